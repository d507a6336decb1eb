"""Render the site: python -m tools.site SCALE

The sources are gathered in one folder (pages from book/, notebooks of the wanted scale, configuration), where the
notebooks' setup cells and links to code are given the commit that they belong to, and Jupyter Book renders that folder
with warnings as errors. Files that did not change are not touched, so that only pages that did are rendered.
"""

import base64
import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from tools import inputs, page

UNSTAMPED = r"ref = \"main\""
SOURCES = "/blob/main/src/noise2tokens/"  # in the links above the code that a chapter shows


def gather(scale: str, site: Path, commit: str, root: Path = inputs.ROOT) -> bool:
    """Bring the folder `site` in line with the repository; return whether a style or a script has changed."""
    notebooks = root / "book" if scale == "small" else root / "_build" / scale / "book"
    names = [*inputs.pages(root), *map(Path, ("_config.yml", "_toc.yml", "CITATION.cff"))]
    content = {name: (root / name).read_bytes() for name in names}
    for chapter in inputs.chapters(root):
        text = (notebooks / f"{chapter}.ipynb").read_text()
        if text.count(UNSTAMPED) != 1:
            raise ValueError(f'{chapter}.ipynb: expected ref = "main" once, in the setup cell')
        text = text.replace(UNSTAMPED, UNSTAMPED.replace("main", commit))
        text = text.replace(SOURCES, SOURCES.replace("main", commit))
        notebook = nbformat.reads(text, 4)
        page.alive(notebook)
        content[Path("book") / f"{chapter}.ipynb"] = nbformat.writes(notebook).encode()
    for path in [path for path in site.rglob("*") if path.is_file()]:
        if path.relative_to(site) not in content:
            path.unlink()
    restyled = False
    for name, data in content.items():
        path = site / name
        if not path.exists() or path.read_bytes() != data:
            restyled |= path.exists() and name.parent.name == "_static"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return restyled


def render(scale: str, root: Path = inputs.ROOT) -> Path:
    """Render the site and return its front page.

    Raises:
        subprocess.CalledProcessError: If Jupyter Book fails or warns.
    """
    build = root / "_build" if scale == "small" else root / "_build" / scale
    site = build / "site"
    restyled = gather(scale, site, _commit(root))
    # Jupyter Book puts its own _build folder under the output path.
    target = root if scale == "small" else build
    if (
        restyled
    ):  # every page names the version of its styles, and Sphinx overwrites no style that is there
        for folder in (".doctrees", "html"):
            shutil.rmtree(target / "_build" / folder, ignore_errors=True)
    command = [
        str(Path(sys.executable).with_name("jupyter-book")),
        "build",
        str(site),
        "--path-output",
        str(target),
    ]
    try:
        subprocess.run([*command, "-W", "--keep-going", "-q"], check=True)
    except subprocess.CalledProcessError:
        # Sphinx warns about a page only when it reads it: without this the next run would find nothing wrong.
        shutil.rmtree(target / "_build" / ".doctrees", ignore_errors=True)
        raise
    html = target / "_build" / "html"
    for path in html.glob("book/*.html"):
        text = path.read_text()
        if (done := finish(text, html / "_images")) != text:
            path.write_text(done)
    return html / "index.html"


INLINE = re.compile(r"data:image/(png|webp);base64,([A-Za-z0-9+/=]+)")
NUMBERED = re.compile(r"(Exercise) \((\d+\.\d+) (.*?)\)(?=</(?:p|a)>)")


def finish(page: str, images: Path) -> str:
    """Take the pictures out of a page and keep each once, as a file; set the numbers of exercises before their titles.

    Notebooks hold the frames of an animation inside, since on Colab there are no files beside them; a page that shows
    an animation twice would carry it twice.

    Args:
        page: HTML of a page one folder below `images`'s parent.
        images: Folder for the pictures.
    """

    def keep(match: re.Match) -> str:
        data = base64.b64decode(match[2])
        name = f"{hashlib.sha256(data).hexdigest()[:24]}.{match[1]}"
        images.mkdir(exist_ok=True)
        (images / name).write_bytes(data)
        return f"../{images.name}/{name}"

    return NUMBERED.sub(r"\1 \2 (\3)", INLINE.sub(keep, page))


def _commit(root: Path) -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "main"


if __name__ == "__main__":
    try:
        print(f"Open {render(sys.argv[1])}")
    except (subprocess.CalledProcessError, ValueError) as error:
        sys.exit(f"The site could not be rendered: {error}")
