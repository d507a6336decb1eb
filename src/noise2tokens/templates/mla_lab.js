// "Choose a cache": what a token takes with each kind of attention, and what decoding does with a byte.
//
// The formulas are those of mla/cost.py; tests/test_lab.py holds both equal.

export function read({ heads, groups, headDim, latent, rotary, layers, tokens, texts, bits }) {
  const numbers = {
    MHA: 2 * heads * headDim * layers, GQA: 2 * groups * headDim * layers,
    MQA: 2 * headDim * layers, MLA: (latent + rotary) * layers,
  };
  const grouped = (count) => ((2 * heads) / count) * (8 / bits);
  const intensity = {
    MHA: grouped(heads), GQA: grouped(groups), MQA: grouped(1),
    MLA: ((2 * heads * (2 * latent + rotary)) / (latent + rotary)) * (8 / bits),
  };
  const bytes = Object.fromEntries(Object.entries(numbers).map(([name, count]) => [name, (count * bits) / 8]));
  // New tokens a step at which both forms of latent attention cost the same; none where absorbed is cheaper for any
  // number. A step has at most as many new tokens as it attends to, so absorbed is always cheaper, too, beyond those.
  const expand = 2 * latent * headDim, each = expand + (2 * latent - 2 * headDim) * tokens;
  return { numbers, bytes, intensity, crossover: each > 0 ? (expand * tokens) / each : null };
}

const short = (x) => (x >= 1000 ? Math.round(x).toLocaleString("en") : Number(x.toPrecision(3)).toString());

// Sliders: name, words, and the values they go through.
const doubling = (from, to) => Array.from({ length: Math.log2(to / from) + 1 }, (_, i) => from * 2 ** i);
const stepping = (from, to, step) => Array.from({ length: (to - from) / step + 1 }, (_, i) => from + i * step);
const SLIDERS = [
  ["heads", "heads", doubling(8, 128)],
  ["groups", "groups of GQA", doubling(1, 128)],
  ["headDim", "dimension of a head", stepping(32, 256, 32)],
  ["latent", "latent of MLA", stepping(64, 2048, 64)],
  ["rotary", "rotary key of MLA", stepping(16, 128, 16)],
  ["layers", "layers", stepping(1, 128, 1)],
  ["tokens", "tokens of a text", doubling(1024, 1048576)],
  ["texts", "texts at once", doubling(1, 128)],
  ["bits", "bits a number", [4, 6, 8, 16, 32]],
];

export function mount(figure, bench, { start, memory, ridge }) {
  bench.innerHTML = `<div class="n2t-mla"><div class="n2t-controls">${SLIDERS.map(
    ([name, words, values]) =>
      `<label><span>${words}</span><input type="range" min="0" max="${values.length - 1}" step="1" value="${values.indexOf(start[name])}" data-name="${name}" aria-label="${words}"><output></output></label>`,
  ).join("")}</div><table><thead><tr><th scope="col">attention</th><th scope="col">kB a token</th><th scope="col">GB in all</th><th scope="col">operations a byte</th></tr></thead><tbody></tbody></table><p aria-live="polite"></p></div>`;
  for (const head of [...bench.querySelectorAll("th")].slice(1)) head.style.textAlign = "right";
  const slider = (name) => bench.querySelector(`[data-name=${name}]`);
  const draw = () => {
    const plan = Object.fromEntries(SLIDERS.map(([name, , values]) => [name, values[Number(slider(name).value)]]));
    plan.groups = Math.min(plan.groups, plan.heads);
    const found = read(plan), most = Math.max(...Object.values(found.bytes));
    const total = Object.fromEntries(Object.entries(found.bytes).map(([name, x]) => [name, (x * plan.tokens * plan.texts) / 1e9]));
    for (const [name] of SLIDERS) {
      slider(name).setAttribute("aria-valuetext", String(plan[name]));
      slider(name).parentElement.querySelector("output").textContent = plan[name] >= 1024 && name === "tokens" ? `${plan[name] / 1024}k` : plan[name];
    }
    bench.querySelector("tbody").innerHTML = Object.keys(found.bytes).map(
      (name) => `<tr><th scope="row">${name}<div style="width:${(100 * found.bytes[name]) / most}%"></div></th><td>${short(found.bytes[name] / 1e3)}</td><td>${short(total[name])}</td><td>${short(found.intensity[name])}</td></tr>`,
    ).join("");
    const fits = Object.keys(total).filter((name) => total[name] <= memory);
    const busy = Object.keys(found.intensity).filter((name) => found.intensity[name] >= ridge);
    bench.querySelector("p").textContent =
      `${fits.length ? fits.join(", ") : "None"} of the four ${fits.length === 1 ? "fits" : "fit"} in ${memory} GB. ` +
      `${busy.length ? busy.join(", ") : "None"} would keep a chip busy that does ${short(ridge)} operations a byte. ` +
      (found.crossover === null || found.crossover >= plan.tokens ? "Absorbing always has as few operations as expanding, or fewer." : `From ${Math.ceil(found.crossover)} new tokens a step on, expanding latents has no more operations than absorbing.`);
    figure.state = { ...plan, ...found, total, fits, busy };
  };
  for (const [name] of SLIDERS) slider(name).addEventListener("input", draw);
  draw();
}
