// Adapters: the table, uploads, mixes, and one adapter with its versions.

import { get, name as path, post, remove, repeat, send, upload } from "./api.js";
import { acting, ago, badge, button, bytes, compact, count, debounce, digest, droppable, empty, facts, field, fixed, h, percent,
  refusal, replace, time, toast } from "./dom.js";

const PAGE = 50;
const COLUMNS = [["name", "Name"], [null, "Digest"], ["rank", "Rank"], [null, "Variant"], ["bytes", "Size"], ["tier", "Tier"],
  ["requests", "Requests"], ["tokens", "Tokens"], ["last_used", "Last used"]];
const NUMBERS = new Set(["rank", "bytes", "requests", "tokens", "last_used"]);
const doomed = new Set(); // names whose deletion can still be undone

export async function mount(page, { part, params, signal }) {
  const query = { search: params.get("search") || "", sort: params.get("sort") || "name", order: params.get("order") || "asc" };
  const body = h("tbody"), head = h("tr"), range = h("span", { class: "muted", role: "status" }), none = h("div"), fault = h("div");
  const search = h("input", { type: "search", value: query.search, placeholder: "Name or digest", "aria-label": "Search adapters" });
  const forms = h("div"), side = h("aside", { class: "detail", "aria-label": "Adapter" });
  let cursors = [null], data = null;

  const table = h("table", { class: "list" }, h("caption", { class: "hidden" }, "Adapters"), h("thead", {}, head), body);
  const previous = button("‹ Previous", () => { cursors.pop(); return load(); });
  const next = button("Next ›", () => { cursors.push(data.data.at(-1).name); return load(); });
  page.append(
    h("div", { class: "bar" }, h("h1", {}, "Adapters"), search,
      button("Upload", () => replace(forms, uploadForm([], changed)), { class: "main" }),
      button("Mix", () => replace(forms, mixForm(changed)))),
    forms, fault,
    h("div", { class: "split" }, h("div", { class: "master" }, h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of adapters" }, table), none,
      h("div", { class: "pager" }, previous, range, next)), side));
  droppable(page, (files) => replace(forms, uploadForm(files, changed)), signal);
  search.addEventListener("input", debounce(() => { query.search = search.value; again(); }));

  function again() {
    cursors = [null];
    remember();
    return load();
  }
  function remember() {
    const kept = new URLSearchParams(Object.entries(query).filter(([k, v]) => v && !(k === "sort" && v === "name") && v !== "asc"));
    history.replaceState(null, "", `#/adapters${part ? `/${path(part)}` : ""}${kept.size ? `?${kept}` : ""}`);
  }
  async function load() {
    const asked = new URLSearchParams({ ...query, limit: PAGE });
    if (cursors.at(-1)) asked.set("after", cursors.at(-1));
    try {
      data = await get(`v1/adapters?${asked}`, signal);
      replace(fault);
    } catch (error) {
      if (signal.aborted) return;
      if (error.param === "after") { cursors = [null]; await load(); return; } // deleted meanwhile
      replace(fault, refusal(error));
      return;
    }
    draw();
  }
  async function changed(name) {
    await load();
    if (name) open(name); else if (part) await showOne();
  }
  function open(name) {
    part = name;
    remember();
    draw();
    return showOne();
  }

  function draw() {
    const rows = data.data.filter((one) => !doomed.has(one.name));
    replace(head, COLUMNS.map(([sort, title]) => h("th", {
      scope: "col", class: NUMBERS.has(sort) ? "number" : "", "aria-sort": sort && sort === query.sort ? `${query.order}ending` : null },
      sort ? button(title, () => {
        query.order = query.sort === sort ? (query.order === "asc" ? "desc" : "asc") : NUMBERS.has(sort) ? "desc" : "asc";
        query.sort = sort;
        again();
      }, { class: "plain" }) : title)));
    replace(body, rows.map((one) => row(one, one.name === part, open)));
    const from = (cursors.length - 1) * PAGE;
    range.textContent = rows.length ? `${count(from + 1)}–${count(from + data.data.length)} of ${count(data.total)}` : "";
    previous.disabled = cursors.length === 1;
    next.disabled = !data.has_more;
    replace(none, rows.length ? null
      : query.search ? empty("No adapter is called so", "Look for another part of its name, or of its digest.")
        : empty("No adapters yet", "Drop adapter_config.json and adapter_model.safetensors here, use Upload, or ",
          h("a", { href: "#/finetune" }, "fine-tune one"), "."));
    table.hidden = rows.length === 0;
  }

  async function showOne() {
    side.hidden = false;
    await detail(side, part, { signal, changed, close: () => { part = ""; side.hidden = true; replace(side); remember(); draw(); } });
  }

  side.hidden = true;
  await load();
  if (part) showOne();
  await repeat(5000, signal, async () => {
    if (data && !body.contains(document.activeElement)) await load();
  });
}

