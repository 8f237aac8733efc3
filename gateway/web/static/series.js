// The series picker and its chart: a combobox as the ARIA practices describe it, days to step through, and a
// slider under the chart that reads out each step.

import { chart, spanOf, words } from "./chart.js";
import { count, dayOf, shown, value } from "./words.js";

const DAY_US = 86_400_000_000, EVERY_MS = 30_000;
const byId = (id) => document.getElementById(id);

async function get(path, query) {
  const answer = await fetch(`${path}?${new URLSearchParams(query)}`, { signal: AbortSignal.timeout(15_000), cache: "no-store" });
  if (!answer.ok) throw new Error(String(answer.status));
  return answer.json();
}

export function series(element) {
  const input = byId("pick"), list = byId("picks"), area = byId("chart");
  let named = [], active = -1, chosen = null, daysBack = 0, asked = 0, data = null, typed = 0;

  const label = (s) => shown(`${s.sensor_id} / ${s.sensor_type}`);

  function open(isOpen) {
    list.hidden = !isOpen;
    input.setAttribute("aria-expanded", String(isOpen));
    if (!isOpen) mark(-1);
  }

  function mark(i) {
    active = i;
    [...list.children].forEach((option, at) => option.setAttribute("aria-selected", String(at === i)));
    if (i >= 0 && named[i]) {
      input.setAttribute("aria-activedescendant", `pick-${i}`);
      list.children[i].scrollIntoView({ block: "nearest" });
    } else input.removeAttribute("aria-activedescendant");
  }

  async function offer(text) {
    const turn = ++typed;
    let found;
    try { found = await get("/series", { match: text, limit: 50 }); } catch { return; }
    if (turn !== typed) return;
    named = found.series;
    list.replaceChildren(...named.map((s, i) => {
      const option = element("li", { id: `pick-${i}`, role: "option", "aria-selected": "false" }, `${shown(s.sensor_id)} `, element("small", {}, shown(s.sensor_type + (s.unit ? `, ${s.unit}` : ""))));
      option.addEventListener("pointerdown", (event) => { event.preventDefault(); choose(s); });
      return option;
    }));
    const more = found.total - named.length;
    const words = !found.total ? "No series matches." : more > 0 ? `and ${count(more)} more: type to narrow it down` : "";
    if (words) list.append(element("li", { class: "none", role: "option", "aria-disabled": "true", "aria-selected": "false" }, words));
    open(true);
    mark(-1);
  }

  function choose(s) {
    typed += 1;
    chosen = s;
    input.value = label(s);
    open(false);
    daysBack = 0;
    history.replaceState(null, "", `#${new URLSearchParams({ sensor_id: s.sensor_id, sensor_type: s.sensor_type })}`);
    load();
  }

  input.addEventListener("focus", () => input.select());
  input.addEventListener("click", () => offer(""));
  input.addEventListener("input", () => offer(input.value));
  input.addEventListener("blur", () => { typed += 1; open(false); if (chosen) input.value = label(chosen); });
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (list.hidden) { offer(""); return; }
      const step = event.key === "ArrowDown" ? 1 : -1;
      if (named.length) mark((active + step + named.length + (active < 0 && step < 0 ? 1 : 0)) % named.length);
    } else if (event.key === "Enter" && !list.hidden) {
      event.preventDefault();
      const pick = named[active] ?? (named.length === 1 ? named[0] : null);
      if (pick) choose(pick);
    } else if (event.key === "Escape") {
      typed += 1;
      open(false);
      if (chosen) input.value = label(chosen);
    }
  });

  function showDay() {
    byId("day").textContent = daysBack === 0 ? "last 24 hours" : dayOf(until());
    byId("later").disabled = daysBack === 0;
  }
  const until = () => {
    if (daysBack === 0) return Date.now() * 1000;
    const midnight = new Date();
    midnight.setHours(24, 0, 0, 0);
    midnight.setDate(midnight.getDate() - daysBack);
    return midnight.getTime() * 1000 - 1;
  };
  byId("earlier").addEventListener("click", () => { daysBack += 1; load(); });
  byId("later").addEventListener("click", () => { daysBack -= 1; load(); });

  function blank(text) {
    data = null;
    area.replaceChildren(element("p", { class: "empty", role: "status" }, text));
  }

  async function load(quiet = false) {
    showDay();
    if (!chosen) return;
    const turn = ++asked;
    const query = { sensor_id: chosen.sensor_id, sensor_type: chosen.sensor_type, span_us: DAY_US };
    if (daysBack > 0) query.until_us = until();
    let found;
    try { found = await get("/chart", query); } catch {
      if (turn === asked && !quiet) blank("The chart could not be loaded. Retrying in half a minute.");
      return;
    }
    if (turn !== asked) return;
    if (!found.readings) return blank(daysBack === 0 ? "No readings in the last 24 hours." : "No readings of this day are in the spool.");
    const before = data?.at_us[area.querySelector("input")?.valueAsNumber];
    data = { ...found, unit: shown(found.unit) };
    draw(quiet && document.activeElement === area.querySelector("input") ? before : undefined);
  }

  function summary() {
    const span = spanOf(data), unit = data.unit ? ` ${data.unit}` : "", number = (x) => value(x, span) + unit;
    const flagged = data.flagged.reduce((a, b) => a + b, 0);
    const low = Math.min(...data.least), high = Math.max(...data.greatest);
    const newest = data.mean.at(-1);
    return [`${daysBack === 0 ? "latest" : "last"} `, element("b", {}, number(newest)),
      low === high ? `, constant, ` : `, between ${number(low)} and ${number(high)}, `,
      data.readings === 1 ? "1 reading" : `${count(data.readings)} readings`,
      flagged ? `, ${count(flagged)} flagged` : "",
      data.complete ? "" : "; earlier ones could not be read in time"];
  }

  function draw(keepAt) {
    const drawn = chart(data, Math.max(280, area.clientWidth));
    const reading = element("p", { class: "reading", id: "chart-words" }, ...summary());
    const slider = element("input", { type: "range", min: 0, max: data.at_us.length - 1, value: data.at_us.length - 1, "aria-label": "Moment", "aria-valuetext": words(data, data.at_us.length - 1).join(", ") });
    const show = (i) => {
      slider.value = i;
      const parts = words(data, i);
      slider.setAttribute("aria-valuetext", parts.join(", "));
      reading.replaceChildren(`${parts[0]}: `, element("b", {}, parts[1]), parts.length > 2 ? `, ${parts.slice(2).join(", ")}` : "");
      drawn.point(i);
    };
    const rest = () => { reading.replaceChildren(...summary()); drawn.point(null); };
    slider.addEventListener("input", () => show(slider.valueAsNumber));
    slider.addEventListener("focus", () => show(slider.valueAsNumber));
    slider.addEventListener("blur", rest);
    drawn.svg.addEventListener("pointermove", (event) => show(drawn.nearest(event.clientX)));
    drawn.svg.addEventListener("pointerleave", () => { if (document.activeElement !== slider) rest(); });
    const hadFocus = keepAt !== undefined;
    area.replaceChildren(reading, drawn.svg, slider);
    slider.style.marginLeft = `${drawn.axisWidth - 6}px`;
    slider.style.width = `calc(100% - ${drawn.axisWidth - 6}px)`;
    slider.hidden = data.at_us.length < 2;
    if (hadFocus) {
      const at = data.at_us.findIndex((t) => t >= keepAt);
      slider.value = at < 0 ? data.at_us.length - 1 : at;
      slider.focus();
    }
  }

  let width = 0;
  new ResizeObserver(() => {
    if (data && Math.abs(area.clientWidth - width) > 4) draw();
    width = area.clientWidth;
  }).observe(area);
  setInterval(() => { if (!document.hidden && chosen && daysBack === 0) load(true); }, EVERY_MS);

  async function begin() {
    const wanted = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
    if (wanted.sensor_id && wanted.sensor_type) return choose({ sensor_id: wanted.sensor_id, sensor_type: wanted.sensor_type });
    try {
      const found = await get("/series", { limit: 1 });
      if (found.series.length) { chosen = found.series[0]; input.value = label(chosen); return load(); }
    } catch { /* said by what follows */ }
    blank("Once a device has sent readings, a day of any series is drawn here.");
    setTimeout(() => { if (!chosen) begin(); }, 5000);
  }
  begin();
}
