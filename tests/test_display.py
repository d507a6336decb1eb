"""Checks, quoted numbers, sources, grids and animations."""

import json
import math
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from noise2tokens import display
from noise2tokens.display import (
    COLORS,
    INK,
    animate,
    check,
    check_text,
    glue,
    image_grid,
    show_source,
    table,
    table_text,
    use_style,
)


class Sample:
    """A class to show."""

    size = 3

    def double(self, x: int) -> int:
        """Double.

        Args:
            x: A number.
        """

        return 2 * x


@pytest.fixture
def shown(monkeypatch) -> list[tuple]:
    """What is displayed: pairs of (object, options)."""
    calls = []
    monkeypatch.setattr(display, "display", lambda thing, **options: calls.append((thing, options)))
    return calls


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_a_check_shows_claim_measured_value_and_bound(capsys):
    check("the flow inverts", 3.14e-15, at_most=1e-12)
    check("quality", torch.tensor(0.9), at_least=0.5)
    check("between", 3, at_least=2, at_most=4)
    check("nothing is lost", 0.0, at_most=0)
    check("nothing is gained", -0.0123, at_least=-1e-5 * 1e5, at_most=0.0)
    check("many", 12345.6, at_least=np.float32(10.0))
    check("diverges", math.inf, at_least=1e6)
    check("it holds", True)
    check("it holds", torch.tensor(True))
    check("NumPy says so", np.bool_(True))
    check("NumPy counted", np.array([7]), at_most=np.int64(7))
    assert capsys.readouterr().out.splitlines() == [
        "✓ the flow inverts: 3.1e-15, at most 1e-12",
        "✓ quality: 0.900, at least 0.5",
        "✓ between: 3, at least 2 and at most 4",
        "✓ nothing is lost: 0, at most 0",
        "✓ nothing is gained: −0.0123, at least −1 and at most 0",
        "✓ many: 12346, at least 10",
        "✓ diverges: inf, at least 1e6",
        "✓ it holds",
        "✓ it holds",
        "✓ NumPy says so",
        "✓ NumPy counted: 7, at most 7",
    ]


def test_a_check_keeps_what_it_measured_for_the_comparison(shown):
    check("the <error> is small", 0.25, at_most=0.5, tolerance=0.1)
    check("it holds", np.True_)
    check("diverges", math.inf, at_least=1)
    bundles = [thing._repr_mimebundle_() for thing, _ in shown]
    records = [metadata["noise2tokens"]["check"] for _, metadata in bundles]
    assert records == [
        {"claim": "the <error> is small", "value": 0.25, "at_most": 0.5, "tolerance": 0.1},
        {"claim": "it holds", "value": True},
        {"claim": "diverges", "value": "inf", "at_least": 1},
    ]
    assert json.loads(json.dumps(records)) == records
    texts = [data["text/plain"] for data, _ in bundles]
    assert texts == [check_text(record) for record in records]
    assert "&lt;error&gt; is small: 0.250, at most 0.5<" in bundles[0][0]["text/html"]


@pytest.mark.parametrize(
    "value, bounds",
    [
        (2.0, {"at_most": 1.0}),
        (math.nextafter(1.0, 2.0), {"at_most": 1.0}),
        (math.nextafter(1.0, 0.0), {"at_least": 1.0}),
        (5e-324, {"at_most": 0}),
        (0.0, {"at_least": 1.0}),
        (math.nan, {"at_most": 1.0}),
        (math.nan, {"at_least": 0.0}),
        (False, {}),
        (np.False_, {}),
    ],
)
def test_a_check_that_does_not_hold_raises_and_prints_nothing(value, bounds, capsys):
    with pytest.raises(AssertionError, match="the claim.*measured"):
        check("the claim", value, **bounds)
    assert capsys.readouterr().out == ""


def test_bounds_are_inclusive(capsys):
    check("at the upper bound", 1.0, at_most=1.0)
    check("at the lower bound", 1.0, at_least=1.0)
    check("at both", 0, at_least=0, at_most=0)
    assert capsys.readouterr().out.endswith("✓ at both: 0, at least 0 and at most 0\n")


