"""The reader's gates: the rendered site in a real browser, without a network.

Chromium is Debian's package `chromium`, or whatever the environment variable CHROMIUM names. The site is the one in
_build/html, which `make test` renders beforehand. A page is opened once, and all tests of it look at it one after the
other; they leave it as they found it.
"""

import functools
import http.server
import os
import re
import shutil
import threading
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tools import inputs

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
CHAPTERS = [f"book/{name}.html" for name in inputs.numbered()]
# Chapters first, so that both lists number them alike and pytest keeps the tests of a page together.
PAGES = CHAPTERS + sorted(
    {str(path.relative_to(SITE)) for path in SITE.glob("book/*.html")} - set(CHAPTERS)
)
PAGES += ["404.html"]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
BASE = CONFIG["html"].get("baseurl", "").rstrip("/")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
SLACK = 1  # pixels, for rounding

pytestmark = pytest.mark.skipif(
    not (SITE / "index.html").exists(), reason="there is no site yet: run `make book` first"
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium: `apt-get install chromium`, or set CHROMIUM to the path of a Chrome or Chromium",
)
every_page = pytest.mark.parametrize("name", PAGES, scope="module")
every_chapter = pytest.mark.parametrize("name", CHAPTERS, scope="module")


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


@pytest.fixture(scope="module")
def visit(browser, address):
    """Open a page; requests that leave this machine are cut off, and they and all errors are noted."""

    def visit(page_name: str, *, dark: bool = False, width: int = 1280, context=None):
        context = context or browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        page = context.new_page()
        page.set_default_timeout(180_000)
        page.problems, page.loaded = [], {}
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

        def answered(answer):
            path = unquote(urlsplit(answer.url).path).lstrip("/")
            if answer.status >= 400:
                page.problems.append(f"{answer.status}: {answer.url}")
            elif (SITE / path).is_file() and answer.url.startswith(address):
                page.loaded[path] = (SITE / path).stat().st_size

        page.on("response", answered)
        page.on("pageerror", lambda error: page.problems.append(f"error: {error}"))
        page.on(
            "console",
            lambda message: (
                message.type in ("error", "warning")
                and page.problems.append(f"console: {message.text}")
            ),
        )
        page.goto(f"{address}/{page_name}", wait_until="load")
        ready(page)
        return page

    return visit


def ready(page) -> None:
    page.wait_for_function(
        "!window.MathJax || !MathJax.startup?.promise || MathJax.startup.promise.then(() => true)"
    )
    settle(page)


