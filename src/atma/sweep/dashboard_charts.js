/* Small SVG charts: lines over a length or a budget, points of quality against cost, and bars of an effect. */
const COLOURS = 8;
const MARKERS = ["circle", "square", "diamond", "triangle"];
const DASHES = ["", "7 4", "2 3"];

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/* Round steps between two ends, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low || Math.abs(high) || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((nice) => nice * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

/* 65536 is 64K in tokens of context; of budgets, thousands are k and M. */
function sizeText(length) {
  if (length >= 1048576) return `${+(length / 1048576).toPrecision(3)}M`;
  return length >= 1024 ? `${+(length / 1024).toPrecision(3)}K` : String(length);
}

function amountText(value) {
  const size = Math.abs(value);
  for (const [unit, suffix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return `${+(value / unit).toPrecision(4)}${suffix}`;
  }
  return String(+value.toPrecision(4));
}

function marker(kind, x, y, r = 3.5) {
  if (kind === "square") return svg("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r });
  if (kind === "circle") return svg("circle", { cx: x, cy: y, r });
  const tips = kind === "diamond" ? [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]] : [[0, -1.3], [1.2, 1], [-1.2, 1]];
  return svg("polygon", { points: tips.map(([dx, dy]) => `${x + dx * r},${y + dy * r}`).join(" ") });
}

/* Colour, dash and mark of the so-manieth selected cell. */
function style(slot) {
  const round = Math.floor(slot / COLOURS);
  const mark = MARKERS[(slot + round) % MARKERS.length];
  return { colour: `var(--c${slot % COLOURS})`, dash: DASHES[round % DASHES.length], mark };
}

function swatch(slot) {
  const { colour, dash, mark } = style(slot);
  const line = svg("line", { x1: 0, y1: 7, x2: 28, y2: 7, "stroke-dasharray": dash, "stroke-width": 2 });
  const made = svg("svg", { width: 28, height: 14, "aria-hidden": "true" }, line, marker(mark, 14, 7));
  made.style.cssText = `stroke:${colour};fill:${colour}`;
  return made;
}

/* The frame of a chart: axes with grid and titles. Gives the drawing and the places of values. */
function frame(box, { xs, ys, log, xTicks, xText, xTitle, yTitle, name, yLow }) {
  const width = Math.max(box.clientWidth, 260);
  const height = width < 600 ? 290 : 380;
  const left = 58, right = 16, top = 24, bottom = 46;
  const scale = log ? Math.log2 : (value) => value;
  const [x0, x1] = spread(xs.map(scale), log ? 0 : 0.02);
  const [y0, y1] = spread(yLow === 0 ? [0, ...ys] : ys, 0.05);
  const x = (value) => left + ((scale(value) - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  const drawing = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  for (const value of ticks(y0, y1, 5)) {
    drawing.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    drawing.append(svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, amountText(value)));
  }
  const places = xTicks ?? ticks(x0, x1, width < 600 ? 4 : 8);
  const every = Math.ceil(places.length / (width < 600 ? 6 : 12));
  for (const value of places.filter((_, i) => (places.length - 1 - i) % every === 0)) {
    drawing.append(svg("line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom }));
    drawing.append(svg("text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, xText(value)));
  }
  const middle = (left + width - right) / 2;
  drawing.append(svg("text", { class: "title", x: middle, y: height - 6, "text-anchor": "middle" }, xTitle));
  drawing.append(svg("text", { class: "title", x: 8, y: 13 }, yTitle));
  return { drawing, x, y, width, left, right, top, foot: height - bottom };
}

function spread(values, share) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const room = (high - low) * share || (high === low ? Math.abs(high) * 0.1 || 1 : 0);
  return [low - room, high + room];
}

/* Lines of {name, slot, points: [[x, y]], thin}: a mark at a point, a note of all of them under the pointer. */
function lineChart(box, { series, mark, ...axes }) {
  const xs = series.flatMap((one) => one.points.map(([x]) => x));
  const ys = series.flatMap((one) => one.points.map(([, y]) => y));
  const plot = frame(box, { ...axes, xs, ys });
  if (mark !== null && mark !== undefined && mark >= Math.min(...xs) && mark <= Math.max(...xs)) {
    const at = plot.x(mark);
    plot.drawing.append(svg("line", { class: "trained", x1: at, x2: at, y1: plot.top, y2: plot.foot }));
    plot.drawing.append(svg("text", { x: at + 5, y: plot.top + 10 }, `trained at ${sizeText(mark)}`));
  }
  for (const one of series) plot.drawing.append(drawnLine(one, plot));
  box.replaceChildren(plot.drawing);
  follow(box, plot, series, axes);
}

function drawnLine({ name, slot, points, thin }, plot) {
  const { colour, dash, mark } = style(slot);
  const group = svg("g", { class: thin ? "series thin" : "series" }, svg("title", {}, name));
  group.style.cssText = `stroke:${colour};fill:${colour}`;
  const path = points.map(([x, y]) => `${plot.x(x).toFixed(1)},${plot.y(y).toFixed(1)}`).join(" ");
  group.append(svg("polyline", { points: path, "stroke-dasharray": dash }));
  if (!thin) group.append(...points.map(([x, y]) => marker(mark, plot.x(x), plot.y(y))));
  return group;
}

/* The values under the pointer, beside a line at the nearest x. */
function follow(box, plot, series, { xText, yText, xTitle }) {
  const note = document.createElement("div");
  note.className = "note-box";
  note.hidden = true;
  const line = svg("line", { class: "pointer", y1: plot.top, y2: plot.foot, visibility: "hidden" });
  plot.drawing.append(line);
  box.append(note);
  const shown = series.filter((one) => !one.thin);
  const xs = [...new Set((shown.length ? shown : series).flatMap((one) => one.points.map(([x]) => x)))];
  const hide = () => {
    note.hidden = true;
    line.setAttribute("visibility", "hidden");
  };
  plot.drawing.addEventListener("pointerleave", hide);
  plot.drawing.addEventListener("pointermove", (event) => {
    const place = event.clientX - plot.drawing.getBoundingClientRect().left;
    const near = xs.reduce((best, x) => (Math.abs(plot.x(x) - place) < Math.abs(plot.x(best) - place) ? x : best));
    const at = series
      .flatMap((one) => one.points.filter(([x]) => x === near).map(([, y]) => ({ one, y })))
      .sort((a, b) => b.y - a.y);
    note.replaceChildren(...[[`${xText(near)} ${xTitle}`], ...at.map(({ one, y }) => [swatch(one.slot), `${yText(y)} ${one.name}`])].map(noteRow));
    note.hidden = false;
    const room = plot.x(near) > plot.width / 2;
    note.style.left = room ? "" : `${plot.x(near) + 12}px`;
    note.style.right = room ? `${plot.width - plot.x(near) + 12}px` : "";
    line.setAttribute("x1", plot.x(near));
    line.setAttribute("x2", plot.x(near));
    line.setAttribute("visibility", "visible");
  });
}

function noteRow(parts) {
  const row = document.createElement("div");
  row.append(...parts);
  return row;
}

/* Points of {name, colour slot, x, y, picked, choose} with the line of the front. */
function pointChart(box, { points, joined, ...axes }) {
  const plot = frame(box, { ...axes, xs: points.map((p) => p.x), ys: points.map((p) => p.y) });
  const path = joined.map((p) => `${plot.x(p.x)},${plot.y(p.y)}`).join(" ");
  plot.drawing.append(svg("polyline", { class: "front", points: path }));
  for (const point of points) {
    const made = marker(MARKERS[point.slot % MARKERS.length], plot.x(point.x), plot.y(point.y), point.picked ? 6.5 : 5);
    made.setAttribute("class", point.picked ? "point picked" : "point");
    made.style.cssText = `fill:var(--c${point.slot % COLOURS})`;
    made.append(svg("title", {}, point.name));
    made.addEventListener("click", point.choose);
    plot.drawing.append(made);
  }
  box.replaceChildren(plot.drawing);
}

/* One effect on the scale that all rows of a table share: range, interval, mean, and where zero is. */
function effectBar(effect, low, high, word) {
  const width = innerWidth < 700 ? 110 : 190;
  const x = (value) => 6 + ((value - low) / (high - low || 1)) * (width - 12);
  const made = svg("svg", { width, height: 22, class: `bar ${word}`, "aria-hidden": "true" });
  made.append(svg("line", { class: "zero", x1: x(0), x2: x(0), y1: 0, y2: 22 }));
  made.append(svg("line", { class: "range", x1: x(effect.minimum), x2: x(effect.maximum), y1: 11, y2: 11 }));
  if (effect.low !== null) {
    made.append(svg("line", { class: "interval", x1: x(effect.low), x2: x(effect.high), y1: 11, y2: 11 }));
  }
  made.append(svg("circle", { cx: x(effect.mean), cy: 11, r: 4.5 }));
  return made;
}
