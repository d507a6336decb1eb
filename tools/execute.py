"""Make one chapter's notebook: python -m tools.execute CHAPTER OUTPUT scale=small

Executes the chapter with papermill if anything that its outputs depend on has changed; otherwise keeps the outputs
and only brings the text up to date. The notebook is replaced when all went well and not before, so that a failing
cell, or a killed build, leaves the last good one in place.

What the run measured is written into the notebook: seconds and memory into the card under the title, numbers into
the sentences that quote them ({glue:text}`name:.2f`), so that the page and Colab show the same.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from tools import inputs, page
from tools.inputs import ChapterError, with_ids

GLUE = re.compile(r"\{glue:text\}`(\w+)(?::([^`]+))?`")
META = "noise2tokens"


def make(chapter: str, output: Path, parameters: dict[str, Any], root: Path = inputs.ROOT) -> bool:
    """Bring a chapter's notebook up to date.

    Args:
        chapter: Name of the chapter's file without its ending.
        output: The notebook to write.
        parameters: Values for the cell tagged "parameters"; `scale` is needed.
        root: The repository.

    Returns:
        Whether the chapter was executed.

    Raises:
        ChapterError: If a parameter is unknown or a cell fails; `output` is then as it was.
    """
    notebook = inputs.source(chapter, root)
    digest = inputs.digest(chapter, parameters["scale"], root)
    last = nbformat.read(output, as_version=4) if output.exists() else None
    known = last is not None and last.metadata.get(META, {}).get("digest") == digest
    if known:
        _copy_outputs(last, notebook)
        run = last.metadata[META]
        print(f"{chapter}  code and modules unchanged, outputs kept", flush=True)
    else:
        from tools.run import execute

        notebook, run = execute(chapter, notebook, parameters, output)
        run["digest"] = digest
    notebook.metadata[META] = run
    _finish(chapter, notebook, parameters["scale"], root)
    text = nbformat.writes(notebook) + "\n"
    if not output.exists() or output.read_text() != text:
        output.parent.mkdir(parents=True, exist_ok=True)
        fresh = output.with_suffix(".part")
        fresh.write_text(text)
        fresh.replace(output)
    else:
        output.touch()
    return not known


def _finish(chapter: str, notebook: NotebookNode, scale: str, root: Path) -> None:
    """Remove time stamps, resolve quoted numbers, make the page of it, make the cells' names lasting."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    glued: dict[str, float] = {}
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):  # papermill adds empty lists
            del cell.metadata["tags"]
        for output in cell.get("outputs", []):
            glued |= output.get("metadata", {}).get(META, {}).get("glue", {})
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = GLUE.sub(lambda match: _quote(chapter, match, glued), cell.source)
    names = inputs.chapters(root)
    page.assemble(notebook, chapter, _card(chapter, notebook.metadata[META], scale, root), names)
    with_ids(notebook)


def _quote(chapter: str, match: re.Match, glued: dict[str, float]) -> str:
    name, spec = match.groups()
    if name not in glued:
        raise ChapterError(f"{chapter}: the text quotes {name!r}, which no cell gives to glue")
    return format(glued[name], spec or "g").replace("-", "−")


def _card(chapter: str, run: dict[str, Any], scale: str, root: Path) -> str:
    before = [name for name in inputs.numbered(root)
              if name < chapter and f"{inputs.PACKAGE}.{name[3:]}" in inputs.modules(chapter, root)]  # fmt: skip
    links = [f"[{int(name[:2])}]({name}.ipynb)" for name in before]
    builds = (
        f"chapter{'s' * (len(links) > 1)} {', '.join(links)}" if links else "no earlier chapter"
    )
    threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
    record = None
    folder = root / "src" / inputs.PACKAGE / "recorded"
    if scale != "small":
        folder = Path(os.environ["NOISE2TOKENS_RECORDS"])
    if list(folder.glob(f"{chapter}.*.json")):
        from noise2tokens.records import best_record

        record = best_record(chapter, folder)
    made = ", ".join(f"{name} {number}" for name, number in sorted(run["versions"].items()))
    return page.card(
        {
            "Builds on": builds,
            "runs in": f"{run['seconds']:.0f} s with {run['peak_memory_gb']:.1f} GB on {threads} of {run['hardware']}",
            "measured longer:": "not yet"
            if record is None
            else f"{record.seconds / 60:.0f} minutes on {record.device}",
            "made with": f"{made}, {run['date']}",
        }
    )


def _copy_outputs(executed: NotebookNode, notebook: NotebookNode) -> None:
    """Move outputs (and an injected parameters cell) to a notebook with the same code."""
    done = [cell for cell in executed.cells if cell.cell_type == "code"]
    injected = [cell for cell in done if "injected-parameters" in cell.metadata.get("tags", [])]
    done = [cell for cell in done if cell not in injected]
    fresh = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for old, new in zip(done, fresh, strict=True):
        new.outputs, new.execution_count = old.outputs, old.execution_count
    if injected:
        after = next(
            i
            for i, cell in enumerate(notebook.cells)
            if "parameters" in cell.metadata.get("tags", [])
        )
        notebook.cells[after + 1 : after + 1] = injected
    notebook.metadata.language_info = executed.metadata.language_info


def main(words: list[str]) -> int:
    chapter, output, *rest = words
    parameters = {
        name: int(value) if value.isdigit() else value
        for name, value in (word.split("=", 1) for word in rest)
    }
    folder = Path("_build", str(parameters.get("scale", "small")), "records").resolve()
    os.environ.setdefault("NOISE2TOKENS_RECORDS", str(folder))
    try:
        make(chapter, Path(output), parameters)
    except (ChapterError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
