/* The state of the page and what changes it. */
const state = {
  metric: data.headline,
  shown: data.factors.map(({ levels }) => levels.map((_, i) => i)),
  picked: [],
  columns: new Set(data.columns),
  factorColumns: new Set(),
  sort: { by: `m${data.headline}`, down: data.metrics[data.headline].rises },
  family: data.metrics[data.headline].family ?? families()[0] ?? null,
  budget: "tokens",
  one: 0,
  other: 1,
  cost: null,
  hue: 0,
  sides: data.factors.map(() => [null, null]),
};

const visible = () => data.cells.filter((cell) => cell.levels.every((level, i) => state.shown[i].includes(level)));
const selected = () => state.picked.filter((cell) => cell !== null);

/* A selected cell keeps its colour until it is let go. */
function pick(cell, on) {
  const place = state.picked.indexOf(cell);
  if (on && place < 0) {
    const free = state.picked.indexOf(null);
    state.picked[free < 0 ? state.picked.length : free] = cell;
  }
  if (!on && place >= 0) state.picked[place] = null;
}

function ranked() {
  const { rises } = data.metrics[state.metric];
  const measured = visible().filter((cell) => cell.metrics[state.metric] !== null);
  return measured.sort((a, b) => (rises ? -1 : 1) * (a.metrics[state.metric] - b.metrics[state.metric]));
}

/* The best cell of each level of the factor that colours the front; without factors the best cell. */
function pickEach() {
  const best = ranked();
  const levels = data.factors[state.hue]?.levels ?? [];
  const each = levels.length ? levels.map((_, level) => best.find((cell) => cell.levels[state.hue] === level)) : [best[0]];
  state.picked = each.filter(Boolean);
}

/* The two factors with the largest interaction. */
function strongest() {
  const levels = data.factors.map(({ levels: all }) => all.map((_, i) => i));
  const pairs = data.factors.flatMap((_, one) => data.factors.slice(one + 1).map((_, i) => [one, one + 1 + i]));
  const size = ([one, other]) => {
    const means = againstFirst(one, levels[one]).flatMap((outer) =>
      againstFirst(other, levels[other]).map((inner) => matched(data.cells, state.metric, crossed(outer, inner)).mean ?? 0),
    );
    return Math.max(0, ...means.map(Math.abs));
  };
  const sizes = pairs.map(size);
  return pairs[sizes.indexOf(Math.max(...sizes))];
}

function filters() {
  const sets = data.factors.map(({ name, levels }, factor) => {
    const boxes = levels.map((text, level) => {
      const change = (event) => {
        const kept = state.shown[factor].filter((other) => other !== level);
        state.shown[factor] = (event.target.checked ? [...kept, level] : kept).sort((a, b) => a - b);
        draw();
      };
      const box = element("input", { type: "checkbox", checked: true, onchange: change });
      return element("label", { class: "chip" }, box, element("span", {}, text));
    });
    return element("fieldset", {}, element("legend", {}, name), ...boxes);
  });
  byId("filters").replaceChildren(...sets);
}

function options(select, entries, chosen, change) {
  select.replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
  select.value = chosen;
  select.onchange = () => {
    change(select.value);
    draw();
  };
}

function radios(place, name, entries, chosen, change) {
  const made = entries.map(([value, text]) => {
    const choose = () => {
      change(value);
      draw();
    };
    const box = element("input", { type: "radio", name, value, checked: value === chosen, onchange: choose });
    return element("label", { class: "chip" }, box, element("span", {}, text));
  });
  place.replaceChildren(...made);
}

function columnChoice() {
  const box = (text, set, key) => {
    const change = (event) => {
      if (event.target.checked) set.add(key);
      else set.delete(key);
      drawCells();
    };
    const made = element("input", { type: "checkbox", checked: set.has(key), onchange: change });
    return element("label", {}, made, ` ${text}`);
  };
  const factors = data.factors.map(({ name }, i) => box(name, state.factorColumns, i));
  byId("columns").replaceChildren(...factors, ...data.metrics.map((_, i) => box(metricText(i), state.columns, i)));
}

function sortable(key, text, falls, kind = "") {
  const active = state.sort.by === key;
  const click = () => {
    state.sort = { by: key, down: active ? !state.sort.down : falls };
    drawCells();
    byId("grid").querySelector(`[data-key="${key}"]`).focus();
  };
  const arrow = element("span", { "aria-hidden": "true" }, active ? (state.sort.down ? " ▼" : " ▲") : "");
  const button = element("button", { type: "button", "data-key": key, onclick: click }, text, arrow);
  const order = active ? (state.sort.down ? "descending" : "ascending") : "none";
  return element("th", { scope: "col", class: kind, "aria-sort": order }, button);
}

