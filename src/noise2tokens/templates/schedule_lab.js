// "A pipeline of your own": three schedules of pipeline parallelism, simulated for the ranks, micro-batches and durations that you set.
//
// The schedules and the simulation are those of deepseek_v3/pipeline.py; tests/test_lab.py holds both equal.
// A piece is [kind, micro-batch, side]: F forward, B backward, b and W its halves; side 0 enters at the first rank, 1 at the last.

function alternate(ranks, batches, split) {
  return Array.from({ length: ranks }, (_, rank) => {
    const ahead = ranks - 1 - rank, steps = Array.from({ length: ahead }, (_, i) => [["F", i, 0]]);
    let made = 0;
    for (let i = 0; i < batches; i++) {
      if (i + ahead < batches) steps.push([["F", i + ahead, 0]]);
      steps.push([[split ? "b" : "B", i, 0]]);
      if (split && i >= rank) steps.push([["W", made++, 0]]);
    }
    while (split && made < batches) steps.push([["W", made++, 0]]);
    return steps;
  });
}

function fromBothEnds(ranks, batches) {
  return Array.from({ length: ranks }, (_, rank) => {
    const inner = Math.min(rank, ranks - 1 - rank), outer = ranks / 2 - 1 - inner;
    const [near, far] = rank < ranks / 2 ? [0, 1] : [1, 0];
    const count = { F: [0, 0], B: [0, 0] }, steps = [], later = [];
    const piece = (kind, side) => [kind, count[kind === "F" ? "F" : "B"][side]++, side];
    const forward = (side) => steps.push([piece("F", side)]);
    const backward = (side, split) => {
      const one = piece(split ? "b" : "B", side);
      steps.push([one]);
      if (split) later.push(one);
    };
    const weights = () => { const [, batch, side] = later.shift(); steps.push([["W", batch, side]]); };
    const together = (ahead, back) => steps.push([piece("F", ahead), piece("B", back)]);
    const repeat = (n, what) => { for (let i = 0; i < n; i++) what(i); };
    repeat(2 * outer, () => forward(near));
    repeat(inner + 1, () => { forward(near); forward(far); });
    repeat(outer, () => { backward(far, true); weights(); forward(far); });
    repeat(batches / 2 - ranks + inner + 1, (i) => {
      if (i === 0 && outer === 0) { forward(near); backward(far, false); } else together(near, far);
      together(far, near);
    });
    repeat(outer, () => { backward(far, false); together(far, near); });
    repeat(2 * (inner + 1), (i) => backward([far, near][i % 2], i > inner));
    repeat(outer, () => { weights(); backward(near, true); });
    repeat(inner + 1, weights);
    return steps;
  });
}

function needs([kind, batch, side], rank, ranks) {
  if (kind === "W") return [["b", batch, side, rank]];
  const onwards = side === 0 ? 1 : -1;
  const list = kind === "F" ? [["F", batch, side, rank - onwards]] : [["F", batch, side, rank], ["b", batch, side, rank + onwards]];
  return list.filter(([, , , where]) => where >= 0 && where < ranks);
}

// Spans [start, end, step] of each rank: a step begins when its rank is free and all that it waits for is done.
export function simulate(schedule, { forward, backward, weights, both }) {
  const ranks = schedule.length, done = new Map(), spans = schedule.map(() => []);
  const alone = { F: forward, B: backward, W: weights, b: backward - weights };
  for (let before = -1; done.size !== before; ) {
    before = done.size;
    schedule.forEach((steps, rank) => {
      const mine = spans[rank];
      while (mine.length < steps.length) {
        const step = steps[mine.length], need = step.flatMap((piece) => needs(piece, rank, ranks)).map(String);
        if (!need.every((name) => done.has(name))) break;
        const start = Math.max(mine.length ? mine.at(-1)[1] : 0, ...need.map((name) => done.get(name)));
        const end = start + (step.length === 2 ? both : alone[step[0][0]]);
        mine.push([start, end, step]);
        for (const [kind, batch, side] of step) done.set(String([kind === "B" ? "b" : kind, batch, side, rank]), end);
      }
    });
  }
  return spans;
}

