// "Be the kernel": attention in tiles, one tile a step, with what lies in fast memory and what has crossed its border.
//
// `trace` runs the whole computation for one plan (loop order, tile, mask) and keeps a frame after each tile; `mount`
// draws frames and listens. The arithmetic is that of flash_attention/softmax.py and tiled.py in the same letters, and
// tests/test_lab.py holds both equal: m is a row's running maximum, ell its denominator, o its undivided output.

const NEVER = -Infinity;
const finite = (m) => (m === NEVER ? 0 : m);
const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const range = (start, stop) => Array.from({ length: Math.max(0, stop - start) }, (_, i) => start + i);

export const spans = (length, tile) =>
  range(0, Math.ceil(length / tile)).map((i) => [i * tile, Math.min((i + 1) * tile, length)]);

export const identity = (dim) => ({ m: NEVER, ell: 0, o: Array(dim).fill(0) });

// The state of some keys for one query: scores are -Infinity where it may not see a key.
export function blockState(scores, values) {
  const m = Math.max(NEVER, ...scores);
  const weights = scores.map((s) => Math.exp(s - finite(m)));
  const o = values[0].map((_, c) => dot(weights, values.map((v) => v[c])));
  return { m, ell: weights.reduce((a, b) => a + b, 0), o };
}

export function merge(a, b) {
  const m = Math.max(a.m, b.m);
  const [wa, wb] = [Math.exp(a.m - finite(m)), Math.exp(b.m - finite(m))];
  return { m, ell: a.ell * wa + b.ell * wb, o: a.o.map((x, c) => x * wa + b.o[c] * wb) };
}

export const divided = (state) => state.o.map((x) => (state.ell === 0 ? 0 : x / state.ell));

export function plainScores(problem, causal) {
  return problem.q.map((q, i) => problem.k.map((k, j) => (causal && j > i ? NEVER : dot(q, k) * problem.scale)));
}

export function plainOutput(problem, causal) {
  return plainScores(problem, causal).map((scores) => divided(blockState(scores, problem.v)));
}

// Numbers that the tiles take in fast memory: Q and O, K and V, and the scores.
export const held = (problem, { rows, columns }) => {
  const dim = problem.q[0].length;
  return { Q: rows * dim, O: rows * dim, K: columns * dim, V: columns * dim, S: rows * columns };
};

export const fits = (problem, plan) =>
  Object.values(held(problem, plan)).reduce((a, b) => a + b, 0) <= problem.fast;

// Bytes of the plain way: Q, K, V read and O written, S and P written and read.
export const plainBytes = (problem) => {
  const n = problem.q.length, dim = problem.q[0].length;
  return (4 * n * dim + 4 * n * n) * problem.itemsize;
};