@pytest.mark.parametrize(
    "value, bounds, error",
    [
        (1.0, {}, TypeError),
        (True, {"at_most": 1.0}, TypeError),
        (True, {"tolerance": 0.1}, TypeError),
        (1.0, {"tolerance": 0.1}, TypeError),
        (torch.tensor(1j), {"at_most": 1.0}, TypeError),
        (torch.ones(2), {"at_most": 1.0}, ValueError),
        (np.array([]), {"at_most": 1.0}, ValueError),
        (1.0, {"at_most": math.inf}, ValueError),
        (1.0, {"at_least": math.nan}, ValueError),
        (1.0, {"at_most": True}, ValueError),
        (1.0, {"at_least": 1.0, "at_most": 0.5}, ValueError),
        (1.0, {"at_most": 2.0, "tolerance": -0.1}, ValueError),
        (1.0, {"at_most": 2.0, "tolerance": math.inf}, ValueError),
    ],
)
def test_a_check_that_could_not_fail_as_meant_is_refused(value, bounds, error):
    with pytest.raises(error):
        check("the claim", value, **bounds)


@pytest.mark.parametrize("claim", ["", " ", "two\nlines"])
def test_a_check_claims_something_on_one_line(claim):
    with pytest.raises(ValueError, match="claims something"):
        check(claim, True)


def test_glue_keeps_the_number_in_metadata_only(shown):
    glue("nll", torch.tensor(1.25))
    glue("steps", np.int64(40), tolerance=2)
    (data, options), (_, second) = shown
    assert options == {"raw": True, "metadata": {"noise2tokens": {"glue": {"nll": 1.25}}}}
    assert "1.25" not in json.dumps(data)
    record = {"glue": {"steps": 40}, "tolerance": {"steps": 2}}
    assert second["metadata"] == {"noise2tokens": record}


@pytest.mark.parametrize(
    "name, value, options, error",
    [
        ("nll", math.inf, {}, ValueError),
        ("nll", True, {}, TypeError),
        ("nll", torch.ones(2), {}, ValueError),
        ("two words", 1.0, {}, ValueError),
        ("nll", 1.0, {"tolerance": -1.0}, ValueError),
        ("nll", 1.0, {"tolerance": math.inf}, ValueError),
    ],
)
def test_glue_refuses_what_a_sentence_cannot_quote(name, value, options, error, shown):
    with pytest.raises(error, match=name):
        glue(name, value, **options)
    assert shown == []


def test_two_cells_cannot_glue_one_name_and_a_cell_can_run_again(shown, monkeypatch):
    monkeypatch.setattr(display, "_GLUED", {})
    space = {"__name__": "__main__", "glue": glue}
    first = compile("glue('distance', 1.0)", "first cell", "exec")
    exec(first, space)
    exec(first, space)
    with pytest.raises(ValueError, match="distance has been glued by another cell"):
        exec(compile("glue('distance', 2.0)", "second cell", "exec"), space)
    assert len(shown) == 2


def test_a_table_shows_measured_values(shown):
    table(
        {
            "real $W_2$": {"distance": torch.tensor(0.5), "steps": 1000, "share": np.float64(0.98)},
            "fake|noise": {"distance": -12.345, "why": "blur"},
            "tiny": {"distance": 1.23456e-9, "share": 0, "why": None},
            "large": {"distance": 123456.7},
        },
        digits={"share": 1},
        tolerance={"distance": 0.25},
        caption="Three of them",
    )
    ((thing, options),) = shown
    assert thing.data.splitlines() == [
        "*Three of them*",
        "",
        "|  | distance | steps | share | why |",
        "|---|---:|---:|---:|---|",
        "| real $W_2$ | 0.500 | 1000 | 1.0 | – |",
        "| fake\\|noise | −12.3 | – | – | blur |",
        "| tiny | 1.23e-9 | – | 0 | – |",
        "| large | 123457 | – | – | – |",
    ]
    record = options["metadata"]["noise2tokens"]["table"]
    assert record["cells"][1] == ["real $W_2$", 0.5, 1000, 0.98, "–"]
    assert record["tolerance"] == [0.25, None, None, None] and record["digits"] == [3, 3, 1, 3]
    assert table_text(json.loads(json.dumps(record, sort_keys=True))) == thing.data


