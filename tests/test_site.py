"""The reader's gates: the rendered site in a real browser, without a network.

Chromium is Debian's package `chromium`, or whatever the environment variable CHROMIUM names. The site is the one in
_build/html, which `make test` renders beforehand.
"""

import functools
import http.server
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tools import inputs

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.glob("book/*.html"))
CHAPTERS = [f"book/{name}.html" for name in inputs.numbered()]
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

pytestmark = pytest.mark.skipif(not PAGES, reason="there is no site yet: run `make book` first")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium: `apt-get install chromium`, or set CHROMIUM to the path of a Chrome or Chromium",
)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(SITE))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Open a page; requests that leave this machine are cut off, and they and all errors are noted."""
    contexts = []

    def visit(page_name: str, *, dark: bool = False, width: int = 1280):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.problems = []
        page.route(
            lambda url: not url.startswith((address, "data:", "blob:")),
            lambda route: (
                page.problems.append(f"left the site: {route.request.url}"),
                route.abort(),
            ),
        )
        page.on(
            "requestfailed", lambda request: page.problems.append(f"failed: {request.url[:200]}")
        )
        page.on(
            "response",
            lambda answer: (
                answer.status >= 400 and page.problems.append(f"{answer.status}: {answer.url}")
            ),
        )
        page.on("pageerror", lambda error: page.problems.append(f"error: {error}"))
        page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and page.problems.append(f"console: {message.text}")
            ),
        )
        page.goto(f"{address}/{page_name}", wait_until="load")
        page.wait_for_function(
            "!window.MathJax || !MathJax.startup?.promise || MathJax.startup.promise.then(() => true)"
        )
        return page

    yield visit
    for context in contexts:
        context.close()


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page_works_without_a_network_and_for_everyone(visit, name, dark):
    """No request leaves the site, nothing fails, nothing is logged as an error; axe finds nothing serious."""
    from axe_playwright_python.sync_playwright import Axe

    page = visit(name, dark=dark)
    theme = page.evaluate("document.documentElement.dataset.theme")
    assert theme == ("dark" if dark else "light")
    assert page.problems == []  # before axe, which tries to fetch style sheets by wrong addresses
    results = Axe().run(page).response["violations"]
    serious = [
        f"{v['id']}: {v['help']}\n"
        + "\n".join(f"    {node['html'][:160]}" for node in v["nodes"][:4])
        for v in results
        if v["impact"] in ("serious", "critical")
    ]
    assert not serious, "\n".join(serious)


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_phone(visit, name):
    page = visit(name, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.problems == []


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("name", CHAPTERS)
def test_mathematics_is_typeset(visit, name):
    page = visit(name)
    typeset = page.locator("mjx-container").count()
    assert typeset >= 5
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    # What MathJax left alone would show its delimiters to the reader.
    assert not re.search(r"\\\(|\\\[|\$\$", page.locator("article").inner_text())


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("name", CHAPTERS)
def test_animations_play_pause_and_step(visit, name):
    page = visit(name)
    players = page.locator("figure.n2t-player")
    assert players.count() >= 1
    for player in players.all():
        picture, count = player.locator("img"), player.locator("span").first
        first, total = picture.get_attribute("src"), int(count.inner_text().split("/")[1])
        assert total >= 3 and len(picture.get_attribute("alt").split()) >= 5
        player.get_by_role("button", name="step forward").click()
        assert count.inner_text() == f"2 / {total}" and picture.get_attribute("src") != first
        player.get_by_role("button", name="step back").click()
        assert picture.get_attribute("src") == first
        player.get_by_role("button", name="play").click()
        page.wait_for_function(
            "([span, was]) => span.textContent !== was",
            arg=[count.element_handle(), f"1 / {total}"],
        )
        player.get_by_role("button", name="pause").click()
        shown = count.inner_text()
        page.wait_for_timeout(700)
        assert count.inner_text() == shown
        player.get_by_role("slider", name="frame").press("End")
        assert count.inner_text() == f"{total} / {total}"
        assert page.evaluate("e => e.naturalWidth", picture.element_handle()) > 100
    assert page.problems == []


@needs_browser
@pytest.mark.browser
def test_search_finds_a_word(visit):
    page = visit("search.html?q=dequantisation")
    page.wait_for_selector("#search-results ul.search li a")
    found = page.locator("#search-results ul.search li a").evaluate_all(
        "links => links.map(a => a.href)"
    )
    assert any("02_nice" in link for link in found)
    assert page.problems == []


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("name", CHAPTERS)
def test_the_launch_button_opens_the_executed_notebook_of_the_site(visit, name):
    page = visit(name)
    links = page.locator("a[href*='colab.research.google.com']").evaluate_all(
        "links => links.map(a => a.href)"
    )
    stem = Path(name).stem
    assert links and all(
        link.endswith(f"/blob/gh-pages/_sources/book/{stem}.ipynb") for link in links
    )
    published = SITE / "_sources" / "book" / f"{stem}.ipynb"
    assert re.search(r'ref = \\"[0-9a-f]{40}\\"', published.read_text()), (
        "the setup cell names no commit"
    )


class Page(HTMLParser):
    """Collects ids, links and pictures."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.pictures: list[dict] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag == "img":
            self.pictures.append(attributes)


@pytest.fixture(scope="module")
def pages() -> dict[Path, Page]:
    return {path: Page(path) for path in SITE.glob("**/*.html") if "_static" not in path.parts}


def test_internal_links_and_anchors_resolve(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            if not target.exists():
                broken.append(f"{path.name}: {link}")
            elif fragment and target in pages and fragment not in pages[target].ids:
                broken.append(f"{path.name}: {link} (no such anchor)")
    assert broken == []


def test_every_picture_has_alt_text_that_says_something(pages):
    bad = [
        f"{path.name}: {picture.get('src', '')[:60]} alt={picture.get('alt')!r}"
        for path, page in pages.items()
        for picture in page.pictures
        if path.parent.name == "book"
        and not picture.get("src", "").startswith("../_static/")
        and (
            len((picture.get("alt") or "").split()) < 3
            or re.search(r"\.(png|svg|webp|jpe?g)$", picture["alt"])
            or picture["alt"].startswith(("../", "_images"))
        )
    ]
    assert bad == []


def test_quoted_numbers_and_roles_are_resolved(pages):
    for path in pages:
        if path.parent.name == "book":
            assert not re.search(r"\{(glue|eq|numref|footcite|ref)[:}]", path.read_text()), (
                path.name
            )


def test_the_ledger_page_holds_every_row_of_every_chapter():
    import nbformat

    from tools.book_pages import ledger_rows

    page = (SITE / "book/ledger.html").read_text()
    for chapter in inputs.numbered():
        rows = ledger_rows(nbformat.read(ROOT / "book" / f"{chapter}.ipynb", as_version=4))
        assert rows
    shown = page.count("<strong>reproduced</strong>") + page.count("<strong>differs</strong>")
    shown += page.count("<strong>not measured yet</strong>") + page.count(
        "<strong>out of reach</strong>"
    )
    total = sum(
        len(ledger_rows(nbformat.read(ROOT / "book" / f"{chapter}.ipynb", as_version=4)))
        for chapter in inputs.chapters()
    )
    assert shown == total