// Every tile of one plan in its order; frame 0 is the state before the first.
export function trace(problem, { order, rows, columns, causal }) {
  const n = problem.q.length, dim = problem.q[0].length, size = problem.itemsize;
  const scores = plainScores(problem, causal);
  const hidden = (r, c) => causal && c[0] > r[1] - 1;
  const blocks = spans(n, rows), tiles = spans(n, columns);
  const queriesOutside = order === "queries";
  const plan = queriesOutside
    ? blocks.flatMap((r) => tiles.filter((c) => !hidden(r, c)).map((c) => [r, c]))
    : tiles.flatMap((c) => blocks.filter((r) => !hidden(r, c)).map((r) => [r, c]));
  // Where a row's state is: nowhere yet, in fast memory, in slow memory, or no longer needed.
  let now = {
    rows: null, columns: null, read: 0, written: 0, loads: [], stores: [],
    place: Array(n).fill("none"), state: range(0, n).map(() => identity(dim)),
    output: Array(n).fill(null), lse: Array(n).fill(null), visited: range(0, n).map(() => Array(n).fill(false)),
  };
  if (!queriesOutside) {
    // FlashAttention keeps O, ell and m of all rows in slow memory and sets them there first.
    now.written = n * (dim + 2) * size;
    now.place = Array(n).fill("slow");
    now.output = range(0, n).map(() => Array(dim).fill(0));
    now.stores = [["O", [0, n]], ["m", [0, n]], ["ℓ", [0, n]]];
  }
  const frames = [now];
  plan.forEach(([r, c], at) => {
    const first = (other) => at === 0 || other !== plan[at - 1][queriesOutside ? 0 : 1];
    const last = at === plan.length - 1 || plan[at + 1][0] !== r;
    const next = {
      rows: r, columns: c, loads: [], stores: [], read: now.read, written: now.written,
      place: now.place.map((place) => (place === "fast" ? (queriesOutside ? "done" : "slow") : place)),
      state: [...now.state], output: [...now.output], lse: [...now.lse], visited: now.visited.map((row) => [...row]),
    };
    const move = (list, name, span, width) => {
      list.push([name, span]);
      next[list === next.loads ? "read" : "written"] += (span[1] - span[0]) * width * size;
    };
    if (!queriesOutside || first(r)) move(next.loads, "Q", r, dim);
    if (!queriesOutside) for (const [name, width] of [["O", dim], ["m", 1], ["ℓ", 1]]) move(next.loads, name, r, width);
    if (queriesOutside || first(c)) for (const name of ["K", "V"]) move(next.loads, name, c, dim);
    const inside = range(...r), keys = range(...c);
    next.before = inside.map((i) => now.state[i]);
    next.block = inside.map((i) => blockState(keys.map((j) => scores[i][j]), keys.map((j) => problem.v[j])));
    inside.forEach((i, here) => {
      next.state[i] = merge(now.state[i], next.block[here]);
      next.place[i] = "fast";
      for (const j of keys) next.visited[i][j] = true;
    });
    if (!queriesOutside || last) {
      for (const i of inside) {
        next.output[i] = divided(next.state[i]);
        next.lse[i] = next.state[i].m + Math.log(next.state[i].ell);
      }
      const parts = queriesOutside ? [["O", dim], ["LSE", 1]] : [["O", dim], ["m", 1], ["ℓ", 1]];
      for (const [name, width] of parts) move(next.stores, name, r, width);
    }
    frames.push((now = next));
  });
  return frames;
}

// The fewest bytes that any tile of this size of fast memory moves, over both loop orders.
export function fewest(problem, causal) {
  const n = problem.q.length;
  let best = Infinity;
  for (const order of ["queries", "keys"])
    for (let rows = 1; rows <= n; rows++)
      for (let columns = 1; columns <= n; columns++)
        if (fits(problem, { rows, columns })) {
          const end = trace(problem, { order, rows, columns, causal }).at(-1);
          best = Math.min(best, end.read + end.written);
        }
  return best;
}

// ---- what is seen

const U = 20; // pixels of a cell, in the drawing's own coordinates
const digits = (x, n = 2) => (Number.isFinite(x) ? x.toFixed(n) : x < 0 ? "-∞" : "∞").replace("-", "−");
const span = ([a, b]) => (b - a === 1 ? `${a + 1}` : `${a + 1}–${b}`);
const some = (one, many, s) => `${s[1] - s[0] > 1 ? many : one} ${span(s)}`;
const grouped = (x) => String(x).replace(/\B(?=(\d{3})+$)/g, " ");
const ORDER = { queries: "queries outside", keys: "keys outside" };

function cell(x, y, value, reach, strong, extra = "") {
  const shade = reach ? Math.min(1, Math.abs(value) / reach) : 0;
  const color = value < 0 ? "var(--minus)" : "var(--plus)";
  return `<rect x="${x}" y="${y}" width="${U}" height="${U}" fill="${color}" fill-opacity="${((strong ? 0.95 : 0.5) * shade).toFixed(3)}" stroke="currentColor" stroke-opacity="${strong ? 0.3 : 0.16}" stroke-width=".7"${extra}/>`;
}

const outline = (x, y, width, height) =>
  `<rect x="${x}" y="${y}" width="${width}" height="${height}" fill="none" stroke="var(--sram)" stroke-width="2.6" rx="2"/>`;

