// Elements, and values in the reader's own locale. Text is always text: nothing is parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

// h("button", { class: "main", onclick: save }, "Save"): properties that begin with `on` are listeners, null is left out.
export const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
export const svg = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value != null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(3).filter((child) => child != null && child !== false));
  return element;
}

export const replace = (parent, ...children) => parent.replaceChildren(...children.flat(3).filter((c) => c != null && c !== false));
export const debounce = (work, ms = 250) => {
  let timer;
  return (...args) => { clearTimeout(timer); timer = setTimeout(work, ms, ...args); };
};

// --- values ------------------------------------------------------------------------------------

const whole = new Intl.NumberFormat();
const short = new Intl.NumberFormat(undefined, { notation: "compact", maximumFractionDigits: 1 });
const percents = new Intl.NumberFormat(undefined, { style: "percent", maximumFractionDigits: 1 });
const dateTime = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const clockTime = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const relative = new Intl.RelativeTimeFormat(undefined, { numeric: "auto", style: "short" });
const NONE = "–";

export const count = (n) => (n == null ? NONE : whole.format(n));
export const compact = (n) => (n == null ? NONE : Math.abs(n) < 10000 ? whole.format(Math.round(n)) : short.format(n));
export const percent = (n) => (n == null ? NONE : percents.format(n));
export const fixed = (n, digits = 3) => n == null ? NONE
  : n !== 0 && Math.abs(n) < 10 ** -digits ? n.toExponential(1)
    : new Intl.NumberFormat(undefined, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(n);
export const brief = new Intl.NumberFormat(undefined, { maximumFractionDigits: 3 }).format;
export const when = (unix) => (unix == null ? NONE : dateTime.format(unix * 1000));
export const clock = (unix) => clockTime.format(unix * 1000);

export function bytes(n) {
  if (n == null) return NONE;
  const units = ["byte", "kilobyte", "megabyte", "gigabyte", "terabyte"];
  const power = n < 1000 ? 0 : Math.min(4, Math.floor(Math.log10(n) / 3));
  const style = { style: "unit", unit: units[power], unitDisplay: "short", maximumFractionDigits: power ? 1 : 0 };
  return new Intl.NumberFormat(undefined, style).format(n / 1000 ** power);
}

export function ago(unix) {
  if (unix == null) return "never";
  const seconds = unix - Date.now() / 1000;
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (Math.abs(seconds) >= size) return relative.format(Math.round(seconds / size), unit);
  }
  return relative.format(Math.round(seconds), "second");
}

export function duration(seconds) {
  const parts = [["h", 3600], ["min", 60], ["s", 1]];
  const at = Math.max(0, parts.findIndex(([, size]) => seconds >= size));
  if (seconds < 1) return `${fixed(Math.max(0, seconds), 1)} s`;
  const [unit, size] = parts[at], [next, smaller] = parts[at + 1] || [];
  const rest = smaller ? Math.floor((seconds % size) / smaller) : 0;
  return `${Math.floor(seconds / size)} ${unit}${rest ? ` ${rest} ${next}` : ""}`;
}

export const time = (unix, text = when(unix)) =>
  unix == null ? NONE : h("time", { datetime: new Date(unix * 1000).toISOString(), title: when(unix) }, text);
export const digest = (value) => value
  ? h("code", { class: "digest", title: value }, value.replace("sha256:", "").slice(0, 8)) : NONE;

// --- pieces of pages -----------------------------------------------------------------------------

export const button = (label, onclick, props) => h("button", { type: "button", onclick, ...props }, label);
export const field = (label, control, hint) =>
  h("div", { class: "field" }, h("label", {}, h("span", {}, label), control), hint ? h("small", {}, hint) : null);
export const facts = (pairs) => h("dl", { class: "facts" },
  pairs.filter(([, value]) => value != null).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
export const empty = (title, ...next) => h("div", { class: "empty" }, h("h3", {}, title), h("p", {}, next));
export const badge = (text, kind) => h("span", { class: `badge ${kind || ""}` }, text);

// An error as the server said it: its words, and the field and the code that it names.
export const refusal = (error) => h("p", { class: "refusal", role: "alert" }, error.message,
  error.param ? [" ", h("code", {}, error.param)] : null, error.code ? [" ", h("code", {}, error.code)] : null);

// Run `work` on a click: the button waits, a refusal is shown in `place` or as a notice.
export const acting = (label, work, props, place) => button(label, async (event) => {
  const self = event.currentTarget;
  self.setAttribute("aria-busy", "true");
  self.disabled = true;
  try {
    if (place) replace(place);
    await work(self);
  } catch (error) {
    if (place) replace(place, refusal(error)); else toast(refusal(error));
  } finally {
    self.removeAttribute("aria-busy");
    self.disabled = false;
  }
}, props);

// A notice for some seconds; `undo` in place of waiting, `then` once the time is over.
export function toast(content, { seconds = 6, undo, then } = {}) {
  const close = () => { clearTimeout(timer); box.remove(); };
  const box = h("div", { class: "toast" }, h("div", {}, content),
    undo ? button("Undo", () => { close(); undo(); }, { class: "main" }) : null,
    button("×", () => { close(); then?.(); }, { class: "plain", "aria-label": undo ? "Do it now" : "Close" }));
  const timer = setTimeout(() => { close(); then?.(); }, seconds * 1000);
  document.getElementById("toasts").append(box);
}

// Files dropped anywhere on `target`, folders included, go to `take`.
export function droppable(target, take, signal) {
  const over = (on) => (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    target.classList.toggle("dropping", on);
  };
  target.addEventListener("dragover", over(true), { signal });
  target.addEventListener("dragleave", over(false), { signal });
  target.addEventListener("drop", async (event) => {
    over(false)(event);
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    take(entries.length ? (await Promise.all(entries.map(filesOf))).flat() : [...event.dataTransfer.files]);
  }, { signal });
}

async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const inside = await new Promise((done, failed) => entry.createReader().readEntries(done, failed));
  return Promise.all(inside.filter((one) => one.isFile).map(async (one) => (await filesOf(one))[0]));
}
