"""pytest plugin: nbval compares a fresh run with the stored notebook by its numbers, and the page with both.

nbval alone compares text to the last digit, and looks neither at figures nor at what the text says. The conftest.py of
this repository loads this plugin, so that `pytest --nbval book/` holds every notebook to the following.

A fresh run against what is stored, cell by cell (`differences`; cells tagged nbval-ignore-output stay out):

- checks: claim, bounds and tolerance are the same; the measured value is within the stored tolerance, or where none is
  stated within 20 % or 1e-6, whichever is more;
- glued numbers and numbers in tables: as checks, but within 10 % or 1e-6; names and texts are the same;
- rows of the ledger: our values are within the row's tolerance; everything else, the verdict above all, is the same;
- figures: as many, each as wide and as high within 10 %;
- players and labs: the same words, numbers aside, with as many pictures of the same size within 10 %;
- everything else is the same text.

What is stored against itself (`faults`), in an item called "page" that needs no run: every check holds its bounds, no
name is glued twice, each check and table shows the numbers that were measured, and the text is what
chapters/NN_slug.md becomes with the glued numbers.

Each notebook runs in an empty folder, and an item called "files" proves that it leaves that empty.
"""

import base64
import copy
import difflib
import html
import io
import json
import math
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from nbformat import NotebookNode
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile

META = "noise2tokens"
FLOOR = 1e-6  # rounding errors differ between machines
DEFAULT = {"check": 0.2, "glue": 0.1, "table": 0.1}
SIZE = 0.1
PICTURE = re.compile(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)")
NUMBER = re.compile(r"[-−]?\d+(\.\d+)?(e[-+]?\d+)?", re.I)


def differences(fresh: list[NotebookNode], stored: list[NotebookNode]) -> list[str]:
    """Compare the outputs of a cell's fresh run with the stored ones.

    Args:
        fresh: What the cell put out now.
        stored: What the notebook holds.

    Returns:
        What differs, a line each; empty if the two agree.
    """
    now, then = _by_kind(fresh), _by_kind(stored)
    found = []
    for kind in dict.fromkeys([*then, *now]):
        if len(now[kind]) != len(then[kind]):
            found.append(f"{kind}: {len(then[kind])} stored, {len(now[kind])} in a fresh run")
            continue
        compare = COMPARE.get(kind, _text)
        for new, old in zip(now[kind], then[kind], strict=True):
            found += [f"{kind}: {line}" for line in compare(new, old)]
    return found


def faults(notebook: NotebookNode, chapter: str = "", root: Path | None = None) -> list[str]:
    """Compare what a notebook shows with what it measured, and with the chapter that it was made from.

    Args:
        notebook: The executed notebook.
        chapter: Name of the chapter's file without its ending.
        root: The repository; without it the text is not looked at.

    Returns:
        What is wrong, a line each.
    """
    found, glued = [], set()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            measured = output.get("metadata", {}).get(META, {})
            for name in measured.get("glue", {}):
                found += [f"{name} is glued twice"] if name in glued else []
                glued.add(name)
            found += _faults(measured, output.get("data", {}))
    if root is not None:
        try:
            found += _diff(_texts(regenerated(notebook, chapter, root)), _texts(notebook))
        except Exception as error:
            found.append(f"not what the build makes of chapters/{chapter}.md: {error!r}")
    return found


def regenerated(notebook: NotebookNode, chapter: str, root: Path) -> NotebookNode:
    """Make a notebook's text anew, from the chapter and the outputs that the notebook holds.

    Args:
        notebook: The executed notebook, which stays as it is.
        chapter: Name of the chapter's file without its ending.
        root: The repository.

    Returns:
        What the build would write.
    """
    from tools import execute, inputs

    fresh = inputs.source(chapter, root)
    execute._copy_outputs(copy.deepcopy(notebook), fresh)
    fresh.metadata[META] = copy.deepcopy(notebook.metadata[META])
    execute._finish(chapter, fresh, "small", root)
    return fresh


def _texts(notebook: NotebookNode) -> list[str]:
    """List the lines that a reader sees beside code and outputs: text, captions and what pictures show in words."""
    lines = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            lines += ["", *cell.source.splitlines()]
            if cell.get("attachments"):
                lines.append(json.dumps(cell.attachments, sort_keys=True))
        elif "mystnb" in cell.metadata:
            lines.append(json.dumps(cell.metadata.mystnb, sort_keys=True, ensure_ascii=False))
    return lines


