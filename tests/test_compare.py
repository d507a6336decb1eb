"""Numbers compared: whatever a reader sees and someone changed, the comparison has to notice.

Notebooks are corrupted in one place at a time and compared without being run; one real nbval run of a tiny notebook
proves that pytest does the same.
"""

import base64
import copy
import html
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from noise2tokens.display import check_text, table_text
from tools import execute, inputs
from tools.compare import META, differences, faults

CHAPTER = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A tiny chapter

One sentence.

```{code-cell} ipython3
:tags: [setup, nbval-ignore-output]

import noise2tokens
```

```{code-cell} ipython3
:tags: [parameters]

scale = "small"
seed = 0
```

```{code-cell} ipython3
import matplotlib.pyplot as plt
from noise2tokens.display import animate, check, glue, table
from noise2tokens.ledger import Ledger
```

## The problem

```{code-cell} ipython3
print("three lines")
check("the flow inverts", 3.1e-15, at_most=1e-12)
check("most are found", 0.91, at_least=0.8, tolerance=0.05)
check("it is so", True)
```

```{code-cell} ipython3
glue("number", 1.234)
glue("noisy", 12.0, tolerance=5.0)
table({"real": {"distance": 0.5, "steps": 10}, "fake": {"distance": 2.25, "why": "blur"}})
```

```{code-cell} ipython3
---
tags: [opening]
mystnb:
  image:
    alt: "A line that rises from 1 to 2."
  figure:
    caption: "Two points and 1 line."
---
figure, ax = plt.subplots(figsize=(3, 2))
_ = ax.plot([1, 2])
```

```{code-cell} ipython3
animate(lambda i, figure: None, 2, alt="nothing", captions=["loss 0.5", "loss 0.25"], figsize=(2, 2))
```

```{code-cell} ipython3
ledger = Ledger("part1_tiny")
_ = ledger.row("likelihood (nats)", paper=1.5, source="Table 1", ours=1.52, tolerance=0.1)
ledger.show()
```

```{code-cell} ipython3
:tags: [nbval-ignore-output]

import time
print(time.time())
```

We measured {glue:text}`number:.2f`.
"""


@pytest.fixture(scope="module")
def book(root, tmp_path_factory) -> Path:
    """A repository with one tiny chapter, executed."""
    folder = tmp_path_factory.mktemp("book")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(root / "src", folder / "src", ignore=ignored)
    shutil.copy(root / inputs.LOCK.name, folder)
    (folder / "chapters").mkdir()
    (folder / "chapters" / "part1_tiny.md").write_text(CHAPTER)
    execute.make(
        "part1_tiny", folder / "book" / "part1_tiny.ipynb", {"scale": "small"}, root=folder
    )
    return folder


@pytest.fixture(scope="module")
def tiny(book):
    return nbformat.read(book / "book" / "part1_tiny.ipynb", as_version=4)


def cells(notebook):
    """The code cells that are compared."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and "nbval-ignore-output" not in cell.metadata.get("tags", [])
    ]


def complaints(stored, fresh, chapter: str, root: Path) -> list[str]:
    """What the nbval pass says of a stored notebook, were a run to put out what `fresh` holds."""
    found = faults(stored, chapter, root)
    for old, new in zip(cells(stored), cells(fresh), strict=True):
        found += differences(new.outputs, old.outputs)
    return found


def outputs(notebook, kind: str):
    """The outputs that carry a kind of measurement, of the cells that are compared."""
    return [
        output
        for cell in cells(notebook)
        for output in cell.outputs
        if kind in output.get("metadata", {}).get(META, {})
    ]


def bounded_check(notebook):
    """The first check of a number, with its record."""
    for output in outputs(notebook, "check"):
        record = output.metadata[META]["check"]
        if isinstance(record["value"], float) and abs(record["value"]) > 1e-3:
            return output, record
    return None, None


