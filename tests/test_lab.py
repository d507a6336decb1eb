"""Labs: what they compute in the browser equals the package, and everyone can use them."""

import base64
import json
import math
import os
import re
import shutil

import matplotlib.pyplot as plt
import pytest
import torch

from noise2tokens.deepseek_v3.config import Config as V3Config
from noise2tokens.deepseek_v3.count import count_parameters, pair_multiplications, training_flops
from noise2tokens.deepseek_v3.pipeline import METHODS, Durations, compare_methods, simulate
from noise2tokens.flash_attention.cost import plain_bytes, tiled_bytes
from noise2tokens.flash_attention.softmax import SoftmaxState, block_state, finish, merge
from noise2tokens.flash_attention.tiled import (
    SlowMemory,
    plain_attention,
    sweep,
    tile_is_hidden,
    tile_scores,
    tile_spans,
    tiled_forward,
)
from noise2tokens.fp8.codec import E4M3, E5M2, E5M6, Format, decode, encode
from noise2tokens.fp8.linear import cast
from noise2tokens.kimi_vl.moonvit import MOONVIT
from noise2tokens.kimi_vl.preprocess import grid_of, resized, tokens
from noise2tokens.labs import TEMPLATES, lab, lab_page
from noise2tokens.mla.attention import Sizes
from noise2tokens.mla.cost import (
    crossover,
    grouped_elements,
    grouped_intensity,
    latent_elements,
    latent_intensity,
)
from noise2tokens.moe.layer import MoEConfig
from noise2tokens.scaling_laws.flops import BATCH_TOKENS, LEARNING_RATE, MODEL_SCALE
from noise2tokens.sequence_packing.layout import offsets

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: `apt-get install chromium`, or set CHROMIUM"
)
N, DIM = 12, 4


def problem() -> dict:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(N, DIM, generator=generator) for _ in range(3))
    rounded = {
        name: [[round(x, 2) for x in row] for row in t.tolist()]
        for name, t in zip("qkv", (q, k, v), strict=True)
    }
    return {**rounded, "scale": 0.75, "fast": 100, "itemsize": 4}


def qkv(dtype=torch.float64) -> list[torch.Tensor]:
    return [torch.tensor(problem()[name], dtype=dtype)[None, None, None] for name in "qkv"]


def queries_outside(rows: int, columns: int, causal: bool) -> list[SoftmaxState]:
    """The state of the rows in fast memory after each tile, by the package's own sweep."""
    q, k, v = qkv()
    return [
        state
        for span in tile_spans(N, rows)
        for i, (_, state) in enumerate(
            sweep(
                q[..., slice(*span), :],
                k,
                v,
                span,
                0 if causal else None,
                0.75,
                SlowMemory(),
                columns,
            )
        )
        if i
    ]


def keys_outside(rows: int, columns: int, causal: bool) -> tuple[list[SoftmaxState], SlowMemory]:
    """FlashAttention's own order (Dao et al. 2022, Algorithm 1), from the package's parts: states, and traffic."""
    q, k, v = qkv()
    o, ell, m = (
        torch.zeros_like(q),
        torch.zeros(1, 1, 1, N).double(),
        torch.full((1, 1, 1, N), -torch.inf).double(),
    )
    memory, states = SlowMemory(), []
    for tensor in (o, ell, m):
        memory.store(tensor, tensor.clone())
    for c in tile_spans(N, columns):
        k_tile, v_tile = memory.load(k[..., slice(*c), :]), memory.load(v[..., slice(*c), :])
        for r in tile_spans(N, rows):
            if causal and tile_is_hidden(r, c, 0):
                continue
            part = slice(*r)
            q_tile, o_tile = memory.load(q[..., part, :]), memory.load(o[..., part, :])
            ell_tile, m_tile = memory.load(ell[..., part]), memory.load(m[..., part])
            scores = tile_scores(q_tile, k_tile, r, c, 0 if causal else None, 0.75)
            state = merge(
                SoftmaxState(m_tile, ell_tile, o_tile * ell_tile[..., None]),
                block_state(scores, v_tile),
            )
            states.append(state)
            memory.store(o[..., part, :], finish(state)[0])
            memory.store(ell[..., part], state.ell)
            memory.store(m[..., part], state.m)
    return states, memory


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """Two labs on one page; what goes wrong or leaves the page is noted."""
    page = browser.new_page(viewport={"width": 860, "height": 900})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.problems.append(request.url))
    labs = "".join(lab_page("kernel_lab", problem(), alt="Tiles of attention.") for _ in range(2))
    page.set_content(
        f'<!doctype html><html lang="en"><title>t</title><main><h1>t</h1>{labs}</main></html>'
    )
    page.wait_for_function("[...document.querySelectorAll('.n2t-lab')].every((lab) => lab.state)")
    yield page
    page.close()


