"""Lay out a chapter: python -m tools.new 07_vq_vae ["Its title"]

A chapter is a text, a module and tests of one name, and it is listed in four places: the table of contents, the front
page, the import rule in pyproject.toml, and the slices of tests/test_full_scale.py. `make` writes all of them, with
TODO wherever something is to be filled in; the chapter's own tests fail and name what is open until nothing is.
`unlisted` says where a chapter has been forgotten, and a test holds it to nothing.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from tools import inputs

TEMPLATE = Path(__file__).resolve().parent / "template"
CONTENTS, FRONT, RULE, SLICES = (
    "_toc.yml",
    "book/index.md",
    "pyproject.toml",
    "tests/test_full_scale.py",
)
# On the front page: | 7 | [VQ-VAE](07_vq_vae.ipynb) | Its question? | ready |
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", re.M)
PART = re.compile(r"^\| \*\*([IVX]+)\*\* \| \*\*(.+?)\*\* \|", re.M)
LINK = re.compile(r"\[(.+?)\]\((\w+)\.ipynb\)")


def make(chapter: str, title: str = "", root: Path = inputs.ROOT) -> list[Path]:
    """Write a new chapter's files and list it where chapters are listed.

    Args:
        chapter: Number and name, such as "07_vq_vae".
        title: Its title; where left out, the front page's, or the name's words.
        root: The repository.

    Returns:
        The files that were written or edited; none is touched if something is wrong.

    Raises:
        ValueError: If the name is no chapter's name, or its number, module or tests are taken.
    """
    if not re.fullmatch(r"\d\d_[a-z][a-z0-9]*(_[a-z0-9]+)*", chapter):
        raise ValueError(
            f"a chapter is called like 07_vq_vae: number, low line, name; got {chapter!r}"
        )
    slug, number = inputs.slug(chapter), int(chapter[:2])
    front = (root / FRONT).read_text()
    row = next((found for found in ROW.finditer(front) if int(found[1]) == number), None)
    title = title or (row[2] if row and "](" not in row[2] else slug.replace("_", " ").capitalize())
    if re.search(r'[|"\n]', title):
        raise ValueError(f'a title holds no |, no " and no line break; got {title!r}')
    texts = {
        root / "chapters" / f"{chapter}.md": "chapter.md",
        root / "src" / inputs.PACKAGE / f"{slug}.py": "module.py.in",
        root / "tests" / f"test_{slug}.py": "test.py.in",
    }
    taken = [path for path in [*texts, root / "src" / inputs.PACKAGE / slug] if path.exists()]
    taken += [path for path in (root / "chapters").glob(f"{chapter[:2]}_*.md") if path not in taken]
    if taken:
        raise ValueError(
            f"already there: {', '.join(str(path.relative_to(root)) for path in taken)}"
        )
    values = {"chapter": chapter, "slug": slug, "dashed": slug.replace("_", "-"), "title": title}
    written = {
        path: re.sub(r"@(\w+)@", lambda match: values[match[1]], (TEMPLATE / name).read_text())
        for path, name in texts.items()
    }
    listed: dict[str, Callable[[str], str]] = {
        CONTENTS: lambda text: _in_contents(text, chapter, title, front),
        FRONT: lambda text: _on_front_page(text, chapter, title),
        RULE: lambda text: _in_rule(
            text,
            chapter,
            [inputs.slug(name) for name in inputs.numbered(root) if name < chapter],
            all(number > int(found[1]) for found in ROW.finditer(front)),
        ),
        SLICES: lambda text: _in_slices(text, chapter),
    }
    written |= {root / name: edit((root / name).read_text()) for name, edit in listed.items()}
    for path, text in written.items():
        path.write_text(text)
    return list(written)


def _in_contents(text: str, chapter: str, title: str, front: str) -> str:
    """Add a chapter to its part, after the chapters before it; the part too if it has none yet."""
    number = int(chapter[:2])
    rows = {int(found[1]): found.start() for found in ROW.finditer(front)}
    at = rows.get(number, len(front))
    roman, name = [found.groups() for found in PART.finditer(front) if found.start() < at][-1]
    entry = f'      - file: book/{chapter}\n        title: "{number}. {title.split(":")[0]}"\n'
    head = re.search(rf'^  - caption: "?Part {roman}\b.*\n    chapters:\n', text, re.M)
    if head is None:
        part = f'  - caption: "Part {roman}: {name[0].lower()}{name[1:]}"\n    chapters:\n{entry}'
        other = re.search(r'^  - caption: (?!"?Part |Using)', text, re.M)
        at = other.start() if other else len(text)
        return text[:at] + part + text[at:]
    after = head.end()
    end = text.find("  - caption", after)
    for found in re.finditer(
        r"      - file: book/(\d\d)_\w+\n(?:        .*\n)*", text[: end if end > 0 else None]
    ):
        if found.start() >= head.end() and int(found[1]) < number:
            after = found.end()
    return text[:after] + entry + text[after:]


def _on_front_page(text: str, chapter: str, title: str) -> str:
    """Turn the chapter's row into a link, or add one after the row before it."""
    rows = list(ROW.finditer(text))
    for row in rows:
        if int(row[1]) == int(chapter[:2]):
            line = f"| {row[1]} | [{row[2]}]({chapter}.ipynb) | {row[3]} | ready |"
            return text[: row.start()] + line + text[row.end() :]
    line = f"| {int(chapter[:2])} | [{title}]({chapter}.ipynb) | TODO: the question of {chapter} | ready |"
    before = [row for row in rows if int(row[1]) < int(chapter[:2])]
    at = before[-1].end() if before else rows[0].start() - 1
    return text[:at] + "\n" + line + text[at:]