def _diff(wanted: list[str], held: list[str]) -> list[str]:
    return [
        f"{'the notebook says' if line[0] == '+' else 'it should say'}: {line[1:300]}"
        for line in difflib.unified_diff(wanted, held, n=0, lineterm="")
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ][:20]


def _faults(measured: dict[str, Any], data: dict[str, str]) -> list[str]:
    found = []
    if "check" in measured:
        from noise2tokens.display import check_text

        record, text = measured["check"], check_text(measured["check"])
        value = record["value"]
        low, high = record.get("at_least", -math.inf), record.get("at_most", math.inf)
        if not (value if isinstance(value, bool) else low <= float(value) <= high):
            found.append(f"a check that does not hold is stored: {text}")
        if data.get("text/plain") != text or html.escape(text, quote=False) not in data.get(
            "text/html", ""
        ):
            found.append(f"a check shows {data.get('text/plain')!r}, its numbers say {text!r}")
    if "table" in measured:
        from noise2tokens.display import table_text

        wanted = table_text(measured["table"]).splitlines()
        found += [f"a table: {line}" for line in _diff(wanted, data["text/markdown"].splitlines())]
    return found


def _by_kind(outputs: list[NotebookNode]) -> defaultdict[str, list]:
    """Sort a cell's outputs into what is compared in its own way, and text by its kind, in order."""
    found = defaultdict(list)
    for output in outputs:
        if output.output_type == "stream":
            if not found[output.name]:
                found[output.name].append("")
            found[output.name][0] += output.text
            continue
        if output.output_type == "error":
            found["error"].append(f"{output.ename}: {output.evalue}")
            continue
        measured, data = output.get("metadata", {}).get(META, {}), output.data
        kind = next((kind for kind in ("check", "glue", "table", "ledger") if kind in measured), "")
        if kind:
            found[kind].append((measured, data))
        elif 'class="n2t-' in data.get("text/html", ""):
            found["player"].append(data["text/html"])
        else:
            for mime, content in data.items():
                found["figure" if mime == "image/png" else mime].append(content)
    return found


def _near(name: str, new: Any, old: Any, kind: str, tolerance: float | None) -> list[str]:
    """Compare two values: numbers within the tolerance, everything else exactly."""
    if not (_is_number(new) and _is_number(old)):
        same = new == old and _is_number(new) == _is_number(old)
        return [] if same else [f"{name} is {old!r}, and {new!r} in a fresh run"]
    allowed = max(DEFAULT[kind] * abs(old), FLOOR) if tolerance is None else tolerance
    if abs(new - old) <= allowed:
        return []
    return [f"{name} is {old:.7g}, and {new:.7g} in a fresh run, further apart than {allowed:.2g}"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(new: dict, old: dict, besides: set[str]) -> list[str]:
    return [
        f"{key} is {old.get(key)!r}, and {new.get(key)!r} in a fresh run"
        for key in dict.fromkeys([*old, *new])
        if key not in besides and new.get(key) != old.get(key)
    ]


def _check(new: tuple, old: tuple) -> list[str]:
    now, then = new[0]["check"], old[0]["check"]
    return _same(now, then, {"value"}) or _near(
        then["claim"], now["value"], then["value"], "check", then.get("tolerance")
    )


def _glue(new: tuple, old: tuple) -> list[str]:
    now, then = new[0]["glue"], old[0]["glue"]
    found = _same(new[0], old[0], {"glue"})
    if list(now) != list(then):
        return [*found, f"{list(then)} became {list(now)}"]
    tolerances = old[0].get("tolerance", {})
    for name, value in then.items():
        found += _near(name, now[name], value, "glue", tolerances.get(name))
    return found


def _table(new: tuple, old: tuple) -> list[str]:
    now, then = new[0]["table"], old[0]["table"]
    found = _same(now, then, {"cells"})
    shape = [len(row) for row in then["cells"]]
    if found or [len(row) for row in now["cells"]] != shape:
        return found or ["other rows or columns"]
    columns = then["cells"][0]
    for row_now, row_then in zip(now["cells"], then["cells"], strict=True):
        for i, column in enumerate(columns):
            allowed = then["tolerance"][i - 1] if i else None
            found += _near(f"{row_then[0]}, {column}", row_now[i], row_then[i], "table", allowed)
    return found


def _ledger(new: tuple, old: tuple) -> list[str]:
    now, then = new[0]["ledger"], old[0]["ledger"]
    if len(now) != len(then):
        return [f"{len(then)} rows, and {len(now)} in a fresh run"]
    if now == then:
        return _text(new[1]["text/markdown"], old[1]["text/markdown"])
    found = []
    for row_now, row_then in zip(now, then, strict=True):
        found += _same(row_now, row_then, {"ours", "spread"})
        for key in ("ours", "spread"):
            what = f"{row_then['what']}: {key}"
            found += _near(what, row_now.get(key), row_then.get(key), "glue", row_then["tolerance"])
    return found or _words(new[1]["text/markdown"], old[1]["text/markdown"])


def _figure(new: str, old: str) -> list[str]:
    sizes = [_size(picture) for picture in (new, old)]
    if all(abs(a - b) <= SIZE * b for a, b in zip(*sizes, strict=True)):
        return []
    return [f"{sizes[1]} pixels, and {sizes[0]} in a fresh run"]


def _player(new: str, old: str) -> list[str]:
    pictures = [PICTURE.findall(page) for page in (new, old)]
    if len(pictures[0]) != len(pictures[1]):
        return [f"{len(pictures[1])} pictures, and {len(pictures[0])} in a fresh run"]
    for first, second in zip(*pictures, strict=True):
        if found := _figure(first, second):
            return found
    return _words(*(PICTURE.sub("picture", page) for page in (new, old)))


def _size(picture: str) -> tuple[int, int]:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(picture))).size