def say(output, record) -> None:
    """Let a check show what its record says, so that nothing but the record has changed."""
    text = check_text(record)
    output.data["text/plain"] = text
    output.data["text/html"] = f'<div class="n2t-check">{html.escape(text, quote=False)}</div>'


def a_glued_number(notebook, text) -> bool:
    """Not rounded away: the sentence, too, is made to say the new number."""
    quoted = set(name for name, _ in execute.GLUE.findall(text))
    for output in outputs(notebook, "glue"):
        for name, value in output.metadata[META]["glue"].items():
            stated = output.metadata[META].get("tolerance", {}).get(name, 0)
            output.metadata[META]["glue"][name] = value + abs(value) / 2 + 2 * stated + 1e-3
            for cell in notebook.cells if name in quoted else []:
                if cell.cell_type == "markdown" and f"{value:.2f}" in cell.source:
                    new = format(output.metadata[META]["glue"][name], ".2f")
                    cell.source = cell.source.replace(f"{value:.2f}", new)
            return True
    return False


def a_digit_in_the_prose(notebook, text) -> bool:
    glued = {
        name: value
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for name, value in output.get("metadata", {}).get(META, {}).get("glue", {}).items()
    }
    for match in execute.GLUE.finditer(text):
        quoted = execute._quote("", match, glued)
        for cell in notebook.cells:
            if cell.cell_type == "markdown" and quoted in cell.source:
                digit = next(c for c in reversed(quoted) if c.isdigit())
                i = cell.source.index(quoted) + quoted.rindex(digit)
                cell.source = cell.source[:i] + str((int(digit) + 1) % 10) + cell.source[i + 1 :]
                return True
    return False


def a_checked_value(notebook, text) -> bool:
    """Far from what was measured, though within the bounds, and shown."""
    output, record = bounded_check(notebook)
    if output is None:
        return False
    far = abs(record["value"]) + 3 * record.get("tolerance", 0) + 1
    record["value"] -= far if "at_most" in record else -far
    if "at_least" in record:
        record.pop("at_most", None)
    say(output, record)
    return True


def a_digit_of_a_check(notebook, text) -> bool:
    output, _ = bounded_check(notebook)
    if output is None:
        return False
    claim = output.metadata[META]["check"]["claim"]
    head, tail = f"✓ {claim}", output.data["text/plain"].removeprefix(f"✓ {claim}")
    digit = next(c for c in tail if c.isdigit())
    output.data["text/plain"] = head + tail.replace(digit, str((int(digit) + 1) % 10), 1)
    return True


def a_digit_of_a_check_on_the_page(notebook, text) -> bool:
    output, _ = bounded_check(notebook)
    if output is None:
        return False
    page = output.data["text/html"]
    i = max(i for i, c in enumerate(page) if c.isdigit())
    output.data["text/html"] = page[:i] + str((int(page[i]) + 1) % 10) + page[i + 1 :]
    return True


def a_bound(notebook, text) -> bool:
    output, record = bounded_check(notebook)
    if output is None:
        return False
    name = "at_most" if "at_most" in record else "at_least"
    record[name] += 1 if name == "at_most" else -1
    say(output, record)
    return True


def a_tolerance(notebook, text) -> bool:
    output, record = bounded_check(notebook)
    if output is None:
        return False
    record["tolerance"] = 1e9
    return True


def a_verdict(notebook, text) -> bool:
    for output in outputs(notebook, "check"):
        output.data["text/plain"] = output.data["text/plain"].replace("✓", "✗")
        return True
    return False


def a_claim(notebook, text) -> bool:
    for output in outputs(notebook, "check"):
        output.metadata[META]["check"]["claim"] += ", and how"
        say(output, output.metadata[META]["check"])
        return True
    return False


def a_verdict_in_the_ledger(notebook, text) -> bool:
    for output in outputs(notebook, "ledger"):
        row = output.metadata[META]["ledger"][0]
        row["verdict"] = "differs" if row["verdict"] == "reproduced" else "reproduced"
        return True
    return False