export function read({ ranks, batches, ...durations }) {
  const schedules = { "1F1B": alternate(ranks, batches, false), ZB1P: alternate(ranks, batches, true), DualPipe: fromBothEnds(ranks, batches) };
  return Object.fromEntries(Object.entries(schedules).map(([name, schedule]) => {
    const spans = simulate(schedule, durations), end = Math.max(...spans.map((rank) => rank.at(-1)[1]));
    const busy = spans.map((rank) => rank.reduce((sum, [a, b]) => sum + b - a, 0));
    const peaks = spans.map((rank) => {
      let held = 0, peak = 0;
      for (const [, , step] of rank) {
        for (const [kind] of step) held += kind === "F";
        peak = Math.max(peak, held);
        for (const [kind] of step) held -= kind === "B" || kind === "W";
      }
      return peak;
    });
    return [name, { spans, end, bubble: end - Math.min(...busy), activations: Math.max(...peaks) }];
  }));
}

const COLORS = { F: "#7fa8d9", B: "#9bc18a", b: "#c9dfb8", W: "#e2b06a" };
const HATCH = `<defs><pattern id="n2t-hatch" width="2.4" height="2.4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width=".9" height="2.4" fill="#fff"/></pattern></defs>`;
const fixed = (x) => Number(x.toFixed(1)).toString();

function chart({ spans }, until) {
  const [W, row] = [600, 12], height = row * spans.length, parts = [];
  spans.forEach((rank, at) => {
    for (const [start, end, step] of rank)
      step.forEach(([kind, , side], i) => {
        const h = (row - 1.5) / step.length, x = (start / until) * W, w = ((end - start) / until) * W;
        const place = `x="${x.toFixed(2)}" y="${(at * row + i * h).toFixed(2)}" width="${Math.max(0.2, w - 0.4).toFixed(2)}" height="${h.toFixed(2)}"`;
        parts.push(`<rect ${place} fill="${COLORS[kind]}"/>`);
        if (side) parts.push(`<rect ${place} fill="url(#n2t-hatch)"/>`);
      });
  });
  return `<svg viewBox="0 0 ${W} ${height}" aria-hidden="true">${HATCH}${parts.join("")}</svg>`;
}

const SLIDERS = [
  ["ranks", "ranks P", [2, 4, 6, 8, 12, 16]],
  ["batches", "micro-batches, of P", [2, 3, 4, 6]],
  ["weights", "W, gradients of weights", [0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6]],
  ["both", "F&B, both at once", [2, 2.2, 2.4, 2.6, 2.8, 3, 3.2]],
];

export function mount(figure, bench, { start }) {
  bench.innerHTML = `<div class="n2t-schedule"><div class="n2t-controls">${SLIDERS.map(
    ([name, words, values]) =>
      `<label><span>${words}</span><input type="range" min="0" max="${values.length - 1}" step="1" value="${values.indexOf(start[name])}" data-name="${name}" aria-label="${words}"><output></output></label>`,
  ).join("")}</div><div class="n2t-charts"></div><p class="n2t-key">${[["F", "F, forward"], ["B", "B, backward"], ["b", "its part for the stage before"], ["W", "W"]].map(
    ([kind, words]) => `<span><i style="background:${COLORS[kind]}"></i>${words}</span>`,
  ).join("")}<span>hatched: from the last rank</span></p><p aria-live="polite"></p></div>`;
  const slider = (name) => bench.querySelector(`[data-name=${name}]`);
  const draw = () => {
    const plan = Object.fromEntries(SLIDERS.map(([name, , values]) => [name, values[Number(slider(name).value)]]));
    for (const [name] of SLIDERS) {
      slider(name).setAttribute("aria-valuetext", String(plan[name]));
      slider(name).parentElement.querySelector("output").textContent = plan[name];
    }
    const durations = { forward: 1, backward: 2, weights: plan.weights, both: plan.both };
    const settings = { ranks: plan.ranks, batches: plan.batches * plan.ranks, ...durations };
    const found = read(settings), until = Math.max(...Object.values(found).map((run) => run.end));
    bench.querySelector(".n2t-charts").innerHTML = Object.entries(found).map(
      ([name, run]) => `<p>${name}: waits ${fixed(run.bubble)} of ${fixed(run.end)}, holds ${run.activations} micro-batches</p>${chart(run, until)}`,
    ).join("");
    const least = Math.min(...Object.values(found).map((run) => run.end)) + 1e-9;
    const best = Object.keys(found).filter((name) => found[name].end <= least);
    bench.querySelector("[aria-live]").textContent = `With F = 1 and B = 2, ${best.join(" and ")} ${best.length > 1 ? "are" : "is"} done first.`;
    figure.state = { ...settings, found: Object.fromEntries(Object.entries(found).map(([name, { end, bubble, activations }]) => [name, { end, bubble, activations }])) };
  };
  for (const [name] of SLIDERS) slider(name).addEventListener("input", draw);
  draw();
}