function matrixPicture(problem, frame, scores, watched, reach) {
  const n = problem.q.length, dim = problem.q[0].length;
  const left = 1.1 * U, sx = left + (dim + 0.8) * U, sy = (1 + dim + 0.8) * U, vy = sy + (n + 0.8) * U;
  const [width, height] = [sx + (n + 0.3) * U, vy + (dim + 0.2) * U];
  const rows = frame.rows ?? [0, 0], columns = frame.columns ?? [0, 0];
  const within = (i, [a, b]) => i >= a && i < b;
  const parts = [];
  problem.q.forEach((row, i) => row.forEach((x, c) => parts.push(cell(left + c * U, sy + i * U, x, reach.q, within(i, rows)))));
  problem.k.forEach((row, j) => row.forEach((x, c) => parts.push(cell(sx + j * U, U + c * U, x, reach.k, within(j, columns)))));
  problem.v.forEach((row, j) => row.forEach((x, c) => parts.push(cell(sx + j * U, vy + c * U, x, reach.v, within(j, columns)))));
  for (let i = 0; i < n; i++)
    for (let j = 0; j < n; j++) {
      const [x, y, s] = [sx + j * U, sy + i * U, scores[i][j]];
      if (within(i, rows) && within(j, columns)) {
        const weight = Math.exp(s - finite(frame.state[i].m));
        parts.push(`<g data-row="${i}"><rect x="${x}" y="${y}" width="${U}" height="${U}" fill="var(--sram)" fill-opacity="${(0.9 * weight).toFixed(3)}" stroke="currentColor" stroke-opacity=".3" stroke-width=".7"/><title>query ${i + 1}, key ${j + 1}: score ${digits(s)}, exp(score − m) = ${digits(weight)}</title></g>`);
        if (s === NEVER) parts.push(`<path d="M${x + 5} ${y + 5}l10 10m0-10l-10 10" stroke="currentColor" stroke-opacity=".5"/>`);
      } else if (s !== NEVER)
        parts.push(frame.visited[i][j]
          ? `<circle cx="${x + U / 2}" cy="${y + U / 2}" r="2.2" fill="currentColor" fill-opacity=".45"/>`
          : `<rect x="${x + 3}" y="${y + 3}" width="${U - 6}" height="${U - 6}" rx="2" fill="none" stroke="currentColor" stroke-opacity=".22" stroke-dasharray="2 2.6"/>`);
    }
  for (let i = 0; i < n; i++) {
    const strong = i === watched ? ' style="font-weight:700"' : ' class="n2t-small"';
    parts.push(`<text x="${left - 6}" y="${sy + (i + 0.7) * U}" text-anchor="end"${strong}>${i + 1}</text>`);
    parts.push(`<text x="${sx + (i + 0.5) * U}" y="${U - 5}" text-anchor="middle" class="n2t-small">${i + 1}</text>`);
  }
  if (frame.rows) {
    const [h, w] = [(rows[1] - rows[0]) * U, (columns[1] - columns[0]) * U];
    parts.push(outline(left, sy + rows[0] * U, dim * U, h), outline(sx + columns[0] * U, U, w, dim * U));
    parts.push(outline(sx + columns[0] * U, vy, w, dim * U), outline(sx + columns[0] * U, sy + rows[0] * U, w, h));
    if (within(watched, rows))
      parts.push(`<rect x="${sx + columns[0] * U}" y="${sy + watched * U}" width="${w}" height="${U}" fill="none" stroke="currentColor" stroke-width="1.4"/>`);
  }
  parts.push(`<text class="n2t-letter" x="${left + (dim * U) / 2}" y="${sy - 7}" text-anchor="middle">Q</text>`);
  parts.push(`<text class="n2t-letter" x="${sx - 9}" y="${U * (1 + dim / 2) + 5}" text-anchor="end">Kᵀ</text>`);
  parts.push(`<text class="n2t-letter" x="${sx - 9}" y="${vy + (dim * U) / 2 + 5}" text-anchor="end">Vᵀ</text>`);
  return { width, height, drop: sy, body: parts.join("") };
}

