// The loss curve as SVG. Numbers in, elements out; colors come from tidetable.css, and so from the theme.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 40, right: 8, top: 6, bottom: 16 };

/** An SVG element with attributes and children. */
function make(name, attributes, ...children) {
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

/** Replace the content of `svg` by the curve of `run`, which has at least one point or validation, at this size in pixels. */
export function drawLoss(svg, run, width, height) {
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  if (inner.width < 20 || inner.height < 20) return svg.replaceChildren();
  const [low, high] = lossRange(run);
  const end = Math.max(run.steps, run.step, 1);
  const x = (step) => (step / end) * inner.width;
  const y = (loss) => inner.height * (1 - (loss - low) / (high - low));
  const path = (points, value) => points.map((p, i) => `${i ? "L" : "M"}${x(p.step).toFixed(1)} ${y(p[value]).toFixed(1)}`).join("");

  // A nested <svg> clips: rare spikes leave the picture instead of flattening it.
  const plot = make("svg", { x: MARGIN.left, y: MARGIN.top, ...inner, overflow: "hidden" });
  const axes = make("g", { class: "tidetable-axes" });
  const losses = ticks(low, high, Math.min(5, Math.floor(inner.height / 22)));
  const digits = decimals(losses);
  for (const loss of losses) {
    plot.append(make("line", { class: "tidetable-grid", x1: 0, x2: inner.width, y1: y(loss), y2: y(loss) }));
    axes.append(make("text", { x: MARGIN.left - 5, y: MARGIN.top + y(loss) + 3, "text-anchor": "end" }, loss.toFixed(digits)));
  }
  for (const step of ticks(0, end, Math.min(5, Math.floor(inner.width / 60))).filter(Number.isInteger)) {
    const anchor = x(step) > inner.width - 14 ? "end" : "middle";
    const place = { x: MARGIN.left + x(step) + (anchor === "end" ? MARGIN.right : 0), y: height - 4, "text-anchor": anchor };
    axes.append(make("text", place, String(step)));
  }
  plot.append(make("path", { class: "tidetable-raw", d: path(run.points, "loss") }));
  plot.append(make("path", { class: "tidetable-smooth", d: path(run.points, "smooth") }));
  if (run.base !== undefined) {
    plot.append(make("line", { class: "tidetable-base", x1: 0, x2: inner.width, y1: y(run.base), y2: y(run.base) }));
  }
  plot.append(make("path", { class: "tidetable-validation", d: path(run.validations, "loss") }));
  for (const { step, loss } of run.validations) {
    plot.append(make("circle", { class: "tidetable-dot", cx: x(step), cy: y(loss), r: 3 }));
  }
  svg.replaceChildren(axes, plot);
}

/** Digits after the point that tell these evenly spaced numbers apart. */
function decimals(values) {
  const step = values.length > 1 ? values[1] - values[0] : values[0] || 1;
  return Math.min(8, Math.max(0, -Math.floor(Math.log10(Math.abs(step)) + 1e-9)));
}