def choose(page, order: str, rows: int, columns: int, causal: bool) -> None:
    page.evaluate(
        """([order, rows, columns, causal]) => {
          const lab = document.querySelector(".n2t-lab"), fire = (e, kind) => e.dispatchEvent(new Event(kind));
          const radio = lab.querySelector(`[value=${order}]`), mask = lab.querySelector("[type=checkbox]");
          radio.checked = true; fire(radio, "change");
          mask.checked = causal; fire(mask, "change");
          for (const [name, value] of [["rows", rows], ["columns", columns]]) {
            const slider = lab.querySelector(`[data-name=${name}]`);
            slider.value = value; fire(slider, "input");
          }
        }""",
        [order, rows, columns, causal],
    )


def states(page) -> list[dict]:
    """Step through the first lab from the start, by its own button, and read its state after each step."""
    return json.loads(
        page.evaluate(
            """() => {
              const lab = document.querySelector(".n2t-lab"), found = [];
              const text = (key, x) => x === -Infinity ? "-inf" : x;
              for (;;) {
                found.push(JSON.stringify(lab.state, text));
                if (lab.state.step === lab.state.steps) return `[${found}]`;
                lab.querySelector("[aria-label='step forward']").click();
              }
            }"""
        )
    )


PLANS = [(3, 3, False), (4, 2, False), (5, 4, False), (6, 3, True), (2, 5, True), (1, 1, True)]


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("order", ["queries", "keys"])
@pytest.mark.parametrize("rows, columns, causal", PLANS)
def test_every_step_of_the_kernel_lab_equals_the_package(page, order, rows, columns, causal):
    choose(page, order, rows, columns, causal)
    shown = states(page)
    if order == "queries":
        expected, memory = queries_outside(rows, columns, causal), SlowMemory()
        tiled_forward(*qkv(torch.float32), causal, 0.75, memory, (rows, columns))
        size = 1
    else:
        (expected, memory), size = (
            keys_outside(rows, columns, causal),
            2,
        )  # counted in double precision
    assert len(shown) == len(expected) + 1
    for seen, state in zip(shown[1:], expected, strict=True):
        part = slice(*seen["tile"][0])
        for name in ("m", "ell", "o"):
            here = torch.tensor(seen[name][part], dtype=torch.float64)
            torch.testing.assert_close(here, getattr(state, name)[0, 0, 0], rtol=1e-12, atol=1e-12)
    last, traffic = shown[-1], [shown[-1]["read"] * size, shown[-1]["written"] * size]
    assert traffic == [memory.read, memory.written]
    if order == "queries" and not causal:
        assert last["read"] + last["written"] == tiled_bytes(N, DIM, 4, rows)
    assert last["plainBytes"] == plain_bytes(N, DIM, 4) and last["error"] < 1e-12
    exact = plain_attention(*(x[0] for x in qkv()), causal, 0.75)[0, 0]
    torch.testing.assert_close(
        torch.tensor(last["output"], dtype=torch.float64), exact, rtol=1e-12, atol=1e-12
    )
    scores = tile_scores(*qkv()[:2], (0, N), (0, N), 0 if causal else None, 0.75)[0, 0, 0]
    if order == "queries":
        torch.testing.assert_close(
            torch.tensor(last["lse"], dtype=torch.float64), scores.logsumexp(-1)
        )
    assert page.problems == []


@needs_browser
@pytest.mark.browser
def test_tiles_that_do_not_fit_are_refused_and_the_other_lab_stays_as_it_is(page):
    before = page.evaluate("JSON.stringify(document.querySelectorAll('.n2t-lab')[1].state)")
    choose(page, "queries", 12, 4, False)
    page.locator(".n2t-lab").first.get_by_role("button", name="step forward").click(force=True)
    state = page.evaluate(
        "(({fits, held, step}) => [fits, held, step])(document.querySelector('.n2t-lab').state)"
    )
    assert state == [False, 2 * 12 * 4 + 2 * 4 * 4 + 12 * 4, 0]
    assert "make one of them smaller" in page.locator(".n2t-story").first.inner_text()
    assert page.evaluate("JSON.stringify(document.querySelectorAll('.n2t-lab')[1].state)") == before


@needs_browser
@pytest.mark.browser
def test_the_lab_works_from_the_keyboard_fits_a_phone_and_everyone(page):
    from axe_playwright_python.sync_playwright import Axe

    first = page.locator(".n2t-lab").first
    first.get_by_role("slider", name="tile", exact=True).press("End")
    assert "Done" in first.locator(".n2t-story").inner_text()
    first.get_by_role("button", name="play").press("Enter")
    page.wait_for_function("document.querySelector('.n2t-lab').state.step > 1")
    first.get_by_role("button", name="pause").press("Enter")
    for width in (390, 860):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [v["id"] for v in Axe().run(page).response["violations"]] == []