def settle(page) -> None:
    """Let the scripts that measure the page do so."""
    page.wait_for_timeout(250)
    page.evaluate(
        "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )


@pytest.fixture(scope="module")
def page(visit, name):
    page = visit(name)
    yield page
    page.context.close()


def too_wide(page, selector: str) -> list[str]:
    """Name what is wider than its box."""
    return page.evaluate(
        """([selector, slack]) => [...document.querySelectorAll(selector)]
        .filter((e) => e.clientWidth && e.scrollWidth > e.clientWidth + slack)
        .map((e) => `${e.closest("div.math")?.id || e.className} ${e.scrollWidth} in ${e.clientWidth}`)""",
        [selector, SLACK],
    )


EQUATION = ".bd-article mjx-container[display=true]"


@needs_browser
@pytest.mark.browser
@every_page
def test_page_works_without_a_network_and_for_everyone(page, name):
    """No request leaves the site, nothing fails, nothing is logged as an error; axe finds nothing, light and dark."""
    from axe_playwright_python.sync_playwright import Axe

    assert page.problems == []
    for theme in ("light", "dark"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
        settle(page)  # colors glide
        found = [
            f"{theme}: {v['id']}: {v['help']}\n"
            + "\n".join(f"    {node['html'][:160]}" for node in v["nodes"][:4])
            for v in Axe().run(page, options={"preload": False}).response["violations"]
        ]
        assert not found, "\n".join(found)
    page.evaluate("document.documentElement.dataset.theme = 'light'")


@needs_browser
@pytest.mark.browser
@every_chapter
def test_figures_keep_their_shape_in_a_narrow_column(page, name):
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        settle(page)
        bent = page.evaluate(
            """() => [...document.querySelectorAll(".bd-article .cell_output img")]
            .filter((e) => e.clientWidth > 0 && e.naturalWidth > 0)
            .map((e) => e.clientWidth / e.clientHeight / (e.naturalWidth / e.naturalHeight))
            .filter((ratio) => Math.abs(ratio - 1) > 0.03)"""
        )
        assert bent == [], width


@needs_browser
@pytest.mark.browser
@every_page
def test_page_fits_a_phone(page, name):
    page.set_viewport_size({"width": 390, "height": 844})
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert too_wide(page, "table.n2t-ledger") == []
    # What is wider than a phone scrolls, looks as if it did, and can be scrolled from the keyboard.
    hidden = page.evaluate(
        """([equations, slack]) => [...document.querySelectorAll(`.bd-article table, ${equations}`)]
        .filter((e) => e.clientWidth && e.scrollWidth > e.clientWidth + slack)
        .filter((e) => !e.matches(".n2t-wide[tabindex='0']") || getComputedStyle(e).overflowX !== "auto")
        .map((e) => e.outerHTML.slice(0, 120))""",
        [EQUATION, SLACK],
    )
    page.set_viewport_size({"width": 1280, "height": 900})
    settle(page)
    assert hidden == [] and page.problems == []


@needs_browser
@pytest.mark.browser
@every_chapter
def test_mathematics_is_typeset_and_fits_its_column(page, name):
    assert page.locator("mjx-container").count() >= 5
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    # What MathJax left alone would show its delimiters to the reader.
    assert not re.search(r"\\\(|\\\[|\$\$", page.locator("article").inner_text())
    assert too_wide(page, EQUATION) == []


@needs_browser
@pytest.mark.browser
@every_chapter
def test_most_equations_fit_a_phone(page, name):
    page.set_viewport_size({"width": 390, "height": 844})
    settle(page)
    wide, total = too_wide(page, EQUATION), page.locator(EQUATION).count()
    smallest = page.evaluate(
        "s => Math.min(...[...document.querySelectorAll(s)].map((e) => parseFloat(e.style.fontSize || 100)))",
        EQUATION,
    )
    page.set_viewport_size({"width": 1280, "height": 900})
    settle(page)
    assert len(wide) <= 0.2 * total, wide
    assert smallest >= 85  # percent of the text's size


@needs_browser
@pytest.mark.browser
@every_chapter
def test_the_keyboard_reaches_what_acts_and_shows_where_it_is(page, name):
    """Formulas and pictures are no stops of the Tab key; every stop on the way to the text is outlined."""
    stops = page.evaluate(
        """() => [...document.querySelectorAll(".bd-article mjx-container, .bd-article img")]
        .filter((e) => e.tabIndex === 0 || e.querySelector("[tabindex='0']")).length"""
    )
    assert stops == 0
    page.evaluate("() => { window.scrollTo(0, 0); document.activeElement?.blur(); }")
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        at = page.evaluate(
            """() => {
              const e = document.activeElement, style = getComputedStyle(e);
              return {
                name: e.getAttribute("aria-label") || e.title || e.textContent.trim() || e.querySelector("img")?.alt,
                header: e.closest(".bd-header-article, .article-header-buttons") !== null,
                text: e.closest(".bd-article") !== null,
                html: e.outerHTML.slice(0, 100),
                outline: style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth),
              };
            }"""
        )
        assert at["name"] and at["outline"] >= 1, at
        seen.append(at)
        if at["text"]:
            break
    assert seen[-1]["text"] and sum(at["header"] for at in seen) >= 4


@needs_browser
@pytest.mark.browser
@every_chapter
def test_animations_play_pause_and_step(page, name):
    players = page.locator("figure.n2t-player")
    assert players.count() or page.locator("figure.n2t-lab").count()
    for player in players.all():
        picture, count = player.locator("img"), player.locator("output").first
        last, total = picture.get_attribute("src"), int(count.inner_text().split("/")[1])
        assert total >= 3 and len(picture.get_attribute("alt").split()) >= 5
        assert count.inner_text() == f"{total} / {total}"  # at rest it shows the end
        player.get_by_role("button", name="step forward").click()
        assert count.inner_text() == f"1 / {total}" and picture.get_attribute("src") != last
        player.get_by_role("button", name="step back").click()
        assert picture.get_attribute("src") == last
        signs = player.locator(".n2t-play, .n2t-pause")
        assert [sign.is_visible() for sign in signs.all()] == [True, False]
        player.get_by_role("button", name="play").click()
        assert [sign.is_visible() for sign in signs.all()] == [False, True]
        page.wait_for_function(
            "([span, was]) => span.textContent !== was",
            arg=[count.element_handle(), f"{total} / {total}"],
        )
        player.get_by_role("button", name="pause").click()
        shown = count.inner_text()
        page.wait_for_timeout(700)
        assert count.inner_text() == shown
        player.get_by_role("slider", name="frame").press("End")
        assert count.inner_text() == f"{total} / {total}"
        assert page.evaluate("e => e.naturalWidth", picture.element_handle()) > 100
        player.get_by_role("slider", name="frame").press("Home")
    assert page.problems == []


@needs_browser
@pytest.mark.browser
def test_who_asks_for_little_motion_gets_a_picture_a_second_and_no_gliding(visit):
    page = visit(CHAPTERS[0])
    page.emulate_media(reduced_motion="reduce")
    counts = page.evaluate(
        """() => new Promise((done) => {
          const player = document.querySelector("figure.n2t-player"), changes = [], start = performance.now();
          new MutationObserver(() => changes.push(performance.now() - start))
            .observe(player.querySelector("output"), { childList: true, characterData: true, subtree: true });
          player.querySelector("[aria-label=play]").click();
          setTimeout(() => { player.querySelector("[aria-label=pause]").click(); done(changes); }, 2400);
        })"""
    )
    # From the last frame it goes to the first at once.
    assert len(counts) == 3 and counts[1] - counts[0] > 900, counts
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    assert (
        page.evaluate(
            "parseFloat(getComputedStyle(document.querySelector('.btn')).transitionDuration)"
        )
        < 0.01
    )
    page.context.close()


@needs_browser
@pytest.mark.browser
@every_chapter
def test_paper_is_white_and_loses_nothing(page, name):
    """From a dark screen: a light print, all unfolded, nothing wider than the sheet; afterwards all is as before."""
    state = """() => [document.documentElement.dataset.theme,
      [...document.querySelectorAll("details")].map((e) => e.open),
      [...document.querySelectorAll(".admonition.toggle")].map((e) => e.classList.contains("toggle-hidden"))]"""
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    before = page.evaluate(state)
    assert any(before[2]), "no folded solution"
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 672, "height": 1000})  # A4 within margins of 16 mm
    page.wait_for_timeout(50)
    theme, details, folded = page.evaluate(state)
    wide = too_wide(
        page, f"{EQUATION}, .bd-article pre, .bd-article table, .bd-article .cell_output"
    )
    sheet = page.evaluate("document.documentElement.scrollWidth")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    settle(page)
    after = page.evaluate(state)
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    assert (theme, all(details), any(folded)) == ("light", True, False)
    assert wide == [] and sheet <= 672 + SLACK
    assert ground in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
    assert after == before and page.problems == []