function row(one, chosen, open) {
  const link = h("a", { href: `#/adapters/${path(one.name)}`, "aria-current": chosen ? "true" : null, onclick: (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    open(one.name);
  } }, one.name);
  return h("tr", { class: chosen ? "chosen" : "" },
    h("th", { scope: "row" }, link, one.pinned ? [" ", badge("pinned", "accent")] : null),
    h("td", {}, digest(one.digest)), h("td", { class: "number" }, count(one.rank)),
    h("td", {}, one.variants.length ? one.variants.join(", ") : "LoRA"), h("td", { class: "number" }, bytes(one.bytes)),
    h("td", {}, badge(one.tier, one.tier === "disk" ? "" : "good")), h("td", { class: "number" }, compact(one.requests)),
    h("td", { class: "number" }, compact(one.tokens)), h("td", { class: "number" }, one.last_used ? time(one.last_used, ago(one.last_used)) : "–"));
}

// --- upload and mix ------------------------------------------------------------------------------

const PARTS = { "adapter_config.json": "config", "adapter_model.safetensors": "weights", "tokenizer.json": "tokenizer",
  "chat_template.jinja": "chat_template" };

function uploadForm(given, changed) {
  let files = {};
  const list = h("ul", { class: "files" }), result = h("div"), bar = h("progress", { max: 1, value: 0, "aria-label": "Upload", hidden: true });
  const named = h("input", { name: "name", required: true, maxlength: 128, placeholder: "support/v2", autocomplete: "off" });
  const promote = h("input", { type: "checkbox", checked: true });
  const picker = h("input", { type: "file", multiple: true, onchange: () => take([...picker.files]) });
  const form = h("form", { class: "panel", "aria-label": "Upload an adapter" }, h("h2", {}, "Upload an adapter"),
    h("div", { class: "fields" }, field("Name", named), field("Files", picker, "or drop them, or their folder, on this page"),
      h("label", { class: "check" }, promote, "answer with it at once (otherwise it waits as a version)")),
    list, bar, result,
    h("div", { class: "row" }, h("button", { class: "main" }, "Upload"), button("Close", () => form.remove())));

  function take(more) {
    for (const file of more) if (PARTS[file.name]) files[PARTS[file.name]] = file;
    const others = more.filter((file) => !PARTS[file.name]);
    replace(list, Object.values(files).map((file) => h("li", {}, file.name, " ", h("span", { class: "muted" }, bytes(file.size)))),
      others.length ? h("li", { class: "muted" }, `left out: ${others.map((file) => file.name).join(", ")}`) : null);
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const data = new FormData();
    data.set("name", named.value.trim());
    data.set("promote", String(promote.checked));
    for (const [part, file] of Object.entries(files)) data.set(part, file, file.name);
    bar.hidden = false;
    replace(result);
    try {
      const made = await upload("v1/adapters", data, (share) => { bar.value = share; });
      replace(result, receipt(made));
      toast(`${made.name} is served.`);
      await changed(made.name);
    } catch (error) {
      replace(result, refusal(error));
    } finally {
      bar.hidden = true;
    }
  });
  take(given);
  queueMicrotask(() => named.focus());
  return form;
}

const receipt = (made) => h("div", { class: "receipt" }, h("p", { role: "status" }, "Received: ", made.name, " ", digest(made.digest)),
  facts([["Rank", count(made.rank)], ["Scaling", fixed(made.scaling, 2)], ["Modules", count(made.modules_matched)],
    ["Parameters", compact(made.parameters)], ["Size", bytes(made.bytes)], ["Dtype", made.dtype]]),
  made.warnings.map((text) => h("p", { class: "warning" }, text)));