def test_a_lab_without_scripts_shows_its_picture_and_says_what_it_is():
    plt.close("all")
    page = lab_page(
        "kernel_lab", {"q": [1.0], "x": "</script>"}, alt='A "tile"', still=plt.figure()
    )
    data = re.search(r'<script type="application/json">(.*?)</script>', page, re.S).group(1)
    assert json.loads(data) == {"q": [1.0], "x": "</script>"}
    assert 'alt="A &quot;tile&quot;"' in page and "http" not in page and not plt.get_fignums()
    assert page == lab_page(
        "kernel_lab", {"x": "</script>", "q": [1.0]}, alt='A "tile"', still=plt.figure()
    )
    plt.close("all")


@pytest.mark.parametrize(
    "change, error",
    [
        ({"name": "no_lab"}, ValueError),
        ({"alt": " "}, ValueError),
        ({"height": 0}, ValueError),
        ({"data": {"x": float("nan")}}, ValueError),
        ({"data": {"x": torch.ones(2)}}, TypeError),
    ],
)
def test_bad_input_is_named(change, error):
    with pytest.raises(error, match="got|JSON"):
        lab(**({"name": "kernel_lab", "data": {}, "alt": "x"} | change))


# Spend a budget


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("decades, doublings", [(17, 0), (22.9, -2.5), (26, 4)])
def test_the_scaling_lab_reads_the_packages_laws(browser, decades, doublings):
    laws = dict(scale=MODEL_SCALE, rate=LEARNING_RATE, batch=BATCH_TOKENS)
    data = {
        "laws": {name: list(law) for name, law in laws.items()},
        "models": [{"name": "7B", "compute": 8.5e22, "scale": 4.2e10}],
        "range": [17, 26],
        "start": 23,
    }
    page, problems = browser.new_page(viewport={"width": 390, "height": 844}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.set_content(
        '<!doctype html><html lang="en"><title>t</title><main><h1>t</h1>'
        f"{lab_page('scaling_lab', data, alt='Laws at a budget.')}</main></html>"
    )
    page.wait_for_function("document.querySelector('.n2t-lab').state")
    state = page.evaluate(
        """(values) => {
          for (const [name, value] of Object.entries(values)) {
            const slider = document.querySelector(`[data-name=${name}]`);
            slider.value = value; slider.dispatchEvent(new Event("input"));
          }
          return document.querySelector(".n2t-lab").state;
        }""",
        {"decades": decades, "doublings": doublings},
    )
    compute = 10**decades
    scale = 2**doublings * MODEL_SCALE(compute)
    expected = dict(
        compute=compute, best=MODEL_SCALE(compute), scale=scale, parameters=scale / 6,
        tokens=compute / scale, rate=LEARNING_RATE(compute), batch=BATCH_TOKENS(compute),
        steps=compute / scale / BATCH_TOKENS(compute),
    )  # fmt: skip
    assert state == pytest.approx(expected, rel=1e-9)
    words = page.locator(".n2t-scaling p").inner_text()
    assert {-2.5: "smaller", 0: "optimum of the law", 4: "larger"}[doublings] in words
    assert page.evaluate("document.documentElement.scrollWidth") <= 390 and problems == []
    from axe_playwright_python.sync_playwright import Axe

    assert [v["id"] for v in Axe().run(page).response["violations"]] == []
    page.close()


# Labs whose sliders are set by the value that they show


def moved(browser, figure, change):
    """Open a lab on a phone, move its sliders to these values; return the page, its problems and the lab's state."""
    page, problems = browser.new_page(viewport={"width": 390, "height": 844}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url))
    page.set_content(
        f'<!doctype html><html lang="en"><title>t</title><main><h1>t</h1>{figure}</main></html>'
    )
    page.wait_for_function("document.querySelector('.n2t-lab').state")
    state = page.evaluate(
        """(wanted) => {
          const lab = document.querySelector(".n2t-lab");
          for (const [name, value] of Object.entries(wanted)) {
            const slider = lab.querySelector(`[data-name=${name}]`);
            for (let i = 0; i <= Number(slider.max); i++) {
              slider.value = i;
              slider.dispatchEvent(new Event("input"));
              if (lab.state[name] === value) break;
            }
          }
          return lab.state;
        }""",
        change,
    )
    return page, problems, state


def fits_and_is_accessible(page, problems):
    """Hold a page to a phone's width, no error, no request, and the rules of accessibility; then close it."""
    assert page.evaluate("document.documentElement.scrollWidth") <= 390 and problems == []
    from axe_playwright_python.sync_playwright import Axe

    assert [v["id"] for v in Axe().run(page).response["violations"]] == []
    page.close()


# Choose a cache