@pytest.mark.parametrize(
    "rows, options, error",
    [
        ({}, {}, ValueError),
        ({"row": {}}, {}, ValueError),
        ({"row": {"x": math.nan}}, {}, ValueError),
        ({"row": {"x": math.inf}}, {}, ValueError),
        ({"row": {"x": torch.ones(2)}}, {}, ValueError),
        ({"row": {"x": [1.0]}}, {}, TypeError),
        ({"row": {"x": 1.0}}, {"digits": 0}, ValueError),
        ({"row": {"x": 1.0}}, {"tolerance": -1.0}, ValueError),
        ({"row": {"x": 1.0}}, {"tolerance": {"y": 1.0}}, ValueError),
        ({"row": {"x": 1.0}}, {"digits": {"y": 1}}, ValueError),
    ],
)
def test_a_table_refuses_what_it_could_not_show_or_compare(rows, options, error, shown):
    with pytest.raises(error):
        table(rows, **options)
    assert shown == []


def test_sources_are_shown_with_their_file_and_without_docstrings(shown):
    show_source(image_grid, check)
    text = shown[0][0].data
    assert text.count("`noise2tokens/display.py`") == 2 and text.count("```python\ndef ") == 2
    assert "def image_grid(" in text and "ax.set_axis_off()" in text
    assert "Args:" not in text and '"""' not in text


def test_only_docstrings_are_left_out_of_a_source():
    import inspect

    shown = display._without_docstrings(inspect.getsource(Sample))
    assert shown == (
        "class Sample:\n    size = 3\n\n    def double(self, x: int) -> int:\n        return 2 * x"
    )
    assert (
        display._without_docstrings('def f():\n    """Only this."""')
        == 'def f():\n    """Only this."""'
    )


def test_an_image_grid_puts_pictures_in_reading_order():
    images = torch.arange(5.0)[:, None, None].expand(5, 2, 3)
    canvas = image_grid(images, columns=3).images[0].get_array()
    assert canvas.shape == (2 * 2 + 1, 3 * 3 + 2)
    assert [canvas[0, 0], canvas[0, 4], canvas[0, 8], canvas[3, 0], canvas[3, 4]] == [0, 1, 2, 3, 4]
    assert math.isnan(canvas.data[0, 3]) and math.isnan(canvas.data[3, 8])
    with pytest.raises(ValueError, match="at least one image"):
        image_grid(images[:0], columns=3)


def test_an_animation_holds_its_frames_and_needs_no_network(shown):
    def draw(i, figure):
        figure.subplots().plot([0, i])

    animate(draw, 3, alt='A "rising" line', captions=["first", "second", "a <b>"])
    page = shown[0][0].data
    data = json.loads(
        re.search(r'<script type="application/json">(.*?)</script>', page, re.S).group(1)
    )
    assert len(set(data["pictures"])) == 3 and data["captions"] == ["first", "second", "a <b>"]
    assert 'alt="A &quot;rising&quot; line"' in page and "a &lt;b&gt;" in page
    assert f'<img src="{data["pictures"][-1]}"' in page and "<output>3 / 3</output>" in page
    assert "http" not in page
    assert len(plt.get_fignums()) == 0


@pytest.mark.parametrize("options", [{"alt": " "}, {"frames": 0}, {"captions": ["one"]}])
def test_an_animation_needs_alt_text_frames_and_a_caption_for_each(options):
    with pytest.raises(ValueError, match="alt text"):
        animate(lambda i, figure: None, **({"frames": 2, "alt": "x"} | options))


def _contrast(first: str, second: str) -> float:
    def luminance(color):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_ink_and_colors_can_be_read_on_light_and_dark_pages():
    for page in ("#ffffff", "#121212"):
        assert _contrast(INK, page) > 4.2
        assert all(_contrast(color, page) > 2.9 for color in COLORS), page


def test_the_style_leaves_the_background_transparent():
    use_style()
    assert plt.rcParams["savefig.facecolor"] == "none" and plt.rcParams["text.color"] == INK


def test_image_rows_stand_under_their_names_on_one_scale():
    rows = {"real": torch.rand(3, 4, 4), "made": torch.full((3, 4, 4), 2.0)}
    figure = display.image_rows(rows)
    assert [ax.get_title("left") for ax in figure.axes] == ["real", "made"]
    assert all(ax.images[0].get_clim() == (0, 1) for ax in figure.axes)
    plt.close(figure)
    with pytest.raises(ValueError, match="at least one row"):
        display.image_rows({})
