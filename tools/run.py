"""Execute a chapter's notebook with papermill, say how far it is, and measure it.

Apart from `tools.execute` because papermill and torch take seconds to import, and an edit of the prose needs neither.
"""

import platform
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

from noise2tokens.records import processor
from tools.inputs import ChapterError, with_ids


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


def execute(
    chapter: str, notebook: NotebookNode, parameters: dict[str, Any], output: Path
) -> tuple[NotebookNode, dict[str, Any]]:
    """Execute a notebook in an empty folder.

    Args:
        chapter: Name of the chapter, for messages.
        notebook: The chapter's text.
        parameters: Values for the cell tagged "parameters".
        output: Where the notebook is to go in the end; a failed one is put into a folder `failed` beside it,
            or under _build.

    Returns:
        The executed notebook, and what the run took and on what.

    Raises:
        ChapterError: If a parameter is unknown, a cell fails or the kernel dies.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{chapter}.ipynb"
        nbformat.write(with_ids(notebook), path)
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
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "noise2tokens": version("noise2tokens"),
            "Python": platform.python_version(),
            "torch": torch.__version__,
        },
        "date": datetime.now(UTC).date().isoformat(),
    }


def _headline(cell: NotebookNode) -> str:
    return next((line for line in cell.source.splitlines() if line.strip()), "")[:60]


def _as_python(text: str) -> str:
    return repr(text.strip("\"'")) if text[:1] in "\"'" else text
