// The status page: requests /status every few seconds and updates what changed, so that focus and selection
// stay. Text from devices is inserted as text nodes only.

import { series } from "./series.js";
import { spark } from "./chart.js";
import { allShown, bytes, count, duration, moment, secondTime, years } from "./words.js";

const EVERY_MS = 2000, PATIENCE_MS = 6000;
const HOUR_SLOTS = 181;
const drawn = new Map();
let last = null, failures = 0, announced = null;

const byId = (id) => document.getElementById(id);

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, text] of Object.entries(attributes)) if (text !== undefined) made.setAttribute(key, text);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// Redraw a part when its data has changed.
function part(id, key, draw) {
  const text = JSON.stringify(key);
  if (drawn.get(id) === text) return;
  drawn.set(id, text);
  byId(id).replaceChildren(...draw());
}

// A figure is [name, value, small print, severity]; null is left out.
function figures(target, list) {
  const key = JSON.stringify(list);
  if (target.dataset.key === key) return;
  target.dataset.key = key;
  target.replaceChildren(...list.filter(Boolean).map(([name, value, small, severity]) =>
    element("div", {}, element("dt", {}, name),
      element("dd", { "data-severity": severity }, value, small ? element("small", {}, small) : null))));
}

const empty = (text) => [element("p", { class: "empty" }, text)];

function table(headings, rows) {
  const cells = (row) => row.map((cell, i) => element("td", { class: headings[i][1] }, ...[cell].flat()));
  return element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": headings.label },
    element("table", {},
      element("thead", {}, element("tr", {}, ...headings.map(([text, kind]) => element("th", { scope: "col", class: kind }, text)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row))))));
}

const small = (text) => element("small", {}, text);

function showRemarks(s) {
  part("remarks", s.remarks, () => s.remarks.map((r) => element("p", { class: "remark", "data-severity": r.severity }, r.text)));
  const worst = s.remarks[0];
  if (worst && worst.severity !== announced) {
    if (announced !== null) say(byId("announcement"), worst.text);
    announced = worst.severity;
  }
}

function showInput(s) {
  const i = s.ingress, d = s.devices;
  say(byId("rate"), count(i.readings_per_s >= 100 ? Math.round(i.readings_per_s) : i.readings_per_s));
  const rates = s.recent?.readings_per_s ?? [];
  part("rate-spark", [s.recent?.until_us, rates.length], () => [spark(rates, HOUR_SLOTS)]);
  const most = Math.max(0, ...rates), minutes = Math.round((rates.length - 1) * (s.recent?.step_s ?? 0) / 60);
  say(byId("rate-caption"), rates.length > 1 ? `${minutes >= 60 ? "last hour" : `last ${Math.max(1, minutes)} min`}, at most ${count(most)} per second` : "no history yet");
  figures(byId("in"), [
    d && ["Devices heard", d.known ? `${count(d.heard)} of ${count(d.known)}` : "none yet", `within ${duration(d.silent_after_s)}`],
    ["Connections", count(i.connections)],
    ["Publishes acknowledged", count(i.acknowledged), i.publishes > i.acknowledged ? `${count(i.publishes - i.acknowledged)} outstanding` : "none outstanding"],
    ["Readings since start", count(i.readings), i.duplicates ? `${count(i.duplicates)} duplicates, stored once` : "no duplicates"],
  ]);
}

const MOODS = { idle: "good", sending: "good", waiting: "warning", held: "critical" };
const STATES = { idle: "up to date", sending: "sending", waiting: "retrying", held: "blocked", stopped: "stopped" };