V3 = dict(
    heads=128,
    groups=8,
    headDim=128,
    latent=512,
    rotary=64,
    layers=61,
    tokens=131072,
    texts=8,
    bits=16,
)


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(heads=16, groups=128, headDim=64, layers=1, tokens=1024, texts=1, bits=32),
        dict(latent=64, rotary=16, tokens=1048576, bits=6),
        dict(groups=1, headDim=256, latent=2048, rotary=128, texts=128, bits=4),
        dict(headDim=128, latent=128),  # both forms meet at all tokens being new
        dict(headDim=224, latent=192, tokens=1024),  # and here beyond that, where no step is
    ],
)
def test_the_cache_lab_computes_what_the_package_does(browser, change):
    page, problems, state = moved(
        browser,
        lab_page("mla_lab", dict(start=V3, memory=80, ridge=295), alt="Caches of four kinds."),
        change,
    )
    plan = V3 | change
    plan["groups"] = min(plan["groups"], plan["heads"])
    assert {name: state[name] for name in plan} == plan
    heads, groups, dim, layers = (plan[name] for name in ("heads", "groups", "headDim", "layers"))
    latent, rotary, bits = plan["latent"], plan["rotary"], plan["bits"]
    counts = {"MHA": heads, "GQA": groups, "MQA": 1}
    numbers = {name: grouped_elements(layers, count, dim) for name, count in counts.items()}
    numbers["MLA"] = latent_elements(layers, latent, rotary)
    assert state["numbers"] == numbers
    assert state["bytes"] == {name: count * bits / 8 for name, count in numbers.items()}
    intensity = {name: grouped_intensity(heads, count, bits) for name, count in counts.items()}
    intensity["MLA"] = latent_intensity(heads, latent, rotary, bits)
    assert state["intensity"] == pytest.approx(intensity, rel=1e-12)
    at = crossover(Sizes(latent, dim, rotary, dim), plan["tokens"])
    assert state["crossover"] == (None if at is None else pytest.approx(float(at), rel=1e-12))
    total = {n: b * plan["tokens"] * plan["texts"] / 1e9 for n, b in state["bytes"].items()}
    assert state["total"] == pytest.approx(total, rel=1e-12)
    assert state["fits"] == [name for name in total if total[name] <= 80]
    assert state["busy"] == [name for name in intensity if intensity[name] >= 295]
    words = page.locator(".n2t-mla p").inner_text()
    assert ("always" in words) is (at is None or at >= plan["tokens"])
    fits_and_is_accessible(page, problems)


# Design a model

V3_PLAN = dict(
    layers=61, dense=3, width=7168, heads=128, hidden=18432, kv=512, query=1536, nope=128, rope=64,
    value=128, experts=256, topK=8, expert=2048, shared=1, vocab=129280, tokens=4096,
)  # fmt: skip


def v3_config(plan: dict) -> V3Config:
    return V3Config(
        vocab_size=plan["vocab"],
        width=plan["width"],
        layers=plan["layers"],
        heads=plan["heads"],
        hidden=plan["hidden"],
        attention=Sizes(
            plan["kv"], plan["nope"], plan["rope"], plan["value"], query_rank=plan["query"]
        ),
        mixture=MoEConfig(plan["experts"], plan["topK"], plan["expert"], shared=plan["shared"]),
        dense=plan["dense"],
    )


def in_full(text: str) -> float:
    """Read a number as the lab writes it: 671B, 36.63B, 70.27kB."""
    number, size = re.match(r"([\d.]+)([kMBT]?)", text).groups()
    return float(number) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[size]


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(layers=4, dense=4, width=512, heads=8, kv=128),
        dict(experts=8, topK=8, expert=256, tokens=131072),
        dict(layers=128, dense=0, width=12288, heads=256, experts=512, topK=32, expert=8192),
        dict(layers=2, dense=16, experts=8, topK=32),  # more than there are: all of them
    ],
)
def test_the_model_lab_counts_as_the_package_does(browser, change):
    page, problems, state = moved(
        browser, lab_page("v3_lab", dict(start=V3_PLAN), alt="What a model holds."), change
    )
    plan = V3_PLAN | change
    plan["dense"] = min(plan["dense"], plan["layers"])
    plan["topK"] = min(plan["topK"], plan["experts"])
    assert {name: state[name] for name in plan} == plan
    config = v3_config(plan)
    parts, active = count_parameters(config), count_parameters(config, active=True)
    assert state["parts"] == parts and state["active"] == active
    assert state["total"] == sum(parts.values())
    assert state["used"] == sum(active.values()) - active["embedding"]
    sizes = config.attention
    assert state["cache"] == latent_elements(plan["layers"], sizes.kv_rank, sizes.rope_dim)
    assert state["flops"] == training_flops(config, plan["tokens"], causal=True)
    shown = page.locator(".n2t-v3 td").all_inner_texts()
    numbers = [state["total"], state["used"], 2 * state["cache"], state["flops"]]
    assert [in_full(text) for text in shown] == pytest.approx(numbers, rel=6e-4)
    bars = page.evaluate(
        "[...document.querySelectorAll('.n2t-v3 tbody i')].map((x) => parseFloat(x.style.width))"
    )
    names = ("attention", "routed experts", "shared experts", "dense layers")
    shares = [100 * parts[name] / state["total"] for name in names]
    shares += [100 * active[name] / state["used"] for name in names]
    assert bars == pytest.approx(shares, rel=1e-3, abs=1e-3)
    pairs = 3 * plan["layers"] * pair_multiplications(config) * (plan["tokens"] + 1)
    words = page.locator(".n2t-v3 [aria-live]").inner_text()
    percent = [float(number) for number in re.findall(r"([\d.]+) %", words)]
    wanted = [100 * state["used"] / state["total"], 100 * pairs / state["flops"]]
    assert percent == pytest.approx(wanted, rel=0.05)
    fits_and_is_accessible(page, problems)