function sorted(cells) {
  const { by, down } = state.sort;
  const index = Number(by.slice(1));
  const value = (cell) => (by[0] === "m" ? cell.metrics[index] : by[0] === "f" ? cell.levels[index] : null);
  const byName = (a, b) => cellText(a).localeCompare(cellText(b)) || a.seed - b.seed;
  return [...cells].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (by === "name") return (down ? -1 : 1) * byName(a, b);
    if (x === null || y === null) return (x === null) - (y === null);
    return (down ? -1 : 1) * (x - y);
  });
}

function drawCells() {
  const factors = [...state.factorColumns].sort((a, b) => a - b);
  const order = [...data.columns, ...data.metrics.map((_, i) => i)].filter((i) => state.columns.has(i));
  const metrics = [...new Set([state.metric, ...order])];
  const header = [
    element("th", { scope: "col" }, element("span", { class: "hidden" }, "selected")),
    sortable("name", "cell", false),
    ...factors.map((i) => sortable(`f${i}`, data.factors[i].name, false)),
    ...metrics.map((i) => sortable(`m${i}`, metricText(i), data.metrics[i].rises, "number")),
  ];
  const rows = sorted(visible()).map((cell) => cellRow(cell, factors, metrics));
  byId("grid").replaceChildren(table(header, rows));
}

function cellRow(cell, factors, metrics) {
  const text = cellText(cell);
  const change = (event) => {
    pick(cell, event.target.checked);
    drawSelection();
  };
  const box = element("input", {
    type: "checkbox",
    "aria-label": `select ${text}`,
    checked: state.picked.includes(cell),
    onchange: change,
  });
  const name = element("button", { type: "button", class: "link", onclick: () => openCell(cell) }, text);
  return element(
    "tr",
    { "data-cell": cell.name },
    element("td", {}, box),
    element("th", { scope: "row" }, name),
    ...factors.map((i) => element("td", {}, data.factors[i].levels[cell.levels[i]])),
    ...metrics.map((i) => number(i, cell.metrics[i])),
  );
}

function drawLegends() {
  for (const place of document.querySelectorAll(".legend")) {
    const items = state.picked.map((cell, slot) => {
      if (cell === null) return null;
      const drop = () => {
        pick(cell, false);
        drawCells();
        drawSelection();
      };
      const label = { type: "button", class: "drop", "aria-label": `let go of ${cellText(cell)}`, onclick: drop };
      const name = element("button", { type: "button", class: "link", onclick: () => openCell(cell) }, cellText(cell));
      return element("li", {}, swatch(slot), name, element("button", label, "×"));
    });
    place.replaceChildren(...items.filter(Boolean));
  }
}

function drawLengths() {
  byId("lengths").hidden = !families().length;
  if (byId("lengths").hidden) return;
  const lengths = lengthsOf(state.family);
  const series = state.picked.flatMap((cell, slot) => {
    const points = cell ? lengths.map(([length, i]) => [length, cell.metrics[i]]).filter(([, y]) => y !== null) : [];
    return points.length ? [{ name: cellText(cell), slot, points, cell }] : [];
  });
  if (!series.length) {
    byId("length-chart").replaceChildren(element("p", { class: "empty" }, "Tick cells in the table to draw them."));
    byId("length-table").replaceChildren();
    return;
  }
  const { digits, rises } = data.metrics[lengths[0][1]];
  lineChart(byId("length-chart"), {
    series,
    log: true,
    mark: data.trained,
    xTicks: lengths.map(([length]) => length),
    xText: sizeText,
    yText: (value) => numberText(value, digits),
    yLow: rises ? 0 : null,
    xTitle: "tokens",
    yTitle: `${plain(state.family)} (${rises ? "higher" : "lower"} is better)`,
    name: `${plain(state.family)} of ${series.length} cells over context length`,
  });
  const header = [heading("cell"), ...lengths.map(([length]) => heading(sizeText(length), "number"))];
  const rows = series.map(({ name, cell }) =>
    element("tr", {}, element("th", { scope: "row" }, name), ...lengths.map(([, i]) => number(i, cell.metrics[i]))),
  );
  byId("length-table").replaceChildren(table(header, rows));
}

