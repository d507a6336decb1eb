"""What a chapter shows, and how: one plotting style, checks, sources, numbers for the prose, animations.

Three decisions are behind it. Figures have a transparent background and mid-grey ink, so that one PNG reads well on
the book's light and dark pages. A check prints its claim and its bound but never the digits it measured, so that the
line is the same on every machine and a stored notebook can be compared with a fresh run. An animation is a strip of
still pictures with buttons, without a library from a network, so that it works on a plane and from the keyboard.
"""

import ast
import base64
import html
import inspect
import io
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from IPython.display import HTML, Markdown, display
from jaxtyping import Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

INK = "#7a7a7a"
COLORS = ["#0f8fd0", "#e0700a", "#00a378", "#d05aa5", "#b8860b", "#7a7fd6"]


def use_style() -> None:
    """Set the book's plotting style for the figures that follow."""
    sns.set_theme(style="ticks", context="notebook", palette=COLORS)
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 110,
            "savefig.dpi": 110,
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


def check(
    claim: str,
    value: float | int | bool | Tensor,
    *,
    at_most: float | int | None = None,
    at_least: float | int | None = None,
) -> None:
    """Assert a claim and print it with its bound, in words that are the same on every machine.

    Args:
        claim: What is claimed, in words.
        value: A truth value, or a number that the bounds are for (a one-element tensor will do).
        at_most: Upper bound, inclusive.
        at_least: Lower bound, inclusive.

    Raises:
        AssertionError: If the claim does not hold; NaN never does. The message holds the measured value.
        TypeError: If a truth value is given together with a bound, or a number without one.
    """
    value = value.item() if isinstance(value, Tensor) else value
    bounded = at_most is not None or at_least is not None
    if isinstance(value, bool) == bounded:
        raise TypeError(
            f"check needs a truth value, or a number and a bound; got {value!r} for: {claim}"
        )
    if not bounded:
        holds, bound = value, ""
    else:
        low, high = (
            (-math.inf if at_least is None else at_least),
            (math.inf if at_most is None else at_most),
        )
        holds = low <= value <= high
        parts = [] if at_least is None else [f"at least {at_least:g}"]
        parts += [] if at_most is None else [f"at most {at_most:g}"]
        bound = ": " + " and ".join(parts)
    if not holds:
        raise AssertionError(f"{claim}{bound}, but measured {value!r}")
    print(f"✓ {claim}{bound}")


def glue(name: str, value: float | int | Tensor) -> None:
    """Keep a measured number under a name, for sentences to quote as ``{glue:text}`name:.2f```.

    Nothing is printed, and the number is kept in the output's metadata, which nbval does not compare.

    Args:
        name: What the sentence calls it; unique in the chapter.
        value: The number (a one-element tensor will do).

    Raises:
        ValueError: If the number is not finite.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"cannot quote {name}: it is {number}")
    display(
        {"text/html": f"<!-- {name} -->", "text/plain": ""},
        raw=True,
        metadata={"noise2tokens": {"glue": {name: number}}},
    )


def show_source(*objects: Callable) -> None:
    """Show the source of functions, methods or classes of the package, as the tests run it.

    Docstrings are left out: beside the text of a chapter they would say everything twice.

    Args:
        objects: Anything `inspect.getsource` takes.
    """
    blocks = []
    for thing in objects:
        thing = inspect.unwrap(thing)  # tests wrap functions to check shapes
        path = Path(inspect.getsourcefile(thing)).relative_to(Path(__file__).parent.parent)
        source = _without_docstrings(textwrap.dedent(inspect.getsource(thing)))
        blocks.append(f"`{path.as_posix()}`\n\n```python\n{source}\n```")
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
    """Draw equally sized grey images in rows, each scaled by the common range of all.

    Args:
        images: The pictures, in reading order.
        columns: Pictures a row; the last row may be shorter.
        ax: Where to draw; a new figure where left out.
        gap: Empty pixels between neighbours.

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
        buffer = io.BytesIO()
        # A fixed canvas (no tight box): frames that differ in size would make the picture jump.
        with plt.rc_context({"savefig.bbox": "standard"}):
            figure.savefig(buffer, format="webp", dpi=90, pil_kwargs={"quality": 70, "method": 4})
        plt.close(figure)
        pictures.append("data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode())
    display(HTML(_player(pictures, captions or [""] * frames, alt, fps)))


def _player(pictures: list[str], captions: list[str], alt: str, fps: float | int) -> str:
    data = json.dumps({"pictures": pictures, "captions": captions, "wait": 1000 / fps}).replace(
        "</", "<\\/"
    )
    last = len(pictures) - 1
    return f"""<figure class="n2t-player" style="margin:0;max-width:40rem">
<img src="{pictures[0]}" alt="{html.escape(alt, quote=True)}" style="width:100%;height:auto;background:none">
<div style="display:flex;gap:.4rem;align-items:center">
<button type="button" aria-label="step back">&#9664;&#xFE0E;</button>
<button type="button" aria-label="play">play</button>
<button type="button" aria-label="step forward">&#9654;&#xFE0E;</button>
<input type="range" min="0" max="{last}" value="0" aria-label="frame" style="flex:1;min-width:0">
<span style="min-width:4.5em;text-align:right">1 / {last + 1}</span>
</div>
<figcaption aria-live="polite" style="min-height:3em">{html.escape(captions[0])}</figcaption>
<script type="application/json">{data}</script>
<script>
(() => {{
  const root = document.currentScript.closest("figure");
  const {{pictures, captions, wait}} = JSON.parse(root.querySelector("script").textContent);
  const [img, slider, count, caption] =
    ["img", "input", "span", "figcaption"].map((name) => root.querySelector(name));
  const [back, play, next] = root.querySelectorAll("button");
  let frame = 0, timer = null;
  const show = (i) => {{
    frame = (i + pictures.length) % pictures.length;
    img.src = pictures[frame];
    slider.value = frame;
    count.textContent = `${{frame + 1}} / ${{pictures.length}}`;
    caption.textContent = captions[frame];
  }};
  const stop = () => {{
    clearInterval(timer);
    timer = null;
    play.textContent = "play";
    play.ariaLabel = "play";
    caption.ariaLive = "polite";
  }};
  const start = () => {{
    caption.ariaLive = "off";
    play.textContent = "pause";
    play.ariaLabel = "pause";
    if (frame === pictures.length - 1) show(0);
    timer = setInterval(() => (frame === pictures.length - 1 ? stop() : show(frame + 1)), wait);
  }};
  play.onclick = () => (timer ? stop() : start());
  back.onclick = () => (stop(), show(frame - 1));
  next.onclick = () => (stop(), show(frame + 1));
  slider.oninput = () => (stop(), show(Number(slider.value)));
}})();
</script>
</figure>"""
