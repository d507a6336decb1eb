"""Sphinx extension: what the site is given beside its chapters.

Pages that are collected from the executed notebooks, a record and CITATION.cff (`{ledger}`, `{run-times}`, `{speed}`,
`{citation}`), so that they cannot say anything that no run has said; what search engines and shared links show (a
description, a card, a map of the site); a page for addresses that lead nowhere; and less to load: the theme's icons
without the two thousand that no page shows, and no scripts of live cells.

What needs the site's public address is made where `html: baseurl` in _config.yml names it, and left out otherwise.
"""

import hashlib
import html
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import yaml
from docutils import nodes
from PIL import Image, ImageDraw, ImageFont
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

META = "noise2tokens"
ROOT = Path(__file__).resolve().parent.parent
VERDICTS = ("reproduced", "differs", "not measured yet", "out of reach")
LEDGER_HEAD = ["What", "Paper", "Here", "Tolerance", "Verdict", "Source"]


# Pages collected from elsewhere


def notebooks(folder: Path) -> list[tuple[str, nbformat.NotebookNode]]:
    """Read the executed chapters in reading order, then the syntheses."""
    return [
        (path.stem, nbformat.read(path, as_version=4)) for path in sorted(folder.glob("*.ipynb"))
    ]


def ledger_rows(notebook: nbformat.NotebookNode) -> list[dict]:
    """Collect the ledger rows that a chapter showed."""
    return [
        row
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for row in output.get("metadata", {}).get(META, {}).get("ledger", [])
    ]


def title(notebook: nbformat.NotebookNode) -> str:
    """Return the chapter's title."""
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def ledger(folder: Path) -> str:
    """Write the ledger page's body as Markdown: how many of which verdict first, then the rows of each chapter."""
    chapters = [(name, ledger_rows(notebook)) for name, notebook in notebooks(folder)]
    chapters = [(name, rows) for name, rows in chapters if rows]
    counts = {name: Counter(row["verdict"] for row in rows) for name, rows in chapters}
    total = sum(counts.values(), Counter())
    lines = [
        f"| Chapter | {' | '.join(verdict.capitalize() for verdict in VERDICTS)} | All |",
        "|---|" + "---:|" * (len(VERDICTS) + 1),
    ]
    for name, count in [*counts.items(), ("", total)]:
        numbers = [str(count[verdict] or "–") for verdict in VERDICTS] + [str(count.total())]
        head, mark = (f"[](/book/{name}.ipynb)", "") if name else ("**All**", "**")
        lines.append(
            f"| {head} | " + " | ".join(f"{mark}{number}{mark}" for number in numbers) + " |"
        )
    # Docutils drops what stands before the first heading of a parsed text.
    parts = ["## All chapters", "\n".join(lines)]
    titles = {name: title(notebook) for name, notebook in notebooks(folder)}
    parts += [f"## {titles[name]}\n\n{_with_reasons_grouped(rows)}" for name, rows in chapters]
    return "\n\n".join(parts)


def _with_reasons_grouped(rows: list[dict]) -> str:
    """Lay out rows as a table with letters for the reasons, each of which is said once, below."""
    from noise2tokens.ledger import ledger_table

    reasons = dict.fromkeys(row["why"] for row in rows if row["why"])
    letters = {why: chr(ord("a") + i) for i, why in enumerate(reasons)}
    text = ledger_table([{**row, "why": letters.get(row["why"], "")} for row in rows])
    return "\n\n".join([text, *(f"({letter}) {why}" for why, letter in letters.items())])


def run_times(folder: Path) -> str:
    """Write the table of run times and hardware as Markdown."""
    from noise2tokens.records import best_record

    lines = [
        "| Chapter | Seconds | Memory (GB) | Hardware | Made with | Longest run on record |",
        "|---|---:|---:|---|---|---|",
    ]
    total = 0.0
    for name, notebook in notebooks(folder):
        run = notebook.metadata[META]
        record = best_record(name)
        versions = ", ".join(f"{key} {value}" for key, value in run["versions"].items())
        longest = (
            "–"
            if record is None
            else f"{record.scale} scale: {record.seconds:.0f} s on {record.device}"
        )
        threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
        total += run["seconds"]
        lines.append(
            f"| [](/book/{name}.ipynb) | {run['seconds']:.0f} | {run['peak_memory_gb']:.1f} | "
            f"{threads} of {run['hardware']} | {versions}, {run['date']} | {longest} |"
        )
    return "\n".join([*lines, f"| **All** | **{total:.0f}** | | | | |"])


