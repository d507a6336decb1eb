"""What a chapter shows, and how: one plotting style, checks, sources, numbers for the prose, animations.

Three decisions are behind it. Figures have a transparent background and mid-gray ink, so that one PNG reads well on
light and dark pages (the book's own darken or lighten it a little), and are drawn at twice a screen's density. A
check, a table and a quoted number carry in their output's metadata what was measured and how far another run may be
from it, so that a stored notebook is compared with a fresh one by its numbers and not by its digits
(tools/compare.py). An animation is a strip of still pictures with buttons, without a library from a network, so that
it works on a plane and from the keyboard.
"""

import ast
import base64
import html
import inspect
import io
import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from IPython import get_ipython
from IPython.display import HTML, Markdown, display
from jaxtyping import Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

INK = "#7a7a7a"
COLORS = ["#0f8fd0", "#e0700a", "#00a378", "#d05aa5", "#b8860b", "#7a7fd6"]
DPI = 110
DENSITY = 2  # pixels of a picture for one of the page


def use_style() -> None:
    """Set the book's plotting style for the figures that follow."""
    sns.set_theme(style="ticks", context="notebook", palette=COLORS)
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": DPI,
            "savefig.dpi": DPI,
            "figure.facecolor": "none",
            "savefig.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": "medium",
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "grid.color": INK,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "image.cmap": "gray",
            "image.interpolation": "nearest",
        }
    )
    shell = get_ipython()
    if shell is not None:

        def draw_inline(*_) -> None:
            shell.display_formatter.formatters["image/png"].for_type(Figure, _inline)

        # matplotlib's inline backend sets its own way after the cell in which it is loaded: so load it now, and come
        # after it.
        plt.close(plt.figure())
        shell.events.register("post_run_cell", draw_inline)
        draw_inline()