function mixForm(changed) {
  const sources = h("div", { class: "sources" }), result = h("div");
  const named = h("input", { required: true, maxlength: 128, autocomplete: "off" });
  const methods = ["svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"];
  const method = h("select", {}, methods.map((one) => h("option", {}, one)));
  const density = h("input", { type: "number", min: 0.01, max: 1, step: 0.01, value: 0.5 });
  const densityField = field("Density", density, "share of each that is kept");
  const prunes = () => /^(ties|dare|magnitude)/.test(method.value);
  method.addEventListener("change", () => { densityField.hidden = !prunes(); });
  densityField.hidden = true;
  const add = () => sources.append(h("div", { class: "row" },
    adapterInput({ "aria-label": "Adapter", required: true, class: "grow" }),
    h("input", { type: "number", step: 0.05, min: -100, max: 100, value: 1, "aria-label": "Weight", class: "short" })));
  add();
  add();
  const form = h("form", { class: "panel", "aria-label": "Mix adapters" }, h("h2", {}, "Mix adapters"),
    h("div", { class: "fields" }, field("Name of the mix", named), field("Method", method), densityField), sources, result,
    h("div", { class: "row" }, h("button", { class: "main" }, "Mix"), button("Add another", add), button("Close", () => form.remove())));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const mix = [...sources.children].map((one) => {
      const [adapter, weight] = one.querySelectorAll("input");
      return { adapter: adapter.value, weight: Number(weight.value) };
    });
    try {
      const made = await post("v1/adapters", { name: named.value.trim(), mix, method: method.value, ...(prunes() ? { density: Number(density.value) } : {}) });
      replace(result, receipt(made));
      await changed(made.name);
    } catch (error) {
      replace(result, refusal(error));
    }
  });
  queueMicrotask(() => named.focus());
  return form;
}

// An input that proposes names of adapters as the server finds them.
let lists = 0;
export function adapterInput(props, first = []) {
  const list = h("datalist", { id: `names-${++lists}` });
  const input = h("input", { list: list.id, autocomplete: "off", spellcheck: "false", ...props });
  const propose = async () => {
    const found = await get(`v1/adapters?limit=20&search=${encodeURIComponent(input.value.split("@")[0])}`).catch(() => ({ data: [] }));
    replace(list, first.map((one) => h("option", { value: one })), found.data.map((one) => h("option", { value: one.name })));
  };
  input.addEventListener("focus", propose);
  input.addEventListener("input", debounce(propose));
  queueMicrotask(() => input.after(list));
  return input;
}

// --- one adapter -----------------------------------------------------------------------------------

async function detail(side, name, { signal, changed, close }) {
  let one, versions, etag;
  try {
    const response = await send(`v1/adapters/${path(name)}/versions`, { signal });
    etag = response.headers.get("ETag");
    [one, versions] = await Promise.all([get(`v1/adapters/${path(name)}`, signal), response.json()]);
  } catch (error) {
    if (!signal.aborted) replace(side, refusal(error), button("Close", close));
    return;
  }
  const result = h("div");
  const at = `v1/adapters/${path(name)}`;
  const change = (verb, json) => async () => {
    await post(`${at}/${verb}`, json, { headers: { "If-Match": etag } });
    await changed();
  };
  replace(side,
    h("div", { class: "bar" }, h("h2", {}, name), button("×", close, { class: "plain", "aria-label": "Close" })),
    h("div", { class: "row" }, h("a", { class: "button main", href: `#/playground?m=${path(name)}` }, "Try it"),
      acting("Warm", async () => { const { seconds } = await post(`${at}/warm`); toast(`On the device after ${fixed(seconds, 2)} s.`); await changed(); }, {}, result),
      one.pinned ? acting("Unpin", async () => { await remove(`${at}/pin`); await changed(); }, {}, result)
        : acting("Pin", async () => { await post(`${at}/pin`); await changed(); }, {}, result),
      button("Delete", () => drop(one, close, changed), { class: "danger" })),
    result,
    facts([["Digest", h("code", { class: "wrap" }, one.digest)], ["Uploaded", time(one.created_at)], ["Tier", one.tier],
      ["Rank", count(one.rank)], ["Scaling", fixed(one.scaling, 2)], ["Variant", one.variants.join(", ") || "LoRA"], ["Dtype", one.dtype],
      ["Modules", count(one.modules_matched)], ["Parameters", compact(one.parameters)],
      ["On disk", bytes(one.bytes_on_disk)], ["On the device", bytes(one.bytes_on_device)],
      ["Requests", count(one.requests)], ["Tokens", count(one.tokens)], ["Last used", one.last_used ? time(one.last_used) : "not yet"]]),
    one.warnings.map((text) => h("p", { class: "warning" }, text)),
    versionsOf(versions, change, result),
    merging(one, at, changed));
}

