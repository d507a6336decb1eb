// "What a picture costs": patches, tokens and distortion of a picture of any size, by three ways to feed an encoder.
//
// The rule of the native way is that of kimi_vl/preprocess.py; tests/test_lab.py holds both equal. Tiling is InternVL's.

const PATCH = 14, BLOCK = 28, MOST_A_SIDE = 512, SQUARE = 448, TILES = 12, PER_TILE = (SQUARE / BLOCK) ** 2;

const fit = (height, width, seen) => {
  const [down, across] = [seen[0] / height, seen[1] / width];
  return { seen, scale: Math.min(down, across), distortion: Math.max(down / across, across / down) };
};

export function native(height, width, limit) {
  const whole = Math.floor(height / PATCH) * Math.floor(width / PATCH), scale = Math.sqrt(limit / whole);
  const seen = whole <= limit ? [height, width] : [height, width].map((side) => Math.max(1, Math.floor(side * scale)));
  const grid = seen.map((side) => 2 * Math.ceil(side / BLOCK));
  const patches = grid[0] * grid[1];
  return {
    ...fit(height, width, seen), grid, patches, tokens: patches / 4, refused: Math.max(...grid) >= MOST_A_SIDE,
    filled: 1 - (seen[0] * seen[1]) / (patches * PATCH ** 2),
  };
}

export function tiled(height, width) {
  let best = [1, 1], least = Infinity;
  for (let count = 1; count <= TILES; count++)
    for (let rows = 1; rows <= count; rows++) {
      if (count % rows) continue;
      const columns = count / rows, off = Math.abs(width / height - columns / rows);
      if (off < least || (off === least && height * width > 0.5 * SQUARE ** 2 * count)) [best, least] = [[rows, columns], off];
    }
  const count = best[0] * best[1], pictures = count + (count > 1 ? 1 : 0); // the whole picture once more, small
  return { ...fit(height, width, best.map((n) => n * SQUARE)), tiles: best, pictures, tokens: pictures * PER_TILE };
}

export function read({ height, width, limit, others }) {
  const own = native(height, width, limit);
  const sizes = [own, ...others.map(([h, w]) => native(h, w, limit))].map((one) => one.patches);
  const ends = sizes.reduce((sums, n) => [...sums, sums.at(-1) + n], [0]);
  const square = { ...fit(height, width, [SQUARE, SQUARE]), tokens: PER_TILE };
  return { native: own, square, tiled: tiled(height, width), cu_seqlens: ends, padded: Math.max(...sizes) * sizes.length };
}

const stepping = (from, to, step) => Array.from({ length: Math.floor((to - from) / step) + 1 }, (_, i) => from + i * step);
const SLIDERS = [
  ["width", "width in pixels", stepping(20, 4000, 20)],
  ["height", "height in pixels", stepping(20, 4000, 20)],
  ["limit", "limit of patches", [4096, 16384]],
];
const COLORS = ["--plus", "--sram", "--done", "--minus"];

// What the encoder is given: the frame, lines between its squares, and a circle of the picture, round or not.
function preview(rows, columns, height, width, squares) {
  const unit = 76 / Math.max(rows, columns), [h, w] = [rows * unit, columns * unit];
  const r = 0.35 * Math.min(height, width), lines = [];
  for (let i = 1; i < squares[0]; i++) lines.push(`M0 ${(i * h) / squares[0]}H${w}`);
  for (let i = 1; i < squares[1]; i++) lines.push(`M${(i * w) / squares[1]} 0V${h}`);
  return `<svg viewBox="-2 -2 80 80" aria-hidden="true"><rect width="${w}" height="${h}"/><path d="${lines.join("")}"/><ellipse cx="${w / 2}" cy="${h / 2}" rx="${(r / width) * w}" ry="${(r / height) * h}"/></svg>`;
}

export function mount(figure, bench, { start, others }) {
  bench.innerHTML = `<div class="n2t-sight"><div class="n2t-controls">${SLIDERS.map(
    ([name, words, values]) =>
      `<label><span>${words}</span><input type="range" min="0" max="${values.length - 1}" step="1" value="${values.indexOf(start[name])}" data-name="${name}" aria-label="${words}"><output></output></label>`,
  ).join("")}</div><div class="n2t-ways"></div><p class="n2t-row">One batch: your picture and ${others.length} others, end to end</p><div class="n2t-pack"></div><p class="n2t-ends"></p><p aria-live="polite"></p></div>`;
  const slider = (name) => bench.querySelector(`[data-name=${name}]`);
  const draw = () => {
    const plan = Object.fromEntries(SLIDERS.map(([name, , values]) => [name, values[Number(slider(name).value)]]));
    const { height, width } = plan, found = read({ ...plan, others }), { native: own, square, tiled: cut } = found;
    for (const [name] of SLIDERS) {
      slider(name).setAttribute("aria-valuetext", String(plan[name]));
      slider(name).parentElement.querySelector("output").textContent = plan[name];
    }
    const few = (n) => Math.min(n, 32);
    const ways = [
      ["native", own, `${own.grid[0]} × ${own.grid[1]} patches`, preview(...own.grid, height, width, own.grid.map((n) => few(n / 2)))],
      ["square", square, "resized to 448 × 448", preview(1, 1, height, width, [16, 16])],
      ["tiles", cut, `${cut.tiles[0]} × ${cut.tiles[1]} of 448 × 448${cut.pictures > 1 ? ", and an overview" : ""}`, preview(...cut.tiles, height, width, cut.tiles)],
    ];
    bench.querySelector(".n2t-ways").innerHTML = ways.map(
      ([name, way, words, drawn]) =>
        `<div><b>${name}</b>${drawn}<span>${words}</span><span><b>${way.tokens}</b> tokens</span><span>scale ${way.scale.toPrecision(3)}</span><span>distortion ${way.distortion.toFixed(2)}</span></div>`,
    ).join("");
    const total = found.cu_seqlens.at(-1);
    bench.querySelector(".n2t-pack").innerHTML = found.cu_seqlens.slice(1).map(
      (end, i) => `<i style="width:${(100 * (end - found.cu_seqlens[i])) / total}%;background:var(${COLORS[i % COLORS.length]})"></i>`,
    ).join("");
    bench.querySelector(".n2t-ends").textContent = `cu_seqlens ${found.cu_seqlens.join(", ")}`;
    bench.querySelector("[aria-live]").textContent = own.refused
      ? `Refused: a side has ${Math.max(...own.grid)} patches, and the released code turns positions below ${MOST_A_SIDE} only.`
      : `${Number((100 * own.filled).toPrecision(2))} % of what the encoder reads is filling up to whole blocks. Padded to the largest picture, the batch would compute ${found.padded} patches in place of ${total}, ${(found.padded / total).toFixed(1)} times as many.`;
    figure.state = { ...plan, ...found };
  };
  for (const [name] of SLIDERS) slider(name).addEventListener("input", draw);
  draw();
}