def picture(
    figure: Figure, kind: str = "png", *, dpi: float | int = DPI * DENSITY, tight: bool = True
) -> bytes:
    """Draw a figure as a file that is small although dense: 256 colors are enough for lines, text and a color map.

    Args:
        figure: The figure.
        kind: "png" or "webp", both without loss beyond the colors.
        dpi: Pixels an inch.
        tight: Whether to cut off empty margins.

    Returns:
        The file's content. A PNG knows its `dpi`, so that a page can show it at the intended size.
    """
    drawn, buffer = io.BytesIO(), io.BytesIO()
    with plt.rc_context({"savefig.bbox": "tight" if tight else "standard"}):
        figure.savefig(drawn, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    image = _in_256_colors(Image.open(drawn).convert("RGBA"))
    if kind == "png":
        image.save(buffer, "png", optimize=True, dpi=(dpi, dpi))
    else:
        image.convert("RGBA").save(buffer, "webp", lossless=True, quality=60, method=4)
    return buffer.getvalue()


def _in_256_colors(image: Image.Image) -> Image.Image:
    """Give every pixel the nearest of 256 colors, chosen one by one where most pixels are furthest off."""
    pixels = np.array(image)
    pixels[pixels[..., 3] == 0] = 0
    packed, place, counts = np.unique(
        pixels.view(np.uint32), return_inverse=True, return_counts=True
    )
    colors = packed[:, None].view(np.uint8)
    opacity = colors[:, 3:].astype(np.float32)
    look = np.concatenate([colors[:, :3] * opacity / 255, opacity], axis=1)  # on a black page
    chosen = [int(counts.argmax())]
    nearest, error = np.zeros(len(look), np.uint8), ((look - look[chosen[0]]) ** 2).sum(1)
    while len(chosen) < 256 and error.any():
        chosen.append(int((error * np.sqrt(counts)).argmax()))
        new = ((look - look[chosen[-1]]) ** 2).sum(1)
        nearest[new < error] = len(chosen) - 1
        error = np.minimum(error, new)
    reduced = Image.fromarray(nearest[place].reshape(pixels.shape[:2]), "P")
    reduced.putpalette(colors[chosen].tobytes(), "RGBA")
    return reduced


def _inline(figure: Figure) -> tuple[str, dict[str, int]] | None:
    """Draw a figure for a notebook, with the size to show it at."""
    if not figure.axes:
        return None
    data = picture(figure, dpi=figure.dpi * DENSITY)
    size = Image.open(io.BytesIO(data)).size
    return base64.b64encode(data).decode(), {
        "width": size[0] // DENSITY,
        "height": size[1] // DENSITY,
    }


def check(
    claim: str,
    value: float | int | bool | Tensor | np.ndarray | np.generic,
    *,
    at_most: float | int | Tensor | np.generic | None = None,
    at_least: float | int | Tensor | np.generic | None = None,
    tolerance: float | int | None = None,
) -> None:
    """Assert a claim, and show it with the measured value and its bound.

    Args:
        claim: What is claimed, in words.
        value: A truth value, or a number that the bounds are for (a tensor or array of one element will do).
        at_most: Upper bound, inclusive.
        at_least: Lower bound, inclusive.
        tolerance: How far from this value another run's may be; where left out, 20 % of it, or 1e-6 where that is
            more, since rounding errors differ between machines.

    Raises:
        AssertionError: If the claim does not hold; NaN never does. The message holds the measured value.
        TypeError: If a truth value is given together with a bound, a number without one, or something else.
        ValueError: If the claim is empty, there is more than one value, a bound or tolerance is not finite, the
            tolerance is negative, or the bounds leave no room.
    """
    if not claim.strip() or "\n" in claim:
        raise ValueError(f"a check claims something, on one line; got {claim!r}")
    value = _one(value, claim)
    bounds = {"at_least": at_least, "at_most": at_most, "tolerance": tolerance}
    bounds = {name: _one(bound, name) for name, bound in bounds.items() if bound is not None}
    truth, bounded = isinstance(value, bool), bool(bounds.keys() & {"at_least", "at_most"})
    if truth == bounded or (truth and bounds):
        raise TypeError(
            f"check needs a truth value, or a number and a bound; got {value!r} for: {claim}"
        )
    if any(isinstance(bound, bool) or not math.isfinite(bound) for bound in bounds.values()):
        raise ValueError(f"bounds and tolerance must be finite numbers, got {bounds} for: {claim}")
    low, high = bounds.get("at_least", -math.inf), bounds.get("at_most", math.inf)
    if low > high or bounds.get("tolerance", 0) < 0:
        raise ValueError(f"no value can be held to {bounds}: {claim}")
    if not (value if isinstance(value, bool) else low <= value <= high):
        raise AssertionError(f"{claim}{_bound(bounds)}, but measured {value!r}")
    record = {"claim": claim, "value": _in_json(value), **bounds}
    text = check_text(record)
    page = html.escape(text, quote=False)
    page = f'<div class="n2t-check" style="font-size:0.9em">{page}</div>'
    display(_Shown(text, page, {"check": record}))


def check_text(record: dict[str, Any]) -> str:
    """Say in one line what a check found.

    Args:
        record: The claim, the value and its bounds, as `check` keeps them in the output's metadata.

    Returns:
        Such as "✓ the flow inverts: 3.1e-15, at most 1e-12".
    """
    value = record["value"]
    if isinstance(value, bool):
        return f"✓ {record['claim']}"
    value = float(value) if isinstance(value, str) else value
    return f"✓ {record['claim']}: {_digits(value, 3, small=2)}{_bound(record)}"


def _bound(record: dict[str, Any]) -> str:
    parts = [
        f"{words} {record[name]:g}".replace(" -", " −").replace("e-0", "e-").replace("e+0", "e")
        for name, words in (("at_least", "at least"), ("at_most", "at most"))
        if name in record
    ]
    return ", " + " and ".join(parts) if parts else ""


def glue(
    name: str,
    value: float | int | Tensor | np.ndarray | np.generic,
    tolerance: float | int | None = None,
) -> None:
    """Keep a measured number under a name, for sentences to quote as ``{glue:text}`name:.2f```.

    Nothing is shown: the number is kept in the output's metadata.

    Args:
        name: What the sentence calls it; unique in the chapter.
        value: The number (a tensor or array of one element will do).
        tolerance: How far from this value another run's may be; where left out, 10 % of it, or 1e-6 where that is
            more.

    Raises:
        TypeError: If the value is no number.
        ValueError: If it is not finite, the tolerance is negative or not finite, the name is not a word, or another
            cell has used it.
    """
    number = _one(value, name)
    if isinstance(number, bool):
        raise TypeError(f"cannot quote {name}: it is a truth value")
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"a quoted number's name is one word, got {name!r}")
    if not math.isfinite(number):
        raise ValueError(f"cannot quote {name}: it is {number}")
    cell = _running_cell()
    if _GLUED.setdefault(name, cell) != cell:
        raise ValueError(f"{name} has been glued by another cell: give it a name of its own")
    record = {"glue": {name: number}}
    if tolerance is not None:
        record["tolerance"] = {name: _tolerance(tolerance, name)}
    display(
        {"text/html": f"<!-- {name} -->", "text/plain": ""},
        raw=True,
        metadata={"noise2tokens": record},
    )


