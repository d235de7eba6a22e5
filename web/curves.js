// Curves as SVG: the server's numbers in, elements out; colors come from tidetable.css, and so from the theme.
import { make, tickFormat, ticks } from "./plot.js";

const MARGIN = { left: 38, right: 10, top: 8, bottom: 16 };

/** Replace the content of `svg`, of this size in pixels, by the curves of `answer` (see runtime/live.py). */
export function drawCurves(svg, answer, width, height) {
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const values = answer.curves.flatMap((curve) => curve.y.filter((y) => isDrawn(y, answer.log)));
  if (inner.width < 20 || inner.height < 20 || !values.length) return svg.replaceChildren();
  const x = scale(answer.curves.flatMap((curve) => curve.x), false, inner.width);
  const y = scale([...values, ...(answer.y_range ?? [])], answer.log, inner.height);
  const left = (value) => (answer.x_falls ? inner.width - x.at(value) : x.at(value));
  const above = (value) => inner.height - y.at(value);
  const plot = make("g", { transform: `translate(${MARGIN.left} ${MARGIN.top})` });
  const axes = make("g", { class: "tidetable-axes" });
  const levels = y.ticks(Math.min(5, Math.floor(inner.height / 20)));
  for (const level of levels.values) {
    plot.append(make("line", { class: "tidetable-grid", x1: 0, x2: inner.width, y1: above(level), y2: above(level) }));
    const place = { x: MARGIN.left - 5, y: MARGIN.top + above(level) + 3, "text-anchor": "end" };
    axes.append(make("text", place, levels.format(level)));
  }
  const across = x.ticks(Math.min(5, Math.floor(inner.width / 50)));
  for (const step of across.values.filter((value) => answer.x_title !== "step" || Number.isInteger(value))) {
    const place = { x: MARGIN.left + left(step), y: height - 4, "text-anchor": "middle" };
    axes.append(make("text", place, across.format(step)));
  }
  const points = answer.curves.flatMap((curve) =>
    curve.x.map((step, i) => [left(step), curve.y[i]]).filter(([, value]) => isDrawn(value, answer.log)),
  );
  axes.append(caption(answer, points.map(([place, value]) => [place, above(value)]), inner));
  answer.curves.forEach((curve, index) => plot.append(...drawn(curve, index, answer, left, above)));
  svg.replaceChildren(axes, plot);
}

/** The class that gives curve `index` its color; faint ones are references. */
export function classOf(curve, index) {
  return curve.faint ? "tidetable-faint" : `tidetable-curve tidetable-color-${index % 8}`;
}

function isDrawn(value, log) {
  return value !== null && (!log || value > 0);
}

/** What is drawn over what, in the corner that the curves leave most empty. */
function caption(answer, points, { width, height }) {
  const [wide, high] = [130, 22];
  const corners = [
    [true, false],
    [true, true],
    [false, false],
    [false, true],
  ].map(([right, low]) => {
    const isIn = ([x, y]) => (right ? x > width - wide : x < wide) && (low ? y > height - high : y < high);
    return { right, low, crowd: points.filter(isIn).length };
  });
  const { right, low } = corners.reduce((best, one) => (one.crowd < best.crowd ? one : best));
  const place = { x: MARGIN.left + (right ? width - 2 : 6), y: MARGIN.top + (low ? height - 6 : 12) };
  const content = `${answer.y_title.replaceAll("_", " ")} over ${answer.x_title}`;
  return make("text", { ...place, "text-anchor": right ? "end" : "start", class: "tidetable-caption" }, content);
}

/** A line through the points, broken where one cannot be drawn, and dots where they can be told apart. */
function drawn(curve, index, { log, x_title: xTitle }, x, y) {
  const color = classOf(curve, index);
  let corner = "M";
  let d = "";
  const dots = [];
  curve.x.forEach((step, i) => {
    const value = curve.y[i];
    if (!isDrawn(value, log)) return (corner = "M");
    d += `${corner}${x(step).toFixed(2)} ${y(value).toFixed(2)}`;
    corner = "L";
    const title = make("title", {}, `${curve.label}, ${xTitle} ${Number(step.toPrecision(6))}: ${Number(value.toPrecision(6))}`);
    dots.push(make("circle", { class: color, cx: x(step), cy: y(value), r: 2 }, title));
  });
  const path = make("path", { class: color, d, "data-label": curve.label });
  return curve.dots ? [path, ...dots] : [path];
}

/** {at: value -> pixels in [0, size], ticks: count -> {values, format}} for these values. */
function scale(values, log, size) {
  const place = log ? Math.log10 : (value) => value;
  let low = place(values.reduce((a, b) => Math.min(a, b)));
  let high = place(values.reduce((a, b) => Math.max(a, b)));
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  return {
    at: (value) => ((place(value) - low) / (high - low)) * size,
    ticks(count) {
      if (!log) {
        const found = ticks(low, high, count);
        return { values: found, format: tickFormat(found) };
      }
      const powers = ticks(low, high, count).filter(Number.isInteger);
      const found = powers.length > 1 ? powers.map((power) => 10 ** power) : ticks(10 ** low, 10 ** high, count);
      return { values: found.filter((value) => value > 0), format: (value) => String(Number(value.toPrecision(3))) };
    },
  };
}