function statePicture(problem, frame, watched, reach) {
  const n = problem.q.length, dim = problem.q[0].length;
  const top = 1.5 * U, mx = 0.5 * U, lx = mx + 2.2 * U, ox = lx + 4.9 * U, Ox = ox + (dim + 1.2) * U;
  const [width, height] = [Ox + (dim + 0.3) * U, top + (n + 0.3) * U];
  const parts = [], bar = lx + 1.9 * U, longest = 2.7 * U;
  const rows = frame.rows ?? [0, 0];
  for (let i = 0; i < n; i++) {
    const y = top + i * U, text = y + 0.7 * U, { m, ell, o } = frame.state[i], place = frame.place[i];
    const bold = i === watched ? ' style="font-weight:700"' : "";
    const group = [`<rect x="0" y="${y}" width="${width}" height="${U}" fill="transparent"/>`];
    if (place === "fast") {
      const before = frame.before[i - rows[0]], kept = before.ell * Math.exp(before.m - finite(m));
      const scale = longest / reach.ell;
      group.push(`<text x="${mx + 1.8 * U}" y="${text}" text-anchor="end"${bold}>${digits(m)}</text>`);
      group.push(`<rect x="${bar}" y="${y + 3}" width="${kept * scale}" height="${U - 6}" fill="var(--plus)" fill-opacity=".55"/>`);
      group.push(`<rect x="${bar + kept * scale}" y="${y + 3}" width="${(ell - kept) * scale}" height="${U - 6}" fill="var(--sram)" fill-opacity=".75"/>`);
      group.push(`<text x="${lx + 1.7 * U}" y="${text}" text-anchor="end"${bold}>${digits(ell)}</text>`);
      o.forEach((x, c) => group.push(cell(ox + c * U, y, x, reach.o, true)));
    } else if (place === "slow") {
      group.push(`<text class="n2t-rest" x="${mx + 1.8 * U}" y="${text}" text-anchor="end">${digits(m)}</text>`);
      group.push(`<text class="n2t-rest" x="${lx + 1.7 * U}" y="${text}" text-anchor="end">${digits(ell)}</text>`);
    } else if (place === "done")
      group.push(`<text class="n2t-rest" x="${lx + 1.7 * U}" y="${text}" text-anchor="end">LSE ${digits(frame.lse[i])}</text>`);
    for (let c = 0; c < dim; c++) {
      const out = frame.output[i];
      group.push(out
        ? cell(Ox + c * U, y, out[c], reach.output, true)
        : `<rect x="${Ox + c * U + 3}" y="${y + 3}" width="${U - 6}" height="${U - 6}" rx="2" fill="none" stroke="currentColor" stroke-opacity=".22" stroke-dasharray="2 2.6"/>`);
    }
    parts.push(`<g data-row="${i}">${group.join("")}</g>`);
  }
  if (frame.rows) {
    const [y, h] = [top + rows[0] * U, (rows[1] - rows[0]) * U];
    parts.push(outline(0.3 * U, y, ox + (dim + 0.2) * U - 0.3 * U, h));
    if (frame.stores.length)
      parts.push(`<path d="M${ox + (dim + 0.35) * U} ${y + h / 2}h${0.55 * U}m-4 -4l4 4l-4 4" fill="none" stroke="var(--sram)" stroke-width="2"/>`);
  }
  for (const [x, letter] of [[mx + 1.2 * U, "m"], [lx + 1.2 * U, "ℓ"], [ox + (dim * U) / 2, "o"], [Ox + (dim * U) / 2, "O"]])
    parts.push(`<text class="n2t-letter" x="${x}" y="${top - 7}" text-anchor="middle">${letter}</text>`);
  return { width, height, top, body: parts.join("") };
}

function legend() {
  const mark = (drawing) => `<svg viewBox="0 0 16 16" aria-hidden="true">${drawing}</svg>`;
  return [
    [mark('<rect x="1.5" y="1.5" width="13" height="13" fill="none" stroke="var(--sram)" stroke-width="2.4" rx="2"/>'), "in fast memory; the rest lies in slow"],
    [mark('<rect x="1" y="1" width="14" height="14" fill="var(--sram)" fill-opacity=".75"/>'), "exp(score − m), and what it adds to ℓ"],
    [mark('<circle cx="8" cy="8" r="2.4" fill="currentColor" fill-opacity=".5"/>'), "a score that was used and forgotten"],
    [mark('<path d="M0 1h8v14H0z" fill="var(--plus)" fill-opacity=".6"/><path d="M8 1h8v14H8z" fill="var(--minus)" fill-opacity=".6"/>'), "above and below zero; blue in ℓ was kept"],
  ].map(([drawing, words]) => `<li>${drawing}<span>${words}</span></li>`).join("");
}