def a_number_in_the_ledger(notebook, text) -> bool:
    for output in outputs(notebook, "ledger"):
        for row in output.metadata[META]["ledger"]:
            if row["ours"] is not None:
                row["ours"] += 3 * row["tolerance"] + 1
                return True
    return False


def a_digit_on_the_ledgers_page(notebook, text) -> bool:
    for output in outputs(notebook, "ledger"):
        page = output.data["text/markdown"]
        i = max(i for i, c in enumerate(page) if c.isdigit())
        output.data["text/markdown"] = page[:i] + str((int(page[i]) + 1) % 10) + page[i + 1 :]
        return True
    return False


def a_number_in_a_table(notebook, text) -> bool:
    """Changed in what is kept and in what is shown."""
    for output in outputs(notebook, "table"):
        record = output.metadata[META]["table"]
        for row in record["cells"][1:]:
            for i, value in enumerate(row):
                if i and isinstance(value, float):
                    row[i] = 2 * value + 3 * (record["tolerance"][i - 1] or 0) + 1
                    output.data["text/markdown"] = table_text(record)
                    return True
    return False


def a_digit_of_a_table(notebook, text) -> bool:
    for output in outputs(notebook, "table"):
        page = output.data["text/markdown"]
        i = max(i for i, c in enumerate(page) if c.isdigit())
        output.data["text/markdown"] = page[:i] + str((int(page[i]) + 1) % 10) + page[i + 1 :]
        return True
    return False


def a_missing_figure(notebook, text) -> bool:
    for cell in cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                del output.data["image/png"]
                return True
    return False


