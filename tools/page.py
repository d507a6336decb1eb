"""What the build adds to a chapter's text: the first screen, numbers, links and folding.

A chapter's author writes title, objectives, set-up and sections, and tags one cell `opening`. The build puts a copy of
that cell's picture under the title, and a card of one line after the objectives; it folds cells that only set up, draw
or show sources, gives figures and exercises the chapter's number, and makes links of "chapter 5". Everything here is a
function of the chapter's text and its outputs, so that a page can be made again and compared.
"""

import ast
import re
from html import unescape
from typing import Any

import nbformat
from nbformat import NotebookNode

CHAPTER = re.compile(r"\b([Cc]hapters?) (\d+)((?:, \d+)*)((?: and | to )\d+)?")
# What must not be looked into: code, formulas, links, roles and directives' first lines, headings.
CLOSED = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\[[^\]]*\]\([^)]*\)|\{[a-z:]+\}`[^`]*`|^:::[^\n]*$|^#[^\n]*$",
    re.S | re.M,
)
IMAGE = re.compile(r'<img[^>]*src="(data:image/[^"]+)"')
PLAYER = re.compile(r'class="n2t-(player|lab)')


def assemble(notebook: NotebookNode, chapter: str, card: str, chapters: list[str]) -> None:
    """Turn an executed chapter into its page, in place.

    Args:
        notebook: The chapter with its outputs.
        chapter: Name of the chapter's file without its ending.
        card: The line of facts about the chapter.
        chapters: Names of all chapters, to link to.
    """
    number = int(chapter[:2]) if chapter[:2].isdigit() else None
    fold(notebook)
    figures = exercises = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = link_chapters(cell.source, chapter, chapters)
            if number is not None:
                cell.source, exercises = number_exercises(cell.source, number, exercises)
        elif number is not None and "figure" in cell.metadata.get("mystnb", {}):
            figures += 1
            figure = cell.metadata["mystnb"]["figure"]
            figure["caption"] = f"**Figure {number}.{figures}.** {figure['caption']}"
    title = notebook.cells[0]
    if number is not None:
        title.source = re.sub(r"^# ", f"# {number}. ", title.source)
    after = next(
        i for i, cell in enumerate(notebook.cells) if "setup" in cell.metadata.get("tags", [])
    )
    notebook.cells.insert(after, _markdown(card, "header-card"))
    picture = opening(notebook)
    if picture:
        notebook.cells.insert(1, _markdown(picture, "header-opening"))


def _markdown(source: str, tag: str) -> NotebookNode:
    cell = nbformat.v4.new_markdown_cell(source)
    cell.metadata["tags"] = [tag]
    return cell


def opening_cell(notebook: NotebookNode) -> NotebookNode | None:
    """Return the code cell whose picture opens the page."""
    tagged = [cell for cell in notebook.cells if "opening" in cell.metadata.get("tags", [])]
    return tagged[0] if tagged else None


def opening(notebook: NotebookNode) -> str:
    """Write the picture under the title as Markdown: a figure as it is, of an animation the last frame.

    The picture is part of the text, as a data URI, because a notebook on Colab has no files beside it.
    """
    cell = opening_cell(notebook)
    if cell is None:
        return ""
    options = cell.metadata.get("mystnb", {})
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            picture = "data:image/png;base64," + data["image/png"].replace("\n", "")
            alt, caption = options["image"]["alt"], options["figure"]["caption"]
            caption = re.sub(r"^\*\*Figure [\d.]+\*\* ", "", caption)
            break
        if PLAYER.search(data.get("text/html", "")):
            page = data["text/html"]
            frames = re.findall(r'"(data:image/[^"]+)"', page)
            if not frames:  # a lab without a still picture
                return ""
            picture = frames[-1]
            alt = unescape(re.search(r'<img[^>]*alt="([^"]*)"', page).group(1))
            caption = "The last frame of an animation that stands further down, with its buttons."
            if "n2t-lab" in page:
                caption = "An experiment that stands further down, with its sliders."
            break
    else:
        return ""
    alt = alt.replace("[", "(").replace("]", ")").replace("\n", " ")
    return f"![{alt}]({picture})\n\n*{caption.replace('*', '')}*"


def alive(notebook: NotebookNode) -> None:
    """For the site, put the animation itself where the notebook has a still of it, in place."""
    cell = opening_cell(notebook)
    header = [c for c in notebook.cells if "header-opening" in c.metadata.get("tags", [])]
    if not (cell and header):
        return
    for output in cell.outputs:
        page = output.get("data", {}).get("text/html", "")
        if PLAYER.search(page):
            # A blank line would end the block of HTML.
            header[0].source = re.sub(r"\n\s*\n", "\n", page.strip())


def fold(notebook: NotebookNode) -> None:
    """Hide the input of cells that set up, import or draw, and take away that of cells that show a source."""
    body = False  # once the first section has begun, a cell that imports may compute something worth reading
    for cell in notebook.cells:
        if cell.cell_type != "code":
            body |= re.search(r"^## ", cell.source, re.M) is not None
            continue
        tags, lines = cell.metadata.setdefault("tags", []), cell.source.strip().splitlines()
        setup = {"setup", "parameters"} & set(tags) or (
            _imports_only(cell.source)
            or (not body and cell.source.startswith(("import ", "from ")))
        )
        if lines and cell.source.strip().startswith("show_source(") and _one_call(cell.source):
            _tag(cell, "remove-input")
        elif (
            setup or "mystnb" in cell.metadata or re.search(r"^(animate|lab)\(", cell.source, re.M)
        ):
            if "hide-cell" not in tags:
                _tag(cell, "hide-input")
        else:
            if not tags:
                del cell.metadata["tags"]
            continue
        if setup:
            _tag(cell, "preamble")
        cell.metadata["jupyter"] = {"source_hidden": True}


def _tag(cell: NotebookNode, tag: str) -> None:
    if tag not in cell.metadata.setdefault("tags", []):
        cell.metadata["tags"] = [*cell.metadata["tags"], tag]


def _imports_only(source: str) -> bool:
    """Whether a cell imports, and beyond that at most calls what it imported, such as `use_style()`."""
    if not source.startswith(("import ", "from ")):
        return False
    imports = (ast.Import, ast.ImportFrom)
    return all(
        isinstance(node, imports)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        for node in ast.parse(source).body
    )


def _one_call(source: str) -> bool:
    body = ast.parse(source).body
    return len(body) == 1 and isinstance(body[0], ast.Expr)


def link_chapters(text: str, chapter: str, chapters: list[str]) -> str:
    """Make links of "chapter 5" and "chapters 2, 3 and 6", where those chapters exist and are not this one.

    Args:
        text: Markdown.
        chapter: The chapter that the text belongs to.
        chapters: Names of all chapters.

    Returns:
        Markdown with links; code, formulas, headings and what is a link already stay as they are.
    """
    known = {int(name[:2]): name for name in chapters if name[:2].isdigit() and name != chapter}

    def link(number: str, words: str) -> str:
        name = known.get(int(number))
        return f"[{words}]({name}.ipynb)" if name else words

    def replace(match: re.Match) -> str:
        word, first, middle, last = match.groups()
        if word.lower() == "chapter" and (middle or last):  # "chapter 2 and 3 people": one chapter
            return link(first, f"{word} {first}") + (middle or "") + (last or "")
        found = link(first, f"{word} {first}" if word.lower() == "chapter" else first)
        found = found if word.lower() == "chapter" else f"{word} {found}"
        found += re.sub(r"\d+", lambda m: link(m[0], m[0]), middle or "")
        return found + re.sub(r"\d+", lambda m: link(m[0], m[0]), last or "")

    parts, at = [], 0
    for closed in CLOSED.finditer(text):
        parts += [CHAPTER.sub(replace, text[at : closed.start()]), closed.group()]
        at = closed.end()
    return "".join([*parts, CHAPTER.sub(replace, text[at:])])


def number_exercises(text: str, number: int, before: int) -> tuple[str, int]:
    """Number exercises within the chapter.

    Args:
        text: Markdown.
        number: Of the chapter.
        before: Exercises so far.

    Returns:
        The text, and the exercises so far.
    """
    count = before

    def replace(match: re.Match) -> str:
        nonlocal count
        count += 1
        return f":::{{exercise-start}} {number}.{count} {match[1]}\n:label: {match[2]}\n:nonumber:"

    return re.sub(r"^:::\{exercise-start\} (.+)\n:label: (\S+)$", replace, text, flags=re.M), count


def card(rows: dict[str, Any]) -> str:
    """Write the card: one small line of facts."""
    facts = " · ".join(f"{name} {text}" for name, text in rows.items())
    return f'<small class="n2t-card">{facts}</small>'
