"""What the build adds to a chapter's text."""

import base64
import copy

import nbformat
import pytest

from tools import page, site

CHAPTERS = ["01_one", "02_two", "03_three", "05_five", "part1_synthesis"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("See chapter 2.", "See [chapter 2](02_two.ipynb)."),
        ("Chapter 5 has it", "[Chapter 5](05_five.ipynb) has it"),
        (
            "chapters 1, 2 and 5",
            "chapters [1](01_one.ipynb), [2](02_two.ipynb) and [5](05_five.ipynb)",
        ),
        ("chapters 1 to 2", "chapters [1](01_one.ipynb) to [2](02_two.ipynb)"),
        ("chapter 2 and 3 more", "[chapter 2](02_two.ipynb) and 3 more"),
        ("chapter 4 is to come, chapter 3 is this", "chapter 4 is to come, chapter 3 is this"),
        ("in `chapter 2` and $chapter 2$", "in `chapter 2` and $chapter 2$"),
        ("# chapter 2\n\nchapter 2", "# chapter 2\n\n[chapter 2](02_two.ipynb)"),
        ("[chapter 2](elsewhere)", "[chapter 2](elsewhere)"),
        ("```\nchapter 2\n```", "```\nchapter 2\n```"),
        ("chapters", "chapters"),
        ("the chapter 22 pages long", "the chapter 22 pages long"),
    ],
)
def test_chapters_become_links_where_they_may(text, expected):
    assert page.link_chapters(text, "03_three", CHAPTERS) == expected
    assert page.link_chapters(expected, "03_three", CHAPTERS) == expected, "not twice"


def test_exercises_are_numbered_through_the_chapter():
    text = (
        ":::{exercise-start} Why\n:label: ex-a\n:::\n\n:::{exercise-start} How\n:label: ex-b\n:::"
    )
    numbered, count = page.number_exercises(text, 6, 1)
    assert count == 3
    assert numbered.startswith(":::{exercise-start} 6.2 Why\n:label: ex-a\n:nonumber:\n:::")
    assert ":::{exercise-start} 6.3 How\n:label: ex-b\n:nonumber:\n:::" in numbered


def notebook(opening_output, **options):
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("# A title\n\nOne sentence, see chapter 2."),
        new.new_markdown_cell("By the end you can:\n\n- a"),
        new.new_code_cell("try:\n    import x", metadata={"tags": ["setup", "hide-cell"]}),
        new.new_code_cell('scale = "small"', metadata={"tags": ["parameters"]}),
        new.new_code_cell("import math\n\nuse_style()"),
        new.new_code_cell("x = 1"),
        new.new_code_cell("show_source(f)"),
        new.new_code_cell("show_source(f)\nprint(1)"),
        new.new_code_cell("plot()", metadata={"tags": ["opening"], **options}),
    ]
    cells[-1].outputs = [opening_output]
    return new.new_notebook(cells=cells)


FIGURE = {"mystnb": {"image": {"alt": "A [line] goes up."}, "figure": {"caption": "It *rises*."}}}
PNG = nbformat.v4.new_output("display_data", data={"image/png": "AAAA\n"})
FRAMES = '<figure class="n2t-player"><img alt="a &amp; b" src="data:image/webp;base64,AA">\n\n'
FRAMES += '<script>["data:image/webp;base64,AA", "data:image/webp;base64,BB"]</script></figure>'
PLAYER = nbformat.v4.new_output("display_data", data={"text/html": FRAMES})


def test_the_first_screen_of_a_figure():
    made = notebook(PNG, **FIGURE)
    page.assemble(made, "03_three", "CARD", CHAPTERS)
    sources = [cell.source for cell in made.cells]
    assert sources[0].startswith("# 3. A title") and "[chapter 2](02_two.ipynb)" in sources[0]
    assert sources[1] == "![A (line) goes up.](data:image/png;base64,AAAA)\n\n*It rises.*"
    assert sources[2].startswith("By the end") and sources[3] == "CARD"
    assert made.cells[-1].metadata["mystnb"]["figure"]["caption"] == "**Figure 3.1.** It *rises*."
    tags = [cell.metadata.get("tags", []) for cell in made.cells[4:]]
    assert tags == [
        ["setup", "hide-cell", "preamble"],
        ["parameters", "hide-input", "preamble"],
        ["hide-input", "preamble"],
        [],
        ["remove-input"],
        [],
        ["opening", "hide-input"],
    ]
    assert [bool(cell.metadata.get("jupyter")) for cell in made.cells[4:]] == [1, 1, 1, 0, 1, 0, 1]


def test_an_animation_opens_with_its_last_frame_and_lives_on_the_site():
    made = notebook(PLAYER)
    page.assemble(made, "03_three", "CARD", CHAPTERS)
    assert made.cells[1].source.startswith("![a & b](data:image/webp;base64,BB)")
    page.alive(made)
    assert made.cells[1].source == FRAMES.replace("\n\n", "\n")
    still = notebook(PNG, **FIGURE)
    page.assemble(still, "03_three", "CARD", CHAPTERS)
    before = copy.deepcopy(still)
    page.alive(still)
    assert still == before


def test_a_synthesis_has_no_number():
    made = notebook(PNG, **FIGURE)
    page.assemble(made, "part1_synthesis", "CARD", CHAPTERS)
    assert made.cells[0].source.startswith("# A title")
    assert made.cells[-1].metadata["mystnb"]["figure"]["caption"] == "It *rises*."


def test_the_card_is_one_line():
    assert (
        page.card({"Builds on": "a", "runs in": "b"})
        == '<small class="n2t-card">Builds on a · runs in b</small>'
    )


def test_a_cell_that_computes_is_not_folded_for_its_first_line():
    assert page._imports_only("import torch\nfrom a import b\n\nb()")
    assert not page._imports_only("import torch\nx = torch.ones(3)")
    assert not page._imports_only("x = 1") and not page._imports_only("")


def test_a_finished_page_has_its_pictures_once_as_files_and_numbers_before_titles(tmp_path):
    (tmp_path / "book").mkdir()
    data = base64.b64encode(b"a picture").decode()
    source = f'<img src="data:image/webp;base64,{data}"><script>["data:image/webp;base64,{data}"]'
    source += "</script><p>Exercise (6.1 Where (and why))</p><p>Exercise (yours)</p>"
    done = site.finish(source, tmp_path / "_images")
    (picture,) = (tmp_path / "_images").iterdir()
    assert picture.read_bytes() == b"a picture" and done.count(f"../_images/{picture.name}") == 2
    assert "data:image" not in done and picture.suffix == ".webp"
    assert "<p>Exercise 6.1 (Where (and why))</p><p>Exercise (yours)</p>" in done
    assert site.finish(done, tmp_path / "_images") == done