# A pipeline of your own

SCHEDULE = dict(ranks=8, batches=2, weights=1, both=2.6)  # where the sliders start


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(ranks=2, batches=4, weights=1.6, both=2),
        dict(ranks=16, batches=32, weights=0.4, both=3.2),
        dict(ranks=6, batches=36, weights=1.2, both=2.2),
    ],
)
def test_the_schedule_lab_simulates_as_the_package_does(browser, change):
    page, problems, state = moved(
        browser, lab_page("schedule_lab", dict(start=SCHEDULE), alt="Three schedules."), change
    )
    plan = dict(ranks=8, batches=16, weights=1, both=2.6) | change
    assert {name: state[name] for name in plan} == plan
    durations = Durations(forward=1, backward=2, weights=plan["weights"], both=plan["both"])
    for name, row in compare_methods(plan["ranks"], plan["batches"], durations).items():
        found = state["found"][name]
        assert found["bubble"] == pytest.approx(row["bubble"], abs=1e-9)
        assert found["bubble"] / found["end"] == pytest.approx(row["share"], abs=1e-9)
        assert found["activations"] == row["activations"]
    runs = [simulate(make(plan["ranks"], plan["batches"]), durations) for make in METHODS.values()]
    until = max(run.end for run in runs)
    drawn = page.evaluate(
        """[...document.querySelectorAll(".n2t-charts svg")].map((svg) =>
          [...svg.querySelectorAll(":scope > rect:not([fill^=url])")].map((rect) =>
            ["x", "y", "width", "height"].map((name) => Number(rect.getAttribute(name)))))"""
    )
    lines = page.locator(".n2t-charts p").all_inner_texts()
    for name, run, rects, line in zip(METHODS, runs, drawn, lines, strict=True):
        want = []
        for rank, spans in enumerate(run.spans):
            for start, end, step in spans:
                high, width = 10.5 / len(step), max(0.2, (end - start) / until * 600 - 0.4)
                for place in range(len(step)):
                    want.append((start / until * 600, 12 * rank + place * high, width, high))
        torch.testing.assert_close(torch.tensor(rects), torch.tensor(want), rtol=0, atol=0.011)
        waits, end, holds = map(
            float, re.findall(r"waits ([\d.]+) of ([\d.]+), holds (\d+)", line)[0]
        )
        assert line.startswith(name) and holds == max(run.peaks)
        assert [waits, end] == pytest.approx([max(run.bubbles), run.end], abs=0.051)
    least = min(run.end for run in runs) + 1e-9
    first = [name for name, run in zip(METHODS, runs, strict=True) if run.end <= least]
    said = " and ".join(first) + (" are" if len(first) > 1 else " is")
    assert f"{said} done first" in page.locator(".n2t-schedule [aria-live]").inner_text()
    fits_and_is_accessible(page, problems)


# What a picture costs

OTHERS = [(427, 640), (1080, 1920), (64, 64)]
SIGHT = dict(width=1200, height=800, limit=4096)


def scale_and_distortion(size, seen):
    down, across = (new / old for new, old in zip(seen, size, strict=True))
    return min(down, across), max(down / across, across / down)


