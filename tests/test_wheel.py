"""Colab's situation: the built wheel with what it depends on, beside a PyTorch that was there before.

`tools.wheel` makes it, by a chapter's own set-up cell. Here is what installing may and may not do; every notebook is
run in it, and compared, by `make test`.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tools import inputs, wheel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def colab() -> Path:
    """The environment's Python."""
    return wheel.make()


def run(python: Path, code: str, cwd: Path) -> str:
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), *(["-m", "IPython"] if "%pip" in code else []), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_set_up_cell_leaves_torch_as_it_is(colab, tmp_path):
    made = json.loads((wheel.FOLDER / "made.json").read_text())
    assert run(colab, wheel.TORCH, tmp_path).strip() == made["torch"]


def test_the_set_up_cell_says_and_does_nothing_where_the_package_is(colab, tmp_path):
    assert run(colab, wheel.set_up_cell(), tmp_path) == ""


def test_the_package_comes_from_the_wheel_with_its_data(colab, tmp_path):
    code = "import noise2tokens, pathlib; print(pathlib.Path(noise2tokens.__file__).parent)"
    folder = Path(run(colab, code, tmp_path).strip())
    assert folder.is_relative_to(wheel.FOLDER / "env")

    def content(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.suffix in (".py", ".json", ".gz", ".html", ".js", ".css")
        }

    source = content(inputs.ROOT / "src" / inputs.PACKAGE)
    assert content(folder) == source
    assert any(name.startswith("corpora/") for name in source)


def test_the_wheel_pulls_in_nothing_of_build_and_tests(colab, tmp_path):
    code = (
        "from importlib.metadata import distributions as d; print(*(x.name.lower() for x in d()))"
    )
    installed = set(run(colab, code, tmp_path).split())
    assert {"noise2tokens", "torch", "ipykernel"} <= installed
    unwanted = {"pytest", "snakemake", "papermill", "jupyter-book", "jupytext", "torchvision"}
    assert not installed & (unwanted | {"beartype", "nbval", "transformers", "triton"})
