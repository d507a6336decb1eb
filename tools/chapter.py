"""Render one chapter's page: python -m tools.chapter 07_vq_vae

The page is that of the site, warnings as errors included, and takes seconds: of the other chapters only the titles are
rendered, so that links to them lead somewhere, and what is collected from all notebooks is left out.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from tools import inputs, page


def gather(chapter: str, folder: Path, root: Path = inputs.ROOT) -> None:
    """Write the sources of a site in which one chapter has its page, and the others have their titles."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in [*inputs.pages(root), *map(Path, ("_config.yml", "_toc.yml", "CITATION.cff"))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, folder / name)
    for name in ("ledger", "run_times"):
        text = (root / "book" / f"{name}.md").read_text()
        (folder / "book" / f"{name}.md").write_text(text.split("\n\n")[0] + "\n")
    for name in inputs.chapters(root):
        if name == chapter:
            notebook = nbformat.read(root / "book" / f"{name}.ipynb", as_version=4)
            page.alive(notebook)
        else:
            text = (root / "chapters" / f"{name}.md").read_text()
            title = next(line for line in text.splitlines() if line.startswith("# "))
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(title)])
        nbformat.write(notebook, folder / "book" / f"{name}.ipynb")


def render(chapter: str, root: Path = inputs.ROOT) -> Path:
    """Render the page and return where it is.

    Raises:
        ValueError: If the chapter has no notebook yet.
        subprocess.CalledProcessError: If Jupyter Book fails or warns.
    """
    if not (root / "book" / f"{chapter}.ipynb").exists():
        raise ValueError(
            f"there is no book/{chapter}.ipynb: make chapter CHAPTER={chapter} makes it"
        )
    build = root / "_build" / "chapter"
    gather(chapter, build / "site", root)
    command = str(Path(sys.executable).with_name("jupyter-book"))
    subprocess.run(
        [
            command,
            "build",
            str(build / "site"),
            "--path-output",
            str(build),
            "--all",
            "-W",
            "--keep-going",
            "-q",
        ],
        check=True,
    )
    return build / "_build" / "html" / "book" / f"{chapter}.html"


if __name__ == "__main__":
    try:
        print(f"The chapter: {render(sys.argv[1])}")
    except (subprocess.CalledProcessError, ValueError) as error:
        sys.exit(f"The page could not be rendered: {error}")