def internvl_tiles(height, width, side=448, most=12):
    """Rows and columns of the tiles that InternVL's released code cuts, written as it is there."""
    ratios = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1)}
    ratios = sorted((r for r in ratios if r[0] * r[1] <= most), key=lambda r: r[0] * r[1])
    best, least = (1, 1), math.inf
    for columns, rows in ratios:
        off = abs(width / height - columns / rows)
        if off < least:
            best, least = (rows, columns), off
        elif off == least and width * height > 0.5 * side * side * rows * columns:
            best = (rows, columns)
    return best


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(width=20, height=20),
        dict(width=1000, height=1000),  # shrunk, filled up, and beyond the limit of patches
        dict(width=1000, height=1000, limit=16384),
        dict(width=4000, height=20),
        dict(width=300, height=4000),
        dict(width=3840, height=2160, limit=16384),
        dict(width=400, height=400),  # one tile is enough
        dict(width=460, height=460),  # and here four tiles tie with it, and win
    ],
)
def test_the_sight_lab_counts_as_the_package_does(browser, change):
    figure = lab_page("sight_lab", dict(start=SIGHT, others=OTHERS), alt="What a picture costs.")
    page, problems, state = moved(browser, figure, change)
    plan = SIGHT | change
    assert {name: state[name] for name in plan} == plan
    size, limit = (plan["height"], plan["width"]), plan["limit"]
    native, seen = state["native"], resized(*size, 14, limit)
    assert tuple(native["seen"]) == seen
    assert tuple(native["grid"]) == grid_of(*size, MOONVIT, limit) and not native["refused"]
    assert native["tokens"] == tokens(*size, MOONVIT, limit) == native["patches"] / 4
    area = native["grid"][0] * native["grid"][1] * 14**2
    assert native["filled"] == pytest.approx(1 - seen[0] * seen[1] / area, abs=1e-12)
    tiles = internvl_tiles(*size)
    assert tuple(state["tiled"]["tiles"]) == tiles
    count = tiles[0] * tiles[1]
    assert state["tiled"]["tokens"] == 256 * (count + (count > 1))
    assert state["square"]["tokens"] == 256
    whole = [448 * n for n in tiles]
    for way, there in [("native", seen), ("square", (448, 448)), ("tiled", whole)]:
        found = state[way]["scale"], state[way]["distortion"]
        assert found == pytest.approx(scale_and_distortion(size, there), rel=1e-12)
    patches = [4 * tokens(*one, MOONVIT, limit) for one in (size, *OTHERS)]
    assert state["cu_seqlens"] == offsets(patches).tolist()
    assert state["padded"] == len(patches) * max(patches)
    fits_and_is_accessible(page, problems)


@needs_browser
@pytest.mark.browser
def test_the_sight_lab_refuses_what_the_package_refuses(browser):
    """No slider reaches so far: the rule is held on the module itself, without the limit of patches in the way."""
    figure = lab_page("sight_lab", dict(start=SIGHT, others=[(14, 7168)]), alt="A long strip.")
    page, problems, _ = moved(browser, figure, {})
    source = (TEMPLATES / "sight_lab.js").read_text()
    module = "data:text/javascript;base64," + base64.b64encode(source.encode()).decode()
    for width in (7139, 7140, 7141, 7168):
        refused = page.evaluate(
            "async ([m, w]) => (await import(m)).native(14, w, 4096).refused", [module, width]
        )
        if refused:
            with pytest.raises(ValueError, match="512"):
                grid_of(14, width, MOONVIT, 4096)
        else:
            assert max(grid_of(14, width, MOONVIT, 4096)) < 512
        assert refused == (width > 7140)
    page.close()


# Round a number

FORMATS = {"E4M3": E4M3, "E5M2": E5M2, "bfloat16": Format(8, 7)}
TYPES = {
    "E4M3": (torch.float8_e4m3fn, torch.uint8),
    "E5M2": (torch.float8_e5m2, torch.uint8),
    "bfloat16": (torch.bfloat16, torch.int16),
}
FP8_DATA = dict(
    formats={name: [f.exponent_bits, f.mantissa_bits, f.ieee] for name, f in FORMATS.items()},
    start=dict(format="E4M3", x=0.3952, scale=0),
)


def finite_numbers(format: Format) -> torch.Tensor:
    """All numbers of a format from the least to the largest, zero once."""
    numbers = decode(torch.arange(2**format.bits), format)
    return numbers[numbers.isfinite()].unique()


def hard_numbers(format: Format) -> torch.Tensor:
    """Numbers of float32: halves, what is next to them, all magnitudes, zeros, and what is too large."""
    generator = torch.Generator().manual_seed(0)
    numbers = finite_numbers(format)
    numbers = numbers[numbers > 0]
    some = torch.randperm(len(numbers) - 40, generator=generator)[:60] + 20
    at = torch.cat([torch.arange(20), some.sort().values, len(numbers) - 20 + torch.arange(20)])
    halves = ((numbers[at[:-1]] + numbers[at[:-1] + 1]) / 2).float()
    numbers = numbers[at]
    half = torch.tensor([format.smallest / 2, format.smallest / 4])
    low, high = math.log2(format.smallest) - 4, math.log2(format.largest) + 4
    spread = torch.exp2(low + (high - low) * torch.rand(100, generator=generator).double())
    above = format.largest * torch.tensor([1.0001, 1.003, 1.03, 1.04, 2, 1e6]).double()
    x = torch.cat([numbers.float(), halves, half, spread.float(), above.float(), torch.zeros(1)])
    around = [torch.nextafter(x, torch.tensor(end)) for end in (-math.inf, math.inf)]
    x = torch.cat([x, *around])
    x = x[x.isfinite()]
    return torch.cat([x, -x])


