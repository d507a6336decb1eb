// "Design a model": what a decoder with latent attention and mixtures of experts holds, reads and computes.
//
// The formulas are those of deepseek_v3/count.py and mla/cost.py; tests/test_lab.py holds both equal.

export function read(plan) {
  const { width, heads, layers, dense, hidden, kv, query, nope, rope, value, experts, topK, expert, shared, vocab, tokens } = plan;
  const attention = width * (kv + rope) + kv * heads * (nope + value) + heads * value * width + width * query + query * heads * (nope + rope);
  const one = 3 * width * expert, mixtures = layers - dense;
  const common = {
    embedding: vocab * width, attention: layers * attention, "dense layers": dense * 3 * width * hidden,
    "shared experts": mixtures * shared * one, routers: mixtures * experts * width,
    norms: layers * (2 * width + kv + query) + width, head: vocab * width,
  };
  const parts = { ...common, "routed experts": mixtures * experts * one };
  const active = { ...common, "routed experts": mixtures * topK * one };
  const sum = (of) => Object.values(of).reduce((a, b) => a + b, 0);
  const matrices = sum(active) - active.embedding - active.norms;
  const flops = 6 * (matrices + layers * heads * (nope + rope + value) * ((tokens + 1) / 2));
  return { parts, active, total: sum(parts), used: sum(active) - active.embedding, cache: (kv + rope) * layers, flops };
}

const short = (x) => {
  for (const [size, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (x >= size) return `${Number((x / size).toPrecision(4))}${name}`;
  return Number(x.toPrecision(3)).toString();
};
const stepping = (from, to, step) => Array.from({ length: (to - from) / step + 1 }, (_, i) => from + i * step);
const doubling = (from, to) => Array.from({ length: Math.log2(to / from) + 1 }, (_, i) => from * 2 ** i);
const SLIDERS = [
  ["layers", "layers", stepping(1, 128, 1)],
  ["dense", "of them dense", stepping(0, 16, 1)],
  ["width", "width", stepping(512, 12288, 256)],
  ["heads", "heads", stepping(8, 256, 8)],
  ["kv", "latent of keys and values", stepping(128, 2048, 128)],
  ["experts", "experts", stepping(8, 512, 8)],
  ["topK", "of them for a token", stepping(1, 32, 1)],
  ["expert", "width of an expert", stepping(256, 8192, 128)],
  ["tokens", "tokens of a sequence", doubling(1024, 131072)],
];

// One bar: parts beside each other, each as long as its share.
const COLORS = { attention: "--plus", "routed experts": "--sram", "shared experts": "--minus", "dense layers": "--done" };
const bar = (of, whole) =>
  Object.entries(COLORS).map(([name, color]) => `<i style="width:${(100 * of[name]) / whole}%;background:var(${color})"></i>`).join("");

export function mount(figure, bench, { start }) {
  bench.innerHTML = `<div class="n2t-v3"><div class="n2t-controls">${SLIDERS.map(
    ([name, words, values]) =>
      `<label><span>${words}</span><input type="range" min="0" max="${values.length - 1}" step="1" value="${values.indexOf(start[name])}" data-name="${name}" aria-label="${words}"><output></output></label>`,
  ).join("")}</div><table><tbody></tbody></table><p class="n2t-key">${Object.entries(COLORS).map(
    ([name, color]) => `<span><i style="background:var(${color})"></i>${name}</span>`,
  ).join("")}<span><i></i>the rest</span></p><p aria-live="polite"></p></div>`;
  const slider = (name) => bench.querySelector(`[data-name=${name}]`);
  const draw = () => {
    const plan = { ...start, ...Object.fromEntries(SLIDERS.map(([name, , values]) => [name, values[Number(slider(name).value)]])) };
    plan.dense = Math.min(plan.dense, plan.layers);
    plan.topK = Math.min(plan.topK, plan.experts);
    const found = read(plan), used = found.used, pairs = found.flops - 6 * (found.used - found.active.norms);
    for (const [name] of SLIDERS) {
      slider(name).setAttribute("aria-valuetext", String(plan[name]));
      slider(name).parentElement.querySelector("output").textContent = plan[name];
    }
    bench.querySelector("tbody").innerHTML = [
      ["parameters", short(found.total), bar(found.parts, found.total)],
      ["for a token, without the embedding", short(used), bar(found.active, used)],
      ["cache of a token, at 16 bits", `${short(2 * found.cache)}B`, ""],
      ["operations of training, a token", short(found.flops), ""],
    ].map(([name, number, drawn]) => `<tr><th scope="row">${name}<div>${drawn}</div></th><td>${number}</td></tr>`).join("");
    bench.querySelector("[aria-live]").textContent =
      `A token uses ${Number(((100 * used) / found.total).toPrecision(2))} % of the parameters, and ${Number(((100 * pairs) / found.flops).toPrecision(2))} % of its operations compare it with other tokens.`;
    figure.state = { ...plan, ...found };
  };
  for (const [name] of SLIDERS) slider(name).addEventListener("input", draw);
  draw();
}
