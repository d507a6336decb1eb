// "Round a number": its bits in a format, its neighbors, and the part of the axis that a scale lets the format reach.
//
// The rules are those of fp8/codec.py; tests/test_lab.py holds both equal. A format is [E, M, whether by IEEE's rule].

const limits = ([E, M, ieee]) => ({ bias: 2 ** (E - 1) - 1, last: 2 ** (E + M) - 1 - (ieee ? 2 ** M : 1) });

// The bits of a code, read as integers, and the number that they stand for. Not for codes of infinity and NaN.
export function decode(code, [E, M]) {
  const s = Math.floor(code / 2 ** (E + M)), e = Math.floor(code / 2 ** M) % 2 ** E, m = code % 2 ** M;
  return { s, e, m, value: (s ? -1 : 1) * 2 ** (Math.max(e, 1) - limits([E]).bias) * ((e > 0) + m / 2 ** M) };
}

// The code of the nearest number, the even one where two are as near; what is too large saturates.
export function encode(x, format) {
  const [E, M] = format, { bias, last } = limits(format), size = Math.min(Math.abs(x), decode(last, format).value);
  const exponent = Math.max(Math.floor(Math.log2(size)), 1 - bias), count = size / 2 ** (exponent - M);
  const whole = Math.floor(count), up = count - whole > 0.5 || (count - whole === 0.5 && whole % 2 === 1);
  return (exponent + bias - 1) * 2 ** M + whole + up + (x < 0 || Object.is(x, -0) ? 2 ** (E + M) : 0);
}

// All about x, stored as x / sigma. Numbers of the format are counted from zero: number(1) is the smallest above it.
export function read(x, sigma, format) {
  const [E, M] = format, { bias, last } = limits(format), scaled = x / sigma, code = encode(scaled, format);
  const found = decode(code, format), { e, value } = found, index = (found.s ? -1 : 1) * (code % 2 ** (E + M));
  const number = (i) => (Math.abs(i) > last ? null : Math.sign(i) * decode(Math.abs(i), format).value * sigma);
  const below = number(value < scaled ? index : index - 1), above = number(value > scaled ? index : index + 1);
  const largest = number(last), smallest = number(1), normal = number(2 ** M), rounded = value * sigma;
  const kind = x === 0 ? "zero" : value === 0 ? "lost" : Math.abs(x) > largest ? "saturates" : e === 0 ? "subnormal" : "normal";
  return {
    code, ...found, bias, index, number, rounded, below, above, kind, largest, smallest, normal,
    error: x === 0 ? 0 : Math.abs(rounded - x) / Math.abs(x),
    tie: kind !== "saturates" && value !== scaled && x - below === above - x,
    gap: 2 ** (Math.max(e, 1) - bias - M) * sigma, // to the next number, away from zero
  };
}

const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const raised = (n) => [...String(n)].map((c) => RAISED[c]).join("");
const short = (x) => {
  if (x === null) return "none";
  const few = Number(x.toPrecision(6)), size = Math.abs(few), far = size !== 0 && (size < 1e-4 || size >= 1e7);
  return (far ? few.toExponential() : Object.is(x, -0) ? "-0" : String(few)).replaceAll("-", "−").replace("+", "");
};

const LOW = -26, HIGH = 22; // powers of two at the ends of the axis
const tick = (at, from, to, more = "") => `<line x1="${at}%" x2="${at}%" y1="${from}" y2="${to}" ${more}/>`;
const gray = (from, to, height) => (to > from ? `<rect class="n2t-out" x="${from}%" width="${to - from}%" height="${height}"/>` : "");
const write = (at, y, words, anchor) => `<text x="${at}%" y="${y}" text-anchor="${anchor ?? (at < 20 ? "start" : at > 80 ? "end" : "middle")}">${words}</text>`;
const drawing = (height, parts) => `<svg height="${height}" aria-hidden="true">${parts.join("")}</svg>`;

