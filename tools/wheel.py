"""Make Colab's situation: python -m tools.wheel

An environment with PyTorch and a kernel, into which a chapter's own set-up cell has installed the built wheel, with
the versions of the lock file and nothing else of this repository. `make test` runs every notebook with its kernel:

    JUPYTER_PATH=_build/wheel pytest --nbval --nbval-kernel-name wheel book/

PyTorch is there beforehand, as on Colab. It is not installed a second time, which would take gigabytes where it comes
with CUDA, but linked from the environment that this runs in, with what it requires: pip sees it, and cannot change it
unnoticed. Made anew where the lock file or Python has changed, else only the wheel is, where the package has.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement

from tools import inputs

FOLDER = inputs.ROOT / "_build" / "wheel"
KERNEL = "wheel"
TORCH = "import torch; print(torch.__version__, torch.__file__)"


def make(folder: Path = FOLDER) -> Path:
    """Bring the environment up to date.

    Args:
        folder: Where it is, or is to be.

    Returns:
        Its Python.

    Raises:
        RuntimeError: If a command fails, or installing the package has changed PyTorch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        python = folder / "env" / "bin" / "python"
        stamp = folder / "made.json"
        made = json.loads(stamp.read_text()) if stamp.exists() else {}
        package = [*sorted((inputs.ROOT / "src").rglob("*")), inputs.ROOT / "pyproject.toml"]
        package = [
            path
            for path in package
            if path.is_file() and not {"__pycache__", "noise2tokens.egg-info"} & set(path.parts)
        ]
        around = _hash([inputs.LOCK, Path(__file__)], sys.version, distribution("torch").version)
        if made.get("around") != around:
            stamp.unlink(missing_ok=True)
            made = {"around": around}
            _environment(folder)
        if made.get("package") != (fresh := _hash(package)):
            stamp.unlink(missing_ok=True)
            before = _run(python, "-c", TORCH)
            _install(folder, python)
            if _run(python, "-c", TORCH) != before:
                raise RuntimeError("installing the package has changed PyTorch")
            stamp.write_text(json.dumps({**made, "package": fresh, "torch": before.strip()}))
    return python


def _environment(folder: Path) -> None:
    """Make the environment without the package: PyTorch, a kernel, and what Jupyter needs to find it."""
    python = folder / "env" / "bin" / "python"
    venv.create(folder / "env", with_pip=True, clear=True)
    shutil.rmtree(folder / "torch", ignore_errors=True)
    (folder / "torch").mkdir()
    for source in _torch_files():
        (folder / "torch" / source.name).symlink_to(source)
    site = Path(_run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    (site / "torch.pth").write_text(f"{folder / 'torch'}\n")
    # Versions without hashes, as constraints have them.
    lock = re.sub(r" \\\n(    --hash=\S+( \\\n)?)+", "\n", inputs.LOCK.read_text())
    (folder / "pins.txt").write_text(lock)
    _run(python, "-m", "pip", "install", "-q", "-c", folder / "pins.txt", "ipykernel")
    kernel = folder / "kernels" / KERNEL
    kernel.mkdir(parents=True, exist_ok=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": KERNEL, "language": "python", "env": {"PYTHONPATH": ""}}
    (kernel / "kernel.json").write_text(json.dumps(spec))


def _torch_files() -> set[Path]:
    """List files and folders, beside each other in site-packages, of PyTorch and all that it requires here."""
    todo, seen, found = ["torch"], set(), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        package = distribution(name)
        for file in package.files:
            if file.parts[0] not in ("..", "__pycache__"):
                found.add(Path(package.locate_file(file.parts[0])))
        for text in package.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed.name)
    return found


def _install(folder: Path, python: Path) -> None:
    """Build the wheel, and let a chapter's set-up cell install it, as it does on Colab from the repository."""
    source, wheels = folder / "source", folder / "wheels"
    for old in (source, wheels):
        shutil.rmtree(old, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(inputs.ROOT / "src", source / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(inputs.ROOT / name, source)
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source]
    _run(sys.executable, "-m", "pip", *build)
    (wheel,) = wheels.glob("*.whl")
    _run(python, "-m", "pip", "uninstall", "-q", "-y", inputs.PACKAGE)
    code = set_up_cell()
    code, count = re.subn(r"^( +source = ).*$", rf"\g<1>{wheel.as_uri()!r}", code, flags=re.M)
    if count != 1:
        raise RuntimeError(f"the set-up cell says {count} times where the package comes from")
    _run(python, "-m", "IPython", "-c", code, cwd=folder, PIP_CONSTRAINT=folder / "pins.txt")
    _run(python, "-c", f"import {inputs.PACKAGE}", cwd=folder)


def set_up_cell() -> str:
    """Return the code of the set-up cell, the same in all chapters."""
    cells = inputs.source(inputs.chapters()[0]).cells
    return next(cell.source for cell in cells if "setup" in cell.metadata.get("tags", []))


def _hash(paths: list[Path], *words: str) -> str:
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    names = [str(path.relative_to(inputs.ROOT)) for path in paths]
    return hashlib.sha256(json.dumps([names, content, words]).encode()).hexdigest()


def _run(*words: str | Path, cwd: Path | None = None, **variables: str | Path) -> str:
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        **{k: str(v) for k, v in variables.items()},
    }
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    if done.returncode:
        said = done.stdout[-3000:] + done.stderr[-3000:]
        raise RuntimeError(f"{' '.join(command)[:200]} failed:\n{said}")
    return done.stdout


if __name__ == "__main__":
    print(f"Colab's situation: {make()}")