// The words for a step, and the sums of one row of it.
function story(problem, plan, frames, at, watched) {
  const frame = frames[at], outside = plan.order === "queries";
  const moved = [["read", frame.loads], ["wrote", frame.stores]]
    .filter(([, list]) => list.length)
    .map(([verb, list]) => `${verb} ${list.map(([name, s]) => `${name}<sub>${span(s)}</sub>`).join(" ")}`)
    .join("; ");
  if (!frame.rows)
    return outside
      ? "<p>Nothing has been read. The outer loop will hold a block of queries in fast memory, and the keys will pass by.</p>"
      : `<p>The outer loop will hold a block of keys, and the queries will pass by with what is known of their rows. That has to lie in slow memory, so it is set there first: ${moved}.</p>`;
  const here = watched - frame.rows[0], a = frame.before[here], b = frame.block[here], s = frame.state[watched];
  const keys = range(...frame.columns);
  const shrink = Math.exp(a.m - finite(s.m)), grow = Math.exp(b.m - finite(s.m));
  const lines = [`<p>${some("Query", "Queries", frame.rows)} ${frame.rows[1] - frame.rows[0] > 1 ? "meet" : "meets"} ${some("key", "keys", frame.columns)}: ${moved || "all that is needed is here already"}.</p>`];
  const sums = [];
  sums.push(`<i>m</i> = max(${digits(a.m)}, ${digits(b.m)}) = ${digits(s.m)}`);
  sums.push(`<i>ℓ</i> = ${digits(a.ell)} · e<sup>${digits(a.m)} − ${digits(s.m)}</sup> + ${digits(b.ell * grow)} = ${digits(a.ell * shrink)} + ${digits(b.ell * grow)} = ${digits(s.ell)}`.replace("− −", "+ "));
  const scores = plainScores(problem, plan.causal)[watched];
  const terms = keys.filter((j) => scores[j] !== NEVER).map((j) => `${digits(Math.exp(scores[j] - s.m))} <b>v</b><sub>${j + 1}</sub>`);
  const shown = terms.length > 4 ? [...terms.slice(0, 3), "…"] : terms;
  sums.push(`<i>o</i> = ${digits(shrink)} · o + ${shown.join(" + ") || "0"}`);
  if (frame.stores.length)
    sums.push(`<i>O</i> = o / ${digits(s.ell)}${outside ? `, and LSE = ${digits(s.m)} + ln ${digits(s.ell)} = ${digits(frame.lse[watched])}` : ": exact for the keys so far"}`);
  const what = a.ell === 0 ? "its first keys" : terms.length === 0 ? "it sees none of these keys" : shrink < 1 ? `a larger score came: what was summed shrinks to ${digits(100 * shrink, 0)}%` : "the maximum stays, nothing is rescaled";
  lines.push(`<div class="n2t-sums"><span class="n2t-muted">Row ${watched + 1}: ${what}.</span>${sums.map((x) => `<div>${x}</div>`).join("")}</div>`);
  return lines.join("");
}