function drawTraining() {
  byId("training").hidden = !data.cells.some((cell) => cell.curves);
  if (byId("training").hidden) return;
  const series = state.picked.flatMap((cell, slot) =>
    Object.entries(cell?.curves ?? {}).map(([kind, curve]) => ({
      name: `${cellText(cell)}, ${kind}`,
      slot,
      thin: kind === "train",
      points: curve.loss.map((loss, i) => [curve[state.budget][i], loss]),
    })),
  );
  if (!series.length) {
    byId("training-chart").replaceChildren(element("p", { class: "empty" }, "No selected cell has a training record."));
    return;
  }
  lineChart(byId("training-chart"), {
    series,
    log: false,
    xText: amountText,
    yText: (value) => numberText(value, 2),
    xTitle: state.budget === "tokens" ? "training tokens" : "training seconds",
    yTitle: "loss, nats per token",
    name: `training curves of ${selected().length} cells`,
  });
}

function drawEffects() {
  const cells = visible();
  const rows = data.factors.flatMap((_, factor) =>
    againstFirst(factor, state.shown[factor]).map((arms) => [armsText(arms), matched(cells, state.metric, arms)]),
  );
  const told = rows.length ? effectTable(rows, state.metric) : element("p", { class: "empty" }, "No factor varies here.");
  byId("effect-table").replaceChildren(told);
}

function builder() {
  const rows = data.factors.map(({ name, levels }, factor) => {
    const choose = (side) => {
      const made = element("select", { "aria-label": `${name}, ${["first", "second"][side]} side` });
      const change = (value) => {
        state.sides[factor][side] = value === "" ? null : Number(value);
        if ((state.sides[factor][0] === null) !== (state.sides[factor][1] === null)) {
          state.sides[factor][1 - side] = state.sides[factor][side];
          builder();
        }
      };
      const chosen = state.sides[factor][side];
      options(made, [["", "matched"], ...levels.map((text, i) => [i, text])], chosen ?? "", change);
      return element("td", {}, made);
    };
    return element("tr", {}, element("th", { scope: "row" }, name), choose(0), choose(1));
  });
  const header = ["factor", "these", "minus these"].map((text) => heading(text));
  byId("builder").replaceChildren(table(header, rows));
}

function drawOwn() {
  const sides = [0, 1].map(
    (side) => new Map(state.sides.map((pair, i) => [i, pair[side]]).filter(([, level]) => level !== null)),
  );
  const differ = [...sides[0]].some(([factor, level]) => sides[1].get(factor) !== level);
  const hint = "Choose levels on both sides that differ somewhere; factors left at “matched” are held equal.";
  if (!differ) {
    byId("own-table").replaceChildren(element("p", { class: "quiet" }, hint));
    return;
  }
  const arms = [{ sign: 1, choice: sides[0] }, { sign: -1, choice: sides[1] }];
  byId("own-table").replaceChildren(
    effectTable([[armsText(arms), matched(visible(), state.metric, arms)]], state.metric),
  );
}

function drawInteractions() {
  byId("interactions").hidden = data.factors.length < 2;
  if (data.factors.length < 2) return;
  const entries = (but) => data.factors.map(({ name }, i) => [i, name]).filter(([i]) => i !== but);
  options(byId("one"), entries(state.other), state.one, (value) => (state.one = Number(value)));
  options(byId("other"), entries(state.one), state.other, (value) => (state.other = Number(value)));
  const cells = visible();
  byId("means").replaceChildren(meansTable(cells, state.metric, state.one, state.other, state.shown));
  const rows = againstFirst(state.one, state.shown[state.one]).flatMap((outer) =>
    againstFirst(state.other, state.shown[state.other]).map((inner) => [
      `(${armsText(outer)}) × (${armsText(inner)})`,
      matched(cells, state.metric, crossed(outer, inner)),
    ]),
  );
  const none = element("p", { class: "empty" }, "One of these factors does not vary here.");
  byId("interaction-table").replaceChildren(rows.length ? effectTable(rows, state.metric) : none);
}