def _in_rule(text: str, chapter: str, earlier: list[str], last: bool) -> str:
    """Add the module to the layers, above those of the earlier chapters."""
    slug = inputs.slug(chapter)
    if f'    "({slug})",\n' in text:
        return text.replace(f'    "({slug})",\n', f'    "{slug}",\n')
    layers = text.index("\nlayers = [\n") + len("\nlayers = [\n")
    lines = [re.search(rf'^    "\(?{name}\)?",$', text, re.M) for name in earlier]
    at = layers if last else min(line.start() for line in lines if line)
    return text[:at] + f'    "{slug}",\n' + text[at:]


def _in_slices(text: str, chapter: str) -> str:
    """Add a budget of seconds, which is the module's to fill in."""
    head, table, rest = re.split(r"(^SLICES[^\n]*\n.*?^\})", text, maxsplit=1, flags=re.M | re.S)
    entries = [found for found in re.finditer(r'^    "(\w+)": ', table, re.M) if found[1] > chapter]
    at = entries[0].start() if entries else len(table) - 1
    return head + table[:at] + f'    "{chapter}": dict(steps=2),\n' + table[at:] + rest


def unlisted(root: Path = inputs.ROOT) -> list[str]:
    """Say where a chapter is missing, out of order or called otherwise.

    Args:
        root: The repository.

    Returns:
        What is wrong, a line each.
    """
    there, found = inputs.chapters(root), []
    numbered = [name for name in there if name[:2].isdigit()]
    # The table of contents, which is the reading order.
    entries = {
        entry["file"].removeprefix("book/"): entry.get("title", "")
        for part in yaml.safe_load((root / CONTENTS).read_text())["parts"]
        for entry in part["chapters"]
    }
    shown = [name for name in entries if re.match(r"(\d\d|part\d)_", name)]
    found += [f"{CONTENTS} lacks {name}" for name in there if name not in shown]
    found += [
        f"{CONTENTS} has {name}, and there is no such chapter"
        for name in shown
        if name not in there
    ]
    if [name for name in shown if name in numbered] != [name for name in numbered if name in shown]:
        found.append(f"{CONTENTS}: the chapters are not in order")
    for name in numbered:
        if name in shown and not re.fullmatch(rf"{int(name[:2])}\. \S.{{0,28}}", entries[name]):
            found.append(
                f'{CONTENTS}: {name} needs a short title "{int(name[:2])}. ...", has {entries[name]!r}'
            )
    # The front page.
    front = (root / FRONT).read_text()
    rows = {int(row[1]): (row[2], row[4]) for row in ROW.finditer(front)}
    table = front[front.index("| **I** |") :]
    linked = [name for _, name in LINK.findall(table)]
    found += [
        f"{FRONT} lists {name} {linked.count(name)} times"
        for name in there
        if linked.count(name) != 1
    ]
    found += [
        f"{FRONT} links to {name}, and there is no such chapter"
        for name in linked
        if name not in there
    ]
    for number, (words, state) in rows.items():
        link = LINK.fullmatch(words)
        if link and not link[2].startswith(f"{number:02}_"):
            found.append(f"{FRONT}: row {number} links to {link[2]}")
        if state != ("ready" if link else "in preparation"):
            found.append(f"{FRONT}: row {number} says {state!r}")
    if list(rows) != sorted(rows):
        found.append(f"{FRONT}: the rows are not in order")
    # The import rule, from the last chapter down to the first.
    rule = (root / RULE).read_text()
    layers = [
        layer.strip("()")
        for layer in re.findall(r'^    "(\(?\w+\)?)",$', rule[rule.index("\nlayers") :], re.M)
    ]
    order = [layer for layer in reversed(layers) if layer in map(inputs.slug, numbered)]
    if order != [inputs.slug(name) for name in numbered]:
        found.append(
            f"{RULE}: the layers are {', '.join(order)}, which is not the order of the chapters"
        )
    # What belongs to a chapter.
    slices = re.findall(r'^    "(\w+)": ', (root / SLICES).read_text(), re.M)
    for name in there:
        own = [path.relative_to(root).parts[0] for path in inputs.room(name, root)]
        found += [
            f"{name} has no {what}"
            for what, folder in (("module", "src"), ("tests", "tests"))
            if folder not in own
        ]
        found += [f"{SLICES} has no slice of {name}"] if name not in slices else []
    return found


def main(words: list[str]) -> str | None:
    if not words or not words[0]:
        return "Say which: make new CHAPTER=07_vq_vae"
    try:
        paths = make(*words[:2])
    except ValueError as error:
        return str(error)
    here = inputs.ROOT
    print("\n".join(f"  {path.relative_to(here)}" for path in paths))
    print(
        f"\nWhat is open:   .venv/bin/pytest -q tests/test_chapters.py -k 'open and {words[0]}'\n"
        f"Write it:       make lab CHAPTER={words[0]}\n"
        f"Make its page:  make chapter CHAPTER={words[0]}"
    )
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