const TEMPLATE = (problem, plan) => `
<div class="n2t-kernel">
<div class="n2t-controls">
<div>
<fieldset><legend>The outer loop goes over</legend>
<label class="n2t-choice"><input type="radio" value="queries"${plan.order === "queries" ? " checked" : ""}>queries (FlashAttention-2)</label>
<label class="n2t-choice"><input type="radio" value="keys"${plan.order === "keys" ? " checked" : ""}>keys (FlashAttention)</label>
</fieldset>
<label class="n2t-choice"><input type="checkbox"${plan.causal ? " checked" : ""}>causal mask</label>
</div>
<div>
<label><span class="n2t-named">queries a tile, <i>B<sub>r</sub></i></span><input type="range" min="1" max="${problem.q.length}" value="${plan.rows}" data-name="rows" aria-label="queries a tile"><output></output></label>
<label><span class="n2t-named">keys a tile, <i>B<sub>c</sub></i></span><input type="range" min="1" max="${problem.q.length}" value="${plan.columns}" data-name="columns" aria-label="keys a tile"><output></output></label>
<label><span class="n2t-named">row explained</span><input type="range" min="0" max="${problem.q.length}" value="0" data-name="watch" aria-label="row explained, 0 for the one that changes most"><output></output></label>
</div>
</div>
<div class="n2t-stage"></div>
<div class="n2t-bar">
<button type="button" aria-label="step back" title="step back"><svg viewBox="0 0 16 16" aria-hidden="true"><path d="M2 2h2.5v12H2zM14 2v12L5.5 8z"/></svg></button>
<button type="button" aria-label="play" title="play"><svg class="n2t-play" viewBox="0 0 16 16" aria-hidden="true"><path d="M3 1.5v13L14 8z"/></svg><svg class="n2t-pause" viewBox="0 0 16 16" aria-hidden="true"><path d="M3 2h3.5v12H3zM9.5 2H13v12H9.5z"/></svg></button>
<button type="button" aria-label="step forward" title="step forward"><svg viewBox="0 0 16 16" aria-hidden="true"><path d="M11.5 2H14v12h-2.5zM2 2v12l8.5-6z"/></svg></button>
<input type="range" min="0" value="0" data-name="step" aria-label="tile">
<output></output>
</div>
<div class="n2t-story" aria-live="polite"></div>
<div class="n2t-meters">
<div><div class="n2t-line"><span>Fast memory</span><span data-text="held"></span></div><div class="n2t-meter" data-meter="fast" aria-hidden="true"></div></div>
<div><div class="n2t-line"><span>Moved by the tiles</span><span data-text="tiles"></span></div><div class="n2t-meter" data-meter="tiles" aria-hidden="true"></div>
<div class="n2t-line"><span>Moved by plain attention</span><span data-text="plain"></span></div><div class="n2t-meter" data-meter="plain" aria-hidden="true"></div></div>
</div>
<p class="n2t-goal"></p>
<ol class="n2t-runs" aria-label="runs so far"></ol>
</div>`;