@pytest.fixture(scope="module")
def number_page(browser):
    """One page for all numbers: opening it takes longer than a number."""
    figure = lab_page("fp8_lab", FP8_DATA, alt="Bits of a number.")
    page, problems, _ = moved(browser, figure, {})
    yield page
    page.close()
    assert problems == []


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize("name", [*FORMATS, "E5M6"])
@pytest.mark.parametrize("power", [0, -14, 10])
def test_the_fp8_lab_rounds_as_the_package_and_pytorch_do(number_page, name, power):
    format = {**FORMATS, "E5M6": E5M6}[name]
    source = (TEMPLATES / "fp8_lab.js").read_text()
    module = "data:text/javascript;base64," + base64.b64encode(source.encode()).decode()
    scaled, sigma = hard_numbers(format), 2.0**power
    x = scaled.double() * sigma
    rows = number_page.evaluate(
        """async ([m, xs, sigma, format]) => {
          const { read } = await import(m);
          return xs.map((x) => (({ number, ...rest }) => rest)(read(x, sigma, format)));
        }""",
        [module, x.tolist(), sigma, [format.exponent_bits, format.mantissa_bits, format.ieee]],
    )
    assert len(rows) >= 300

    def column(key):
        return torch.tensor([row[key] for row in rows], dtype=torch.float64)

    codes = encode(scaled, format)
    assert torch.equal(column("code").long(), codes)
    assert torch.equal(column("value"), decode(codes, format))
    assert torch.equal(column("rounded"), decode(codes, format) * sigma)
    if name in TYPES:
        dtype, integer = TYPES[name]
        theirs = scaled.clamp(-format.largest, format.largest).to(dtype)
        assert torch.equal(theirs.view(integer).long() % 2**format.bits, codes)
    if name == "E4M3":
        assert torch.equal(column("rounded"), cast(x.float(), 1 / sigma).double())
    bits = [f"{code:0{format.bits}b}" for code in codes.tolist()]
    end = 1 + format.exponent_bits
    parts = [(int(b[0]), int(b[1:end], 2), int(b[end:], 2)) for b in bits]
    assert [(row["s"], row["e"], row["m"]) for row in rows] == parts
    numbers = finite_numbers(format)
    at = torch.searchsorted(numbers, scaled.double())
    after = torch.searchsorted(numbers, scaled.double(), right=True)
    padded = [None, *(numbers * sigma).tolist(), None]
    pairs = [
        [None if row[k] is None else float(row[k]) for k in ("below", "above")] for row in rows
    ]
    after = (after + 1).tolist()
    assert pairs == [[padded[i], padded[j]] for i, j in zip(at.tolist(), after, strict=True)]
    error = ((column("rounded") - x) / x).abs().nan_to_num(0)
    torch.testing.assert_close(column("error"), error, rtol=1e-12, atol=0)
    size = scaled.double().abs()
    zero, lost = size == 0, (size > 0) & (size <= format.smallest / 2)
    large = size > format.largest
    small = (decode(codes, format).abs() < format.smallest_normal) & ~zero & ~lost
    kinds = {"zero": zero, "lost": lost, "saturates": large, "subnormal": small}
    kinds["normal"] = ~(zero | lost | large | small)
    for kind, here in kinds.items():
        assert here.any() and [row["kind"] == kind for row in rows] == here.tolist(), kind
    means = [math.nan if b is None or a is None else (b + a) / 2 for b, a in pairs]
    middle = (torch.tensor(means, dtype=torch.float64) == x) & (decode(codes, format) != scaled)
    assert middle.sum() >= 200 and [row["tie"] for row in rows] == middle.tolist()
    gap = torch.tensor([0.0 if a is None or b is None else a - b for b, a in pairs]).double()
    inside = (gap > 0) & (decode(codes, format) != scaled)
    assert ((column("rounded") - x).abs()[inside] <= gap[inside] / 2).all()


def set_number(page, text: str, format: str, power: int) -> dict:
    page.get_by_role("radio", name=format, exact=True).first.check()
    page.get_by_role("slider", name="scale").first.fill(str(power))
    page.get_by_role("textbox", name="x").first.fill(text)
    return page.evaluate("document.querySelector('.n2t-lab').state")


def shown_number(text: str) -> float | None:
    return None if text == "none" else float(text.replace("−", "-"))


