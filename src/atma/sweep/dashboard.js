/* Shows what the form's controls ask for of the page's data; nothing is computed here. The form is the only state. */
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const form = byId("controls");
const rows = [...document.querySelectorAll("#grid tbody tr")];
const heads = [...document.querySelectorAll("#grid thead th")];
const hiding = document.head.appendChild(document.createElement("style"));
const COLOURS = ["#2f7fe0", "#dd6b10", "#16976c", "#a45ee0", "#cf4065", "#7d8a1f", "#1793a8", "#9a6b4f"];
const MARKERS = ["circle", "square", "diamond", "triangle-up"];
const VERDICTS = { better: COLOURS[0], worse: COLOURS[1], unclear: "#8a8f98" };
const slots = []; /* a selected cell keeps its colour until it is let go */
const chosen = (name) => new FormData(form).getAll(name).map(Number);
const words = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;"); /* plotly reads some markup */
const kept = () => data.factors.map(({ levels }, i) => (chosen(`f${i}`).length ? chosen(`f${i}`) : levels.map((_, level) => level)));
const fits = ({ levels }, shown = kept()) => levels.every((level, i) => shown[i].includes(level));
const subset = () => kept().map((levels, i) => (levels.length === data.factors[i].levels.length ? "" : levels.join("|"))).join();
const colour = (slot) => ({ color: COLOURS[slot % 8], symbol: MARKERS[slot % 4], dash: ["solid", "dash", "dot"][Math.floor(slot / 8) % 3] });

function table(place, header, lines) {
  const made = document.createElement("table");
  for (const [i, line] of [header, ...lines].entries()) {
    const row = (i ? made.tBodies[0] ?? made.createTBody() : made.createTHead()).insertRow();
    for (const [j, text] of line.entries()) {
      const cell = row.appendChild(document.createElement(i && j ? "td" : "th"));
      [cell.textContent, cell.scope] = [Array.isArray(text) ? text[0] : text, i ? "row" : "col"];
      if (Array.isArray(text)) cell.className = "shade";
      if (Array.isArray(text)) cell.style.setProperty("--share", `${45 * text[1]}%`);
    }
  }
  byId(place).replaceChildren(made);
}

function effects(place, found) {
  const header = ["contrast", "mean", "95% interval", "median", "range", "+ / 0 / −", "p", "pairs"];
  table(place, header, found.map(([label, verdict, ...rest]) => [label, ...(rest.length ? rest.slice(5) : [verdict])]));
}