def _words(new: str, old: str) -> list[str]:
    return _text(NUMBER.sub("#", new), NUMBER.sub("#", old))


def _text(new: Any, old: Any) -> list[str]:
    if new == old:
        return []
    if not (isinstance(new, str) and isinstance(old, str)):
        return [f"{old!r} became {new!r}"]
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), "stored", "fresh", n=0, lineterm=""
    )
    return [line[:200] for line in lines if line[:1] in "+-"][2:22]


COMPARE = {
    "check": _check,
    "glue": _glue,
    "table": _table,
    "ledger": _ledger,
    "figure": _figure,
    "player": _player,
}


# The plugin


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path, parent):
    """Collect a notebook as `Notebook` where nbval would collect it as its own kind of file."""
    nodes = yield
    return [
        Notebook.from_parent(parent, path=file_path) if type(node) is IPyNbFile else node
        for node in nodes
    ]


def pytest_collection_modifyitems(items):
    """Start with the notebook that took longest, so that in the end no core waits for it."""
    items.sort(key=lambda item: -getattr(item.parent, "seconds", 0))


class Notebook(IPyNbFile):
    """A notebook that is run in an empty folder, and compared as this module says."""

    def collect(self):
        cells = list(super().collect())
        yield Page.from_parent(self, name="page")
        for cell in cells:
            yield Cell.from_parent(
                self, name=cell.name, cell_num=cell.cell_num, cell=cell.cell, options=cell.options
            )
        yield Files.from_parent(self, name="files")

    @property
    def seconds(self) -> float:
        return self.nb.metadata.get(META, {}).get("seconds", 0)

    def setup(self):
        # As nbval does, but in a folder of its own.
        self.folder = tempfile.TemporaryDirectory()
        options = self.config.option
        named = self.nb.metadata.get("kernelspec", {}).get("name", "python")
        self.kernel = RunningKernel(
            CURRENT_ENV_KERNEL_NAME
            if options.nbval_current_env
            else options.nbval_kernel_name or named,
            cwd=self.folder.name,
            startup_timeout=options.nbval_kernel_startup_timeout,
        )
        self.setup_sanitize_files()

    def teardown(self):
        super().teardown()
        self.folder.cleanup()


class Cell(IPyNbCell):
    """A cell whose outputs are compared by `differences`."""

    def compare_outputs(self, test, ref, skip_compare=None):
        self.comparison_traceback = differences(test, ref)
        return not self.comparison_traceback

    def runtest(self):
        super().runtest()
        if "setup" in self.cell.metadata.get("tags", []) and self.test_outputs:
            self.raise_cell_error("The package is there, so the set-up cell has nothing to say")


class Whole(pytest.Item):
    """Something that is claimed of a notebook as a whole."""

    def repr_failure(self, excinfo):
        return str(excinfo.value)

    def reportinfo(self):
        return self.path, 0, f"{self.path.name}::{self.name}"


class Page(Whole):
    """What the page shows is what was measured."""

    def runtest(self):
        chapter, root = self.path.stem, self.path.parent.parent
        there = (root / "chapters" / f"{chapter}.md").exists()
        found = faults(self.parent.nb, chapter, root if there else None)
        assert not found, "\n".join(found)


class Files(Whole):
    """A chapter at small scale leaves no files."""

    def runtest(self):
        left = sorted(path.name for path in Path(self.parent.folder.name).iterdir())
        assert not left, f"the run left files: {left}"
