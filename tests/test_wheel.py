"""Colab's situation: every notebook runs outside the repository, with the built wheel and what it depends on.

PyTorch is there beforehand, as on Colab, and installing the package must leave it as it is.
"""

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import papermill
import pytest
from jupyter_client.kernelspec import KernelSpecManager

import tools.run  # noqa: F401 (registers the engine "progress")
from tools import execute, inputs

pytestmark = pytest.mark.slow


def run(*words: str | Path, **options) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = run(
        "git",
        "ls-files",
        "-co",
        "--exclude-standard",
        "src",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "NOTICE",
        cwd=root,
    )
    for name in files.splitlines():
        if (root / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((root / name).read_bytes())
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def colab(root, wheel, tmp_path_factory) -> Path:
    """A virtual environment with torch and a kernel, into which the wheel is installed as the setup cell does."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    lock = re.sub(r" \\\n(    --hash=\S+( \\\n)?)+", "\n", (root / "requirements.lock").read_text())
    (folder / "pins.txt").write_text(lock)
    torch = next(
        line for line in (root / "Makefile").read_text().splitlines() if line.startswith("TORCH :=")
    )
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    run(*pip, torch.split(":= ")[1])
    run(*pip, "-c", folder / "pins.txt", "ipykernel")
    before = run(python, "-c", "import torch; print(torch.__version__, torch.__file__)")
    version = before.split()[0]
    run(*pip, "-c", folder / "pins.txt", f"noise2tokens @ {wheel.as_uri()}", f"torch=={version}")
    assert run(python, "-c", "import torch; print(torch.__version__, torch.__file__)") == before
    return python


def test_the_wheel_pulls_in_nothing_of_build_and_tests(colab):
    installed = {
        line.split("==")[0].lower() for line in run(colab, "-m", "pip", "freeze").splitlines()
    }
    assert "noise2tokens" in {name.split(" @")[0] for name in installed}
    assert not installed & {
        "pytest",
        "snakemake",
        "papermill",
        "jupyter-book",
        "jupytext",
        "torchvision",
        "beartype",
    }


@pytest.mark.parametrize("chapter", inputs.chapters())
def test_notebook_runs_outside_the_repository(chapter, root, colab, tmp_path, monkeypatch):
    """Execute the published notebook with that environment's kernel, in an empty folder."""
    kernel = tmp_path / "kernels" / "colab"
    kernel.mkdir(parents=True)
    argv = [str(colab), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Colab", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setattr(
        KernelSpecManager, "kernel_dirs", property(lambda self: [str(kernel.parent)])
    )
    for name in ("PYTHONPATH", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = papermill.execute_notebook(
        str(root / "book" / f"{chapter}.ipynb"),
        str(tmp_path / "out.ipynb"),
        kernel_name="colab",
        engine_name="progress",
        progress_bar=False,
        chapter=chapter,
        cwd=elsewhere,
    )
    assert execute.META in done.metadata
    setup = next(cell for cell in done.cells if "setup" in cell.metadata.get("tags", []))
    assert setup.outputs == [], "the package was found, so nothing is to be installed"
    assert list(elsewhere.iterdir()) == [], "a chapter at small scale leaves no files"
