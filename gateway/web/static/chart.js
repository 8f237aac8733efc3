// The sparkline of the last hour, and the chart of a series, as SVG.

import { clockTime, count, dayOf, moment, value } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 256, RIGHT = 10, TOP = 10, BOTTOM = 26, GAP = 8, DIGIT_WIDTH = 8;

export function shape(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, text] of Object.entries(attributes)) element.setAttribute(key, text);
  element.append(...children);
  return element;
}

// `values` at even steps, the newest last; null where nothing is known. It always spans `slots` steps.
export function spark(values, slots) {
  const width = 300, height = 60;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  const most = Math.max(...values.map((v) => v ?? 0), 1e-9);
  const x = (i) => width - ((values.length - 1 - i) / (slots - 1)) * width;
  const y = (v) => height - 2 - (v / most) * (height - 6);
  const points = values.map((v, i) => [x(i), y(v ?? 0)]).map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`);
  svg.append(shape("path", { d: `M0 ${height - 1}H${width}`, stroke: "var(--line)", "vector-effect": "non-scaling-stroke" }));
  if (points.length > 1) {
    svg.append(shape("path", { d: `M${x(0).toFixed(1)} ${height}L${points.join("L")}L${width} ${height}Z`, fill: "var(--tide-soft)" }));
    svg.append(shape("path", { d: `M${points.join("L")}`, fill: "none", stroke: "var(--tide)", "stroke-width": "1.75", "stroke-linejoin": "round", "vector-effect": "non-scaling-stroke" }));
  }
  return svg;
}

function ticksBetween(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const ticks = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) ticks.push(t);
  return [ticks, step];
}

function hoursBetween(since, until, most) {
  const every = [1, 2, 3, 6, 12, 24].find((h) => (until - since) / 3.6e9 / h <= most) ?? 24;
  const at = new Date(since / 1000);
  at.setMinutes(0, 0, 0);
  const ticks = [];
  for (; at.getTime() * 1000 <= until; at.setHours(at.getHours() + 1)) {
    if (at.getTime() * 1000 >= since && at.getHours() % every === 0) ticks.push(at.getTime() * 1000);
  }
  return ticks;
}

// Runs of neighbouring steps: a gap is a hole at least three times the usual distance.
function runsOf(data) {
  const gaps = data.at_us.slice(1).map((t, i) => t - data.at_us[i]).sort((a, b) => a - b);
  const usual = gaps.length ? gaps[Math.floor(gaps.length / 2)] : data.step_us;
  const runs = [];
  data.at_us.forEach((t, i) => {
    if (i === 0 || t - data.at_us[i - 1] > 3 * usual) runs.push([]);
    runs.at(-1).push(i);
  });
  return runs;
}

export function spanOf(data) {
  return data.at_us.length ? Math.max(...data.greatest) - Math.min(...data.least) : 0;
}

// Step i in words.
export function words(data, i) {
  const span = spanOf(data), unit = data.unit ? ` ${data.unit}` : "";
  const number = (x) => value(x, span);
  const parts = [`${moment(data.at_us[i], data.until_us)}`, `${number(data.mean[i])}${unit}`];
  if (data.greatest[i] > data.least[i]) parts.push(`${number(data.least[i])} to ${number(data.greatest[i])}`);
  parts.push(data.count[i] === 1 ? "1 reading" : `${count(data.count[i])} readings`);
  if (data.flagged[i]) parts.push(`${count(data.flagged[i])} flagged`);
  return parts;
}

// Returns the SVG, the width of its value axis, and two functions: `point(i)` sets the cursor on a step,
// `nearest(clientX)` finds one.
export function chart(data, width) {
  let low = Math.min(...data.least), high = Math.max(...data.greatest);
  const span = high - low;
  const pad = span > 0 ? span * 0.06 : Math.max(Math.abs(high) * 0.05, 0.5);
  low -= pad; high += pad;
  const [ticks, step] = ticksBetween(low, high, 4);
  const labels = ticks.map((tick) => value(tick, step * 10));
  const left = GAP + Math.max(...labels.map((label) => label.length), 5) * DIGIT_WIDTH;
  const x = (us) => left + ((us + data.step_us / 2 - data.since_us) / (data.until_us - data.since_us)) * (width - left - RIGHT);
  const y = (v) => TOP + ((high - v) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const at = (i, v) => `${x(data.at_us[i]).toFixed(1)} ${y(v).toFixed(1)}`;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-labelledby": "chart-words" });

  for (const [i, tick] of ticks.entries()) {
    svg.append(shape("path", { class: "grid", d: `M${left} ${Math.round(y(tick))}H${width - RIGHT}` }));
    svg.append(shape("text", { x: left - GAP, y: y(tick) + 4, "text-anchor": "end" }, labels[i]));
  }
  for (const tick of hoursBetween(data.since_us, data.until_us, width > 600 ? 9 : 5)) {
    const at = left + ((tick - data.since_us) / (data.until_us - data.since_us)) * (width - left - RIGHT);
    const midnight = new Date(tick / 1000).getHours() === 0;
    if (at < left + 14 || at > width - RIGHT - 14) continue;
    svg.append(shape("path", { class: "grid", d: `M${Math.round(at)} ${HEIGHT - BOTTOM}v4` }));
    svg.append(shape("text", { x: at, y: HEIGHT - 7, "text-anchor": "middle" }, midnight ? dayOf(tick) : clockTime(tick)));
  }
  for (const run of runsOf(data)) {
    const back = [...run].reverse();
    if (run.length > 1) {
      svg.append(shape("path", { class: "band", d: `M${run.map((i) => at(i, data.greatest[i])).join("L")}L${back.map((i) => at(i, data.least[i])).join("L")}Z` }));
    }
    if (run.length > 1) svg.append(shape("path", { class: "mean", d: `M${run.map((i) => at(i, data.mean[i])).join("L")}` }));
    else svg.append(shape("circle", { class: "alone", cx: x(data.at_us[run[0]]).toFixed(1), cy: y(data.mean[run[0]]).toFixed(1), r: 2.5 }));
  }
  data.flagged.forEach((n, i) => {
    if (n) svg.append(shape("path", { class: "flagged", d: `M${x(data.at_us[i]).toFixed(1)} ${HEIGHT - BOTTOM - 5}v5` }));
  });
  const cursor = shape("path", { class: "cursor", visibility: "hidden" });
  const dot = shape("circle", { class: "point", r: 4.5, visibility: "hidden" });
  svg.append(cursor, dot);
  return {
    svg,
    axisWidth: left,
    point(i) {
      for (const mark of [cursor, dot]) mark.setAttribute("visibility", i === null ? "hidden" : "visible");
      if (i === null) return;
      cursor.setAttribute("d", `M${x(data.at_us[i]).toFixed(1)} ${TOP}V${HEIGHT - BOTTOM}`);
      dot.setAttribute("cx", x(data.at_us[i]).toFixed(1));
      dot.setAttribute("cy", y(data.mean[i]).toFixed(1));
    },
    nearest(clientX) {
      const box = svg.getBoundingClientRect();
      const us = data.since_us + ((clientX - box.left) * (width / box.width) - left) / (width - left - RIGHT) * (data.until_us - data.since_us) - data.step_us / 2;
      let best = 0;
      data.at_us.forEach((t, i) => { if (Math.abs(t - us) < Math.abs(data.at_us[best] - us)) best = i; });
      return best;
    },
  };
}