_GLUED: dict[str, str] = {}


def _running_cell() -> str:
    """Name the notebook's cell that is running: a front end's own name where it gives one, else its code's."""
    shell = get_ipython()
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    named = parent.get("metadata", {}).get("cellId")
    frame = inspect.currentframe()
    while named is None and frame is not None and frame.f_globals.get("__name__") != "__main__":
        frame = frame.f_back
    return named or ("" if frame is None else frame.f_code.co_filename)


def table(
    rows: dict[str, dict[str, Any]],
    *,
    tolerance: float | int | dict[str, float | int] | None = None,
    digits: int | dict[str, int] = 3,
    caption: str | None = None,
) -> None:
    """Show measured values as a table.

    Args:
        rows: For each row its name and its values by column: numbers, or text. Names may hold formulas ($...$). A
            column that a row leaves out shows a dash there.
        tolerance: How far from these numbers another run's may be, for all or by column; where left out, 10 % of each,
            or 1e-6 where that is more.
        digits: Significant digits to show, for all or by column. Integers are shown in full.
        caption: What the table shows, above it.

    Raises:
        TypeError: If a value is neither a finite number nor text.
        ValueError: If there are no rows or columns, a number is not finite (say in words what happened), `digits` is
            below 1, the tolerance is negative or not finite, or either names a column that is not there.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if not columns:
        raise ValueError("a table needs at least one row with one column")
    for given in (tolerance, digits):
        if isinstance(given, dict) and not set(given) <= set(columns):
            raise ValueError(f"the table has no column {sorted(set(given) - set(columns))}")
    shown = digits if isinstance(digits, dict) else dict.fromkeys(columns, digits)
    if min([1, *shown.values()]) < 1:
        raise ValueError(f"at least one digit must be shown, got {digits}")
    allowed = dict.fromkeys(columns, tolerance) if not isinstance(tolerance, dict) else tolerance
    record = {
        "cells": [["", *columns]]
        + [
            [name, *(_cell(row.get(column), f"{name}, {column}") for column in columns)]
            for name, row in rows.items()
        ],
        "digits": [shown.get(column, 3) for column in columns],
        "tolerance": [
            None if allowed.get(column) is None else _tolerance(allowed[column], column)
            for column in columns
        ],
        "caption": caption,
    }
    display(Markdown(table_text(record)), metadata={"noise2tokens": {"table": record}})


def table_text(record: dict[str, Any]) -> str:
    """Lay out a table in Markdown.

    Args:
        record: Cells (the first row names the columns), digits and caption, as `table` keeps them in the metadata.

    Returns:
        Markdown.
    """
    head, *body = record["cells"]
    numeric = [any(isinstance(row[i], int | float) for row in body) for i in range(1, len(head))]
    lines = [] if record["caption"] is None else [f"*{record['caption']}*", ""]
    lines.append("| " + " | ".join(_escaped(name) for name in head) + " |")
    lines.append("|---|" + "|".join("---:" if number else "---" for number in numeric) + "|")
    for name, *values in body:
        texts = [
            _digits(value, digits) if isinstance(value, int | float) else _escaped(value)
            for value, digits in zip(values, record["digits"], strict=True)
        ]
        lines.append("| " + " | ".join([_escaped(name), *texts]) + " |")
    return "\n".join(lines)


def _cell(value: Any, what: str) -> float | int | str:
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    value = _one(value, what)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not math.isfinite(value):
        raise ValueError(f"{what}: {value} is no value to show; say in words what happened")
    return value


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _one(value: Any, what: str) -> float | int | bool:
    """Turn a tensor or array of one element into Python's own number or truth value."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        if math.prod(value.shape) != 1:
            raise ValueError(f"{what}: one value is needed, got the shape {tuple(value.shape)}")
        value = value.item()
    if not isinstance(value, bool | int | float):
        raise TypeError(f"{what}: a number or a truth value is needed, got {value!r}")
    return value


