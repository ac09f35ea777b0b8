/* The parts of the page, drawn from the state that dashboard.js holds. All text becomes text nodes. */
const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (typeof value === "boolean") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const seeds = new Set(data.cells.map((cell) => cell.seed)).size;
const cellText = (cell) => (seeds > 1 ? `${cell.label}, seed ${cell.seed}` : cell.label);
const valueText = (metric, value, signed) => numberText(value, data.metrics[metric].digits, signed);
const plain = (name) => name.replaceAll("_", " ");

function metricText(metric) {
  const { name, length, family } = data.metrics[metric];
  return length ? `${plain(family)} ${sizeText(length)}` : plain(name);
}

function choiceText(choice) {
  return [...choice]
    .map(([factor, level]) => {
      const { name, levels, switch: switched, alone } = data.factors[factor];
      if (switched) return `${levels[level] === "on" ? "+" : "no "}${name}`;
      return alone[level] ? levels[level] : `${name}=${levels[level]}`;
    })
    .join(" ");
}

/* As `arms_text` of atma.sweep.contrasts. */
function armsText(arms) {
  const [more, less] = [arms[0].choice, arms.at(-1).choice];
  if (more.size > 1) return `${choiceText(more)} − ${choiceText(less)}`;
  const [[factor, level]] = more;
  const { name, levels } = data.factors[factor];
  return `${name} ${levels[level]} − ${levels[less.get(factor)]}`;
}

function table(header, rows) {
  return element("table", {}, element("thead", {}, element("tr", {}, ...header)), element("tbody", {}, ...rows));
}

function heading(text, kind = "") {
  return element("th", { scope: "col", class: kind }, text);
}

function number(metric, value, signed = false) {
  return element("td", { class: "number", "data-value": value ?? "" }, valueText(metric, value, signed));
}

/* Rows of effects, with bars on one scale. `rows` are [label, effect]. */
function effectTable(rows, metric) {
  const words = ["contrast", "", "mean", "95% interval", "median", "range", "+ / 0 / −", "p", "pairs"];
  const known = rows.map(([, effect]) => effect).filter((effect) => effect.pairs);
  const ends = known.flatMap((effect) => [effect.minimum, effect.maximum, 0]);
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  return table(
    words.map((word, i) => heading(word, i > 1 ? "number" : "")),
    rows.map(([label, effect]) => effectRow(label, effect, metric, low, high)),
  );
}

function effectRow(label, effect, metric, low, high) {
  const head = element("th", { scope: "row" }, label);
  if (!effect.pairs) {
    return element("tr", {}, head, element("td", { colspan: 8, class: "quiet" }, "no matched cells are shown"));
  }
  const span = (from, to) =>
    element(
      "td",
      { class: "number", "data-low": from ?? "", "data-high": to ?? "" },
      from === null ? "–" : `${valueText(metric, from, true)} … ${valueText(metric, to, true)}`,
    );
  const told = [
    effect.settings < effect.pairs ? `${effect.settings} settings` : null,
    effect.unmatched ? `${effect.unmatched} cells unmatched` : null,
  ].filter(Boolean);
  const counted = told.length ? `${effect.pairs} (${told.join(", ")})` : String(effect.pairs);
  return element(
    "tr",
    {},
    head,
    element("td", {}, effectBar(effect, low, high, verdict(effect, metric))),
    number(metric, effect.mean, true),
    span(effect.low, effect.high),
    number(metric, effect.median, true),
    span(effect.minimum, effect.maximum),
    element("td", { class: "number" }, `${effect.positive} / ${effect.zero} / ${effect.negative}`),
    element("td", { class: "number", "data-value": effect.p }, probabilityText(effect.p)),
    element("td", { class: "number" }, counted),
  );
}

/* Better, worse or neither, by the direction of the metric and whether the interval leaves zero out. */
function verdict(effect, metric) {
  if (effect.low === null || (effect.low <= 0 && effect.high >= 0)) return "unclear";
  return effect.mean > 0 === data.metrics[metric].rises ? "better" : "worse";
}

function probabilityText(p) {
  return p >= 0.01 ? p.toFixed(2) : p.toExponential(1);
}

/* Means of the metric over two factors' shown levels, shaded from the worst to the best. */
function meansTable(cells, metric, one, other, shown) {
  const mean = (outer, inner) => {
    const values = cells
      .filter((cell) => cell.levels[one] === outer && cell.levels[other] === inner)
      .map((cell) => cell.metrics[metric])
      .filter((value) => value !== null);
    return values.length ? sum(values) / values.length : null;
  };
  const grid = shown[one].map((outer) => shown[other].map((inner) => mean(outer, inner)));
  const all = grid.flat().filter((value) => value !== null);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const cellOf = (value) => {
    const made = number(metric, value);
    const share = value === null || high === low ? 0 : (value - low) / (high - low);
    made.style.setProperty("--share", `${Math.round(45 * (data.metrics[metric].rises ? share : 1 - share))}%`);
    made.classList.add("shade");
    return made;
  };
  const name = (factor, level) => `${data.factors[factor].name} ${data.factors[factor].levels[level]}`;
  const header = [heading(`mean ${metricText(metric)}`), ...shown[other].map((level) => heading(name(other, level), "number"))];
  const rows = grid.map((row, i) =>
    element("tr", {}, element("th", { scope: "row" }, name(one, shown[one][i])), ...row.map(cellOf)),
  );
  return table(header, rows);
}

/* What the dialog shows of a cell. */
function detail(cell) {
  const facts = data.factors.map(({ name, levels }, i) => [name, levels[cell.levels[i]]]);
  facts.push(["seed", String(cell.seed)], ["cell", cell.name]);
  const lone = data.metrics.map((metric, i) => [metric, i]).filter(([metric]) => !metric.length);
  facts.push(...lone.map(([metric, i]) => [plain(metric.name), valueText(i, cell.metrics[i])]));
  const told = facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  const parts = [element("dl", {}, ...told)];
  parts.push(element("div", { class: "table", tabindex: "0" }, lengthsTable(cell)));
  for (const [title, text] of [["Recipe", cell.config], ["Log", cell.log]]) {
    if (text) parts.push(element("h3", {}, title), element("pre", { tabindex: "0" }, text));
  }
  return parts;
}

function families() {
  return [...new Set(data.metrics.map((metric) => metric.family).filter(Boolean))];
}

/* [length, metric's number] of a family, by rising length. */
function lengthsOf(family) {
  return data.metrics
    .map((metric, i) => [metric.length, i, metric.family])
    .filter(([, , name]) => name === family)
    .map(([length, i]) => [length, i])
    .sort(([a], [b]) => a - b);
}

function lengthsTable(cell) {
  const names = families();
  const lengths = [...new Set(data.metrics.map((metric) => metric.length).filter(Boolean))].sort((a, b) => a - b);
  const at = (family, length) => lengthsOf(family).find(([known]) => known === length)?.[1];
  const rows = lengths.map((length) => {
    const values = names.map((family) => {
      const metric = at(family, length);
      return metric === undefined ? element("td", {}, "–") : number(metric, cell.metrics[metric]);
    });
    return element("tr", {}, element("th", { scope: "row" }, sizeText(length)), ...values);
  });
  return table([heading("length"), ...names.map((name) => heading(plain(name), "number"))], rows);
}