@needs_browser
@pytest.mark.browser
@every_chapter
def test_set_up_is_one_fold_and_exercises_have_numbers(page, name):
    folds = page.locator(".cell.tag_preamble")
    assert folds.count() == 1 and folds.locator("details").count() == 1
    assert folds.locator("summary").inner_text() == "show set-up and imports"
    code = folds.locator(".cell_input")
    assert code.count() >= 3 and not code.first.is_visible()
    folds.locator("summary").click()
    assert all(cell.is_visible() for cell in code.all())
    folds.locator("summary").click()
    titles = page.locator("div.exercise > .admonition-title").all_inner_texts()
    number = int(Path(name).name[:2])
    assert len(titles) >= 3
    for i, title in enumerate(titles, 1):
        assert re.fullmatch(rf"Exercise {number}\.{i} \(.+\)", title.strip()), title


@needs_browser
@pytest.mark.browser
@every_chapter
def test_the_title_of_a_solution_opens_it(page, name):
    solution = page.locator(".admonition.solution.toggle").first
    title, address = solution.locator("> .admonition-title"), page.url
    content = solution.locator("> section, > div").first
    assert not content.is_visible()
    words = title.bounding_box()
    title.click(position={"x": words["width"] / 3, "y": words["height"] / 2})
    assert content.is_visible() and page.url == address
    solution.get_by_role("button", name="Solution to").press("Enter")
    assert not content.is_visible() and page.url == address


