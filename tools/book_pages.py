"""Sphinx extension: two pages of the book that are collected from its executed notebooks.

`{ledger}` lists every chapter's rows of published against measured numbers, `{run-times}` what each chapter took and
on what. Both read the notebooks that are being rendered, and so cannot say anything that no run has said.
"""

from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

META = "noise2tokens"


def notebooks(folder: Path) -> list[tuple[str, nbformat.NotebookNode]]:
    """Read the executed chapters in reading order, then the syntheses."""
    return [
        (path.stem, nbformat.read(path, as_version=4)) for path in sorted(folder.glob("*.ipynb"))
    ]


def ledger_rows(notebook: nbformat.NotebookNode) -> list[dict]:
    """Collect the ledger rows that a chapter showed."""
    return [
        row
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for row in output.get("metadata", {}).get(META, {}).get("ledger", [])
    ]


def title(notebook: nbformat.NotebookNode) -> str:
    """Return the chapter's title."""
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def ledger(folder: Path) -> str:
    """Write the ledger page's body as Markdown."""
    from noise2tokens.ledger import ledger_table

    chapters = [
        (f"[{title(notebook)}](/book/{name}.ipynb)", ledger_rows(notebook))
        for name, notebook in notebooks(folder)
    ]
    verdicts = [row["verdict"] for _, rows in chapters for row in rows]
    count = ", ".join(
        f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(sorted(verdicts))
    )
    parts = [f"{len(verdicts)} published results: {count}."]
    parts += [f"## {link}\n\n{ledger_table(rows)}" for link, rows in chapters if rows]
    return "\n\n".join(parts)


def run_times(folder: Path) -> str:
    """Write the table of run times and hardware as Markdown."""
    from noise2tokens.ledger import load_record

    lines = [
        "| Chapter | Seconds | Memory (GB) | Hardware | Made with | At full scale |",
        "|---|---:|---:|---|---|---|",
    ]
    total = 0.0
    for name, notebook in notebooks(folder):
        run = notebook.metadata[META]
        record = load_record(name, "small")
        versions = ", ".join(f"{key} {value}" for key, value in run["versions"].items())
        full = (
            "not measured yet" if record is None else f"{record.seconds:.0f} s on {record.device}"
        )
        threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
        total += run["seconds"]
        lines.append(
            f"| [](/book/{name}.ipynb) | {run['seconds']:.0f} | {run['peak_memory_gb']:.1f} | "
            f"{threads} of {run['hardware']} | {versions}, {run['date']} | {full} |"
        )
    return "\n".join([*lines, f"| **All** | **{total:.0f}** | | | | |"])


class Collected(SphinxDirective):
    """A directive without content that stands for what a function collects from the notebooks."""

    collect = staticmethod(lambda folder: "")

    def run(self) -> list[nodes.Node]:
        folder = Path(self.env.srcdir) / "book"
        for path in folder.glob("*.ipynb"):
            self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(self.collect(folder), allow_section_headings=True)


class LedgerDirective(Collected):
    collect = staticmethod(ledger)


class RunTimesDirective(Collected):
    collect = staticmethod(run_times)


def drop_thebe(app, pagename, templatename, context, doctree) -> None:
    """Leave out the scripts of live cells, which Jupyter Book adds (twice) to every page and no page here uses."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes.get('body', '')}".lower()
    ]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("ledger", LedgerDirective)
    app.add_directive("run-times", RunTimesDirective)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
