"""Records of runs that are longer than a page can wait for.

A chapter has one function `full_scale(device, *, seed, **budget) -> (results, pictures)` and a table `BUDGETS` that
says how much of everything it may use: at scale "long" on one thread of a CPU, at scale "full" on one GPU. `measured`
runs it there and writes what came out together with where it comes from (budget, device, versions, commit, seconds,
memory); at scale "small", the page's own, it reads the best record that there is. A record is written in no other way:
the file is sealed with a hash of its content, and one whose seal does not fit is refused, so that a number edited by
hand is not mistaken for a measurement.

A run leaves its records in the folder named by the environment variable NOISE2TOKENS_RECORDS (else `records/` in the
current folder). Those that the book shows are kept beside the code, in `noise2tokens/recorded/`, so that a chapter
opened on Colab can show them too.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure
from PIL import Image

from noise2tokens.display import use_style
from noise2tokens.training import seed_everything

SHIPPED = Path(__file__).parent / "recorded"
SCALES = ("small", "long", "full")
PICTURE_BYTES = 150_000


@dataclass(frozen=True)
class Record:
    """What a run at long or full scale left behind.

    Attributes:
        chapter: Name of the chapter's file without its ending.
        scale: "long" or "full".
        seed: What the run was seeded with.
        budget: How much of everything it was given.
        results: The measured values, by name.
        pictures: PNG pictures in base64; their names are their captions.
        device: Name of the GPU, or of the processor with the number of threads.
        versions: Versions of Python, torch, CUDA and Triton.
        commit: Commit of the code, "+changes" behind it where the tree was not clean.
        date: Day of the run (UTC).
        seconds: Wall-clock time of the run.
        peak_memory_gb: Largest memory during the run, in 10⁹ bytes: of the GPU, or of the process.
    """

    chapter: str
    scale: str
    seed: int
    budget: dict[str, Any]
    results: dict[str, Any]
    pictures: dict[str, str]
    device: str
    versions: dict[str, str]
    commit: str
    date: str
    seconds: float
    peak_memory_gb: float

    def provenance(self) -> str:
        """Say in two sentences where the numbers come from."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        budget = ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in self.budget.items()
        )
        return (
            f"Measured at {self.scale} scale on {self.device} on {self.date}, in {self.seconds:.0f} s "
            f"with at most {self.peak_memory_gb:.1f} GB of memory ({versions}; commit "
            f"{self.commit[:10]}{'+changes' if self.commit.endswith('+changes') else ''}). "
            f"Budget: {budget}; seed {self.seed}."
        )


def measured(
    chapter: str,
    full_scale: Callable[..., tuple[dict[str, Any], dict[str, Figure]]],
    budgets: dict[str, dict[str, Any]],
    scale: str,
    seed: int,
) -> Record | None:
    """Run a chapter's experiment at the wanted scale and write its record; or read the best record there is.

    Args:
        chapter: Name of the chapter's file without its ending.
        full_scale: The experiment.
        budgets: Its keyword arguments at scale "long" and "full". A chapter that has nothing to measure at a scale
            leaves that out, and shows its best record there.
        scale: "small" (nothing is run), "long" or "full".
        seed: Seeds everything beforehand, and is handed on.

    Returns:
        The record; None where there is none yet.

    Raises:
        ValueError: If the scale is unknown, or a picture takes more than 150 kB.
        TypeError: If a result is neither a finite number nor text, nor lists and dictionaries of them.
        RuntimeError: If the scale is "full" and there is no CUDA device: such a run is no record.
    """
    if scale not in SCALES or not set(budgets) <= set(SCALES[1:]):
        raise ValueError(
            f"scale must be one of {SCALES}, got {scale!r} and budgets for {set(budgets)}"
        )
    if scale not in budgets:
        return best_record(chapter)
    if scale == "full" and not torch.cuda.is_available():
        raise RuntimeError("full scale needs a CUDA GPU, and there is none here")
    device = torch.device("cuda" if scale == "full" else "cpu")
    seed_everything(seed)
    use_style()
    if scale == "full":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    results, pictures = full_scale(device, seed=seed, **budgets[scale])
    if scale == "full":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    record = Record(
        chapter=chapter,
        scale=scale,
        seed=seed,
        budget=_plain(budgets[scale], "budget"),
        results=_plain(results, "results"),
        pictures={caption: _png(figure, caption) for caption, figure in pictures.items()},
        device=_device(scale),
        versions=_versions(scale),
        commit=_commit(),
        date=datetime.now(UTC).date().isoformat(),
        seconds=seconds,
        peak_memory_gb=_peak_memory(scale),
    )
    content = asdict(record)
    path = Path(os.environ.get("NOISE2TOKENS_RECORDS", "records"), _file_name(chapter, scale))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**content, "seal": _seal(content)}, indent=1, sort_keys=True) + "\n"
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
    return record


def load_record(chapter: str, scale: str, folder: Path = SHIPPED) -> Record | None:
    """Read a chapter's record of one scale.

    Args:
        chapter: Name of the chapter's file without its ending.
        scale: "long" or "full".
        folder: Where records are; those of the book where left out.

    Returns:
        The record, or None where there is none.

    Raises:
        ValueError: If the file is damaged or was changed after the run.
    """
    path = folder / _file_name(chapter, scale)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        seal = content.pop("seal")
        record = Record(**content)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is not a record: {error!r}") from error
    if seal != _seal(content) or (record.chapter, record.scale) != (chapter, scale):
        raise ValueError(
            f"{path.name} was changed after the run that made it; run the chapter again"
        )
    return record


def best_record(chapter: str, folder: Path = SHIPPED) -> Record | None:
    """Read a chapter's record at full scale, or else at long scale; None where there is neither."""
    return load_record(chapter, "full", folder) or load_record(chapter, "long", folder)


def show_record(record: Record | None) -> None:
    """Show where long numbers come from, with their pictures; or say that there are none yet."""
    if record is None:
        display(
            Markdown("*Not measured yet: this chapter has not been run at long or full scale.*")
        )
        return
    display(Markdown(f"*{record.provenance()}*"))
    for caption, picture in record.pictures.items():
        words = html.escape(caption)
        display(
            HTML(
                f'<figure><img alt="{words}" src="data:image/png;base64,{picture}">'
                f"<figcaption>{words}</figcaption></figure>"
            )
        )


def processor() -> str:
    """Name the processor as the system does; Python's own `platform` leaves it empty on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _file_name(chapter: str, scale: str) -> str:
    return f"{chapter}.{scale}.json"


def _png(figure: Figure, caption: str) -> str:
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    # 256 colors (octree: the one method that keeps transparency) are enough, and take a third of the bytes.
    Image.open(drawn).quantize(256, method=Image.Quantize.FASTOCTREE).save(
        buffer, "png", optimize=True
    )
    if buffer.tell() > PICTURE_BYTES:
        raise ValueError(f"{caption!r} takes {buffer.tell()} bytes; the limit is {PICTURE_BYTES}")
    return base64.b64encode(buffer.getvalue()).decode()


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


def _device(scale: str) -> str:
    if scale == "full":
        return f"one {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {processor()}"


def _peak_memory(scale: str) -> float:
    if scale == "full":
        return torch.cuda.max_memory_allocated() / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 1e9


def _versions(scale: str) -> dict[str, str]:
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    if scale != "full":
        return versions
    versions["CUDA"] = str(torch.version.cuda)
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
        # What a run depends on is the code; records that lie beside it are what runs leave.
        changed = git("status", "--porcelain", "--", ".", ":(exclude)recorded")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("NOISE2TOKENS_COMMIT", "unknown")