function versionsOf(versions, change, result) {
  const several = versions.data.length > 1;
  const sliders = versions.data.map((one) => h("input", { type: "range", min: 0, max: 100, value: Math.round(one.share * 100), "aria-label": `Share of ${one.digest.slice(7, 15)}` }));
  const shares = versions.data.map((one) => h("output", {}, percent(one.share)));
  const told = () => {
    const sum = sliders.reduce((all, one) => all + one.valueAsNumber, 0);
    sliders.forEach((one, i) => { shares[i].textContent = percent(sum ? one.valueAsNumber / sum : 0); });
    return sum;
  };
  sliders.forEach((one) => one.addEventListener("input", told));
  const divide = async () => {
    const sum = told();
    const split = Object.fromEntries(sliders.map((one, i) => [versions.data[i].digest, one.valueAsNumber / sum]).filter(([, share]) => share > 0));
    const [only] = Object.keys(split);
    await change("promote", Object.keys(split).length === 1 ? { digest: only } : { split })();
  };
  return h("section", {}, h("h3", {}, "Versions"), h("table", { class: "plain" },
    h("thead", {}, h("tr", {}, ["Version", several ? "Share" : "", ""].map((title) => h("th", { scope: "col" }, title || h("span", { class: "hidden" }, "More"))))),
    h("tbody", {}, versions.data.map((one, i) => h("tr", {},
      h("th", { scope: "row" }, digest(one.digest), one.current ? [" ", badge("current", "good")] : one.staged ? [" ", badge("waits", "accent")] : null, h("br"), h("small", {}, time(one.created_at))),
      h("td", {}, several ? h("span", { class: "share" }, sliders[i], shares[i]) : null),
      h("td", {}, several && one.share < 1 ? acting("Promote", change("promote", { digest: one.digest }), { "aria-label": `Promote ${one.digest.slice(7, 15)}` }, result) : null))))),
  several ? h("div", { class: "row" }, acting("Split by these shares", divide, {}, result), acting("Roll back", change("rollback"), {}, result)) : null);
}

function merging(one, at, changed) {
  const result = h("div");
  const merge = (to, dtype) => async () => {
    const made = await post(`${at}/merge`, { to, ...(dtype ? { dtype } : {}) });
    if (made.resident) await changed();
    else replace(result, h("p", {}, `Written: ${count(made.checkpoint.files.length)} files, ${bytes(made.checkpoint.bytes)}.`));
  };
  const merged = one.merged;
  return h("section", {}, h("h3", {}, "Merge into the base"),
    merged ? facts([["Served as", merged.dtype], ["Memory", bytes(merged.bytes)], ["Built in", `${fixed(merged.build_seconds, 1)} s`],
      ["Drift", `KL ${fixed(merged.drift.mean_kl, 4)}, same token ${percent(merged.drift.greedy_agreement)}`],
      ...merged.decode_tokens_per_second.map((speed) => [`${count(speed.requests)} at once`, `${fixed(speed.merged, 0)} tokens/s, ${percent(speed.gain - 1)} more`])])
      : h("p", { class: "muted" }, "Serve it from weights of its own: faster for one adapter, at the price of memory. The answer says how far it drifts and how much faster it is."),
    result,
    h("div", { class: "row" }, merged ? acting("Undo the merge", async () => { await remove(`${at}/merge?to=resident`); await changed(); }, {}, result)
      : [acting("Merge, nf4", merge("resident", "nf4"), {}, result), acting("Merge, bf16", merge("resident", "bf16"), {}, result)],
    acting("Write a checkpoint", merge("checkpoint"), {}, result)));
}

// Deleted once it can no longer be undone, and only while the name still means this content.
function drop(one, close, changed) {
  doomed.add(one.name);
  close();
  toast(["Deleting ", one.name, " ", digest(one.digest)], {
    seconds: 8,
    undo: () => { doomed.delete(one.name); changed(one.name); },
    then: async () => {
      try {
        const now = await get(`v1/adapters/${path(one.name)}`);
        if (now.digest !== one.digest) throw new Error(`${one.name} has other content by now and was not deleted.`);
        await remove(`v1/adapters/${path(one.name)}`);
      } catch (error) {
        toast(refusal(error));
      }
      doomed.delete(one.name);
      await changed();
    },
  });
}
