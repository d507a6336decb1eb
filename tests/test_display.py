"""Checks, quoted numbers, sources, grids and animations."""

import json
import math
import re

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb

from noise2tokens import display
from noise2tokens.display import (
    COLORS,
    INK,
    animate,
    check,
    glue,
    image_grid,
    show_source,
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


def test_a_check_prints_claim_and_bound_but_not_what_was_measured(capsys):
    check("error is small", 1.2345e-9, at_most=1e-6)
    check("quality", torch.tensor(0.9), at_least=0.5)
    check("between", 3, at_least=2, at_most=4)
    check("it holds", True)
    check("it holds", torch.tensor(True))
    assert capsys.readouterr().out.splitlines() == [
        "✓ error is small: at most 1e-06",
        "✓ quality: at least 0.5",
        "✓ between: at least 2 and at most 4",
        "✓ it holds",
        "✓ it holds",
    ]


@pytest.mark.parametrize(
    "value, bounds",
    [
        (2.0, {"at_most": 1.0}),
        (0.0, {"at_least": 1.0}),
        (math.nan, {"at_most": 1.0}),
        (math.nan, {"at_least": 0.0}),
        (False, {}),
    ],
)
def test_a_check_that_does_not_hold_raises_and_prints_nothing(value, bounds, capsys):
    with pytest.raises(AssertionError, match="the claim.*measured"):
        check("the claim", value, **bounds)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value, bounds", [(1.0, {}), (True, {"at_most": 1.0})])
def test_a_check_that_could_not_fail_as_meant_is_refused(value, bounds):
    with pytest.raises(TypeError, match="truth value"):
        check("the claim", value, **bounds)


def test_glue_keeps_the_number_in_metadata_only(shown):
    glue("nll", torch.tensor(1.25))
    ((data, options),) = shown
    assert options == {"raw": True, "metadata": {"noise2tokens": {"glue": {"nll": 1.25}}}}
    assert "1.25" not in json.dumps(data)
    with pytest.raises(ValueError, match="nll"):
        glue("nll", math.inf)


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

    animate(draw, 3, alt='A "rising" line', captions=["a <b>", "second", "third"])
    page = shown[0][0].data
    data = json.loads(
        re.search(r'<script type="application/json">(.*?)</script>', page, re.S).group(1)
    )
    assert len(set(data["pictures"])) == 3 and data["captions"] == ["a <b>", "second", "third"]
    assert 'alt="A &quot;rising&quot; line"' in page and "a &lt;b&gt;" in page
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


def test_ink_and_colours_can_be_read_on_light_and_dark_pages():
    for page in ("#ffffff", "#121212"):
        assert _contrast(INK, page) > 4.2
        assert all(_contrast(color, page) > 2.9 for color in COLORS), page


def test_the_style_leaves_the_background_transparent():
    use_style()
    assert plt.rcParams["savefig.facecolor"] == "none" and plt.rcParams["text.color"] == INK
