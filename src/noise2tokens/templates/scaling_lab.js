// "Spend a budget": what DeepSeek LLM's laws say at a budget of compute, for the best scale or for another one.
//
// The laws come from scaling_laws/flops.py with the data; tests/test_lab.py holds what is read here equal to them.

const power = ([coefficient, exponent], x) => coefficient * x ** exponent;

// All numbers at C = 10^decades for a model of 2^doublings times the best scale.
export function read(laws, decades, doublings) {
  const compute = 10 ** decades, best = power(laws.scale, compute), batch = power(laws.batch, compute);
  const scale = best * 2 ** doublings, tokens = compute / scale;
  return { compute, best, scale, parameters: scale / 6, tokens, rate: power(laws.rate, compute), batch, steps: tokens / batch };
}

const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const raised = (n) => [...String(n)].map((c) => RAISED[c]).join("");

export function words(x) {
  const [digits, exponent] = x.toExponential(2).split("e");
  return Math.abs(exponent) < 3 ? Number(x.toPrecision(3)).toString() : `${digits} · 10${raised(Number(exponent))}`;
}

const ROWS = [
  ["scale", "M, FLOP a token"],
  ["parameters", "about M / 6 parameters"],
  ["tokens", "D, tokens"],
  ["rate", "highest learning rate η"],
  ["batch", "batch B, tokens"],
  ["steps", "steps, D / B"],
];

// Best M over C on logarithmic axes, the published models, and where the sliders are.
function chart(laws, models, range, now) {
  const [W, H, left, bottom] = [520, 250, 44, 36];
  const [low, high] = [power(laws.scale, 10 ** range[0]) / 16, power(laws.scale, 10 ** range[1]) * 16].map(Math.log10);
  const x = (c) => left + ((Math.log10(c) - range[0]) / (range[1] - range[0])) * (W - left - 12);
  const y = (m) => H - bottom - ((Math.log10(m) - low) / (high - low)) * (H - bottom - 8);
  const parts = [];
  for (let d = Math.ceil(range[0]); d <= range[1]; d += 2)
    parts.push(`<text x="${x(10 ** d)}" y="${H - 20}" text-anchor="middle">10${raised(d)}</text>`);
  for (let d = Math.ceil(low); d <= high; d += 2)
    parts.push(`<text x="${left - 6}" y="${y(10 ** d) + 4}" text-anchor="end">10${raised(d)}</text>`);
  parts.push(`<path d="M${left} 8V${H - bottom}H${W - 8}" fill="none" stroke="currentColor" stroke-opacity=".4"/>`);
  parts.push(`<text x="${W - 8}" y="${H - 4}" text-anchor="end">C, FLOP</text><text x="${left + 6}" y="18">M, FLOP a token</text>`);
  const ends = range.map((d) => 10 ** d).map((c) => `${x(c)} ${y(power(laws.scale, c))}`);
  parts.push(`<path d="M${ends.join("L")}" fill="none" stroke="var(--plus)" stroke-width="2"/>`);
  for (const { name, compute, scale } of models)
    parts.push(`<path d="M${x(compute)} ${y(scale) - 5}l5 5l-5 5l-5 -5z" fill="var(--done)"/><text x="${x(compute) + 9}" y="${y(scale) + 12}">${name}</text>`);
  parts.push(`<circle cx="${x(now.compute)}" cy="${y(now.scale)}" r="6" fill="none" stroke="var(--sram)" stroke-width="3"/>`);
  return `<svg viewBox="0 0 ${W} ${H}" aria-hidden="true">${parts.join("")}</svg>`;
}

export function mount(figure, bench, { laws, models, range, start }) {
  bench.innerHTML = `<div class="n2t-scaling"><div class="n2t-controls">
<label><span>compute C</span><input type="range" min="${range[0]}" max="${range[1]}" step="0.1" value="${start}" data-name="decades" aria-label="compute, in powers of ten"><output></output></label>
<label><span>scale, of the best</span><input type="range" min="-4" max="4" step="0.5" value="0" data-name="doublings" aria-label="scale over the best one, in doublings"><output></output></label>
</div><div class="n2t-chart"></div><table><tbody></tbody></table><p aria-live="polite"></p></div>`;
  const slider = (name) => bench.querySelector(`[data-name=${name}]`);
  const [compute, share] = bench.querySelectorAll("output");
  const draw = () => {
    const state = read(laws, Number(slider("decades").value), Number(slider("doublings").value));
    compute.textContent = words(state.compute);
    share.textContent = `${words(state.scale / state.best)} ×`;
    bench.querySelector(".n2t-chart").innerHTML = chart(laws, models, range, state);
    bench.querySelector("tbody").innerHTML = ROWS.map(
      ([key, name]) => `<tr><th scope="row">${name}</th><td>${words(state[key])}</td></tr>`,
    ).join("");
    const times = state.tokens / state.parameters;
    bench.querySelector("p").textContent =
      `${words(times)} tokens a parameter` +
      (state.scale === state.best ? ": the optimum of the law." : state.scale < state.best ? ": a smaller model, trained beyond its optimum." : ": a larger model, trained too briefly.");
    figure.state = state;
  };
  for (const name of ["decades", "doublings"]) slider(name).addEventListener("input", draw);
  draw();
}
