"""Make one chapter's notebook: python -m tools.execute CHAPTER OUTPUT scale=small

Executes the chapter with papermill if anything that its outputs depend on has changed; otherwise keeps the outputs
and only brings the text up to date. The notebook is replaced when all went well and not before, so that a failing
cell, or a killed build, leaves the last good one in place.

What the run measured is written into the notebook: seconds and memory into the card under the title, numbers into
the sentences that quote them ({glue:text}`name:.2f`), so that the page and Colab show the same.
"""

import hashlib
import os
import platform
import re
import resource
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
import papermill
import torch
from nbformat import NotebookNode
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from noise2tokens.ledger import load_record
from tools import inputs

GLUE = re.compile(r"\{glue:text\}`(\w+)(?::([^`]+))?`")
META = "noise2tokens"


class ChapterError(Exception):
    """A chapter that could not be made; the message names chapter, cell and error."""


class Progress(NBClientEngine):
    """papermill's engine, which also says which chapter and cell is running, and since when."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, chapter="", **options):
        start, total = (
            time.perf_counter(),
            sum(cell.cell_type == "code" for cell in nb_man.nb.cells),
        )
        number, manager_start = 0, nb_man.cell_start

        def cell_start(cell, cell_index=None, **kwargs):
            nonlocal number
            if cell.cell_type == "code":
                number += 1
                seconds = time.perf_counter() - start
                print(
                    f"{chapter}  cell {number:2} of {total}  {seconds:6.1f} s  {_headline(cell)}",
                    flush=True,
                )
            return manager_start(cell, cell_index, **kwargs)

        nb_man.cell_start = cell_start
        # Sockets of the file system, which no other user can read; over TCP the kernel warns that they could.
        local = Config({"KernelManager": {"transport": "ipc"}})
        return super().execute_managed_notebook(nb_man, kernel_name, config=local, **options)


papermill_engines.register("progress", Progress)


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
        notebook, run = _execute(chapter, notebook, parameters, output)
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


def _execute(
    chapter: str, notebook: NotebookNode, parameters: dict[str, Any], output: Path
) -> tuple[NotebookNode, dict[str, Any]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{chapter}.ipynb"
        nbformat.write(_with_ids(notebook), path)
        offered = papermill.inspect_notebook(str(path))
        unknown = sorted(set(parameters) - set(offered))
        if unknown:
            raise ChapterError(
                f"{chapter} has no parameter {', '.join(unknown)}; it has {', '.join(offered)}"
            )
        # Only what differs from the text is injected, so that a page at its defaults has no cell of its own for them.
        changed = {
            key: value
            for key, value in parameters.items()
            if repr(value) != _as_python(offered[key]["default"])
        }
        start = time.perf_counter()
        try:
            executed = papermill.execute_notebook(
                str(path),
                str(path),
                changed,
                engine_name="progress",
                progress_bar=False,
                chapter=chapter,
                cwd=folder,
            )
        except PapermillExecutionError as error:
            failed = (
                output.parent / "failed" / output.name
                if "_build" in output.parts
                else Path("_build/failed") / output.name
            )
            failed.parent.mkdir(parents=True, exist_ok=True)
            path.replace(failed)
            trace = "\n".join(error.traceback)
            raise ChapterError(
                f"{chapter}, cell {error.exec_count}: {error.ename}: {error.evalue}\n{trace}\n"
                f"The notebook up to there: {failed}. The last good one is untouched."
            ) from None
        except Exception as error:  # the kernel died, or never started
            raise ChapterError(
                f"{chapter}: {type(error).__name__}: {error}. The last good notebook is untouched."
            ) from error
    seconds = time.perf_counter() - start
    kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (
        1024 if sys.platform == "darwin" else 1
    )
    return executed, {
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(kilobytes * 1024 / 1e9, 2),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "noise2tokens": version("noise2tokens"),
            "Python": platform.python_version(),
            "torch": torch.__version__,
        },
        "date": datetime.now(UTC).date().isoformat(),
    }


def _finish(chapter: str, notebook: NotebookNode, scale: str, root: Path) -> None:
    """Remove time stamps, resolve quoted numbers, put the card under the title, make the cells' names lasting."""
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
    notebook.cells.insert(
        1, nbformat.v4.new_markdown_cell(_card(chapter, notebook.metadata[META], scale, root))
    )
    notebook.cells[1].metadata["tags"] = ["header-card"]
    _with_ids(notebook)


def _quote(chapter: str, match: re.Match, glued: dict[str, float]) -> str:
    name, spec = match.groups()
    if name not in glued:
        raise ChapterError(f"{chapter}: the text quotes {name!r}, which no cell gives to glue")
    return format(glued[name], spec or "g").replace("-", "−")


def _card(chapter: str, run: dict[str, Any], scale: str, root: Path) -> str:
    before = [name for name in inputs.chapters(root)
              if name < chapter and f"{inputs.PACKAGE}.{name[3:]}" in inputs.modules(chapter, root)]  # fmt: skip
    record = load_record(chapter, scale)
    full = "not measured yet" if record is None else (
        f"{record.device}: {record.seconds:.0f} s, {record.peak_memory_gb:.1f} GB of GPU memory"
    )  # fmt: skip
    rows = {
        "Builds on": ", ".join(f"[]({name}.ipynb)" for name in before) or "no earlier chapter",
        f"At {scale} scale": f"{run['seconds']:.0f} s and {run['peak_memory_gb']:.1f} GB, "
        f"measured on {run['threads']} threads of {run['hardware']}",
        "At full scale": full,
        "Made with": ", ".join(
            f"{name} {number}" for name, number in sorted(run["versions"].items())
        )
        + f", on {run['date']}",
    }
    return "\n".join(
        [
            "| This chapter | |",
            "|---|---|",
            *(f"| {name} | {text} |" for name, text in rows.items()),
        ]
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


def _with_ids(notebook: NotebookNode) -> NotebookNode:
    """Name cells by their content, so that a rebuild changes no line of the file that says the same."""
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        name = hashlib.sha256(cell.source.encode()).hexdigest()[:12]
        seen[name] = seen.get(name, 0) + 1
        cell["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def _headline(cell: NotebookNode) -> str:
    return next((line for line in cell.source.splitlines() if line.strip()), "")[:60]


def _as_python(text: str) -> str:
    return repr(text.strip("\"'")) if text[:1] in "\"'" else text


def _processor() -> str:
    """Name the processor as the system does; Python's own `platform` leaves it empty on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(words: list[str]) -> int:
    chapter, output, *rest = words
    parameters = {
        name: int(value) if value.isdigit() else value
        for name, value in (word.split("=", 1) for word in rest)
    }
    os.environ.setdefault("NOISE2TOKENS_RECORDS", str(Path("_build/full/records").resolve()))
    try:
        make(chapter, Path(output), parameters)
    except (ChapterError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