@needs_browser
@pytest.mark.browser
@pytest.mark.parametrize(
    "text, format, power, says",
    [
        ("0.3952", "E4M3", 0, ["Normal", "0.03125"]),
        ("1.0625", "E4M3", 0, ["Normal", "even mantissa"]),
        ("2", "E5M2", 4, ["one of them"]),
        ("−0.004", "E4M3", 0, ["Subnormal", "0.015625"]),
        ("3e-5", "E4M3", 0, ["Lost", "becomes zero"]),
        ("3e-5", "E5M2", 0, ["Subnormal"]),
        ("3e-5", "E4M3", -14, ["Normal"]),
        ("1", "E4M3", 10, ["Lost"]),
        ("1", "E4M3", 6, ["Normal"]),
        ("-1000", "E4M3", 0, ["Too large", "448"]),
        ("1e9", "E5M2", 1, ["Too large", "114688"]),
        ("0", "E5M2", 0, ["Zero"]),
        ("1.003", "bfloat16", 0, ["Normal"]),
        ("1e-50", "bfloat16", 0, ["Lost"]),
    ],
)
def test_the_fp8_lab_draws_and_says_what_it_computes(number_page, text, format, power, says):
    page = number_page
    state = set_number(page, text, format, power)
    kind, sigma, x = FORMATS[format], 2.0**power, float(text.replace("−", "-"))
    assert (state["format"], state["scale"], state["x"]) == (format, power, x)
    groups = page.locator(".n2t-bits > div").all()
    digits = ["".join(group.locator("b").all_inner_texts()) for group in groups]
    assert "".join(digits) == f"{encode(torch.tensor([x / sigma]), kind).item():0{kind.bits}b}"
    assert [len(part) for part in digits] == [1, kind.exponent_bits, kind.mantissa_bits]
    read = [group.inner_text().split("=")[1] for group in groups]
    assert [int(value) for value in read] == [int(part, 2) for part in digits]
    formula = page.locator(".n2t-formula").inner_html().split("stored as")[1]
    formula = formula.replace("<sup>", "**(").replace("</sup>", ")").replace("&nbsp;", "")
    formula = re.sub(r"</?i[^>]*>", "", formula).replace("−", "-").replace("·", "*")
    left, right = formula.split("=")
    assert eval(left) == state["value"] == pytest.approx(float(right), rel=1e-5)
    cells = page.locator(".n2t-fp8 td").all_inner_texts()
    for cell, value in zip(cells, ("below", "rounded", "above"), strict=False):
        value = state[value]
        assert shown_number(cell) == (None if value is None else pytest.approx(value, rel=1e-5))
    assert float(cells[3].removesuffix(" %")) == pytest.approx(100 * state["error"], rel=5e-3)
    words = page.locator(".n2t-fp8 [aria-live]").inner_text()
    assert all(part in words for part in says)
    if format != "bfloat16":
        drawn = sorted(ticks(page, ".n2t-axis line:not(.n2t-x)[y2='26']"))
        numbers = (finite_numbers(kind) * sigma).log2()
        places = 100 * (numbers + 26) / 48
        assert drawn == pytest.approx([v for v in places.tolist() if 0 < v < 100], abs=1e-6)
    here, gap = state["rounded"], state["gap"]
    near = ((finite_numbers(kind) * sigma - here) / gap / 9 + 0.5) * 100
    near = near[(near > 0) & (near < 100)].tolist()
    assert sorted(ticks(page, ".n2t-near line[y2='50']:not(.n2t-x):not([x1='0'])")) == (
        pytest.approx(near, abs=1e-6)
    )
    off = 100 * ((x - here) / gap / 9 + 0.5)
    assert ticks(page, ".n2t-near .n2t-x") == (
        [pytest.approx(off, abs=1e-6)] if 0 < off < 100 else []
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def ticks(page, selector: str) -> list[float]:
    return page.evaluate(
        "s => [...document.querySelectorAll(s)].map((e) => parseFloat(e.getAttribute('x1')))",
        selector,
    )


@needs_browser
@pytest.mark.browser
def test_the_fp8_lab_works_from_the_keyboard_and_refuses_what_is_no_number(browser):
    figure = lab_page("fp8_lab", FP8_DATA, alt="Bits of a number.")
    page, problems, start = moved(browser, figure + figure, {})
    state = "document.querySelectorAll('.n2t-lab')[{}].state"
    size = page.get_by_role("slider", name="size of x").first
    field = page.get_by_role("textbox", name="x").first
    for text in ("abc", "", "1e999", "--1"):
        field.fill(text)
        assert field.get_attribute("aria-invalid") == "true"
        assert "Type a number" in page.locator(".n2t-fp8 [aria-live]").first.inner_text()
        assert page.evaluate(state.format(0)) == start
    field.fill("-0.4")
    assert field.get_attribute("aria-invalid") == "false"
    size.press("Home")  # the sign stays
    assert page.evaluate(state.format(0))["x"] == -(2.0**-26) == float(field.input_value())
    assert page.evaluate(state.format(0))["kind"] == "lost"
    size.press("End")
    assert page.evaluate(state.format(0))["kind"] == "saturates"
    page.get_by_role("radio", name="E4M3").first.press("ArrowRight")
    assert page.evaluate(state.format(0))["format"] == "E5M2"
    page.get_by_role("slider", name="scale").first.press("ArrowLeft")
    assert page.evaluate(state.format(0))["scale"] == -1
    assert page.evaluate(state.format(1)) == start
    fits_and_is_accessible(page, problems)