// All numbers of the format between 2^LOW and 2^HIGH, on the axis of the slider.
function axis(x, found, [, M], last) {
  const place = (v) => Math.min(100, Math.max(0, (100 * (Math.log2(v) - LOW)) / (HIGH - LOW)));
  const [zero, end] = [place(found.smallest / 2), place(found.largest)], parts = [gray(0, zero, 26), gray(end, 100, 26)];
  if (zero > 10) parts.push(write(zero / 2, 18, "→ 0", "middle"));
  if (end < 80) parts.push(write((100 + end) / 2, 18, `→ ${short(found.largest)}`, "middle"));
  if (M > 3) parts.push(`<rect class="n2t-dense" x="${place(found.normal)}%" width="${end - place(found.normal)}%" height="26"/>`);
  for (let i = 1; i <= last && M <= 3; i++) {
    const at = place(found.number(i));
    if (at > 0 && at < 100) parts.push(tick(at, i < 2 ** M ? 14 : 4, 26));
  }
  for (let d = -6; d <= 6; d += 3) parts.push(tick(place(10 ** d), 26, 31), write(place(10 ** d), 44, d ? `10${raised(d)}` : "1", "middle"));
  const size = Math.log2(Math.abs(x));
  if (size < LOW || size > HIGH) parts.push(x ? write(size < LOW ? 0 : 100, 18, size < LOW ? "← x" : "x →") : "");
  else parts.push(tick(place(Math.abs(x)), 0, 28, 'class="n2t-x"'));
  return drawing(48, parts);
}

// The numbers around x on a plain axis; tinted, all that is rounded to the same number as x.
function near(x, found, [, M]) {
  const { index, number, rounded, below, above, gap } = found, [left, right] = [rounded - 4.5 * gap, rounded + 4.5 * gap];
  const place = (v) => Math.min(100, Math.max(0, (100 * (v - left)) / (right - left)));
  const halfway = (other, end) => (number(other) === null ? end : place((rounded + number(other)) / 2));
  const ends = [place(-found.largest), place(found.largest)];
  const parts = [gray(0, ends[0], 50), gray(ends[1], 100, 50)];
  const own = [halfway(index - 1, 0), halfway(index + 1, 100)];
  parts.push(`<rect class="n2t-own" x="${own[0]}%" width="${own[1] - own[0]}%" y="22" height="28"/>`, `<line x1="0" x2="100%" y1="50" y2="50"/>`);
  const mark = (i, more) => parts.push(tick(place(number(i)), i && Math.abs(i) < 2 ** M ? 38 : 26, 50, more));
  for (let i = index - 1; number(i) !== null && number(i) > left; i--) mark(i);
  for (let i = index + 1; number(i) !== null && number(i) < right; i++) mark(i);
  mark(index, 'class="n2t-found"');
  if (Math.abs(index) > 1 && left < 0 && right > 0) parts.push(write(place(0), 23, "0"));
  if (x > left && x < right) parts.push(tick(place(x), 18, 50, 'class="n2t-x"'));
  parts.push(write(place(x), 12, `${x < left ? "← " : ""}x = ${short(x)}${x > right ? " →" : ""}`));
  parts.push(below === null ? write(48, 66, "nothing below", "end") : write(place(below), 66, short(below), "end"));
  parts.push(above === null ? write(52, 66, "nothing above", "start") : write(place(above), 66, short(above), "start"));
  return drawing(72, parts);
}

function words({ kind, error, gap, tie, largest, smallest, normal }) {
  const halfway = tie ? " x lies halfway between two of them: the even mantissa is taken." : "";
  return {
    zero: "Zero has a code for each sign, with all other bits zero.",
    lost: `Lost: half of the smallest number is ${short(smallest / 2)}, and what is no larger than that becomes zero.`,
    saturates: `Too large: with this scale the format ends at ±${short(largest)}, and x saturates there.`,
    subnormal: `Subnormal: below ${short(normal)} numbers stay ${short(gap)} apart, so the relative error grows as x shrinks.${halfway}`,
    normal: `Normal: numbers lie ${short(gap)} apart here${error === 0 ? ", and x is one of them." : `.${halfway || " Rounding moves x by half of that at most."}`}`,
  }[kind];
}