@needs_browser
@pytest.mark.browser
@every_chapter
def test_a_chapter_loads_little_and_shows_sharp_figures(page, name):
    pictures = (".png", ".webp")
    small = {path: size for path, size in page.loaded.items() if not path.endswith(pictures)}
    assert page.loaded["_static/scripts/fontawesome.js"] < 20_000
    assert not any("thebe" in path or "webfonts" in path for path in page.loaded)
    assert "thebe" not in (SITE / name).read_text().lower()
    assert "data:image" not in (SITE / name).read_text()  # a picture is a file, and there once
    assert sum(small.values()) < 3_000_000, sorted(small.items(), key=lambda item: -item[1])[:5]
    icons = page.locator(".article-header-buttons svg path")
    assert icons.count() >= 5
    # A record's picture (a figure without a name) is as sharp as the run that made it; it cannot be drawn again here.
    soft = page.evaluate(
        """() => [...document.querySelectorAll(".cell_output img[src*='_images/']")]
        .filter((e) => !e.closest("figure:not([id])"))
        .filter((e) => e.naturalWidth < 1.9 * e.clientWidth).map((e) => `${e.naturalWidth} for ${e.clientWidth}`)"""
    )
    assert soft == []


@needs_browser
@pytest.mark.browser
def test_search_finds_a_word_and_leads_to_it(visit):
    page = visit("search.html?q=dequantization")
    # A slow machine, on which Sphinx marks the words after the page has loaded.
    slow = page.context.new_cdp_session(page)
    slow.send("Emulation.setCPUThrottlingRate", {"rate": 4})
    link = page.locator("#search-results ul.search li a[href*='02_nice']").first
    link.wait_for()
    link.click()
    page.wait_for_url("**/02_nice.html*")
    ready(page)
    page.locator(".bd-article .highlighted").first.wait_for(state="attached")
    page.wait_for_function("document.activeElement.classList.contains('highlighted')")
    focused = page.locator(".bd-article .highlighted:focus")
    top = focused.bounding_box()["y"]
    assert 0 <= top <= 900 and "dequantization" in focused.inner_text().lower()
    assert page.evaluate("window.scrollY") > 900
    assert page.locator(".bd-sidebar-primary .highlighted").count() == 0
    assert page.problems == []
    page.context.close()


@needs_browser
@pytest.mark.browser
def test_a_system_in_dark_mode_gets_dark_pages_with_lighter_ink(visit):
    """Ink and colors reach the contrast that text (4.5) and lines (3) need, as light and dark pages show them."""
    from matplotlib.colors import to_rgb

    from noise2tokens.display import COLORS, INK

    def luminance(color):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for dark in (False, True):
        page = visit(CHAPTERS[0], dark=dark)
        theme = "dark" if dark else "light"
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        picture = page.locator(".cell_output img").first
        assert f"n2t-on-{theme}" in picture.evaluate("e => getComputedStyle(e).filter")
        exponent = float(page.locator(f"#n2t-on-{theme} feFuncG").get_attribute("exponent"))
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ground = luminance([int(part) / 255 for part in re.findall(r"\d+", ground)[:3]])
        for color, least in [(INK, 4.5), *((color, 3) for color in COLORS)]:
            ink = luminance([part**exponent for part in to_rgb(color)])
            contrast = (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05)
            assert contrast >= least, (theme, color)
        page.context.close()


