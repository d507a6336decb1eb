"""What every chapter must have.

The text in chapters/ is checked against the anatomy that readers are promised, and the executed notebook in book/
against the text. That comparing its outputs can fail is proved in test_compare.py.
"""

import ast
import re

import jupytext
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tools import inputs, new

CHAPTERS = inputs.chapters()
# A synthesis at the end of a part compares chapters; it is free in its form.
numbered = pytest.mark.parametrize("chapter", inputs.numbered(), indirect=True)
SECTIONS = [
    "The problem",
    "The experiment",
    "At long and full scale",
    "Ledger",
    "What goes wrong",
    "Exercises",
    "Summary",
    "References",
]
SETUP = '''try:
    import noise2tokens
except ModuleNotFoundError:  # on Colab: the package at this page's commit; torch stays the one that Colab ships
    import torch

    ref = "main"
    source = f"git+https://github.com/noise-to-tokens/noise-to-tokens@{ref}"
    %pip install --quiet "noise2tokens @ {source}" "torch=={torch.__version__}"'''


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def text_of(output) -> str:
    """What the nbval pass compares word by word: streams, results, and checks and tables with their numbers."""
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data or "glue" in output.get("metadata", {}).get("noise2tokens", {}):
        return ""
    return data.get("text/markdown", data.get("text/plain", ""))


def compared(notebook):
    """The cells whose text a fresh run is held to."""
    return [
        cell
        for cell in code_cells(notebook)
        if not {"nbval-ignore-output", "nbval-skip"} & set(tags(cell))
        and any(text_of(output).strip() for output in cell.outputs)
    ]


@pytest.fixture(params=CHAPTERS)
def chapter(request) -> str:
    return request.param


@pytest.fixture
def text(chapter):
    return inputs.source(chapter)


@pytest.fixture
def executed(chapter, root):
    path = root / "book" / f"{chapter}.ipynb"
    if not path.exists():
        pytest.fail(
            f"there is no book/{path.name} yet: make chapter CHAPTER={chapter}", pytrace=False
        )
    return nbformat.read(path, as_version=4)


def test_there_are_chapters_and_all_are_listed(root):
    """In the table of contents, on the front page, in the import rule; with a module, tests and a slice of its run."""
    assert CHAPTERS
    assert new.unlisted(root) == []


# The text


@numbered
def test_opens_with_title_and_one_sentence_then_objectives(text):
    first = text.cells[0]
    assert first.cell_type == "markdown"
    title, sentence = first.source.split("\n\n")
    assert re.fullmatch(r"# \S.*", title)
    assert sentence.count(".") - sentence.count("e.g.") == 1 or sentence.rstrip().endswith(".")
    before = prose(text).split("## The problem")[0]
    objectives = re.search(r"By the end you can:\n\n((?:- .*\n(?:  .*\n)*)+)", before + "\n")
    assert objectives, "the objectives are missing"
    assert 3 <= objectives.group(1).count("\n- ") + 1 <= 5


@numbered
def test_has_the_sections_in_order(text):
    headings = re.findall(r"^## (.+)$", prose(text), re.M)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    assert headings[0] == "The problem" and headings[-1] == "References"
    derivation = headings[1 : headings.index("The experiment")]
    assert len(derivation) >= 2, "where is the derivation?"


def test_setup_and_parameters_come_first(text):
    setup, parameters = code_cells(text)[:2]
    assert setup.source == SETUP and tags(setup) == ["setup", "hide-cell", "nbval-ignore-output"]
    assert parameters.source == 'scale = "small"\nseed = 0' and tags(parameters) == ["parameters"]


def test_nothing_is_left_open(chapter, root):
    """`make new` writes TODO wherever something is to be filled in: in the text, the module and its tests."""
    paths = [root / "chapters" / f"{chapter}.md", *inputs.room(chapter, root)]
    paths.append(root / "book" / "index.md")
    left = [
        f"{path.relative_to(root)}, line {number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "TODO" in line and (path.stem != "index" or chapter in line)
    ]
    if left:
        pytest.fail("left open:\n" + "\n".join(left), pytrace=False)


def test_long_runs_and_ledger_go_by_the_chapters_own_name(chapter, text):
    """Under a wrong name the page would show another chapter's record."""
    run = f'record = measured("{chapter}", full_scale, BUDGETS, scale, seed)\nshow_record(record)'
    cells = [cell for cell in text.cells if cell.cell_type == "code" and "measured(" in cell.source]
    assert [cell.source[: len(run)] for cell in cells] == [run]
    named = [
        name for source in inputs.code(text) for name in re.findall(r"Ledger\((.*?)\)", source)
    ]
    if chapter[:2].isdigit():
        assert named == [f'"{chapter}"']
        before = "\n".join(
            cell.source
            for cell in text.cells[: text.cells.index(cells[0])]
            if cell.cell_type == "markdown"
        )
        assert re.findall(r"^## (.+)$", before, re.M)[-1] == "At long and full scale"


