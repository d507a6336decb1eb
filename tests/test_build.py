"""The build: what makes a chapter run, what does not, and what a failure or a kill leaves behind.

Each test works on a copy of the repository with two tiny chapters, so that real Snakemake, papermill and kernels run
in seconds.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import nbformat
import pytest

from tools import execute, inputs

SNAKEMAKE = str(Path(sys.executable).with_name("snakemake"))
CHAPTER = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A tiny chapter

Some prose.

```{{code-cell}} ipython3
:tags: [setup]

import noise2tokens
```

```{{code-cell}} ipython3
:tags: [parameters]

scale = "small"
seed = 0
```

```{{code-cell}} ipython3
{code}
```

We measured {{glue:text}}`number:.2f`.
"""


@pytest.fixture
def book(root, tmp_path) -> Path:
    """A repository with the real tools and modules and two tiny chapters."""
    for name in ("src", "tools", "profiles"):
        shutil.copytree(
            root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("Snakefile", "requirements.lock", "_config.yml", "_toc.yml", "pyproject.toml"):
        shutil.copy(root / name, tmp_path / name)
    (tmp_path / "book").mkdir()
    write(
        tmp_path,
        "01_first",
        "from noise2tokens.display import glue\nglue('number', 1.234)\nprint('first')",
    )
    code = "from noise2tokens.display import glue\nfrom noise2tokens.images import split\nglue('number', 5)\n"
    write(tmp_path, "02_second", code + "print('second')")
    return tmp_path


def write(book: Path, name: str, code: str) -> None:
    path = book / "chapters" / f"{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(CHAPTER.format(code=code))


def snakemake(book: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{book / 'src'}{os.pathsep}{book}"}
    return subprocess.run(
        [SNAKEMAKE, *(words or ["chapters"])],
        cwd=book,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def executed(run: subprocess.CompletedProcess) -> set[str]:
    """Which chapters executed cells in a run."""
    return {line.split()[0] for line in run.stdout.splitlines() if "  cell " in line}


def later(path: Path) -> None:
    """Make sure that an edit is newer than what was built from the file, and not newer than what will be."""
    time.sleep(0.1)
    path.touch()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    later(path)


@pytest.mark.slow
def test_what_runs_after_which_edit(book):
    first = snakemake(book)
    assert first.returncode == 0, first.stdout + first.stderr
    assert executed(first) == {"01_first", "02_second"}
    notebooks = {name: book / "book" / f"{name}.ipynb" for name in ("01_first", "02_second")}
    original = nbformat.read(notebooks["01_first"], as_version=4)
    assert any("We measured 1.23." in cell.source for cell in original.cells)
    (card,) = (c for c in original.cells if "header-card" in c.metadata.get("tags", []))
    assert "runs in" in card.source and "no earlier chapter" in card.source

    # Nothing changed: no job at all.
    bytes_before = notebooks["01_first"].read_bytes()
    nothing = snakemake(book)
    assert nothing.returncode == 0 and "  c" not in nothing.stdout

    # Prose: the text changes, the outputs stay, no cell runs.
    edit(book / "chapters/01_first.md", "Some prose.", "Other prose.")
    prose = snakemake(book)
    assert prose.returncode == 0 and executed(prose) == set() and "outputs kept" in prose.stdout
    updated = nbformat.read(notebooks["01_first"], as_version=4)
    assert "Other prose." in updated.cells[0].source
    assert [cell.get("outputs") for cell in updated.cells] == [
        cell.get("outputs") for cell in original.cells
    ]

    # Back again: byte for byte what it was.
    edit(book / "chapters/01_first.md", "Other prose.", "Some prose.")
    snakemake(book)
    assert notebooks["01_first"].read_bytes() == bytes_before

    # A module: exactly the chapters that import it, here through another module.
    edit(book / "src/noise2tokens/training.py", "import copy", "import copy  # edited")
    later(book / "src/noise2tokens/training.py")
    module = snakemake(book)
    assert module.returncode == 0 and executed(module) == {"02_second"}, module.stdout

    # The lock file: all.
    (book / "requirements.lock").write_text("# other versions\n")
    later(book / "requirements.lock")
    assert executed(snakemake(book)) == {"01_first", "02_second"}

    # A fresh clone, where time stamps mean nothing: jobs look, no cell runs.
    later(book / "src/noise2tokens/__init__.py")
    shutil.rmtree(book / ".snakemake")
    clone = snakemake(book)
    assert (
        clone.returncode == 0
        and executed(clone) == set()
        and clone.stdout.count("outputs kept") == 2
    )


@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_last_good_notebook_stays(book):
    assert snakemake(book).returncode == 0
    good = (book / "book/01_first.ipynb").read_bytes()
    edit(book / "chapters/01_first.md", "print('first')", "print('before')\n1 / 0")
    edit(book / "chapters/02_second.md", "print('second')", "print('changed')")
    run = snakemake(book)
    assert run.returncode != 0
    for word in ("01_first, cell 3", "ZeroDivisionError", "_build/failed/01_first.ipynb"):
        assert word in run.stderr, run.stderr
    assert (book / "book/01_first.ipynb").read_bytes() == good
    assert "changed" in (book / "book/02_second.ipynb").read_text(), (
        "the other chapter has to go on"
    )
    failed = nbformat.read(book / "_build/failed/01_first.ipynb", as_version=4)
    assert any(
        out.output_type == "error" for cell in failed.cells for out in cell.get("outputs", [])
    )

    edit(book / "chapters/01_first.md", "1 / 0", "1 / 1")
    rest = snakemake(book)
    assert rest.returncode == 0 and executed(rest) == {"01_first"}


@pytest.mark.slow
def test_a_killed_build_loses_nothing_and_the_next_one_goes_on(book):
    assert snakemake(book).returncode == 0
    good = (book / "book/01_first.ipynb").read_bytes()
    edit(book / "chapters/01_first.md", "print('first')", "import time\ntime.sleep(600)")
    environment = {**os.environ, "PYTHONPATH": f"{book / 'src'}{os.pathsep}{book}"}
    process = subprocess.Popen(
        [SNAKEMAKE, "chapters"],
        cwd=book,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if "cell  3 of" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (book / "book/01_first.ipynb").read_bytes() == good

    edit(book / "chapters/01_first.md", "time.sleep(600)", "print('awake')")
    run = snakemake(book)
    assert run.returncode == 0, run.stdout + run.stderr
    assert executed(run) == {"01_first"} and "awake" in (book / "book/01_first.ipynb").read_text()


@pytest.mark.slow
def test_unknown_parameters_and_quoted_numbers_are_errors(book, capfd):
    for parameters in ({"scale": "small", "sede": 1}, {"scale": "small", "sede": 1, "seed": 2}):
        with pytest.raises(execute.ChapterError, match="no parameter sede; it has scale, seed"):
            execute.make("01_first", book / "out.ipynb", parameters, root=book)
    edit(book / "chapters/01_first.md", "glue('number', 1.234)", "glue('other', 1.234)")
    with pytest.raises(execute.ChapterError, match="'number'"):
        execute.make("01_first", book / "out.ipynb", {"scale": "small"}, root=book)
    assert not (book / "out.ipynb").exists()


@pytest.mark.slow
def test_a_parameter_that_differs_is_injected_and_survives_an_edit_of_the_prose(book):
    output = book / "out.ipynb"
    edit(book / "chapters/01_first.md", "print('first')", "print(seed)")
    assert execute.make("01_first", output, {"scale": "small", "seed": 7}, root=book)
    edit(book / "chapters/01_first.md", "Some prose.", "Other prose.")
    assert not execute.make("01_first", output, {"scale": "small", "seed": 7}, root=book)
    cells = nbformat.read(output, as_version=4).cells
    injected = next(
        cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", [])
    )
    assert "seed = 7" in injected.source
    assert cells[-2].outputs[-1].text == "7\n" and "Other prose." in cells[0].source


def test_inputs_are_the_import_closure(root):
    closure = inputs.closure({"noise2tokens.nice.NICE"})
    assert {f"noise2tokens{name}" for name in ("", ".nice", ".images", ".training")} <= closure
    assert not any(name.startswith("noise2tokens.flash_attention") for name in closure)
    with pytest.raises(ValueError, match="no such module"):
        inputs.closure({"noise2tokens.nowhere.thing"})


def pins(path: Path) -> dict[str, set[str]]:
    """The versions that a lock file pins, by package; some are pinned by version of Python."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.M):
        found.setdefault(name, set()).add(version)
    return found


def test_the_lock_files_agree_and_only_the_first_is_behind_an_output(root):
    """A peer of the tests can be added without executing the book again."""
    executes, proves = (pins(root / f"requirements{part}.lock") for part in ("", "-test"))
    assert {"papermill", "numpy", "tokenizers"} <= executes.keys()
    assert {"pytest", "nbval", "zuko"} <= proves.keys() - executes.keys()
    assert "torch" not in executes | proves  # the Makefile installs it first
    assert all(proves[name] == executes[name] for name in proves.keys() & executes.keys())
    behind = {path.name for path in inputs.files(inputs.chapters()[0])}
    assert "requirements.lock" in behind and "requirements-test.lock" not in behind


def test_what_is_locked_is_installed(root):
    """For this version of Python; a lock file that was edited and not installed would prove nothing."""
    wanted = pins(root / "requirements.lock") | pins(root / "requirements-test.lock")
    here = {name: [d.version for d in distributions(name=name)] for name in wanted}
    wrong = {name: found for name, found in here.items() if found and found[0] not in wanted[name]}
    assert wrong == {} and len([name for name in here if here[name]]) > 200


def test_snakemake_offers_the_jobs_to_a_slurm_cluster(root, tmp_path):
    """The dry run loads the SLURM executor and plans every chapter as a GPU job."""
    run = subprocess.run(
        [
            SNAKEMAKE,
            "--workflow-profile",
            "profiles/slurm",
            "--config",
            "scale=full",
            "--dry-run",
            "chapters",
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    plan = run.stdout + run.stderr
    for chapter in inputs.chapters():
        assert f"_build/full/book/{chapter}.ipynb" in plan
    assert "gpu=1" in plan and "slurm_partition=gpu" in plan


def test_snakemake_refuses_an_unknown_scale(root):
    run = subprocess.run(
        [SNAKEMAKE, "--config", "scale=huge", "--dry-run"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode != 0 and "small, long or full" in run.stdout + run.stderr