@needs_browser
@pytest.mark.browser
@every_chapter
def test_the_launch_button_opens_the_executed_notebook_of_the_site(page, name):
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
    """Collects ids, links, pictures and what the head says."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.pictures: list[dict] = []
        self.meta: dict[str, str] = {}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag == "img":
            self.pictures.append(attributes)
        if tag == "meta":
            self.meta[attributes.get("name") or attributes.get("property")] = attributes.get(
                "content"
            )


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


def test_pages_say_what_they_are_about(pages):
    """Each page has a description of its own; with the site's address known, a card for shared links too."""
    from PIL import Image

    from tools.book_pages import VERDICTS

    assert len(VERDICTS) == 4
    seen = {}
    for path, page in pages.items():
        if path.parent.name != "book" or path.stem == "bibliography":  # a list, without a sentence
            continue
        words = page.meta["description"]
        assert 40 <= len(words) <= 200 and words not in seen, (path.name, words, seen.get(words))
        seen[words] = path.name
        assert ("og:image" in page.meta) == bool(BASE)
        if BASE:
            assert page.meta["og:description"] == words and page.meta["og:title"]
            assert page.meta["og:url"] == f"{BASE}/book/{path.name}"
            card = SITE / page.meta["og:image"].removeprefix(f"{BASE}/")
            with Image.open(card) as picture:
                assert picture.size == (1200, 630) and card.stat().st_size < 150_000


def test_the_map_of_the_site_names_its_pages():
    path = SITE / "sitemap.xml"
    assert path.exists() == bool(BASE)
    if BASE:
        space = {"map": "http://www.sitemaps.org/schemas/sitemap/0.9"}
        places = {place.text for place in ET.parse(path).iterfind("map:url/map:loc", space)}
        wanted = {str(page.relative_to(SITE)) for page in SITE.glob("book/*.html")}
        assert places == {f"{BASE}/{page}" for page in wanted}


@needs_browser
@pytest.mark.browser
def test_a_lost_address_leads_back(browser):
    """Served for an address that leads nowhere, deep in the site's folder, the page has its styles and its links."""
    prefix = urlsplit(BASE).path

    class Lost(Handler):
        def translate_path(self, path):
            found = super().translate_path(path.removeprefix(prefix))
            return found if os.path.isfile(found) else str(SITE / "404.html")

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Lost, directory=str(SITE))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(
        f"http://127.0.0.1:{server.server_port}{prefix}/book/no/such/page.html", wait_until="load"
    )
    assert problems == [] and "no such page" in page.locator("article h1").first.inner_text()
    assert (
        page.locator("article").evaluate("e => getComputedStyle(e).fontFamily") != "Times New Roman"
    )
    page.get_by_role("link", name="Start at the front page").click()
    assert page.url.endswith(f"{prefix}/book/index.html") and "Noise to Tokens" in page.title()
    page.close()
    server.shutdown()


def test_the_page_on_citing_says_what_the_citation_file_says():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    shown = re.sub(r"<[^>]+>", "", (SITE / "book/cite.html").read_text()).replace("&#39;", "'")
    for key in ("title", "version", "repository-code"):
        assert str(cff[key]).replace("'", "’") in shown.replace("'", "’"), key
    assert "@misc{" in shown and str(cff["date-released"]) in shown


def test_the_ledger_page_counts_first_and_holds_every_row_of_every_chapter():
    import nbformat

    from tools.book_pages import VERDICTS, ledger_rows

    page = (SITE / "book/ledger.html").read_text()
    article = page[page.index('<article class="bd-article">') :]
    rows = {
        chapter: ledger_rows(nbformat.read(ROOT / "book" / f"{chapter}.ipynb", as_version=4))
        for chapter in inputs.chapters()
    }
    assert all(rows[chapter] for chapter in inputs.numbered())
    total = sum(map(len, rows.values()))
    shown = sum(article.count(f"<strong>{verdict}</strong>") for verdict in VERDICTS)
    assert shown == total
    summary = article[: article.index("n2t-ledger")]
    numbers = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", summary, re.S)]
    assert numbers[-1] == str(total), numbers[-6:]
    assert article.count("(derived)") == 1 + sum(row["derived"] for row in sum(rows.values(), []))


def test_a_reason_that_several_rows_share_is_said_once():
    from tools.book_pages import _with_reasons_grouped

    row = {
        "what": "x",
        "paper": 1.0,
        "source": "s",
        "ours": None,
        "tolerance": None,
        "spread": None,
        "derived": False,
    }
    rows = [
        row | {"why": why, "verdict": "out of reach"} for why in ("no data", "too long", "no data")
    ]
    text = _with_reasons_grouped(rows)
    assert text.count("no data") == 1 and text.count("too long") == 1
    lines = [line for line in text.splitlines() if line.startswith("| x")]
    assert [re.search(r"\*\*: (\w) \|", line)[1] for line in lines] == ["a", "b", "a"]