def _tolerance(value: float | int, what: str) -> float | int:
    value = _one(value, what)
    if isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{what}: a tolerance is a finite number from 0 on, got {value}")
    return value


def _in_json(value: float | int | bool) -> float | int | bool | str:
    return value if math.isfinite(value) else str(value)  # JSON has no infinity


def _digits(value: float | int, digits: int, small: int | None = None) -> str:
    """Write a number with so many significant digits (another number of them below 0.001); integers in full."""
    size = abs(value)
    if isinstance(value, int) or value == 0 or not math.isfinite(value):
        text = f"{size:g}" if isinstance(value, float) else str(size)
    elif 1e-3 <= size < 1e7:
        text = f"{size:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    else:
        mantissa, exponent = f"{size:.{(small or digits) - 1}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    return ("−" if value < 0 else "") + text


class _Shown:
    """Text for a terminal, HTML for a page, and what was measured, for a program."""

    def __init__(self, text: str, page: str, measured: dict[str, Any]):
        self.text, self.page, self.measured = text, page, measured

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict[str, str], dict]:
        return {"text/plain": self.text, "text/html": self.page}, {"noise2tokens": self.measured}


# The site binds it to the commit that the page was made at (tools/site.py).
SOURCES = "https://github.com/noise-to-tokens/noise-to-tokens/blob/main/src"


def show_source(*objects: Callable) -> None:
    """Show the source of functions, methods or classes of the package, as the tests run it.

    Docstrings are left out: beside the text of a chapter they would say everything twice. The file's name above it
    leads to those lines in the repository.

    Args:
        objects: Anything `inspect.getsource` takes.
    """
    blocks = []
    for thing in objects:
        thing = inspect.unwrap(thing)  # tests wrap functions to check shapes
        path = Path(inspect.getsourcefile(thing)).relative_to(Path(__file__).parent.parent)
        path = path.as_posix()
        lines, first = inspect.getsourcelines(thing)
        source = _without_docstrings(textwrap.dedent("".join(lines)))
        place = f"{SOURCES}/{path}#L{first}-L{first + len(lines) - 1}"
        blocks.append(f"[`{path}`]({place})\n\n```python\n{source}\n```")
    display(Markdown("\n\n".join(blocks)))


def _without_docstrings(source: str) -> str:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and ast.get_docstring(node)
            and len(node.body) > 1
        ):
            doc = node.body[0]
            following = (
                lines[doc.end_lineno].strip() == "" if doc.end_lineno < len(lines) else False
            )
            for line in range(doc.lineno - 1, doc.end_lineno + following):
                lines[line] = None
    return "\n".join(line for line in lines if line is not None).rstrip()