def speed(folder: Path) -> str:
    """Write the table of our times over those of other libraries, and where it comes from, as Markdown."""
    from noise2tokens.records import load_record

    record = load_record("speed", "long", folder)
    if record is None:
        return "Not measured yet."
    lines = ["| What | Against | Ours / theirs | Ours (ms) |", "|---|---|---:|---:|"]
    for row in record.results["cases"]:
        chapter = (
            f"[{int(row['chapter'][:2])}](/book/{row['chapter']}.ipynb): " if row["chapter"] else ""
        )
        lines.append(
            f"| {chapter}{row['what']} | {row['library']} | {row['ratio']:.2f} | {row['milliseconds']:.3g} |"
        )
    return "\n".join([*lines, "", record.provenance()])


def citation(path: Path) -> str:
    """Write how to cite the book, in words and as BibTeX, from CITATION.cff."""
    cff = yaml.safe_load(path.read_text())
    authors = [
        who.get("name") or f"{who['given-names']} {who['family-names']}" for who in cff["authors"]
    ]
    date = str(cff["date-released"])
    entry = {
        "title": f"{{{cff['title']}}}",
        "author": " and ".join(f"{{{author}}}" for author in authors),
        "year": date[:4],
        "version": cff["version"],
        "url": cff.get("url") or cff["repository-code"],
    }
    fields = ",\n".join(f"  {key} = {{{value}}}" for key, value in entry.items())
    return (
        f"{', '.join(authors)}. *{cff['title']}*. Version {cff['version']}, {date}. <{entry['url']}>\n\n"
        f"```bibtex\n@misc{{noise2tokens,\n{fields}\n}}\n```"
    )


class Collected(SphinxDirective):
    """A directive without content that stands for what a function writes from the notebooks."""

    collect = staticmethod(lambda folder: "")

    def run(self) -> list[nodes.Node]:
        folder = Path(self.env.srcdir) / "book"
        for path in [*folder.glob("*.ipynb"), *folder.glob("*.json")]:
            self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(self.collect(folder), allow_section_headings=True)


class LedgerDirective(Collected):
    collect = staticmethod(ledger)


class RunTimesDirective(Collected):
    collect = staticmethod(run_times)


class SpeedDirective(Collected):
    collect = staticmethod(speed)


class CitationDirective(SphinxDirective):
    """How to cite the book."""

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / "CITATION.cff"
        self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(citation(path))


# What is changed on every page


def mark_tables(app: Sphinx, doctree: nodes.document) -> None:
    """Give ledger tables a class: on a phone their rows become cards."""
    for table in doctree.findall(nodes.table):
        head = next(table.findall(nodes.thead), None)
        if (
            head is not None
            and [entry.astext() for entry in head.findall(nodes.entry)] == LEDGER_HEAD
        ):
            table["classes"].append("n2t-ledger")


def size_figures(app: Sphinx, doctree: nodes.document, name: str) -> None:
    """Show figures that are drawn at twice the density at the size they are drawn for."""
    for image in doctree.findall(nodes.image):
        path = Path(app.srcdir, image["uri"])
        if path.suffix == ".png" and path.exists() and "width" not in image:
            with Image.open(path) as picture:
                if picture.info.get("dpi", (0, 0))[0] > 150:
                    image["width"] = f"{picture.width // 2}px"