export function mount(figure, bench, problem) {
  const n = problem.q.length, dim = problem.q[0].length;
  const plan = { order: "queries", rows: 2, columns: 2, causal: false, ...problem.plan };
  bench.innerHTML = TEMPLATE(problem, plan);
  const find = (selector) => bench.querySelector(selector);
  const slider = (name) => find(`[data-name=${name}]`);
  const [back, play, next] = bench.querySelectorAll("button");
  const radios = bench.querySelectorAll("[type=radio]");
  const stage = find(".n2t-stage"), caption = find(".n2t-story");
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const largest = (rows) => Math.max(...rows.flat().map(Math.abs));
  const group = `n2t-kernel-${document.querySelectorAll(".n2t-kernel").length}`;
  for (const radio of radios) radio.name = group; // two labs on a page do not share their buttons
  const runs = [];
  let frames, scores, reach, at = 0, timer = null, pinned = null;

  // The row that is explained: the one that was asked for while it is in fast memory, else the one that changes most.
  const watched = (frame) => {
    if (!frame.rows) return -1;
    if (pinned !== null && pinned >= frame.rows[0] && pinned < frame.rows[1]) return pinned;
    const growth = range(...frame.rows).map((i, here) => (frame.before[here].ell ? frame.state[i].m - frame.before[here].m : 0));
    return frame.rows[0] + growth.indexOf(Math.max(...growth));
  };

  const restart = (step = 0) => {
    turn(false);
    frames = trace(problem, plan);
    scores = plainScores(problem, plan.causal);
    const states = frames.flatMap((frame) => frame.state);
    reach = {
      q: largest(problem.q), k: largest(problem.k), v: largest(problem.v),
      ell: Math.max(...states.map((s) => s.ell)), o: largest(states.map((s) => s.o)),
      output: largest(plainOutput(problem, plan.causal)),
    };
    slider("step").max = frames.length - 1;
    for (const name of ["rows", "columns"]) slider(name).parentElement.querySelector("output").textContent = plan[name];
    show(fits(problem, plan) ? Math.min(step, frames.length - 1) : 0);
  };

  const show = (step) => {
    at = Math.max(0, Math.min(step, frames.length - 1));
    const frame = frames[at], row = watched(frame), end = frames.at(-1), fit = fits(problem, plan);
    const matrix = matrixPicture(problem, frame, scores, row, reach), state = statePicture(problem, frame, row, reach);
    const drawing = (name, { width, height, body }) => `<svg class="n2t-${name}" viewBox="0 0 ${width} ${height}" aria-hidden="true">${body}</svg>`;
    stage.innerHTML = `${drawing("matrix", matrix)}<div class="n2t-side"><ul class="n2t-legend">${legend()}</ul>${drawing("state", state)}</div>`;
    stage.style.setProperty("--matrix", matrix.width);
    stage.style.setProperty("--state", state.width);
    stage.style.setProperty("--drop", `${state.width} / ${matrix.drop - state.top}`);
    slider("step").value = at;
    slider("step").setAttribute("aria-valuetext", `tile ${at} of ${frames.length - 1}`);
    find(".n2t-bar output").textContent = `${at} / ${frames.length - 1}`;
    for (const button of [back, play, next]) button.setAttribute("aria-disabled", String(!fit));
    slider("step").disabled = !fit;

    const parts = held(problem, plan), sum = Object.values(parts).reduce((a, b) => a + b, 0);
    const wide = Math.max(problem.fast, sum);
    let left = 0;
    find("[data-meter=fast]").innerHTML = Object.entries(parts)
      .map(([name, x]) => {
        const part = `<div style="left:${(100 * left) / wide}%;width:calc(${(100 * x) / wide}% - 1px);background:color-mix(in srgb, var(--sram) ${name === "S" ? 62 : 34}%, transparent)">${name}</div>`;
        left += x;
        return part;
      })
      .join("") + `<div style="left:calc(${(100 * problem.fast) / wide}% - 2px);width:2px;background:currentColor"></div>`;
    find("[data-text=held]").textContent = `${sum} of ${problem.fast} numbers${fit ? "" : ": too much"}`;

    const moved = frame.read + frame.written, total = end.read + end.written, plain = plainBytes(problem);
    const scale = 100 / Math.max(plain, total);
    find("[data-meter=tiles]").innerHTML =
      `<div class="n2t-ghost" style="left:0;width:${fit ? total * scale : 0}%"></div>` +
      `<div style="left:0;width:${frame.read * scale}%;background:color-mix(in srgb, var(--plus) 60%, transparent)"></div>` +
      `<div style="left:${frame.read * scale}%;width:${frame.written * scale}%;background:color-mix(in srgb, var(--done) 70%, transparent)"></div>`;
    find("[data-meter=plain]").innerHTML = `<div style="left:0;width:${plain * scale}%;background:color-mix(in srgb, currentColor 30%, transparent)"></div>`;
    find("[data-text=tiles]").innerHTML = `<span class="n2t-chip" style="background:var(--plus)"></span>${grouped(frame.read)} bytes read <span class="n2t-chip" style="background:var(--done)"></span>${grouped(frame.written)} written`;
    find("[data-text=plain]").textContent = `${grouped(plain)} bytes`;

    const error = at === frames.length - 1
      ? Math.max(...plainOutput(problem, plan.causal).flatMap((out, i) => out.map((x, c) => Math.abs(x - frame.output[i][c]))))
      : null;
    caption.innerHTML = fit
      ? story(problem, plan, frames, at, row) + (error === null ? "" : `<p>Done. The largest difference from softmax(QKᵀ)V is ${error < 1e-12 ? "below 10<sup>−12</sup>" : error.toExponential(1)}, and ${grouped(total)} bytes were moved: ${digits(total / plain)} of the plain way’s.</p>`)
      : `<p>These tiles take ${sum} numbers, and the fast memory holds ${problem.fast}. A compiler would refuse them: make one of them smaller.</p>`;
    const auto = pinned === null;
    slider("watch").value = auto ? 0 : pinned + 1;
    slider("watch").setAttribute("aria-valuetext", auto ? "the one that changes most" : `row ${pinned + 1}`);
    slider("watch").parentElement.querySelector("output").textContent = auto ? "auto" : pinned + 1;
    if (fit && error !== null) remember(total, plain);
    list();
    figure.state = {
      ...plan, step: at, steps: frames.length - 1, fits: fit, held: sum, tile: frame.rows && [frame.rows, frame.columns],
      m: frame.state.map((s) => s.m), ell: frame.state.map((s) => s.ell), o: frame.state.map((s) => s.o), place: frame.place,
      output: frame.output, lse: frame.lse, read: frame.read, written: frame.written, plainBytes: plain, error, runs: [...runs],
    };
  };

  const remember = (bytes, plain) => {
    const { order, rows, columns, causal } = plan;
    const same = (run) => run.order === order && run.rows === rows && run.columns === columns && run.causal === causal;
    if (!runs.some(same)) runs.push({ order, rows, columns, causal, bytes, share: bytes / plain });
  };

  let least = {};
  const list = () => {
    const mine = runs.filter((run) => run.causal === plan.causal).sort((a, b) => a.bytes - b.bytes).slice(0, 5);
    const longest = Math.max(1, ...mine.map((run) => run.share));
    find(".n2t-runs").innerHTML = mine
      .map((run, i) => `<li${i ? "" : ' class="n2t-best"'} style="--share:${(100 * run.share) / longest}%"><span>${ORDER[run.order]}, ${run.rows} × ${run.columns}</span><span>${grouped(run.bytes)} bytes, ${digits(run.share)} of plain</span></li>`)
      .join("");
    if (mine.length) least[plan.causal] ??= fewest(problem, plan.causal);
    find(".n2t-goal").textContent = !mine.length
      ? "Which loop and which tile move the fewest bytes and still fit? Play one to its end, then change it."
      : mine[0].bytes > least[plan.causal]
        ? `Your runs${plan.causal ? ", causal" : ""}. There is a tile that moves fewer than ${grouped(mine[0].bytes)} bytes.`
        : `Your runs${plan.causal ? ", causal" : ""}. Found: no tile that fits moves fewer bytes, in either loop.`;
  };

  const turn = (on) => {
    clearInterval(timer);
    const wait = Math.max(60, Math.min(900, 16000 / (frames?.length ?? 1)));
    timer = on ? setInterval(advance, calm.matches ? Math.max(wait, 1000) : wait) : null;
    figure.classList.toggle("n2t-playing", on);
    play.ariaLabel = play.title = on ? "pause" : "play";
    caption.ariaLive = on ? "off" : "polite";
  };
  const advance = () => {
    if (!figure.isConnected) return turn(false);
    show(at + 1);
    if (at === frames.length - 1) turn(false);
  };
  const able = (action) => () => fits(problem, plan) && action();
  play.onclick = able(() => {
    if (!timer && at === frames.length - 1) show(0);
    turn(!timer);
  });
  back.onclick = able(() => (turn(false), show(at - 1)));
  next.onclick = able(() => (turn(false), show(at + 1)));
  slider("step").oninput = (event) => (turn(false), show(Number(event.target.value)));
  slider("watch").oninput = (event) => {
    pinned = Number(event.target.value) ? Number(event.target.value) - 1 : null;
    show(at);
  };
  for (const name of ["rows", "columns"])
    slider(name).oninput = (event) => {
      plan[name] = Number(event.target.value);
      restart();
    };
  for (const radio of radios)
    radio.onchange = () => {
      plan.order = radio.value;
      restart();
    };
  find("[type=checkbox]").onchange = (event) => {
    plan.causal = event.target.checked;
    restart();
  };
  stage.onclick = (event) => {
    const row = event.target.closest("[data-row]")?.dataset.row;
    if (row !== undefined) {
      pinned = pinned === Number(row) ? null : Number(row);
      show(at);
    }
  };
  restart(problem.step ?? 0);
}
