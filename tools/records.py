"""Check that a full-scale run was one: python -m tools.records

Every chapter must have left a notebook, and a record that was measured on CUDA; otherwise the exit status is 1.
"""

import os
import sys
from pathlib import Path

from noise2tokens.ledger import load_record
from tools import inputs


def missing(root: Path = inputs.ROOT) -> list[str]:
    """Say what a full-scale run of the whole book has not left."""
    found = []
    for chapter in inputs.chapters(root):
        if not (root / "_build/full/book" / f"{chapter}.ipynb").exists():
            found.append(f"{chapter}: no executed notebook")
        record = load_record(chapter, "full")
        if record is None:
            found.append(f"{chapter}: no record")
        elif record.versions["CUDA"] == "None" or record.peak_memory_gb == 0:
            found.append(f"{chapter}: CUDA was not used (record from {record.device})")
    return found


if __name__ == "__main__":
    os.environ.setdefault("NOISE2TOKENS_RECORDS", str(inputs.ROOT / "_build/full/records"))
    sys.exit("\n".join(missing()) or None)