def on_page(
    app: Sphinx, name: str, template: str, context: dict, doctree: nodes.document | None
) -> None:
    """Leave out the scripts of live cells, which Jupyter Book adds (twice) to every page; say what the page is."""
    context["css_files"] = [
        style
        for style in context["css_files"]
        if "thebe" not in str(getattr(style, "filename", ""))
    ]
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes.get('body', '')}".lower()
    ]
    if context.get("body"):
        context["body"] = re.sub(
            r'\s*<script type="text/x-thebe-config">.*?</script>\s*<script>kernelName.*?</script>',
            "",
            context["body"],
            flags=re.S,
        )
    base = app.config.html_baseurl
    tags = []
    if name == "404":
        # The page is served for any address, however deep: its links are relative to the site's root.
        root = html.escape(urlsplit(base).path or "/")
        tags.append(
            f"<script>if (!location.pathname.endsWith('/404.html')) document.write('<base href=\"{root}\">')</script>"
        )
    if doctree is not None:
        title = re.sub(r"<[^>]+>", "", context["title"])
        words = description(doctree)
        tags += [_meta("name", "description", words)] if words else []
        if base:
            tags += [
                _meta("property", "og:type", "article"),
                _meta("property", "og:site_name", app.config.html_title),
                _meta("property", "og:title", html.unescape(title)),
                *([_meta("property", "og:description", words)] if words else []),
                _meta("property", "og:url", f"{base.rstrip('/')}/{name}.html"),
                _meta("property", "og:image", f"{base.rstrip('/')}/{_card_name(name)}"),
                _meta("name", "twitter:card", "summary_large_image"),
            ]
            cards = app.n2t_cards
            cards[name] = (html.unescape(title), words)
    context["metatags"] = context.get("metatags", "") + "\n".join(["", *tags])


def _meta(key: str, name: str, content: str) -> str:
    return f'<meta {key}="{name}" content="{html.escape(content, quote=True)}" />'


def description(doctree: nodes.document) -> str:
    """Return the first sentences of a page, up to about 200 characters."""
    for paragraph in doctree.findall(nodes.paragraph):
        section = isinstance(paragraph.parent, nodes.section)
        if section and not any(paragraph.findall(nodes.math)) and len(paragraph.astext()) > 40:
            return textwrap.shorten(paragraph.astext(), 200, placeholder=" …")
    return ""


def lost_page(app: Sphinx) -> Iterator[tuple[str, dict, str]]:
    """Make the page that a server shows for an address that leads nowhere."""
    body = (
        "<h1>There is no such page</h1><p>The address may be mistyped, or the page may have moved. "
        '<a href="book/index.html">Start at the front page</a>, or '
        '<a href="search.html">search the book</a>.</p>'
    )
    yield "404", {"title": "There is no such page", "body": body}, "page.html"


# What is done once all pages are written


def finish(app: Sphinx, error: Exception | None) -> None:
    """Write the map of the site and the cards, keep the icons in use, drop what no page loads."""
    if error is not None or app.builder.name != "html":
        return
    site = Path(app.outdir)
    base = app.config.html_baseurl.rstrip("/")
    if base:
        places = "".join(
            f"<url><loc>{base}/{name}.html</loc></url>\n" for name in sorted(app.env.found_docs)
        )
        (site / "sitemap.xml").write_text(
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{places}</urlset>\n'
        )
        for name, (title, words) in app.n2t_cards.items():
            draw_card(title, words, site / _card_name(name))
    keep_icons_in_use(site)
    static = site / "_static"
    for path in [*static.rglob("*.map"), *static.glob("vendor/fontawesome/webfonts/*")]:
        path.unlink()  # book.css takes away what the theme draws in these fonts
    for path in static.rglob("*.css"):
        styles = path.read_text()
        kept = re.sub(r"@font-face\s*\{[^}]*Font ?Awesome[^}]*\}", "", styles)
        if kept != styles:
            path.write_text(kept)
    # Of MathJax's twelve bundles the pages load one, which finds its extensions in the folders beside it.
    for path in static.glob("mathjax/*.js"):
        if re.match(r"(tex|mml)-(?!chtml\.js)|mml-|latest|node-main", path.name):
            path.unlink()


ICON = r'(?<![\w-])"?%s"?:\[(\d+),(\d+),\[[^\]]*\],"[^"]*","([^"]+)"\]'


