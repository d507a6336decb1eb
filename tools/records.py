"""Make and keep records of long runs: python -m tools.records run CHAPTER SCALE | keep SCALE | missing SCALE

`run` does a chapter's long or full run without executing its notebook, and leaves the record where the book keeps its
own. `keep` copies there what a run of the whole book at a scale has left. `missing` names what such a run has not left
and fails if there is something; at full scale a record must have been measured on CUDA.
"""

import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from noise2tokens import records
from tools import inputs


def experiment(chapter: str) -> ModuleType:
    """Import the module that holds a chapter's `full_scale` and `BUDGETS`.

    Raises:
        ValueError: If there is no such chapter.
    """
    if chapter not in inputs.chapters():
        raise ValueError(f"no chapter {chapter}; there are {', '.join(inputs.chapters())}")
    name = f"{inputs.PACKAGE}.{chapter if chapter.startswith('part') else chapter[3:]}"
    try:
        return import_module(f"{name}.experiment")
    except ModuleNotFoundError as error:
        if error.name != f"{name}.experiment":
            raise
        return import_module(name)


def run(chapter: str, scale: str) -> records.Record:
    """Run a chapter at long or full scale and put the record among the book's own."""
    module = experiment(chapter)
    if scale not in module.BUDGETS:
        raise ValueError(
            f"{chapter} has no budget for scale {scale!r}, only {', '.join(module.BUDGETS)}"
        )
    os.environ["NOISE2TOKENS_RECORDS"] = str(records.SHIPPED)
    return records.measured(chapter, module.full_scale, module.BUDGETS, scale, seed=0)


def keep(scale: str, root: Path = inputs.ROOT) -> list[Path]:
    """Copy the records that a run of the whole book left to where the book keeps them."""
    found = sorted((root / "_build" / scale / "records").glob("*.json"))
    if not found:
        raise ValueError(f"no run at scale {scale} has left records: make book SCALE={scale}")
    target = root / "src" / inputs.PACKAGE / "recorded"
    target.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(path, target)) for path in found]


def missing(scale: str, root: Path = inputs.ROOT) -> list[str]:
    """Say what a run of the whole book at a scale has not left."""
    found = []
    for chapter in inputs.chapters(root):
        if not (root / "_build" / scale / "book" / f"{chapter}.ipynb").exists():
            found.append(f"{chapter}: no executed notebook")
        if scale not in experiment(chapter).BUDGETS:
            continue
        record = records.load_record(chapter, scale, root / "_build" / scale / "records")
        if record is None:
            found.append(f"{chapter}: no record")
        elif scale == "full" and ("CUDA" not in record.versions or record.peak_memory_gb == 0):
            found.append(f"{chapter}: CUDA was not used (record from {record.device})")
    return found


def main(words: list[str]) -> str | None:
    try:
        match words:
            case ["run", chapter, scale]:
                print(run(chapter, scale).provenance())
            case ["keep", scale]:
                print(*keep(scale), sep="\n")
            case ["missing", scale]:
                return "\n".join(missing(scale)) or None
            case _:
                return __doc__
    except (ValueError, RuntimeError) as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
