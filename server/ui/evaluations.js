// Evaluations: adapters beside the base on a file, and the rows where they differ.

import { adapterInput } from "./adapters.js";
import { get, name as path, post, remove, repeat, send } from "./api.js";
import { acting, ago, badge, button, compact, count, digest, empty, field, fixed, h, percent, refusal, replace, time } from "./dom.js";
import { fileChooser } from "./finetune.js";

const KINDS = { succeeded: "good", running: "accent", failed: "bad" };
const ROWS = 50; // shown at first

export async function mount(page, { part, signal }) {
  const body = h("tbody"), none = h("div"), fault = h("div"), forms = h("div"), below = h("div", { class: "stack" });
  const table = h("table", { class: "list" }, h("caption", { class: "hidden" }, "Evaluations"), h("thead", {},
    h("tr", {}, h("th", { scope: "col" }, "Model"), h("th", { scope: "col" }, "Status"), h("th", { scope: "col" }, "File"), h("th", { scope: "col", class: "number" }, "Examples"),
      ["Loss", "Perplexity", "Exact match"].flatMap((title) => [h("th", { scope: "col", class: "number" }, title), h("th", { scope: "col", class: "number" }, "base")]),
      h("th", { scope: "col" }, "Started"), h("th", { scope: "col" }, h("span", { class: "hidden" }, "Actions")))), body);
  let names = {}, shown = null;
  page.append(h("div", { class: "bar" }, h("h1", {}, "Evaluations"), button("New evaluation", () => replace(forms, evaluationForm(load, () => replace(forms))), { class: "main" })),
    forms, fault, h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of evaluations" }, table), none, below);

  async function load() {
    let data;
    try {
      [{ data }, names] = await Promise.all([get("v1/evaluations?limit=100", signal),
        get("v1/files?limit=1000", signal).then((files) => Object.fromEntries(files.data.map((one) => [one.id, one.filename])))]);
      replace(fault);
    } catch (error) {
      if (!signal.aborted) replace(fault, refusal(error));
      return;
    }
    table.hidden = data.length === 0;
    replace(none, data.length ? null : empty("No evaluations yet", "Measure an adapter beside the base on held-out examples: ",
      button("new evaluation", () => replace(forms, evaluationForm(load, () => replace(forms)))), "."));
    replace(body, data.map((one) => row(one, names, part, async () => { await remove(`v1/evaluations/${one.id}`); if (one.id === part) location.hash = "#/evaluations"; await load(); })));
    const chosen = data.find((one) => one.id === part);
    if (chosen && shown !== chosen.status) {
      shown = chosen.status;
      await differences(below, chosen, signal);
    }
  }
  await repeat(3000, signal, () => (body.contains(document.activeElement) ? null : load()));
}

function row(one, names, part, drop) {
  const { base, adapter } = one.results || {};
  const pair = (key, format, lessIsBetter) => [adapter || base, adapter ? base : null].map((score, i) => h("td", {
    class: `number ${i === 0 && adapter && adapter[key] !== base[key] ? (adapter[key] < base[key] === lessIsBetter ? "better" : "worse") : ""}` }, score ? format(score[key]) : "–"));
  return h("tr", { class: one.id === part ? "chosen" : "" },
    h("th", { scope: "row" }, h("a", { href: `#/evaluations/${one.id}`, "aria-current": one.id === part ? "true" : null }, one.model), " ", one.digest ? digest(one.digest) : null),
    h("td", {}, badge(one.status, KINDS[one.status])), h("td", {}, names[one.file] || one.file), h("td", { class: "number" }, count(one.examples)),
    pair("loss", (n) => fixed(n, 3), true), pair("perplexity", (n) => (n < 10000 ? fixed(n, 2) : compact(n)), true), pair("exact_match", percent, false),
    h("td", {}, time(one.created_at, ago(one.created_at))), h("td", {}, acting("Delete", drop, { class: "plain danger" })));
}

function evaluationForm(done, close) {
  const file = fileChooser("Examples", true), result = h("div");
  const most = h("input", { type: "number", min: 1, step: 1, placeholder: "all" });
  const models = h("div", { class: "stack" });
  const add = () => models.append(adapterInput({ "aria-label": "Adapter", placeholder: "an adapter" }));
  add();
  const form = h("form", { class: "panel", "aria-label": "New evaluation" }, h("div", { class: "bar" }, h("h2", {}, "New evaluation"), button("×", close, { class: "plain", "aria-label": "Close" })),
    h("div", { class: "halves" }, h("div", { class: "stack" }, h("h3", {}, "Adapters"), models, h("div", { class: "row" }, button("Add another", add))),
      h("div", { class: "stack" }, file.element, h("div", { class: "fields" }, field("At most", most, "examples")))),
    result, h("div", { class: "row" }, h("button", { class: "main" }, "Measure"), h("span", { class: "muted" }, "Each beside the base, through the engine that serves.")));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const named = [...models.querySelectorAll("input")].map((one) => one.value.trim()).filter(Boolean);
    try {
      if (!named.length) throw new Error("Name an adapter first.");
      if (!file.value()) throw new Error("Choose the examples first.");
      for (const model of named) await post("v1/evaluations", { model, file: file.value(), ...(most.value ? { max_examples: Number(most.value) } : {}) });
      close();
      await done();
    } catch (error) {
      replace(result, refusal(error));
    }
  });
  return form;
}