export function mount(figure, bench, { formats, start }) {
  const radios = Object.keys(formats).map((name) => `<label><input type="radio" value="${name}"${name === start.format ? " checked" : ""}>${name}</label>`);
  bench.innerHTML = `<div class="n2t-fp8"><div class="n2t-controls"><fieldset><legend>format</legend>${radios.join("")}</fieldset>
<label>x <input type="text" data-name="x" value="${start.x}" spellcheck="false" autocomplete="off"></label>
<label class="n2t-scale">scale σ <input type="range" data-name="scale" min="-16" max="16" step="1" value="${start.scale}" aria-label="scale, a power of two"><output></output></label>
<input type="range" data-name="size" min="${LOW}" max="${HIGH}" step="0.0625" aria-label="size of x"></div>
<div class="n2t-axis"></div><div class="n2t-bits"></div><p class="n2t-formula"></p><div class="n2t-near"></div><p class="n2t-key">Orange: x. Green: x̂, and all that is rounded to it. Short ticks: subnormal. Gray: what becomes zero, and what saturates.</p>
<table><thead><tr><th scope="col">next below x</th><th scope="col">x̂, rounded</th><th scope="col">next above x</th><th scope="col">relative error</th></tr></thead><tbody></tbody></table><p aria-live="polite"></p></div>`;
  const control = (name) => bench.querySelector(`[data-name=${name}]`), fill = (name, text) => { bench.querySelector(name).innerHTML = text; };
  const group = `n2t-fp8-${document.querySelectorAll(".n2t-fp8").length}`; // two labs on a page do not share their buttons
  for (const radio of bench.querySelectorAll("[type=radio]")) radio.name = group;
  let x = start.x;
  const draw = () => {
    const name = bench.querySelector("[type=radio]:checked").value, format = formats[name], [E, M] = format, power = Number(control("scale").value);
    const found = read(x, 2 ** power, format), { s, e, m, bias, value } = found;
    control("scale").setAttribute("aria-valuetext", `2 to the power of ${power}`);
    bench.querySelector("output").textContent = `2${raised(power)}`;
    if (x !== 0) control("size").value = Math.log2(Math.abs(x));
    control("size").setAttribute("aria-valuetext", short(x));
    fill(".n2t-axis", axis(x, found, format, limits(format).last));
    const bits = found.code.toString(2).padStart(1 + E + M, "0");
    fill(".n2t-bits", [["sign", bits[0], `s = ${s}`], ["exponent", bits.slice(1, 1 + E), `e = ${e}`], ["mantissa", bits.slice(1 + E), `m = ${m}`]].map(
      ([part, digits, read]) => `<div class="n2t-${part}" style="flex-grow:${digits.length}"><span>${part}</span><div>${[...digits].map((bit) => `<b>${bit}</b>`).join("")}</div><span>${read}</span></div>`,
    ).join(""));
    const of = (part, n) => `<i class="n2t-${part}">${n}</i>`, fraction = `${of("mantissa", m)}/${2 ** M}`;
    fill(".n2t-formula", `x / σ = ${short(x / 2 ** power)} is stored as (−1)<sup>${of("sign", s)}</sup> · 2<sup>${e ? of("exponent", e) : 1} − ${bias}</sup> · ${e ? `(1 + ${fraction})` : fraction} =&nbsp;${short(value)}`);
    fill(".n2t-near", near(x, found, format));
    fill("tbody", `<tr><td>${[found.below, found.rounded, found.above].map(short).join("</td><td>")}</td><td>${Number((100 * found.error).toPrecision(3))} %</td></tr>`);
    bench.querySelector("[aria-live]").textContent = words(found);
    const { number, ...plain } = found;
    figure.state = { format: name, x, scale: power, ...plain };
  };
  control("size").addEventListener("input", () => {
    const power = Number(control("size").value), size = Number.isInteger(power) ? 2 ** power : Number((2 ** power).toPrecision(4));
    x = x < 0 ? -size : size;
    control("x").value = String(x);
    control("x").setAttribute("aria-invalid", "false");
    draw();
  });
  control("x").addEventListener("input", () => {
    const text = control("x").value.trim().replace("−", "-"), typed = Number(text), good = text !== "" && Number.isFinite(typed);
    control("x").setAttribute("aria-invalid", String(!good));
    if (!good) bench.querySelector("[aria-live]").textContent = "Type a number, such as −0.4 or 3e-5.";
    else { x = typed; draw(); }
  });
  for (const one of bench.querySelectorAll("[data-name=scale], [type=radio]")) one.addEventListener("input", draw);
  draw();
}
