"""Make the text corpus that the package ships: an extract of CPython's standard library.

The library differs from one Python to the next, and results that are compared must not, so everyone
gets the same extract. Run this with the Python whose library is wanted (the shipped one: 3.11.7):

    python3.11 tools/make_corpus.py

It writes `stdlib.txt.gz`, the files one after the other, and `stdlib.json`, which says where they
come from and how long each is. The files are unchanged, and ASCII, so that a character is a byte.
All of them stand under Python's licence alone: tests, the modules that CPython's documentation
lists as incorporated software, and any module whose text names other terms or holders are left out.
"""

import gzip
import hashlib
import json
import platform
import re
import sysconfig
from pathlib import Path

MODULES = """
    argparse bdb bisect calendar cmd collections/__init__ compileall configparser contextlib copy
    csv dataclasses datetime difflib dis enum filecmp fileinput gettext glob graphlib gzip html/parser
    pickle pprint queue random reprlib sched selectors shelve shutil string tempfile threading
    traceback weakref
""".split()
OTHER_TERMS = re.compile(
    r"copyright\s*(\(c\)|\d{4})|public domain|licen[cs]ed? (to|under)|permission (to use|is)",
    re.IGNORECASE,
)
CORPORA = Path(__file__).parents[1] / "src" / "noise2tokens" / "corpora"


def read_module(path: Path) -> str:
    """Return a module's source; refuse it where the text names terms of its own."""
    text = path.read_bytes().decode("ascii")
    if found := OTHER_TERMS.search(text):
        raise ValueError(
            f"{path} may stand under other terms than Python's licence: it says {found[0]!r}"
        )
    return text


def main() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    names = [f"{module}.py" for module in sorted(MODULES)]
    texts = {name: read_module(library / name) for name in names}
    content = "".join(texts.values()).encode("ascii")
    about = {
        "source": f"standard library of CPython {platform.python_version()}",
        "licence": "PSF-2.0",
        "sha256": hashlib.sha256(content).hexdigest(),
        "files": {name: len(text) for name, text in texts.items()},
    }
    CORPORA.mkdir(exist_ok=True)
    (CORPORA / "stdlib.json").write_text(
        json.dumps(about, indent=2) + "\n", encoding="ascii", newline="\n"
    )
    (CORPORA / "stdlib.txt.gz").write_bytes(gzip.compress(content, 9, mtime=0))


if __name__ == "__main__":
    main()
