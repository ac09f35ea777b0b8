"use strict";
/* Matched contrasts, bootstrap, sign test and fronts: what atma.sweep.contrasts and atma.sweep.pareto compute, over
   the page's data. An arm is {sign, choice}, a choice a Map from a factor's number to a level's. */
const data = JSON.parse(document.getElementById("data").textContent);

function hashed(counter) {
  let x = (Math.imul(counter, 0x9e3779b1) + data.bootstrap.seed) >>> 0;
  x = Math.imul(x ^ (x >>> 16), 0x85ebca6b) >>> 0;
  x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35) >>> 0;
  return (x ^ (x >>> 16)) >>> 0;
}

const sum = (values) => values.reduce((total, value) => total + value, 0);

function quantile(sorted, share) {
  const place = (sorted.length - 1) * share;
  const below = Math.floor(place);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (place - below);
}

function median(values) {
  return quantile(Float64Array.from(values).sort(), 0.5);
}

/* 95% of the means when whole groups are drawn again; nulls for one group. */
function bootstrap(groups) {
  const n = groups.length;
  if (n < 2) return [null, null];
  const sums = groups.map(sum);
  const means = new Float64Array(data.bootstrap.resamples);
  for (let i = 0; i < means.length; i++) {
    let total = 0;
    let count = 0;
    for (let j = 0; j < n; j++) {
      const pick = Math.floor((hashed(i * n + j) * n) / 4294967296);
      total += sums[pick];
      count += groups[pick].length;
    }
    means[i] = total / count;
  }
  means.sort();
  return [quantile(means, 0.025), quantile(means, 0.975)];
}

/* Two-sided exact sign test; terms are built in logarithms, which no count of cells overflows. */
function signTest(values) {
  const positive = values.filter((value) => value > 0).length;
  const negative = values.filter((value) => value < 0).length;
  const n = positive + negative;
  let logTerm = -n * Math.LN2;
  let tail = 0;
  for (let i = 0; i <= Math.min(positive, negative); i++) {
    tail += Math.exp(logTerm);
    logTerm += Math.log((n - i) / (i + 1));
  }
  return Math.min(1, 2 * tail);
}

function fits(cell, choice) {
  return [...choice].every(([factor, level]) => cell.levels[factor] === level);
}

function difference(arms, values) {
  const total = sum(arms.map((arm, i) => arm.sign * values[i]));
  const largest = Math.max(...values.map(Math.abs));
  return Math.abs(total) <= data.bootstrap.tie * largest ? 0 : total;
}

/* The effect of arms that name the same factors, over `cells`. */
function matched(cells, metric, arms) {
  const rest = data.factors.map((_, i) => i).filter((factor) => !arms[0].choice.has(factor));
  const sets = new Map();
  let chosen = 0;
  for (const cell of cells) {
    const arm = arms.findIndex((candidate) => fits(cell, candidate.choice));
    if (arm < 0) continue;
    chosen += 1;
    if (cell.metrics[metric] === null) continue;
    const setting = rest.map((factor) => cell.levels[factor]).join();
    const key = `${setting}|${cell.seed}`;
    if (!sets.has(key)) sets.set(key, { setting, values: [] });
    sets.get(key).values[arm] = cell.metrics[metric];
  }
  const full = [...sets.values()].filter((set) => arms.every((_, i) => set.values[i] !== undefined));
  const clusters = new Map();
  for (const set of full) {
    set.difference = difference(arms, set.values);
    clusters.set(set.setting, [...(clusters.get(set.setting) ?? []), set.difference]);
  }
  return described(full.map((set) => set.difference), [...clusters.values()], chosen - full.length * arms.length);
}

function described(differences, clusters, unmatched) {
  const count = (test) => differences.filter(test).length;
  const counts = {
    pairs: differences.length,
    settings: clusters.length,
    unmatched,
    positive: count((d) => d > 0),
    zero: count((d) => d === 0),
    negative: count((d) => d < 0),
  };
  if (!differences.length) return counts;
  const groups = clusters.length === 1 ? clusters[0].map((d) => [d]) : clusters;
  const [low, high] = bootstrap(groups);
  return {
    ...counts,
    mean: sum(differences) / differences.length,
    median: median(differences),
    low,
    high,
    minimum: Math.min(...differences),
    maximum: Math.max(...differences),
    p: signTest(groups.map(sum)),
  };
}

/* Each shown level of a factor against the first shown: a pair of arms each. */
function againstFirst(factor, levels) {
  const [first, ...others] = levels;
  const arm = (sign, level) => ({ sign, choice: new Map([[factor, level]]) });
  return others.map((level) => [arm(1, level), arm(-1, first)]);
}

function crossed(outer, inner) {
  return outer.flatMap((a) =>
    inner.map((b) => ({ sign: a.sign * b.sign, choice: new Map([...a.choice, ...b.choice]) })),
  );
}

/* As `over_seeds` of atma.sweep.pareto: one setting of all cells that differ in the seed alone, its metrics their means. */
function overSeeds(cells) {
  const settings = Object.values(Object.groupBy(cells, (cell) => cell.levels.join()));
  return settings.map((alike) => {
    const mean = (i) => alike.reduce((sum, cell) => sum + cell.metrics[i], 0) / alike.length;
    const whole = (i) => alike.every((cell) => cell.metrics[i] !== null);
    const [{ label, levels }] = alike;
    const metrics = data.metrics.map((_, i) => (whole(i) ? mean(i) : null));
    return { cells: alike, levels, label: alike.length > 1 ? `${label}, ${alike.length} seeds` : label, metrics };
  });
}

/* Cells that no other beats at once in two metrics, by rising cost. */
function front(cells, quality, cost) {
  const worth = (cell, metric) => (data.metrics[metric].rises ? 1 : -1) * cell.metrics[metric];
  const measured = cells.filter((cell) => cell.metrics[quality] !== null && cell.metrics[cost] !== null);
  const beats = (a, b) => {
    const gains = [quality, cost].map((metric) => worth(a, metric) - worth(b, metric));
    return gains.every((gain) => gain >= 0) && gains.some((gain) => gain > 0);
  };
  return measured
    .filter((cell) => !measured.some((other) => beats(other, cell)))
    .sort((a, b) => a.metrics[cost] - b.metrics[cost]);
}

/* Text of a number, halves away from zero. */
function numberText(value, digits, signed = false) {
  if (value === null || value === undefined) return "–";
  const [whole, part] = Math.abs(value).toFixed(digits).split(".");
  const text = whole.replace(/\B(?=(\d{3})+$)/g, ",") + (part ? `.${part}` : "");
  const nothing = !/[1-9]/.test(text);
  return (nothing ? "" : value < 0 ? "-" : signed ? "+" : "") + text;
}