function destination(d, s) {
  const trend = s.recent?.backlog[d.name] ?? [];
  const quiet = d.backlog_readings === 0;
  const stuck = d.drain_s === null && !quiet;
  const numbers = element("dl", { class: "figures" });
  figures(numbers, [
    ["Backlog", count(d.backlog_readings), d.backlog_readings === 1 ? "reading" : "readings"],
    ["Size", bytes(d.backlog_bytes)],
    ["Oldest", d.backlog_oldest_s === null ? "–" : duration(d.backlog_oldest_s)],
    ["Time to drain", quiet ? "–" : stuck ? "unknown" : duration(d.drain_s), stuck ? "not shrinking" : undefined],
    ["Delivered", count(d.delivered), d.delivered_per_s >= 0.05 ? `${count(d.delivered_per_s)} per second` : undefined],
    ["Last receipt", d.last_receipt_at_us === null ? "none yet" : moment(d.last_receipt_at_us, s.at_us)],
  ]);
  const most = Math.max(0, ...trend.map((n) => n ?? 0));
  return element("article", { class: "destination", "data-mood": d.last_error && MOODS[d.state] === "good" ? "warning" : MOODS[d.state] },
    element("header", {},
      element("h3", {}, d.name, " ", element("span", { class: "kind" }, d.kind)),
      element("p", { class: "state" }, element("span", { class: "dot", "aria-hidden": "true" }),
        d.state === "idle" && !quiet ? "filling a batch" : STATES[d.state] ?? d.state)),
    numbers,
    trend.length > 1 ? element("figure", { class: "spark" }, spark(trend, HOUR_SLOTS),
      element("figcaption", { class: "muted" }, most ? `backlog of the last hour, at most ${count(most)}` : "no backlog in the last hour")) : null,
    d.last_error ? element("p", { class: "fault" }, d.last_error) : null);
}

function showDestinations(s) {
  const trend = s.recent?.until_us;
  part("destinations", [s.destinations, trend, moment(s.at_us, s.at_us)], () => s.destinations.length
    ? s.destinations.map((d) => destination(d, s))
    : empty("No destination is configured. Readings stay in the spool until one is added."));
}

function showKept(s) {
  const k = s.spool, w = s.wear, p = s.processing;
  const total = k.size_bytes + k.free_bytes;
  const reserved = Math.max(0, k.free_bytes - k.room_bytes);
  part("bar", [k.size_bytes, k.room_bytes, k.free_bytes], () => {
    const bar = element("div", { class: "bar", "aria-hidden": "true" });
    for (const [kind, size] of [["used", k.size_bytes], ["others", reserved]]) {
      const piece = element("i", { class: kind });
      piece.style.width = `${Math.max(size > 0 ? 0.4 : 0, 100 * size / total)}%`;
      bar.append(piece);
    }
    const item = (kind, text) => element("li", {}, element("i", { class: kind, "aria-hidden": "true" }), text);
    return [bar, element("ul", { class: "legend" }, item("used", `spool ${bytes(k.size_bytes)}`),
      reserved ? item("others", `reserved ${bytes(reserved)}`) : null, item("free", `available ${bytes(k.room_bytes)}`))];
  });
  const low = k.room_days !== null && k.room_days < 1 ? "critical" : k.room_days !== null && k.room_days < 7 ? "warning" : undefined;
  const watched = w && (w.observed_s < 86000 ? `measured over ${duration(w.observed_s)}` : "last 24 hours");
  figures(byId("kept"), [
    ["Readings", count(k.readings_kept), k.readings_ever > k.readings_kept ? `of ${count(k.readings_ever)} ever` : "all since the spool was created"],
    ["Spool full in", k.room_days === null ? "–" : duration(k.room_days * 86400), k.room_days === null ? "nothing comes in" : "if nothing were delivered", low],
    w && w.written_bytes_per_day !== null && ["Written a day", bytes(w.written_bytes_per_day), `by this gateway, ${watched}`],
    w && w.disk_written_bytes_per_day !== null && ["Written to the disk", bytes(w.disk_written_bytes_per_day), `a day to ${w.disk}, by all programs`],
    w && w.amplification !== null && ["Amplification", `${w.amplification.toFixed(w.amplification < 10 ? 1 : 0)} ×`, "written for each byte of readings"],
    w && w.years_left !== null ? ["Flash lasts", years(w.years_left), `of ${bytes(w.endurance_bytes)} to write`, w.years_left < 2 ? "warning" : undefined]
      : w && ["Flash lasts", "–", w.endurance_bytes === null ? "no endurance is configured" : "not known yet"],
    p && p.rollups ? ["Rollups", count(p.rollups), p.lag_s > 10 ? `${duration(p.lag_s)} behind` : "up to date", p.lag_s > 300 ? "warning" : undefined] : null,
    k.damaged_readings ? ["Damaged", count(k.damaged_readings), "readings set aside", "warning"] : null,
  ]);
}

function showRecords(s) {
  const a = s.alerts;
  part("alerts", a, () => !a || !a.newest.length ? empty("No alerts.")
    : [table(Object.assign([["Alert"], ["Since", "number"]], { label: "Alerts" }), a.newest.map((x) => [
      [element("span", { class: "tag", "data-severity": x.firing ? x.severity : undefined }, x.firing ? x.severity : "resolved"), ` ${x.subject}`, small(x.text || x.rule)],
      moment(x.since_us, s.at_us)]))]);
  const l = s.losses;
  part("losses", l, () => !l || !l.entries ? empty("No losses: every reading is delivered, or still in the spool.")
    : [table(Object.assign([["What"], ["Records", "number"], ["Declared", "number"]], { label: "Declared losses" }), l.newest.map((x) => [
      [`${x.what === "reading" ? "readings" : `${x.what}s`}${x.destination ? ` for ${x.destination}` : ""}`, small(`${x.reason.replaceAll("_", " ")}; ${x.remains ? `kept as ${x.remains}` : "nothing kept"}; of ${moment(x.from_us, s.at_us)} to ${moment(x.to_us, s.at_us)}`)], count(x.records), moment(x.declared_at_us, s.at_us)]))]);
  const q = s.quarantine;
  part("quarantine", [q, moment(s.at_us, s.at_us)], () => !q || !q.items ? empty(q?.ever ? "Empty now: earlier items were retried or dropped." : "Empty.")
    : [table(Object.assign([["Reason"], ["Items", "number"], ["Newest", "number"]], { label: "Quarantine by reason" }), q.reasons.map((x) => [
      [x.reason.replaceAll("_", " "), small([x.topic, x.detail].filter(Boolean).join(": "))], count(x.items), moment(x.newest_at_us, s.at_us)]))]);
  const d = s.devices;
  part("silent", [d?.silent, d?.silent_devices, d?.heard === 0, moment(s.at_us, s.at_us)], () => {
    if (!d || !d.known) return empty("No device has sent a reading yet.");
    if (!d.silent) return empty(d.known === 1 ? "None: the only device is sending." : `None: all ${count(d.known)} are sending.`);
    const rest = d.silent - d.silent_devices.length;
    return [table(Object.assign([["Device"], ["Last heard", "number"]], { label: "Silent devices" }), d.silent_devices.map((x) => [
      [x.sensor_id, small(x.series === 1 ? "1 series" : `${count(x.series)} series`)],
      [moment(x.heard_at_us, s.at_us), small(`${duration((s.at_us - x.heard_at_us) / 1e6)} ago`)]])),
      rest > 0 ? element("p", { class: "empty" }, `and ${count(rest)} more`) : null].filter(Boolean);
  });
}

function show(s) {
  last = s;
  document.title = `${s.remarks[0]?.severity === "critical" ? "! " : ""}${s.gateway_id} · Tidegate`;
  say(byId("about"), `Tidegate ${s.version}, up ${duration(s.uptime_s)}`);
  showRemarks(s); showInput(s); showDestinations(s); showKept(s); showRecords(s);
  byId("main").setAttribute("aria-busy", "false");
}

function live(state, text) {
  const changed = byId("live").dataset.state !== state;
  byId("live").dataset.state = state;
  say(byId("live-text"), text);
  document.body.classList.toggle("stale", state === "lost");
  if (changed && state === "lost") say(byId("announcement"), text);
}

async function ask() {
  try {
    const answer = await fetch("/status", { signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store" });
    if (answer.status === 401) return location.reload();
    if (!answer.ok) throw new Error(String(answer.status));
    show(allShown(await answer.json()));
    failures = 0;
    live("live", `Live, ${secondTime(last.at_us)}`);
  } catch {
    failures += 1;
    if (failures > 1) live("lost", last ? `No answer since ${secondTime(last.at_us)}` : "No answer");
  }
}

let timer = 0;
async function turn() {
  clearTimeout(timer);
  if (document.hidden) return;
  await ask();
  clearTimeout(timer);
  timer = setTimeout(turn, EVERY_MS);
}

document.addEventListener("visibilitychange", turn);
turn();
series(element);