@numbered
def test_a_figure_or_failing_attempt_comes_before_any_displayed_formula(text):
    problem = False
    for cell in text.cells:
        if cell.cell_type == "markdown":
            problem = problem or "## The problem" in cell.source
            assert not (problem and "$$" in cell.source), (
                "a formula comes before the first code of the problem"
            )
        elif problem:
            return
    pytest.fail("the problem shows nothing")


def test_every_figure_has_alt_text_and_caption(text, executed):
    drawn = [
        cell
        for cell in code_cells(executed)
        if any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]
    assert drawn
    for cell in drawn:
        options = cell.metadata.get("mystnb", {})
        alt = options.get("image", {}).get("alt", "")
        assert len(alt.split()) >= 5 and not re.search(r"\.(png|svg|webp)", alt), cell.source[:80]
        assert options.get("figure", {}).get("caption", "").strip(), cell.source[:80]


@numbered
def test_exercises_have_solutions_and_some_are_executed(text):
    words = prose(text)
    exercises = re.findall(r"exercise-start\}[^\n]*\n:label: (\S+)", words)
    solutions = re.findall(r"solution-start\} (\S+)\n:class: dropdown", words)
    assert 3 <= len(exercises) <= 5 and exercises == solutions
    inside, executed = False, 0
    for cell in text.cells:
        if cell.cell_type == "markdown":
            gates = re.findall(r"\{(solution-start|solution-end)\}", cell.source)
            inside = gates[-1] == "solution-start" if gates else inside
        else:
            executed += inside
    assert executed >= 1


def test_code_cells_are_short(text):
    lengths = sorted(
        len(cell.source.splitlines()) for cell in code_cells(text) if "setup" not in tags(cell)
    )
    assert lengths[len(lengths) // 2] <= 8, lengths
    assert lengths[int(len(lengths) * 0.9)] <= 25, lengths
    assert lengths[-1] <= 40, lengths
    wide = [
        line for cell in code_cells(text) for line in cell.source.splitlines() if len(line) > 100
    ]
    assert [line for line in wide if line not in SETUP] == []


def test_no_cell_ends_in_a_semicolon(text):
    """nbval runs cells without history, where IPython does not see it: the value would come back as a mismatch."""
    assert [cell for cell in inputs.code(text) if cell.rstrip().endswith(";")] == []


def test_defines_no_model_and_no_algorithm(text):
    for cell in code_cells(text):
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(cell.source))):
            assert not isinstance(node, ast.ClassDef), f"class {node.name} belongs into the package"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 10, f"{node.name} belongs into the package"


@numbered
def test_imports_its_own_module(chapter, text):
    assert any(name.startswith(f"noise2tokens.{chapter[3:]}") for name in inputs.imported(text))


@numbered
def test_citations_and_labels(text, root):
    words = prose(text)
    cited = set(re.findall(r"\{footcite:[tp]+\}`([^`]+)`", words))
    known = set(re.findall(r"^@\w+\{(\S+),", (root / "book/references.bib").read_text(), re.M))
    assert cited and {key.strip() for keys in cited for key in keys.split(",")} <= known
    labels = re.findall(r"^\$\$ \((\S+)\)$", words, re.M)
    assert len(labels) == len(set(labels)) >= 5
    assert set(re.findall(r"\{eq\}`([^`]+)`", words)) <= set(labels)


def test_says_no_hype(text):
    found = re.findall(
        r"\b(simply|obviously|clearly|trivially|of course|game.chang\w+)\b", prose(text), re.I
    )
    assert found == []


def test_text_survives_the_round_trip_through_jupytext(chapter, root):
    written = (root / "chapters" / f"{chapter}.md").read_text()
    notebook = jupytext.reads(written, fmt="md:myst")
    again = jupytext.reads(jupytext.writes(notebook, fmt="md:myst"), fmt="md:myst")
    assert [(c.cell_type, c.source, c.metadata) for c in again.cells] == [
        (c.cell_type, c.source, c.metadata) for c in notebook.cells
    ]


# The executed notebook


def test_notebook_was_made_from_this_text_and_these_modules(chapter, text, executed):
    """That its words are those of the text, with the measured numbers, is compared in the nbval pass."""
    assert [cell.source for cell in code_cells(executed)] == inputs.code(text)
    assert executed.metadata["noise2tokens"]["digest"] == inputs.digest(chapter, "small"), (
        "stale: run make book; if it finds nothing to do, delete the notebook first"
    )


def test_notebook_ran_from_top_to_bottom_without_error(executed):
    assert [cell.execution_count for cell in code_cells(executed)] == list(
        range(1, len(code_cells(executed)) + 1)
    )
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs), (
        "warnings or progress bars were stored"
    )