function drawFront() {
  const costs = data.metrics.map((_, i) => i).filter((i) => i !== state.metric);
  if (!costs.includes(state.cost)) state.cost = costs.find((i) => data.metrics[i].name === "train_seconds") ?? costs[0];
  byId("tradeoff").hidden = !costs.length;
  if (!costs.length) return;
  options(byId("cost"), costs.map((i) => [i, metricText(i)]), state.cost, (value) => (state.cost = Number(value)));
  const hues = data.factors.map(({ name }, i) => [i, name]);
  options(byId("hue"), hues, state.hue, (value) => {
    state.hue = Number(value);
  });
  byId("pick-each").textContent = `Select the best of each ${data.factors[state.hue]?.name}`;
  const [x, y] = [state.cost, state.metric];
  const point = ({ cells, label, levels, metrics }) => {
    const picked = cells.every((cell) => state.picked.includes(cell));
    const choose = () => {
      for (const cell of cells) pick(cell, !picked);
      drawCells();
      drawSelection();
    };
    const name = `${label}: ${valueText(y, metrics[y])}, ${metricText(x)} ${valueText(x, metrics[x])}`;
    return { name, x: metrics[x], y: metrics[y], slot: levels[state.hue] ?? 0, picked, choose };
  };
  const measured = overSeeds(visible()).filter(({ metrics }) => metrics[x] !== null && metrics[y] !== null);
  const best = front(measured, y, x);
  if (measured.length) {
    pointChart(byId("front-chart"), {
      points: measured.map(point),
      joined: best.map(point),
      log: false,
      xText: amountText,
      xTitle: metricText(x),
      yTitle: metricText(y),
      name: `${metricText(y)} against ${metricText(x)}`,
    });
  } else byId("front-chart").replaceChildren(element("p", { class: "empty" }, "No cell shown has both."));
  const keys = (state.shown[state.hue] ?? []).map((i) => element("li", {}, key(i), data.factors[state.hue].levels[i]));
  byId("front-keys").replaceChildren(...keys);
  byId("front-list").replaceChildren(...best.map((setting) => element("li", {}, point(setting).name)));
}

function key(slot) {
  const made = svg("svg", { width: 14, height: 14, "aria-hidden": "true" }, marker(MARKERS[slot % MARKERS.length], 7, 7, 5));
  made.style.cssText = `fill:var(--c${slot % COLOURS})`;
  return made;
}

function openCell(cell) {
  byId("detail-name").textContent = cellText(cell);
  byId("detail-body").replaceChildren(...detail(cell));
  byId("detail").showModal();
  byId("detail").scrollTop = 0;
}

function drawSelection() {
  drawLegends();
  drawLengths();
  drawTraining();
  drawFront();
}

function draw() {
  const count = visible().length;
  byId("shown").textContent = `${count} of ${data.cells.length} cells shown`;
  drawCells();
  drawEffects();
  drawOwn();
  drawInteractions();
  drawSelection();
}

function start() {
  const varied = data.factors.map(({ name, levels }) => `${name} (${levels.length})`).join(", ");
  const waiting = data.unfinished.length ? ` ${data.unfinished.length} more have no result yet.` : "";
  const told = varied ? `; factors and their levels: ${varied}` : ", without factors";
  byId("summary").textContent = `${data.cells.length} cells of ${data.name}${told}.${waiting}`;
  for (const name of ["filterbox", "pick-each", "hue-field", "effects"]) byId(name).hidden = !varied;
  options(byId("metric"), data.metrics.map((_, i) => [i, metricText(i)]), state.metric, (value) => {
    state.metric = Number(value);
    state.sort = { by: `m${value}`, down: data.metrics[state.metric].rises };
    state.family = data.metrics[state.metric].family ?? state.family;
    familyChoice();
  });
  filters();
  columnChoice();
  familyChoice();
  builder();
  radios(byId("budgets"), "budget", [["tokens", "tokens"], ["seconds", "seconds"]], state.budget, (value) => (state.budget = value));
  byId("filterbox").open = innerWidth >= 700;
  if (data.factors.length > 1) [state.one, state.other] = strongest();
  pickEach();
  draw();
}

function familyChoice() {
  radios(byId("families"), "family", families().map((name) => [name, plain(name)]), state.family, (value) => (state.family = value));
}

byId("reset").onclick = () => {
  state.shown = data.factors.map(({ levels }) => levels.map((_, i) => i));
  filters();
  draw();
};
byId("pick-best").onclick = () => {
  state.picked = ranked().slice(0, 5);
  draw();
};
byId("pick-each").onclick = () => {
  pickEach();
  draw();
};
byId("pick-none").onclick = () => {
  state.picked = [];
  draw();
};
byId("detail-close").onclick = () => byId("detail").close();
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) drawSelection();
  width = innerWidth;
});
start();