def image_grid(
    images: Real[Tensor, "n height width"], columns: int, ax: Axes | None = None, *, gap: int = 1
) -> Axes:
    """Draw equally sized gray images in rows, each scaled by the common range of all.

    Args:
        images: The pictures, in reading order.
        columns: Pictures a row; the last row may be shorter.
        ax: Where to draw; a new figure where left out.
        gap: Empty pixels between neighbors.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no image or `columns` is below 1.
    """
    if len(images) == 0 or columns < 1:
        raise ValueError(f"need at least one image and one column, got {len(images)} and {columns}")
    rows = -(-len(images) // columns)
    height, width = images.shape[1:]
    canvas = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap), math.nan)
    for i, picture in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    ax = (
        plt.subplots(figsize=(columns * 0.55, rows * 0.55 * height / width))[1]
        if ax is None
        else ax
    )
    ax.imshow(canvas.cpu().numpy(), vmin=float(images.min()), vmax=float(images.max()))
    ax.set_axis_off()
    return ax


def image_rows(rows: dict[str, Real[Tensor, "n height width"]]) -> Figure:
    """Draw rows of equally many gray images, each row under its name: real ones above, say, and samples below.

    Args:
        rows: Images in [0, 1], by name.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("need at least one row of images")
    figure, axes = plt.subplots(len(rows), 1, figsize=(6.4, 0.82 * len(rows)), squeeze=False)
    for ax, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        image_grid(images.float().clamp(0, 1).cpu(), columns=len(images), ax=ax)
        ax.images[0].set_clim(0, 1)  # black and white mean the same in every row
        ax.set_title(name, loc="left", fontsize="x-small", pad=2)
    return figure


def animate(
    draw: Callable[[int, Figure], None],
    frames: int,
    *,
    alt: str,
    captions: list[str] | None = None,
    figsize: tuple[float | int, float | int] = (6.0, 4.0),
    fps: float | int = 4.0,
) -> None:
    """Show a sequence of figures as an animation with play, pause, step and a slider.

    Args:
        draw: Draws frame `i` on an empty figure.
        frames: How many.
        alt: What is to be seen, for those who cannot see it.
        captions: A line of text for each frame, shown under it and read out by screen readers.
        figsize: Size of a frame in inches.
        fps: Frames a second while playing.

    Raises:
        ValueError: If `alt` is empty, there are no frames, or captions do not match them in number.
    """
    if not alt.strip() or frames < 1 or (captions is not None and len(captions) != frames):
        raise ValueError(
            f"need alt text, at least one frame and one caption a frame; got alt={alt!r}, {frames} frames, "
            f"{'no' if captions is None else len(captions)} captions"
        )
    pictures = []
    for i in range(frames):
        figure = plt.figure(figsize=figsize)
        draw(i, figure)
        # A fixed canvas (no tight box): frames that differ in size would make the picture jump.
        content = picture(figure, "webp", dpi=90 * DENSITY, tight=False)
        plt.close(figure)
        pictures.append("data:image/webp;base64," + base64.b64encode(content).decode())
    size = tuple(round(90 * inches) for inches in figsize)
    display(HTML(_player(pictures, captions or [""] * frames, alt, fps, size)))


def _player(
    pictures: list[str], captions: list[str], alt: str, fps: float | int, size: tuple[int, int]
) -> str:
    # "</" would end the script that the data lie in.
    data = json.dumps({"pictures": pictures, "captions": captions, "wait": 1000 / fps}).replace(
        "</", "<\\/"
    )
    page = (Path(__file__).parent / "templates" / "player.html").read_text(encoding="utf-8")
    values = {
        "still": pictures[-1],
        "alt": html.escape(alt, quote=True),
        "width": str(size[0]),
        "height": str(size[1]),
        "last": str(len(pictures) - 1),
        "frames": str(len(pictures)),
        "caption": html.escape(captions[-1]),
        "data": data,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], page).rstrip()