// The rows of the result file where the adapter's answer is not the base's, the largest difference of loss first.
async function differences(place, one, signal) {
  replace(place, h("h2", {}, one.model), one.error ? refusal(one.error) : null);
  if (one.status === "running") { place.append(h("p", { class: "muted", role: "status" }, "It is being measured…")); return; }
  if (!one.result_files.length) return;
  let rows;
  try {
    rows = (await (await send(`v1/files/${one.result_files[0]}/content`, { signal })).text()).trim().split("\n").map((line) => JSON.parse(line));
  } catch (error) {
    if (!signal.aborted) place.append(refusal(error));
    return;
  }
  const gain = (row) => (row.adapter ? row.base.loss - row.adapter.loss : 0);
  const differing = rows.filter((row) => row.adapter && (row.adapter.answer !== row.base.answer || row.adapter.answer == null));
  const all = h("input", { type: "checkbox" }), list = h("div", { class: "rows" });
  let most = ROWS;
  const draw = () => {
    const chosen = (all.checked || !one.results.adapter ? rows : differing).toSorted((a, b) => Math.abs(gain(b)) - Math.abs(gain(a)));
    replace(list, chosen.length ? null : empty("The answers are the same", "Not one differs from the base's."),
      chosen.slice(0, most).map(rowOf), chosen.length > most ? button("More rows", () => { most += ROWS; draw(); }) : null);
  };
  all.addEventListener("change", draw);
  place.append(h("div", { class: "row" }, h("span", { class: "muted" }, `${count(differing.length)} of ${count(rows.length)} answers differ from the base's`),
    h("label", { class: "check" }, all, "show all"), h("span", { class: "grow" }),
    one.digest ? h("a", { class: "button", href: `#/playground?m=${path(one.model)}` }, "Try it") : null), list);
  draw();
}

function rowOf(row) {
  const answer = (title, one) => one && h("div", {}, h("h4", {}, title, " ", h("span", { class: "muted" }, `loss ${fixed(one.loss, 3)}`),
    one.exact_match == null ? null : [" ", badge(one.exact_match ? "match" : "no match", one.exact_match ? "good" : "")]), h("p", { class: "text" }, one.answer ?? "–"));
  return h("article", { class: "panel compared", "aria-label": `Example ${row.example}` },
    h("div", {}, h("h4", {}, `Example ${count(row.example)}`), h("p", { class: "text prompt" }, row.prompt)),
    h("div", {}, h("h4", {}, "Expected"), h("p", { class: "text" }, row.expected)), answer("Base", row.base), answer("Adapter", row.adapter));
}
