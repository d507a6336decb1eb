"""A new chapter is laid out whole, its open ends are named, and a chapter that is not listed somewhere is noticed."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools import inputs, new


@pytest.fixture
def book(root, tmp_path) -> Path:
    """A copy of the repository without its notebooks, as it was before chapter 7 was written."""
    for name in ("chapters", "src", "tools", "tests"):
        shutil.copytree(
            root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    (tmp_path / "book").mkdir()
    for name in ("_toc.yml", "pyproject.toml", "conftest.py", "requirements.lock"):
        shutil.copy(root / name, tmp_path / name)
    for name in ("index.md", "references.bib"):
        shutil.copy(root / "book" / name, tmp_path / "book" / name)
    shutil.rmtree(tmp_path / "src" / inputs.PACKAGE / "vq_vae")
    for path in [tmp_path / "chapters/07_vq_vae.md", tmp_path / "tests/test_vq_vae.py"]:
        path.unlink()
    for name, pattern, before in (
        ("_toc.yml", r"      - file: book/07_vq_vae\n.*\n", ""),
        ("book/index.md", r"\| 7 \| .* \| (How do you train.*) \| ready \|", r"| 7 | VQ-VAE | \1 | in preparation |"),
        ("pyproject.toml", r'"vq_vae"', '"(vq_vae)"'),
        ("tests/test_full_scale.py", r'    "07_vq_vae": dict\((?:\n        .*)*\n    \),\n', ""),
    ):  # fmt: skip
        text, found = re.subn(pattern, before, (tmp_path / name).read_text())
        assert found == 1, name
        (tmp_path / name).write_text(text)
    return tmp_path


def run(book: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{book / 'src'}{os.pathsep}{book}"}
    return subprocess.run(
        [sys.executable, *words], cwd=book, env=environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip


@pytest.mark.parametrize("chapter", ["07_vq_vae", "18_one_more"])
def test_a_new_chapter_is_listed_everywhere_and_in_order(book, chapter):
    before = {path: path.read_bytes() for path in book.rglob("*") if path.is_file()}
    touched = new.make(chapter, root=book)
    after = {path for path in book.rglob("*") if path.is_file()}
    assert {path for path in after if before.get(path) != path.read_bytes()} == set(touched)
    assert chapter in inputs.chapters(book) and new.unlisted(book) == []
    assert [path.name for path in inputs.room(chapter, book)] == [
        f"{chapter[3:]}.py",
        f"test_{chapter[3:]}.py",
    ]
    parts = yaml.safe_load((book / "_toc.yml").read_text())["parts"]
    part = next(
        part for part in parts if any(chapter in entry["file"] for entry in part["chapters"])
    )
    expected = (
        "Part I: transforming distributions" if chapter < "08" else "Part III: today's models"
    )
    assert part["caption"] == expected
    assert not any("@" in line for path in touched[:3] for line in placeholders(path))


def placeholders(path: Path) -> list[str]:
    return re.findall(r"@[a-z]+@", path.read_text())


def test_the_front_pages_words_are_the_title(book):
    new.make("07_vq_vae", root=book)
    assert "\n# VQ-VAE\n" in (book / "chapters/07_vq_vae.md").read_text()
    assert (
        "| 7 | [VQ-VAE](07_vq_vae.ipynb) | How do you train" in (book / "book/index.md").read_text()
    )
    assert 'title: "7. VQ-VAE"' in (book / "_toc.yml").read_text()
    new.make("18_one_more", "More: and more", root=book)
    assert "\n# More: and more\n" in (book / "chapters/18_one_more.md").read_text()
    assert 'title: "18. More"\n' in (book / "_toc.yml").read_text()


@pytest.mark.parametrize(
    "chapter, complaint",
    [
        ("7_vq_vae", "called like"),
        ("07-vq-vae", "called like"),
        ("07_VQ", "called like"),
        ("../07_x", "called like"),
        ("07_", "called like"),
        ("02_other", "already there: chapters/02_nice.md"),
        ("07_nice", "already there: src/noise2tokens/nice.py, tests/test_nice.py"),
        ("07_rectified_flow", "already there"),
    ],
)
def test_a_name_that_is_wrong_or_taken_leaves_everything_as_it_was(book, chapter, complaint):
    before = {path: path.read_bytes() for path in book.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=complaint):
        new.make(chapter, root=book)
    assert before == {path: path.read_bytes() for path in book.rglob("*") if path.is_file()}


def test_a_title_that_would_break_a_table_is_refused(book):
    for title in ("a | b", 'a "b"', "a\nb"):
        with pytest.raises(ValueError, match="a title holds no"):
            new.make("07_vq_vae", title, root=book)


@pytest.mark.slow
def test_a_new_chapters_own_tests_fail_and_name_what_is_open(book):
    new.make("07_vq_vae", root=book)
    anatomy = run(book, "-m", "pytest", "-q", "tests/test_chapters.py", "-k", "07_vq_vae or listed")
    assert anatomy.returncode == 1, anatomy.stdout + anatomy.stderr
    for name in ("listed", "sections", "setup", "own_name", "imports_its_own_module", "round_trip"):
        assert not re.search(rf"^(FAILED|ERROR) \S*{name}", anatomy.stdout, re.M), anatomy.stdout
    marked = [
        (path, number)
        for path in (book / "chapters/07_vq_vae.md", *inputs.room("07_vq_vae", book))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "TODO" in line
    ]
    assert len(marked) > 30
    for path, number in marked:
        assert f"{path.relative_to(book)}, line {number}: " in anatomy.stdout
    assert "no book/07_vq_vae.ipynb yet: make chapter CHAPTER=07_vq_vae" in anatomy.stdout

    own = run(
        book,
        "-m",
        "pytest",
        "-q",
        "tests/test_vq_vae.py",
        "tests/test_full_scale.py",
        "-k",
        "vq_vae",
    )
    assert own.returncode == 1 and " passed" in own.stdout  # the budgets fit the signature
    assert "NotImplementedError: TODO: full_scale of 07_vq_vae" in own.stdout
    for function in ast.parse((book / "tests/test_vq_vae.py").read_text()).body:
        if isinstance(function, ast.FunctionDef):
            assert f"FAILED tests/test_vq_vae.py::{function.name}" in own.stdout
            assert ast.literal_eval(function.body[0].value.args[0]) in own.stdout


@pytest.mark.slow
def test_a_new_chapter_fits_the_import_rule_and_stops_at_its_first_open_cell(book):
    new.make("07_vq_vae", root=book)
    rule = run(
        book, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    assert rule.returncode == 0, rule.stdout + rule.stderr
    made = run(book, "-m", "tools.execute", "07_vq_vae", "book/07_vq_vae.ipynb", "scale=small")
    assert made.returncode == 1 and not (book / "book/07_vq_vae.ipynb").exists()
    assert "07_vq_vae, cell 4: NotImplementedError: TODO: the failing attempt, drawn" in made.stderr


@pytest.mark.parametrize(
    "name, old, replacement, complaint",
    [
        ("_toc.yml", "      - file: book/02_nice\n        title: \"2. NICE\"\n", "", "_toc.yml lacks 02_nice"),
        ("_toc.yml", 'book/02_nice\n', "book/02_neat\n", "has 02_neat, and there is no such chapter"),
        ("_toc.yml", '"2. NICE"', '"NICE"', "needs a short title \"2. ...\", has 'NICE'"),
        ("_toc.yml", '"2. NICE"', '"3. NICE"', "needs a short title"),
        ("_toc.yml", '        title: "2. NICE"\n', "", "needs a short title"),
        ("book/index.md", "[NICE](02_nice.ipynb)", "NICE", "lists 02_nice 0 times"),
        ("book/index.md", "(03_realnvp_glow.ipynb)", "(02_nice.ipynb)", "row 3 links to 02_nice"),
        ("book/index.md", "(03_realnvp_glow.ipynb)", "(03_glow.ipynb)", "links to 03_glow, and there is no such"),
        ("book/index.md", "| 16 | [Muon]", "| 19 | [Muon]", "not in order"),
        ("book/index.md", "density? | ready |", "density? | in preparation |", "row 2 says 'in preparation'"),
        ("pyproject.toml", '    "nice",\n', "", "layers are"),
        ("pyproject.toml", '    "realnvp_glow",\n    "nice",\n', '    "nice",\n    "realnvp_glow",\n', "layers are"),
        ("tests/test_full_scale.py", '    "02_nice": ', '    "02_neat": ', "has no slice of 02_nice"),
        ("tests/test_nice.py", None, None, "02_nice has no tests"),
        ("src/noise2tokens/nice.py", None, None, "02_nice has no module"),
    ],
)  # fmt: skip
def test_a_forgotten_or_wrong_entry_is_noticed(book, name, old, replacement, complaint):
    assert new.unlisted(book) == []
    path = book / name
    if old is None:
        path.unlink()
    else:
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, replacement))
    assert any(complaint in line for line in new.unlisted(book)), new.unlisted(book)


def test_chapters_that_changed_places_are_noticed(book):
    path = book / "_toc.yml"
    entries = re.findall(r"      - file: book/0[23]_\w+\n        title: .*\n", path.read_text())
    path.write_text(path.read_text().replace("".join(entries), "".join(reversed(entries))))
    assert new.unlisted(book) == ["_toc.yml: the chapters are not in order"]


def test_the_command_says_what_it_wrote_or_what_is_wrong(book):
    done = run(book, "-m", "tools.new", "07_vq_vae", "")
    assert done.returncode == 0, done.stderr
    for word in ("chapters/07_vq_vae.md", "tests/test_vq_vae.py", "make chapter CHAPTER=07_vq_vae"):
        assert word in done.stdout
    assert "already there" in run(book, "-m", "tools.new", "07_vq_vae", "").stderr
    assert "make new CHAPTER=07_vq_vae" in run(book, "-m", "tools.new", "", "").stderr