function drawCells() {
  const shown = kept();
  for (const row of rows) row.hidden = !fits(data.cells[row.dataset.number], shown);
  const columns = chosen("column");
  const hidden = heads.map((head, i) => [Number(head.dataset.metric || -1), i + 2]).filter(([metric, i]) => i > 2 && metric !== chosen("metric")[0] && !columns.includes(i));
  hiding.textContent = hidden.map(([, i]) => `#grid tr > :nth-child(${i}) { display: none; }`).join("");
  byId("shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} cells shown`;
}

function drawCurves() {
  const picked = chosen("cell");
  slots.forEach((number, slot) => picked.includes(number) || (slots[slot] = null));
  for (const number of picked) if (!slots.includes(number)) slots[slots.includes(null) ? slots.indexOf(null) : slots.length] = number;
  const cells = slots.flatMap((number, slot) => (number === null ? [] : [{ ...data.cells[number], slot, number }]));
  const line = (cell, x, y, name = cell.name) => ({ x, y, name: words(name), mode: "lines+markers", line: { ...colour(cell.slot), width: 2 }, marker: { ...colour(cell.slot), size: 7 } });
  const measures = data.metrics.map((metric, i) => ({ ...metric, i })).filter(({ family }) => family && family === form.elements.family.selectedOptions[0]?.text).sort((a, b) => a.length - b.length);
  const mark = data.trained ? [{ type: "line", x0: data.trained, x1: data.trained, yref: "paper", y0: 0, y1: 1, line: { color: "#8a8f98", dash: "dash" }, label: { text: `trained at ${data.trainedSize}`, textposition: "end", textangle: 0 } }] : [];
  const lengths = { type: "log", title: { text: "tokens" }, tickvals: measures.map(({ length }) => length), ticktext: measures.map(({ size }) => size) };
  const title = measures.length ? `${words(measures[0].family)} (${measures[0].rises ? "higher" : "lower"} is better)` : "";
  show(byId("length-chart"), { data: cells.map((cell) => line(cell, lengths.tickvals, measures.map(({ i }) => cell.metrics[i]))), layout: { xaxis: lengths, yaxis: { title: { text: title }, rangemode: measures[0]?.rises ? "tozero" : "normal" }, shapes: mark, showlegend: true } });
  const text = ({ number }, i) => rows.find((row) => Number(row.dataset.number) === number).cells[1 + heads.findIndex((head) => head.dataset.metric === String(i))].textContent;
  table("length-table", ["cell", ...lengths.ticktext], cells.map((cell) => [cell.name, ...measures.map(({ i }) => text(cell, i))]));
  const budget = form.elements.budget.value;
  const training = cells.flatMap((cell) => Object.entries(cell.curves).map(([kind, curve]) => ({ ...line(cell, curve[budget], curve.loss, `${cell.name}, ${kind}`), ...(kind === "train" && { mode: "lines", opacity: 0.5 }) })));
  show(byId("training-chart"), { data: training, layout: { xaxis: { title: { text: `training ${budget}` } }, yaxis: { title: { text: "loss, nats per token" } }, showlegend: true } });
}

function drawEffects() {
  const found = data.judged[subset()]?.[chosen("metric")[0]];
  byId("uncounted").hidden = Boolean(found);
  const { main, other, pairs } = found ?? { main: [], other: [], pairs: [] };
  effects("effect-table", main);
  effects("other-table", other);
  const known = main.filter((row) => row.length > 2).reverse();
  const bars = (low, high, width) => ({ x: known.map((row) => row[2]), y: known.map((row) => words(row[0])), error_x: { type: "data", symmetric: false, array: known.map((row) => row[high] - row[2]), arrayminus: known.map((row) => row[2] - row[low]), width: 0, thickness: width, color: "#8a8f98" }, mode: "markers", hoverinfo: "x+y", marker: { size: 9, color: known.map((row) => VERDICTS[row[1]]) } });
  const intervals = known.filter((row) => row[3] !== null).map((row) => ({ x: [row[3], row[4]], y: [words(row[0]), words(row[0])], mode: "lines", hoverinfo: "skip", line: { width: 6, color: VERDICTS[row[1]] } }));
  show(byId("effect-chart"), { data: [bars(5, 6, 1.5), ...intervals], layout: { hovermode: "closest", showlegend: false, xaxis: { zeroline: true } } });
  const pair = pairs[chosen("pair")[0]] ?? { rows: [], means: [] };
  effects("interaction-table", pair.rows);
  const both = data.factors.flatMap((_, i) => data.factors.slice(i + 1).map((_, j) => [i, i + 1 + j]))[chosen("pair")[0]] ?? [];
  const [down, across] = both.map((i) => kept()[i].map((level) => `${data.factors[i].name} ${data.factors[i].levels[level]}`));
  table("means", ["mean", ...(across ?? [])], pair.means.map((line, i) => [down[i], ...line]));
}

function drawFront() {
  const [metric, cost, hue] = ["metric", "cost", "hue"].map((name) => chosen(name)[0] ?? 0);
  const points = data.settings.filter((one) => fits(one) && one.metrics[metric] !== null && one.metrics[cost] !== null);
  const trace = (some, more) => ({ x: some.map((one) => one.metrics[cost]), y: some.map((one) => one.metrics[metric]), text: some.map((one) => words(one.name)), customdata: some.map((one) => one.cells), hovertemplate: "%{text}<br>%{y}, %{x}<extra></extra>", ...more });
  const levels = data.factors[hue]?.levels ?? ["all"];
  const groups = levels.map((name, level) => trace(points.filter((one) => (one.levels[hue] ?? 0) === level), { name: words(name), mode: "markers", marker: { ...colour(level), size: 9 } }));
  const best = (data.fronts[subset()]?.[[metric, cost].join()] ?? []).map((i) => data.settings[i]);
  const layout = { hovermode: "closest", showlegend: true, xaxis: { title: { text: words(data.metrics[cost].name) } }, yaxis: { title: { text: words(data.metrics[metric].name) } } };
  show(byId("front-chart"), { data: [trace(best, { name: "front", mode: "lines", hoverinfo: "skip", line: { color: "#8a8f98" } }), ...groups.filter(({ x }) => x.length)], layout });
  byId("front-list").replaceChildren(...best.map((one) => Object.assign(document.createElement("li"), { textContent: `${one.name}: ${one.texts[metric]}, ${data.metrics[cost].name} ${one.texts[cost]}` })));
}

function sort(column, down) {
  const value = (row) => (column === 1 ? row.cells[1].textContent : row.cells[column].dataset.value);
  const order = (a, b) => (column === 1 ? a.localeCompare(b) : (a === "") - (b === "") || (down ? b - a : a - b));
  rows.sort((a, b) => order(value(a), value(b)) * (down && column === 1 ? -1 : 1));
  document.querySelector("#grid tbody").append(...rows);
  heads.forEach((head, i) => head.setAttribute("aria-sort", i + 1 !== column ? "none" : down ? "descending" : "ascending"));
}

const best = () => rows.filter((row) => !row.hidden).map((row) => data.cells[row.dataset.number]).filter((cell) => cell.metrics[chosen("metric")[0]] !== null).sort((a, b) => (data.metrics[chosen("metric")[0]].rises ? -1 : 1) * (a.metrics[chosen("metric")[0]] - b.metrics[chosen("metric")[0]]));
function pick(cells) {
  for (const row of rows) row.cells[0].firstChild.checked = cells.includes(data.cells[row.dataset.number]);
  drawCurves();
}
const each = () => (data.factors[chosen("hue")[0]]?.levels ?? [0]).map((_, level) => best().find((cell) => (cell.levels[chosen("hue")[0]] ?? 0) === level));
function drawAll() {
  for (const draw of [drawCells, drawCurves, drawEffects, drawFront]) draw();
}
function judge() {
  const metric = data.metrics[chosen("metric")[0]];
  for (const option of form.elements.family.options) if (option.text === metric.family) option.selected = true;
  sort(1 + heads.findIndex((head) => head.dataset.metric === String(chosen("metric")[0])) , metric.rises);
}

const parts = { lengths: data.metrics.some(({ family }) => family), training: data.cells.some(({ curves }) => curves.train || curves.validation), interactions: data.factors.length > 1, tradeoff: data.metrics.length > 1 };
for (const name of ["filterbox", "pick-each", "effects"]) parts[name] = data.factors.length > 0;
for (const [name, there] of Object.entries(parts)) byId(name).hidden = !there;
form.elements.hue.parentElement.hidden = !data.factors.length;
form.addEventListener("change", () => drawAll());
document.addEventListener("change", ({ target }) => { if (target.name === "metric") judge(); if (!form.contains(target)) drawAll(); });
form.addEventListener("reset", (event) => { event.preventDefault(); form.querySelectorAll("fieldset input").forEach((box) => (box.checked = false)); drawAll(); });
heads.forEach((head, i) => head.firstChild.addEventListener("click", () => sort(i + 1, head.ariaSort === "none" || !head.ariaSort ? Boolean(data.metrics[head.dataset.metric || -1]?.rises) : head.ariaSort === "ascending")));
byId("pick-best").onclick = () => pick(best().slice(0, 5));
byId("pick-each").onclick = () => pick(each());
byId("pick-none").onclick = () => pick([]);
judge();
drawCells();
pick(each());
drawAll();
byId("front-chart").on("plotly_click", ({ points: [{ customdata }] }) => {
  const [cells, picked] = [customdata.map((i) => data.cells[i]), chosen("cell")];
  const all = customdata.every((i) => picked.includes(i));
  pick(data.cells.filter((cell, i) => (cells.includes(cell) ? !all : picked.includes(i))));
});
for (const query of [dark, narrow]) query.addEventListener("change", drawAll);