def test_no_cell_shows_the_insides_of_an_object(executed):
    """The value of a last line is shown: a training curve or a ledger's row is not for reading. Say `_ = ...`."""
    shown = [
        output.data["text/plain"]
        for cell in code_cells(executed)
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    assert [text[:60] for text in shown if re.match(r"\w+\(\w+=", text)] == []


def test_notebook_holds_no_time_stamps_and_no_unresolved_number(executed):
    assert "papermill" not in executed.metadata
    assert not any({"papermill", "execution"} & set(cell.metadata) for cell in executed.cells)
    assert "{glue:text}" not in prose(executed)


def test_the_first_screen(chapter, executed):
    """Title and sentence, a picture, objectives, a line of facts, and then what only a run needs, folded."""
    first = executed.cells[0].source.splitlines()[0]
    assert first.startswith(f"# {int(chapter[:2])}. " if chapter[:2].isdigit() else "# ")
    made = [cell for cell in executed.cells if any(t.startswith("header-") for t in tags(cell))]
    assert [tags(cell) for cell in made] == [["header-opening"], ["header-card"]]
    picture, card = made
    assert executed.cells[1] is picture
    alt = re.match(r"!\[(.+)\]\(data:image/(png|webp);base64,", picture.source)
    assert alt and len(alt.group(1).split()) >= 5
    for needed in ("Builds on", "runs in", "measured longer", "torch 2."):
        assert needed in card.source
    before = executed.cells[: executed.cells.index(card)]
    assert all(cell.cell_type == "markdown" for cell in before)
    assert "By the end you can:" in before[-1].source or not chapter[:2].isdigit()
    preamble = [cell for cell in code_cells(executed) if "preamble" in tags(cell)]
    assert len(preamble) >= 3 and preamble == code_cells(executed)[: len(preamble)]
    assert all({"hide-input", "hide-cell"} & set(tags(cell)) for cell in preamble)


def test_one_picture_opens_the_chapter(text):
    """The cell tagged `opening`: a figure, an animation or a lab, which the build also puts under the title."""
    marked = [cell for cell in code_cells(text) if "opening" in tags(cell)]
    assert len(marked) == 1, f"{len(marked)} cells are tagged opening"
    drawn = "figure" in marked[0].metadata.get("mystnb", {})
    assert drawn or re.search(r"^(animate|lab)\(", marked[0].source, re.M), marked[0].source


def test_cells_that_draw_or_show_sources_are_folded(executed):
    for cell in code_cells(executed):
        if "figure" in cell.metadata.get("mystnb", {}):
            assert "hide-input" in tags(cell), cell.source[:80]
        if re.fullmatch(r"show_source\([^()]*\)", cell.source.strip()):
            assert "remove-input" in tags(cell), cell.source[:80]


def test_the_links_above_sources_lead_to_those_lines(executed, root):
    shown = 0
    for cell in code_cells(executed):
        for output in cell.outputs:
            text = output.get("data", {}).get("text/markdown", "")
            for path, first, last, line in re.findall(
                r"^\[`.+?`\]\(\S+/blob/main/(\S+)#L(\d+)-L(\d+)\)\n\n```python\n(.+)\n", text, re.M
            ):
                lines = (root / path).read_text().splitlines()[int(first) - 1 : int(last)]
                assert line.strip() == lines[0].strip() and lines[-1].strip(), path
                shown += 1
    calls = [cell for cell in code_cells(executed) if cell.source.startswith("show_source(")]
    assert shown >= len(calls)


@numbered
def test_figures_and_exercises_have_the_chapters_number(chapter, executed):
    number = int(chapter[:2])
    captions = [
        cell.metadata["mystnb"]["figure"]["caption"]
        for cell in code_cells(executed)
        if "figure" in cell.metadata.get("mystnb", {})
    ]
    expected = [f"**Figure {number}.{i}.** " for i in range(1, len(captions) + 1)]
    assert [c[: len(e)] for c, e in zip(captions, expected, strict=True)] == expected
    found = re.findall(r"exercise-start\} (\S+) ", prose(executed))
    assert found == [f"{number}.{i}" for i in range(1, len(found) + 1)]


def test_notebook_is_small(chapter, root, executed):
    for cell in code_cells(executed):
        for output in cell.outputs:
            picture = output.get("data", {}).get("image/png", "")
            assert len(picture) * 3 / 4 <= 150_000, cell.source[:80]
    assert (root / "book" / f"{chapter}.ipynb").stat().st_size < 4_000_000


@numbered
def test_at_least_eight_cells_are_compared(executed):
    assert len(compared(executed)) >= 8


@numbered
def test_shows_its_ledger(executed):
    rows = [
        row
        for cell in code_cells(executed)
        for output in cell.outputs
        for row in output.get("metadata", {}).get("noise2tokens", {}).get("ledger", [])
    ]
    assert rows and all(row["source"] for row in rows)
