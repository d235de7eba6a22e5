// The loss curve as SVG. Numbers in, elements out; colors come from tidetable.css, and so from the theme.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 40, right: 8, top: 6, bottom: 16 };

/** An SVG element with attributes and children. */
export function make(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Round numbers, at most `count` + 1 of them, inside [low, high]. */
export function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

/** Value at fraction `share` of a sorted list. */
function quantile(sorted, share) {
  return sorted[Math.round(share * (sorted.length - 1))];
}

/** [low, high] of the loss axis: all of the smooth curve and validation, and the raw losses but for rare spikes. */
export function lossRange(run) {
  const raw = run.points.map((point) => point.loss).sort((a, b) => a - b);
  const values = [...run.points.map((point) => point.smooth), ...run.validations.map((point) => point.loss)];
  if (raw.length) values.push(quantile(raw, 0.02), quantile(raw, 0.98));
  const low = values.reduce((a, b) => Math.min(a, b));
  const high = values.reduce((a, b) => Math.max(a, b));
  const pad = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
  return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
}

/** Replace the content of `svg`, of this size in pixels, by the curve of `run`, which has a point or a validation. */
export function drawLoss(svg, run, width, height) {
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  if (inner.width < 20 || inner.height < 20) return svg.replaceChildren();
  const [low, high] = lossRange(run);
  const last = Math.max(run.steps, run.step, 1);
  const x = (step) => (step / last) * inner.width;
  const y = (loss) => inner.height * (1 - (loss - low) / (high - low));
  const losses = ticks(low, high, Math.min(5, Math.floor(inner.height / 22)));
  const steps = ticks(0, last, Math.min(5, Math.floor(inner.width / 60))).filter(Number.isInteger);
  // A nested <svg> clips: rare spikes leave the picture instead of flattening it.
  const plot = make(
    "svg",
    { x: MARGIN.left, y: MARGIN.top, ...inner, overflow: "hidden" },
    ...losses.map((loss) => level(inner.width, y(loss), "tidetable-grid")),
    ...curves(run, inner.width, x, y),
  );
  const format = tickFormat(losses);
  const axes = make("g", { class: "tidetable-axes" });
  for (const loss of losses) {
    const place = { x: MARGIN.left - 5, y: MARGIN.top + y(loss) + 3, "text-anchor": "end" };
    axes.append(make("text", place, format(loss)));
  }
  for (const step of steps) {
    const hangsOver = x(step) > inner.width - 14;
    const place = { x: hangsOver ? width - 2 : MARGIN.left + x(step), y: height - 4 };
    axes.append(make("text", { ...place, "text-anchor": hangsOver ? "end" : "middle" }, String(step)));
  }
  svg.replaceChildren(axes, plot);
}

/** Losses, their average, and validation, in the coordinates of the functions x(step) and y(loss). */
function curves(run, width, x, y) {
  const path = (points, value, className) => {
    const corner = (point, index) => `${index ? "L" : "M"}${x(point.step).toFixed(1)} ${y(point[value]).toFixed(1)}`;
    return make("path", { class: className, d: points.map(corner).join("") });
  };
  return [
    path(run.points, "loss", "tidetable-raw"),
    path(run.points, "smooth", "tidetable-smooth"),
    ...(run.base === undefined ? [] : [level(width, y(run.base), "tidetable-base")]),
    path(run.validations, "loss", "tidetable-validation"),
    ...run.validations.map((one) => make("circle", { class: "tidetable-dot", cx: x(one.step), cy: y(one.loss), r: 3 })),
  ];
}

/** A horizontal line at y. */
function level(width, y, className) {
  return make("line", { class: className, x1: 0, x2: width, y1: y, y2: y });
}

/** A function that writes these evenly spaced numbers so that they can be told apart. */
export function tickFormat(values) {
  const step = values.length > 1 ? values[1] - values[0] : values[0] || 1;
  const digits = Math.max(0, -Math.floor(Math.log10(Math.abs(step)) + 1e-9));
  return digits > 4 ? (value) => value.toExponential(1) : (value) => value.toFixed(digits);
}
