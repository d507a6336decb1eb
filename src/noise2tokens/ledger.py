"""Published numbers held against ours, and records of full-scale runs.

A `Ledger` row says what a paper reports, what this book measured or computed, and how far apart the two may be; the
verdict follows from the numbers and cannot be typed. A `Record` is what a full-scale run on a GPU leaves behind: the
results, and where they come from (device, versions, commit, seconds, memory). It is written by `measure` when the
measured block ends without an error, at scale "full" on CUDA, and in no other way: the file is sealed with a hash of
its content, and `load_record` refuses one whose seal does not fit, so that a number edited by hand is not mistaken
for a measurement.

A run leaves its records in the folder named by the environment variable NOISE2TOKENS_RECORDS (else `records/` in the
current folder). Those that the book shows are kept beside the code, in `noise2tokens/records/`, so that a chapter
opened on Colab can show them too.
"""

import base64
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure

SHIPPED = Path(__file__).parent / "records"


@dataclass(frozen=True)
class Row:
    """One line of the ledger.

    Attributes:
        what: The quantity, with its unit.
        paper: The published value: a number where ours is to be compared with it, else words.
        source: Where it is published: paper, and section, table or figure.
        ours: The value of this book; None where there is none.
        tolerance: How far apart the two may be and still count as the same.
        why: Why they differ, or why the value is out of reach here.
        verdict: "reproduced", "differs", "not measured yet" or "out of reach", from the numbers.
    """

    what: str
    paper: float | int | str
    source: str
    ours: float | int | None
    tolerance: float | int | None
    why: str
    verdict: str


class Ledger:
    """The rows of one chapter.

    Args:
        chapter: Name of the chapter's file without its ending, such as "02_nice".
    """

    def __init__(self, chapter: str):
        self.chapter = chapter
        self.rows: list[Row] = []

    def row(
        self,
        what: str,
        *,
        paper: float | int | str,
        source: str,
        ours: float | int | None = None,
        tolerance: float | int | None = None,
        why: str = "",
    ) -> Row:
        """Add a row; the verdict is computed.

        Args:
            what: The quantity, with its unit.
            paper: The published value.
            source: Paper, and section, table or figure.
            ours: Our value; None where there is none.
            tolerance: Largest distance that counts as reproduced; needed with `ours`. Given without `ours`, the row
                says that the value is to come from a full-scale run that has not been made; left out too, the value is
                out of reach.
            why: The reason, needed where the values differ or ours is out of reach.

        Returns:
            The row.

        Raises:
            ValueError: If a source, a tolerance or a needed reason is missing, or a number is not finite.
        """
        if not source.strip():
            raise ValueError(f"{what}: the source is missing")
        if ours is None:
            verdict = "out of reach" if tolerance is None else "not measured yet"
        else:
            if not isinstance(paper, int | float) or tolerance is None:
                raise ValueError(
                    f"{what}: to compare, paper must be a number and a tolerance be given"
                )
            if not all(map(math.isfinite, (paper, ours, tolerance))) or tolerance < 0:
                raise ValueError(f"{what}: got paper {paper}, ours {ours}, tolerance {tolerance}")
            verdict = "reproduced" if abs(ours - paper) <= tolerance else "differs"
        if verdict in ("differs", "out of reach") and not why.strip():
            raise ValueError(f"{what}: the verdict is “{verdict}”, so say why")
        self.rows.append(Row(what, paper, source, ours, tolerance, why, verdict))
        return self.rows[-1]

    def show(self) -> None:
        """Show the rows as a table; the book's ledger page collects them from the output's metadata."""
        display(
            Markdown(ledger_table(asdict(row) for row in self.rows)),
            metadata={"noise2tokens": {"ledger": [asdict(row) for row in self.rows]}},
        )