def keep_icons_in_use(site: Path) -> None:
    """Replace the theme's script with all icons by one that holds those on the pages.

    The theme's script is replaced under its own name, so that its templates need not be.

    Raises:
        ValueError: If the theme's script does not hold an icon that a page shows.
    """
    path = site / "_static" / "scripts" / "fontawesome.js"
    theme = path.read_text()
    if theme.startswith("// Icons"):
        return  # nothing was rendered, so nothing was copied
    used = set()
    for page in site.rglob("*.html"):
        if "_static" not in page.parts:
            used |= set(
                re.findall(
                    r'class="[^"]*\bfa-(?!solid|brands|regular|lg)([a-z0-9-]+)', page.read_text()
                )
            )
            used |= set(re.findall(r'class="fa[srb]? fa-([a-z0-9-]+)', page.read_text()))
    icons = []
    for name in sorted(used):
        # The bundle holds brands, then outlined, then solid icons: a later one of the same name is the solid one.
        found = re.findall(ICON % re.escape(name), theme)
        if not found:
            raise ValueError(f"the theme has no icon {name!r}")
        width, height, shape = found[-1]
        icons.append(f'"{name}": ["0 0 {width} {height}", "{shape}"],')
    path.write_text(ICONS.replace("ICONS_IN_USE", "\n  ".join(icons)))


ICONS = """// Icons that the pages show (Font Awesome Free, CC BY 4.0, https://fontawesome.com/license/free).
const n2tIcons = {
  ICONS_IN_USE
};
document.querySelectorAll(".fa-solid, .fa-brands, .fas, .fab, .far").forEach((place) => {
  const name = [...place.classList].map((word) => word.slice(3)).find((word) => word in n2tIcons);
  if (!name) return;
  const [box, shape] = n2tIcons[name];
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg"), path = document.createElementNS(space, "path");
  path.setAttribute("d", shape);
  path.setAttribute("fill", "currentColor");
  svg.setAttribute("viewBox", box);
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", `svg-inline--fa ${place.getAttribute("class")}`);
  for (const [key, value] of Object.entries(place.dataset)) svg.dataset[key] = value;
  svg.append(path);
  place.replaceWith(svg);
});
"""


def _card_name(name: str) -> str:
    return f"_images/card-{Path(name).name}.png"


def draw_card(title: str, words: str, path: Path) -> None:
    """Draw what a shared link shows: 1200 by 630 pixels with title, first sentence and the book's picture."""
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    card = Image.new("RGB", (1200, 630), "white")
    draw = ImageDraw.Draw(card)
    with Image.open(ROOT / "book" / "_static" / "front.webp") as front:
        strip = front.convert("RGBA").resize((1080, round(1080 * front.height / front.width)))
    card.paste(strip, (60, 420), strip)
    y = 70
    for text, face, size, width, lines, color in [
        ("Noise to Tokens", "DejaVuSans-Bold.ttf", 30, 60, 1, "#5f6368"),
        (title, "DejaVuSans-Bold.ttf", 54, 34, 3, "#1a1a1a"),
        (words, "DejaVuSans.ttf", 30, 62, 3, "#3c4043"),
    ]:
        font = ImageFont.truetype(str(fonts / face), size)
        for line in textwrap.wrap(text, width, max_lines=lines, placeholder=" …"):
            if y + size < 430:
                draw.text((60, y), line, font=font, fill=color)
                y += round(1.25 * size)
        y += 14
    path.parent.mkdir(exist_ok=True)
    card.quantize(64).save(path, "png", optimize=True)


def note_own_files(app: Sphinx, config) -> None:
    """Let Sphinx know when styles, scripts or this file change: it renders all pages anew then."""
    files = sorted([*(ROOT / "book" / "_static").glob("*"), Path(__file__)])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files if path.is_file()))
    config.n2t_own_files = digest.hexdigest()


def setup(app: Sphinx) -> dict[str, bool]:
    app.n2t_cards = {}
    app.add_config_value("n2t_own_files", "", "html")
    app.add_directive("ledger", LedgerDirective)
    app.add_directive("run-times", RunTimesDirective)
    app.add_directive("speed", SpeedDirective)
    app.add_directive("citation", CitationDirective)
    app.connect("config-inited", note_own_files)
    app.connect("doctree-read", mark_tables)
    app.connect("doctree-resolved", size_figures)
    app.connect("html-page-context", on_page, priority=900)
    app.connect("html-collect-pages", lost_page)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
