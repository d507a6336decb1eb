"""Experiments within the page: sliders and steps, with the numbers computed in the reader's browser.

A lab is one JavaScript module without dependencies (`templates/NAME.js`, style in `templates/NAME.css`), poured with
its data into one frame (`templates/lab.html`). It is part of the output of its cell, so that it works on the page, in
Jupyter and on Colab, from the keyboard and without a network; where no script may run, a still picture and the
description stand in its place. What a lab computes, a test holds equal to the package (tests/test_lab.py): every lab
puts its numbers into the `state` of its <figure>.
"""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure

from noise2tokens.display import picture

TEMPLATES = Path(__file__).parent / "templates"


def lab(
    name: str, data: dict[str, Any], *, alt: str, still: Figure | None = None, height: int = 520
) -> None:
    """Show an experiment with sliders.

    Args:
        name: Of the module in `templates`, without its ending.
        data: What the module works on: numbers, texts, lists and dicts.
        alt: What is to be seen and done, for those who cannot see it and where no script runs.
        still: A picture for where no script runs; it is closed.
        height: Pixels that the page keeps free until the script has run.

    Raises:
        ValueError: If there is no such lab, `alt` is empty, the height is not positive, or the data hold a number that
            is not finite.
        TypeError: If the data hold what JSON does not know, such as a tensor.
    """
    page = lab_page(name, data, alt=alt, still=still, height=height)
    display({"text/plain": f"An experiment on the page: {alt}", "text/html": page}, raw=True)


def lab_page(
    name: str, data: dict[str, Any], *, alt: str, still: Figure | None = None, height: int = 520
) -> str:
    """Write the HTML of a lab.

    Args:
        name, data, alt, still, height: As for `lab`.

    Returns:
        One <figure>, the same for the same input.

    Raises:
        ValueError, TypeError: See `lab`.
    """
    known = sorted(path.stem for path in TEMPLATES.glob("*.js"))
    if name not in known:
        raise ValueError(f"there are the labs {', '.join(known)}, got {name!r}")
    if not alt.strip():
        raise ValueError(f"alt must say what is to be seen, got {alt!r}")
    if height < 1:
        raise ValueError(f"height must be a positive number of pixels, got {height}")
    try:
        text = json.dumps(data, allow_nan=False, sort_keys=True)
    except ValueError as error:
        raise ValueError(
            f"the data of lab {name!r} must be finite numbers, got nan or infinity"
        ) from error
    except TypeError as error:
        raise TypeError(f"the data of lab {name!r} must be what JSON knows: {error}") from error
    style = TEMPLATES / f"{name}.css"
    values = {
        "name": name,
        "alt": html.escape(alt, quote=True),
        "height": str(height),
        "data": text.replace("</", "<\\/"),  # it would end the script that the data lie in
        "still": "" if still is None else _image(still, alt),
        "style": style.read_text(encoding="utf-8").rstrip() if style.exists() else "",
        "module": (TEMPLATES / f"{name}.js").read_text(encoding="utf-8").rstrip(),
    }
    page = (TEMPLATES / "lab.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], page).rstrip()


def _image(still: Figure, alt: str) -> str:
    content = base64.b64encode(picture(still)).decode()
    plt.close(still)
    return f'<img src="data:image/png;base64,{content}" alt="{html.escape(alt, quote=True)}" style="max-width:100%">'