def a_figure_of_another_size(notebook, text) -> bool:
    for cell in cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                buffer = io.BytesIO()
                picture.resize((picture.width, picture.height * 5 // 4)).save(buffer, "png")
                output.data["image/png"] = base64.b64encode(buffer.getvalue()).decode()
                return True
    return False


def a_missing_animation(notebook, text) -> bool:
    for cell in cells(notebook):
        for output in cell.outputs:
            if 'class="n2t-player"' in output.get("data", {}).get("text/html", ""):
                cell.outputs.remove(output)
                return True
    return False


def an_animation_with_fewer_pictures(notebook, text) -> bool:
    for cell in cells(notebook):
        for output in cell.outputs:
            page = output.get("data", {}).get("text/html", "")
            if 'class="n2t-player"' in page:
                i = page.rindex("data:image")
                output.data["text/html"] = page[:i] + page[page.index('"', i) :]
                return True
    return False


def a_printed_line(notebook, text) -> bool:
    for cell in cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text += "!"
                return True
    return False


def a_caption(notebook, text) -> bool:
    for cell in cells(notebook):
        if "figure" in cell.metadata.get("mystnb", {}):
            cell.metadata.mystnb.figure.caption += " And more."
            return True
    return False


def a_sentence(notebook, text) -> bool:
    cell = [cell for cell in notebook.cells if cell.cell_type == "markdown"][-1]
    cell.source += " And more."
    return True


CORRUPTIONS = [
    a_glued_number,
    a_digit_in_the_prose,
    a_checked_value,
    a_digit_of_a_check,
    a_digit_of_a_check_on_the_page,
    a_bound,
    a_tolerance,
    a_verdict,
    a_claim,
    a_verdict_in_the_ledger,
    a_number_in_the_ledger,
    a_digit_on_the_ledgers_page,
    a_number_in_a_table,
    a_digit_of_a_table,
    a_missing_figure,
    a_figure_of_another_size,
    a_missing_animation,
    an_animation_with_fewer_pictures,
    a_printed_line,
    a_caption,
    a_sentence,
]
# What every chapter has; the rest is corrupted where it is found.
EVERYWHERE = {
    a_glued_number,
    a_digit_in_the_prose,
    a_bound,
    a_claim,
    a_missing_figure,
    a_caption,
    a_sentence,
}


@pytest.mark.slow
def test_an_unchanged_notebook_passes(tiny, book):
    assert complaints(tiny, copy.deepcopy(tiny), "part1_tiny", book) == []


@pytest.mark.slow
@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_a_corrupted_notebook_does_not(corrupt, tiny, book):
    stored = copy.deepcopy(tiny)
    assert corrupt(stored, CHAPTER)
    assert complaints(stored, tiny, "part1_tiny", book)


@pytest.mark.slow
def test_a_run_may_differ_by_the_tolerance_and_no_more(tiny, book):
    def another_run(kind, change):
        fresh = copy.deepcopy(tiny)
        for output in outputs(fresh, kind):
            change(output.metadata[META][kind])
        return complaints(tiny, fresh, "part1_tiny", book)

    def check(index, value):
        values = iter(range(3))
        return lambda record: record.update(value=value) if next(values) == index else None

    assert another_run("check", check(0, 9e-13)) == []
    assert another_run("check", check(0, 2e-6)) != []
    assert another_run("check", check(1, 0.955)) == []
    assert another_run("check", check(1, 0.965)) != []
    assert another_run("check", check(2, False)) != []

    def glued(name, value):
        return lambda record: record.update({name: value}) if name in record else None

    assert another_run("glue", glued("number", 1.234 * 1.09)) == []
    assert another_run("glue", glued("number", 1.234 * 1.11)) != []
    assert another_run("glue", glued("noisy", 16.9)) == []
    assert another_run("glue", glued("noisy", 17.1)) != []

    def cell(row, column, value):
        return lambda record: record["cells"][row].__setitem__(column, value)

    assert another_run("table", cell(1, 1, 0.54)) == []
    assert another_run("table", cell(1, 1, 0.56)) != []
    assert another_run("table", cell(2, 3, "noise")) != []

    def ours(value):
        return lambda rows: rows[0].update(ours=value)

    assert another_run("ledger", ours(1.61)) == []
    assert another_run("ledger", ours(1.63)) != []


def measured(kind: str, value, tolerance) -> list:
    """The outputs of a cell that measures one number."""
    record = {
        "check": {"check": {"claim": "c", "value": value, "at_most": 10} | tolerance},
        "glue": {"glue": {"n": value}} | ({"tolerance": {"n": 0.0}} if tolerance else {}),
        "table": {"table": {"cells": [["", "x"], ["r", value]], "digits": [3], "caption": None}
                  | {"tolerance": [tolerance.get("tolerance")]}},
    }  # fmt: skip
    metadata = {META: record[kind]}
    return [nbformat.v4.new_output("display_data", data={}, metadata=metadata)]


@pytest.mark.parametrize(
    "kind, stored, fresh, tolerance, same",
    [
        ("check", 1.0, 1.2, {}, True),
        ("check", 1.0, 1.21, {}, False),
        ("check", 1.0, 0.79, {}, False),
        ("check", -1.0, -1.19, {}, True),
        ("check", -1.0, 1.0, {}, False),
        ("check", 0.0, 9e-7, {}, True),
        ("check", 0.0, 2e-6, {}, False),
        ("check", 1.0, "inf", {}, False),
        ("check", "inf", "inf", {}, True),
        ("check", True, 1.0, {}, False),
        ("check", 1, 1.0, {}, True),
        ("glue", 1.0, 1.09, {}, True),
        ("glue", 1.0, 1.11, {}, False),
        ("table", 1.0, 1.09, {}, True),
        ("table", 1.0, 1.11, {}, False),
        ("table", 1.0, "no", {}, False),
        *((kind, 1.0, 1.0, {"tolerance": 0.0}, True) for kind in ("check", "glue", "table")),
        *(
            (kind, 1.0, 1.0 + 1e-9, {"tolerance": 0.0}, False)
            for kind in ("check", "glue", "table")
        ),
    ],
)
def test_numbers_are_compared_within_the_tolerance(kind, stored, fresh, tolerance, same):
    found = differences(measured(kind, fresh, tolerance), measured(kind, stored, tolerance))
    assert (found == []) == same, found


@pytest.mark.slow
def test_a_player_is_held_to_its_words_and_not_to_their_numbers(tiny, book):
    fresh = copy.deepcopy(tiny)
    (output,) = (
        output
        for cell in cells(fresh)
        for output in cell.outputs
        if "n2t-player" in output.get("data", {}).get("text/html", "")
    )
    page = output.data["text/html"]
    output.data["text/html"] = page.replace("loss 0.25", "loss 0.26")
    assert page != output.data["text/html"] and complaints(tiny, fresh, "part1_tiny", book) == []
    output.data["text/html"] = page.replace("loss 0.25", "gain 0.25")
    assert complaints(tiny, fresh, "part1_tiny", book) != []


@pytest.mark.slow
def test_a_name_glued_twice_and_a_check_that_does_not_hold_are_found(tiny):
    twice = copy.deepcopy(tiny)
    cell = next(cell for cell in twice.cells if "glue(" in cell.source)
    cell.outputs.append(copy.deepcopy(cell.outputs[0]))
    assert faults(twice) == ["number is glued twice"]
    broken = copy.deepcopy(tiny)
    record = outputs(broken, "check")[0]
    record.metadata[META]["check"]["value"] = 2e-12
    say(record, record.metadata[META]["check"])
    assert "does not hold" in faults(broken)[0]


@pytest.mark.parametrize("chapter", inputs.chapters())
def test_every_chapter_is_held_to_its_numbers(chapter, root):
    """Corrupt the book's own notebooks in every way that applies, and see each found."""
    stored = nbformat.read(root / "book" / f"{chapter}.ipynb", as_version=4)
    text = (root / "chapters" / f"{chapter}.md").read_text()
    assert complaints(stored, stored, chapter, root) == []
    for corrupt in CORRUPTIONS:
        corrupted = copy.deepcopy(stored)
        applies = corrupt(corrupted, text)
        assert applies or corrupt not in EVERYWHERE, f"{chapter} has no {corrupt.__name__}"
        assert not applies or complaints(corrupted, stored, chapter, root), corrupt.__name__


@pytest.mark.slow
def test_pytest_does_the_same(tiny, book, root):
    """One real run: a good notebook passes, bad ones fail where they are bad, and nothing is left behind."""
    corrupted = {
        "part2_glue": (a_glued_number, "Cell 4"),
        "part3_prose": (a_digit_in_the_prose, "page"),
        "part4_check": (a_checked_value, "Cell 3"),
    }
    for name, (corrupt, _) in corrupted.items():
        stored = copy.deepcopy(tiny)
        corrupt(stored, CHAPTER)
        nbformat.write(stored, book / "book" / f"{name}.ipynb")
        shutil.copy(book / "chapters" / "part1_tiny.md", book / "chapters" / f"{name}.md")
    # A set-up cell that has something to say where the package is, and a run that leaves a file.
    untidy = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("print('installing')", metadata={"tags": ["setup"]}),
            nbformat.v4.new_code_cell("open('left', 'w').close()"),
        ]
    )
    nbformat.write(untidy, book / "book" / "part5_untidy.ipynb")
    shutil.copy(root / "conftest.py", book)
    before = {path: path.read_bytes() for path in (book / "book").iterdir()}
    words = ["--nbval", "-rA", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", "book"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        capture_output=True,
        text=True,
        cwd=book,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    failed = set(re.findall(r"FAILED book/(\w+)\.ipynb::(.+?) - ", run.stdout))
    wanted = {(name, where) for name, (_, where) in corrupted.items()}
    assert failed == wanted | {("part5_untidy", "Cell 0"), ("part5_untidy", "files")}, run.stdout
    assert run.returncode == 1 and "43 passed" in run.stdout
    assert {path: path.read_bytes() for path in (book / "book").iterdir()} == before
