"""What a chapter's outputs depend on: its code, the modules that it imports (directly or not), data, the lock file.

Snakemake asks `files` for a chapter's inputs, and so knows what to run when one of them changes. `digest` condenses
their content into one hash, which the executed notebook carries: with it a run can tell an edit of the prose, which
needs no execution, from an edit of the code, and a fresh clone, whose time stamps mean nothing, from a stale one.
"""

import ast
import hashlib
import json
import re
from functools import cache
from pathlib import Path

import grimp
import jupytext
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "noise2tokens"
LOCK = ROOT / "requirements.lock"


class ChapterError(Exception):
    """A chapter that could not be made; the message names chapter, cell and error."""


def chapters(root: Path = ROOT) -> list[str]:
    """Name what is executed: the chapters in reading order, then the syntheses that end a part of the book."""
    names = (path.stem for path in (root / "chapters").glob("*.md"))
    return sorted(name for name in names if re.fullmatch(r"(\d\d|part\d)_\w+", name))


def numbered(root: Path = ROOT) -> list[str]:
    """Name the chapters without the syntheses, which compare chapters and teach nothing new."""
    return [name for name in chapters(root) if name[:2].isdigit()]


def slug(chapter: str) -> str:
    """Return the name that a chapter's module and tests have: the chapter's without its number."""
    return chapter[3:] if chapter[:2].isdigit() else chapter


def room(chapter: str, root: Path = ROOT) -> list[Path]:
    """List the files that are a chapter's own, its text apart: module or package, and tests."""
    base = root / "src" / PACKAGE / slug(chapter)
    tests = root / "tests" / f"test_{slug(chapter)}.py"
    return [
        path
        for path in (base.with_suffix(".py"), *sorted(base.rglob("*.py")), tests)
        if path.exists()
    ]


def pages(root: Path = ROOT) -> list[Path]:
    """List what the site is made of beside the chapters: pages, pictures, styles, and the code that renders them."""
    found = [
        path
        for path in (root / "book").rglob("*")
        if path.is_file() and path.stem not in chapters(root)
    ]
    tools = [root / "tools" / name for name in ("site.py", "page.py", "book_pages.py")]
    return sorted(path.relative_to(root) for path in [*found, *tools])


def source(chapter: str, root: Path = ROOT) -> NotebookNode:
    """Read a chapter's text as a notebook without outputs.

    Raises:
        ValueError: If the text cannot be parsed as a MyST notebook.
    """
    path = root / "chapters" / f"{chapter}.md"
    try:
        return jupytext.read(path, fmt="md:myst")
    except Exception as error:
        raise ValueError(f"{path.name} is not a MyST notebook: {error}") from error


def code(notebook: NotebookNode) -> list[str]:
    """Return the sources of the code cells."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def imported(notebook: NotebookNode) -> set[str]:
    """Name what the code cells import from the package, as dotted names that may end in a function."""
    names = set()
    for cell in code(notebook):
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(cell))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == PACKAGE}


@cache
def _graph() -> grimp.ImportGraph:
    return grimp.build_graph(PACKAGE, cache_dir=None)


def closure(names: set[str]) -> set[str]:
    """Add to imported names all modules that they import in turn, and the packages that hold them.

    Raises:
        ValueError: If a name's module does not exist.
    """
    graph = _graph()
    modules: set[str] = set()
    for name in names:
        module = name if name in graph.modules else name.rpartition(".")[0]
        if module not in graph.modules:
            raise ValueError(f"{name}: the package has no such module")
        modules |= {module} | graph.find_upstream_modules(module)
    for module in set(modules):
        parts = module.split(".")
        for end in range(1, len(parts)):
            package = ".".join(parts[:end])
            modules |= {package} | graph.find_upstream_modules(package)
    return modules


def modules(chapter: str, root: Path = ROOT) -> list[str]:
    """Name the modules behind a chapter, in alphabetical order."""
    return sorted(closure(imported(source(chapter, root)) | {PACKAGE}))


def files(chapter: str, root: Path = ROOT) -> list[Path]:
    """List the files behind a chapter's outputs, its own text apart: modules, data, its records, the lock file."""
    found = []
    for module in modules(chapter, root):
        base = root / "src" / Path(*module.split("."))
        found.append(base / "__init__.py" if base.is_dir() else base.with_suffix(".py"))
    package = root / "src" / PACKAGE
    corpora = sorted((package / "corpora").iterdir()) if package / "text.py" in found else []
    words = "\n".join(code(source(chapter, root)))
    # Of the pages that animations and labs are poured into, those that the chapter uses.
    templates = [
        path
        for path in sorted((package / "templates").glob("*"))
        if {"player": "animate(", "lab": "lab("}.get(path.stem, path.stem) in words
    ]
    recorded = sorted((package / "recorded").glob(f"{chapter}.*.json"))
    return [*found, *corpora, *templates, *recorded, root / LOCK.name]


def digest(chapter: str, scale: str, root: Path = ROOT) -> str:
    """Hash what a chapter's outputs depend on."""
    parts = [scale, *code(source(chapter, root))]
    parts += [
        f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in files(chapter, root)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def with_ids(notebook: NotebookNode) -> NotebookNode:
    """Name cells by their content, so that a rebuild changes no line of the file that says the same."""
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        name = hashlib.sha256(cell.source.encode()).hexdigest()[:12]
        seen[name] = seen.get(name, 0) + 1
        cell["id"] = name if seen[name] == 1 else f"{name}-{seen[name]}"
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook
