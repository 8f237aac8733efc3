// Numbers and times as people read them, in the same words as gateway/humanize.py.

const MINUTE = 60, HOUR = 3600, DAY = 86400, YEAR = 365 * DAY;
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const seconds = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const date = new Intl.DateTimeFormat(undefined, { weekday: "short", day: "numeric", month: "short" });

const threeDigits = (x) => String(Number(x.toPrecision(3)));

// Text of strangers: what is not printable in it (control and direction characters) is shown as an escape.
export function shown(text) {
  return text.replace(/[\p{C}\u2028\u2029]/gu, (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);
}

// The same for every text of a document.
export function allShown(given) {
  if (typeof given === "string") return shown(given);
  if (Array.isArray(given)) return given.map(allShown);
  if (given && typeof given === "object") return Object.fromEntries(Object.entries(given).map(([k, v]) => [k, allShown(v)]));
  return given;
}

export function count(n) {
  for (const [size, unit, suffix] of [[1e9, 1e9, " G"], [1e6, 1e6, " M"], [1e5, 1e3, " k"]]) {
    if (Math.abs(n) >= size) return threeDigits(n / unit) + suffix;
  }
  return Number.isInteger(n) || Math.abs(n) >= 100 ? whole.format(n) : n.toFixed(1);
}

export function bytes(n) {
  for (const suffix of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(n) < 1000) return `${threeDigits(n)} ${suffix}`;
    n /= 1000;
  }
  return `${threeDigits(n)} TB`;
}

export function duration(s) {
  if (s > 0 && s < 1) return `${Number(s.toPrecision(1))} s`;
  if (s < MINUTE) return `${Math.max(s, 0).toFixed(0)} s`;
  if (s >= 10 * YEAR) return "over 10 years";
  for (const [large, small, a, b] of [[DAY, HOUR, "d", "h"], [HOUR, MINUTE, "h", "min"], [MINUTE, 1, "min", "s"]]) {
    if (s >= large) {
      const t = Math.floor(s);
      return `${Math.floor(t / large)} ${a} ${Math.floor((t % large) / small)} ${b}`;
    }
  }
}

export const years = (n) => (n >= 100 ? "over 100 years" : n >= 1 ? `${threeDigits(n)} years` : duration(n * YEAR));

// A measured value with as many digits as its span makes sensible.
export function value(x, span) {
  const digits = span > 0 ? Math.max(0, Math.min(6, 2 - Math.floor(Math.log10(span)))) : 2;
  if (x !== 0 && (Math.abs(x) >= 1e9 || Math.abs(x) < 1e-6)) return x.toPrecision(4);
  return x.toFixed(digits).replace(/^-(0(\.0+)?)$/, "$1").replace(/^-/, "\u2212");
}

export const clockTime = (us) => clock.format(us / 1000);
export const secondTime = (us) => seconds.format(us / 1000);
export const dayOf = (us) => date.format(us / 1000);

// A moment as one reads it: the time today, the day and time before that.
export function moment(us, nowUs) {
  const day = dayOf(us);
  return day === dayOf(nowUs) ? clockTime(us) : `${day}, ${clockTime(us)}`;
}