def ledger_table(rows: Iterable[dict[str, Any]]) -> str:
    """Lay out rows as a Markdown table.

    Args:
        rows: The fields of `Row`, as dictionaries.

    Returns:
        Markdown.
    """
    lines = ["| What | Paper | Here | Tolerance | Verdict | Source |", "|---|---|---|---|---|---|"]
    for row in rows:
        verdict = f"**{row['verdict']}**" + (f": {row['why']}" if row["why"] else "")
        cells = (
            row["what"],
            _number(row["paper"]),
            _number(row["ours"], row["tolerance"]),
            "" if row["tolerance"] is None else f"± {row['tolerance']:g}",
            verdict,
            row["source"],
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _number(value: float | int | str | None, tolerance: float | int | None = None) -> str:
    """Write a number with one digit more than its tolerance resolves."""
    if value is None:
        return "–"
    if isinstance(value, str) or not tolerance:
        return f"{value:.7g}" if isinstance(value, int | float) else value
    return f"{value:.{max(0, 1 - math.floor(math.log10(tolerance)))}f}"


@dataclass(frozen=True)
class Record:
    """What a full-scale run left behind.

    Attributes:
        chapter: Name of the chapter's file without its ending.
        results: The measured values, by name.
        pictures: Small PNG pictures in base64, by name.
        device: Name of the GPU.
        versions: Versions of Python, torch, CUDA and Triton.
        commit: Commit of the code, "+changes" behind it where the tree was not clean.
        date: Day of the run (UTC).
        seconds: Wall-clock time of the run.
        peak_memory_gb: Largest GPU memory allocated during the run, in 10⁹ bytes.
    """

    chapter: str
    results: dict[str, Any]
    pictures: dict[str, str]
    device: str
    versions: dict[str, str]
    commit: str
    date: str
    seconds: float
    peak_memory_gb: float

    def provenance(self) -> str:
        """Say in one sentence where the numbers come from."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"Measured on one {self.device} on {self.date}, in {self.seconds:.0f} s with at most "
            f"{self.peak_memory_gb:.1f} GB of GPU memory ({versions}; commit {self.commit[:10]}"
            f"{'+changes' if self.commit.endswith('+changes') else ''})."
        )


@dataclass
class Measurement:
    """Collects results while a block runs; see `measure`."""

    results: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)

    def __setitem__(self, name: str, value: Any) -> None:
        """Keep a number, a string, or nested lists and dictionaries of them."""
        self.results[name] = _plain(value, name)

    def picture(self, name: str, figure: Figure) -> None:
        """Keep a figure as a small PNG.

        Raises:
            ValueError: If it takes more than 150 kB.
        """
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        if buffer.tell() > 150_000:
            raise ValueError(f"picture {name} takes {buffer.tell()} bytes; the limit is 150000")
        self.pictures[name] = base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def measure(chapter: str, scale: str) -> Iterator[Measurement]:
    """Time a block, and at full scale on a GPU write what it collects as the chapter's record.

    Args:
        chapter: Name of the chapter's file without its ending.
        scale: "small" (nothing is written) or "full".

    Yields:
        What the block puts its results into.

    Raises:
        ValueError: If `scale` is neither.
        RuntimeError: If `scale` is "full" and there is no CUDA device: such a run is no record.
    """
    if scale not in ("small", "full"):
        raise ValueError(f'scale must be "small" or "full", got {scale!r}')
    if scale == "full" and not torch.cuda.is_available():
        raise RuntimeError("full scale needs a CUDA GPU, and there is none here")
    measurement = Measurement()
    if scale == "small":
        yield measurement
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield measurement
    torch.cuda.synchronize()
    record = Record(
        chapter=chapter,
        results=measurement.results,
        pictures=measurement.pictures,
        device=torch.cuda.get_device_name(),
        versions=_versions(),
        commit=_commit(),
        date=datetime.now(UTC).date().isoformat(),
        seconds=time.perf_counter() - start,
        peak_memory_gb=torch.cuda.max_memory_allocated() / 1e9,
    )
    content = asdict(record)
    path = _folder(scale) / f"{chapter}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({**content, "seal": _seal(content)}, indent=1, sort_keys=True) + "\n"
    )


def load_record(chapter: str, scale: str) -> Record | None:
    """Read a chapter's record: the one the book ships at scale "small", the one just measured at "full".

    Args:
        chapter: Name of the chapter's file without its ending.
        scale: "small" or "full".

    Returns:
        The record, or None where the chapter was never run at full scale.

    Raises:
        ValueError: If the file is damaged or was changed after the run.
    """
    path = _folder(scale) / f"{chapter}.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        seal = content.pop("seal")
        record = Record(**content)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is not a record: {error!r}") from error
    if seal != _seal(content) or record.chapter != chapter:
        raise ValueError(
            f"{path.name} was changed after the run that made it; run the chapter at full scale"
        )
    return record


def show_record(chapter: str, scale: str) -> Record | None:
    """Show where a chapter's full-scale numbers come from, with its pictures, or that there are none yet.

    Args:
        chapter: Name of the chapter's file without its ending.
        scale: As for `load_record`.

    Returns:
        The record, or None.
    """
    record = load_record(chapter, scale)
    if record is None:
        display(
            Markdown("*Not measured yet: this chapter has not been run at full scale on a GPU.*")
        )
        return None
    display(Markdown(f"*{record.provenance()}*"))
    for name, picture in record.pictures.items():
        display(HTML(f'<img alt="{name}" src="data:image/png;base64,{picture}">'))
    return record


def _folder(scale: str) -> Path:
    return SHIPPED if scale == "small" else Path(os.environ.get("NOISE2TOKENS_RECORDS", "records"))


def _plain(value: Any, name: str) -> Any:
    """Turn tensors and NumPy values into what JSON holds; refuse the rest and what is not finite."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise TypeError(
        f"a record holds finite numbers, strings, lists and dictionaries; {name} is {value!r}"
    )


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
    }
    try:
        import triton
    except ModuleNotFoundError:
        return versions
    return {**versions, "Triton": triton.__version__}


def _commit() -> str:
    """Return the commit of the code, from git, or from NOISE2TOKENS_COMMIT where the tree has no history."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=SHIPPED.parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", ".") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("NOISE2TOKENS_COMMIT", "unknown")
