// Line charts in SVG. Each is a figure with its newest values in words; the arrow keys move its cursor.

import { h, replace, svg } from "./dom.js";

const LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 20;

// title; series: [{ name, points: [[x, y], ...], dots, color }]; formats of y, of y's axis and of x; height; most (a least upper end of y)
export function chart({ title, format, formatTick = format, formatX, height = 150, most = 0, least }) {
  const legend = h("span", { class: "legend" });
  const area = h("div", { class: "plot", tabindex: 0, role: "img", "aria-label": title });
  const figure = h("figure", { class: "chart" }, h("figcaption", {}, h("strong", {}, title), legend), area);
  let series = [], at = null, frame = 0;

  const scale = (values, low, high, from, to) => values.map((v) => from + ((v - low) / (high - low || 1)) * (to - from));

  function draw() {
    frame = 0;
    const width = area.clientWidth;
    const points = series.flatMap((one) => one.points).filter(([, y]) => y != null && Number.isFinite(y));
    if (!width) return;
    if (points.length === 0) {
      replace(area, h("p", { class: "nothing" }, "Nothing yet"));
      replace(legend);
      return;
    }
    const xs = series.flatMap((one) => one.points.map(([x]) => x)), ys = points.map(([, y]) => y);
    const x0 = min(xs), x1 = max(xs);
    const ticks = nice(least ?? min(ys), Math.max(max(ys), most));
    const y0 = ticks[0], y1 = ticks.at(-1);
    const X = (x) => scale([x], x0, x1, LEFT, width - RIGHT)[0];
    const Y = (y) => scale([y], y0, y1, height - BOTTOM, TOP)[0];
    const drawing = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    for (const tick of ticks) {
      drawing.append(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: Y(tick), y2: Y(tick) }),
        svg("text", { class: "tick", x: LEFT - 6, y: Y(tick) + 4, "text-anchor": "end" }, formatTick(tick)));
    }
    const anchors = x0 === x1 ? [["middle", x0]] : [["start", x0], ["end", x1]];
    for (const [anchor, x] of anchors) {
      drawing.append(svg("text", { class: "tick", x: X(x), y: height - 4, "text-anchor": anchor }, formatX(x)));
    }
    series.forEach((one, i) => drawing.append(...lines(one, i, X, Y)));
    if (at != null) drawing.append(svg("line", { class: "cursor", x1: X(at), x2: X(at), y1: TOP, y2: height - BOTTOM }));
    replace(area, drawing);
    describe();
  }

  function lines(one, i, X, Y) {
    const color = `s${one.color ?? i}`;
    const known = (point) => point && point[1] != null && Number.isFinite(point[1]);
    const dots = [];
    let d = "";
    one.points.forEach(([x, y], j) => {
      if (!known(one.points[j])) return;
      const follows = known(one.points[j - 1]);
      d += `${follows ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`;
      if (one.dots || (!follows && !known(one.points[j + 1]))) dots.push(svg("circle", { class: `dot ${color}`, cx: X(x), cy: Y(y), r: 3 }));
    });
    return [svg("path", { class: `line ${color}`, d }), ...dots];
  }

  // The newest values, or those under the cursor.
  function describe() {
    const x = at ?? max(series.flatMap((one) => one.points.map(([p]) => p)));
    const shown = series.map((one, i) => {
      const known = one.points.filter(([, y]) => y != null);
      const point = known.reduce((best, p) => (!best || Math.abs(p[0] - x) <= Math.abs(best[0] - x) ? p : best), null);
      return point && h("span", { class: "key" }, h("i", { class: `s${one.color ?? i}` }), `${one.name} `, h("b", {}, format(point[1])));
    });
    replace(legend, at == null ? null : h("span", { class: "muted" }, formatX(at)), shown);
    area.setAttribute("aria-label", `${title}: ${legend.textContent}`);
  }

  const places = () => [...new Set(series.flatMap((one) => one.points.map(([x]) => x)))].sort((a, b) => a - b);
  const later = () => { frame ||= requestAnimationFrame(draw); };
  area.addEventListener("pointermove", (event) => {
    const all = places();
    if (!all.length) return;
    const share = (event.offsetX - LEFT) / (area.clientWidth - LEFT - RIGHT);
    const x = all[0] + share * (all.at(-1) - all[0]);
    at = all.reduce((best, one) => (Math.abs(one - x) < Math.abs(best - x) ? one : best));
    later();
  });
  area.addEventListener("pointerleave", () => { at = null; later(); });
  area.addEventListener("blur", () => { at = null; later(); });
  area.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const all = places();
    if (!step || !all.length) return;
    event.preventDefault();
    const i = at == null ? all.length - 1 : all.indexOf(at) + step;
    at = all[Math.min(all.length - 1, Math.max(0, i))];
    later();
  });
  new ResizeObserver(later).observe(area);
  return { figure, set(next) { series = next; later(); } };
}

const min = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const max = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

// Three to five round values that span the range.
function nice(low, high) {
  if (low === high) [low, high] = low === 0 ? [0, 1] : [Math.min(0, low), Math.max(0, high)];
  const rough = (high - low) / 3, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((one) => one * power >= rough) * power;
  const ticks = [];
  for (let tick = Math.floor(low / step + 1e-9) * step; ; tick += step) {
    ticks.push(Number(tick.toPrecision(12)));
    if (tick >= high - step * 1e-9) return ticks;
  }
}
