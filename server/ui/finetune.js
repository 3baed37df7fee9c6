// Fine-tune: data files, a new job, and the jobs that there are.

import { adapterInput } from "./adapters.js";
import { baseName, get, post, repeat, upload } from "./api.js";
import { ago, badge, bytes, button, compact, count, debounce, droppable, empty, facts, field, h, percent, refusal, replace, time, toast } from "./dom.js";
import { showJob } from "./job.js";

export const KINDS = { succeeded: "good", running: "accent", failed: "bad", cancelled: "" };
const JOBS = "v1/fine_tuning/jobs";

export async function mount(page, { part, signal }) {
  const list = h("tbody"), none = h("div"), fault = h("div"), side = h("div", { class: "job" });
  const table = h("table", { class: "list" }, h("caption", { class: "hidden" }, "Jobs"), h("thead", {}, h("tr", {},
    ["Job", "Status", "Step"].map((title) => h("th", { scope: "col" }, title)))), list);
  const forms = h("div");
  let jobs = [];
  const form = (files) => replace(forms, jobForm(files, (job) => { location.hash = `#/finetune/${job.id}`; }, () => replace(forms)));
  page.append(h("div", { class: "bar" }, h("h1", {}, "Fine-tune"), button("New fine-tune", () => form([]), { class: "main" })), forms, fault,
    h("div", { class: "jobs" }, h("div", { class: "master" }, h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of jobs" }, table), none), side));
  droppable(page, form, signal);

  async function load() {
    try {
      jobs = (await get(`${JOBS}?limit=100`, signal)).data;
      replace(fault);
    } catch (error) {
      if (!signal.aborted) replace(fault, refusal(error));
      return;
    }
    const queue = jobs.filter((job) => job.status === "queued" || job.status === "validating_files").reverse();
    table.hidden = jobs.length === 0;
    replace(none, jobs.length ? null : empty("No fine-tunes yet", "Drop a JSONL file here, or start a ", button("new fine-tune", () => form([])), "."));
    replace(list, jobs.map((job) => h("tr", { class: job.id === part ? "chosen" : "" },
      h("th", { scope: "row" }, h("a", { href: `#/finetune/${job.id}`, "aria-current": job.id === part ? "true" : null }, titleOf(job)), h("br"), h("small", {}, time(job.created_at, ago(job.created_at)))),
      h("td", {}, badge(job.status.replaceAll("_", " "), KINDS[job.status]), queue.includes(job) ? ` no. ${count(queue.indexOf(job) + 1)} of the queue` : null),
      h("td", {}, job.total_steps ? `${count(job.step)} of ${count(job.total_steps)}` : "–"))));
  }
  await load();
  if (part) showJob(side, part, { signal, jobs: () => jobs, changed: load });
  else if (jobs.length) replace(side, h("p", { class: "muted hint" }, "Choose a job to see its curves."));
  await repeat(4000, signal, () => (list.contains(document.activeElement) ? null : load()));
}

export const titleOf = (job) => job.fine_tuned_model?.split(":").slice(2).join(":") || job.metadata?.name || `${job.model} ${job.id.slice(-6)}`;

// --- a new job --------------------------------------------------------------------------------------

const CHOICES = [
  ["n_epochs", "Epochs", { type: "number", min: 1, step: 1, placeholder: "3" }],
  ["batch_size", "Batch size", { type: "number", min: 1, step: 1, placeholder: "auto" }],
  ["learning_rate", "Learning rate", { type: "number", min: 0, max: 1, step: "any", placeholder: "auto" }],
  ["r", "Rank r", { type: "number", min: 1, step: 1, placeholder: "16" }],
  ["lora_alpha", "Alpha", { type: "number", min: 0, step: "any", placeholder: "32" }],
  ["lora_dropout", "Dropout", { type: "number", min: 0, max: 0.99, step: 0.01, placeholder: "0" }],
  ["target_modules", "Linears", { placeholder: "all-linear" }, "names, with commas"],
  ["lr_scheduler", "Schedule", ["linear", "cosine", "constant"]],
  ["max_seq_len", "Longest example", { type: "number", min: 8, step: 1, placeholder: "2048" }],
  ["micro_batch_tokens", "Tokens of a pass", { type: "number", min: 1, step: 1, placeholder: "auto" }],
  ["checkpoint_every", "Checkpoint every", { type: "number", min: 1, step: 1, placeholder: "epoch" }, "steps"],
  ["seed", "Seed", { type: "number", min: 0, step: 1, placeholder: "random" }],
];
const HYPER = ["n_epochs", "batch_size"], LORA = ["r", "lora_alpha", "lora_dropout", "target_modules"], TOP = ["seed"];

function jobForm(dropped, started, close) {
  const controls = {}, memory = h("div", { class: "estimate", "aria-live": "polite" }), result = h("div");
  const model = adapterInput({ required: true });
  const suffix = h("input", { maxlength: 64, pattern: "[A-Za-z0-9._\\-]{1,64}", placeholder: "orders" });
  const training = fileChooser("Training data", true), validation = fileChooser("Validation data", false);
  for (const [key, , props] of CHOICES) {
    controls[key] = Array.isArray(props) ? h("select", {}, props.map((one) => h("option", {}, one))) : h("input", props);
  }
  const value = (key) => {
    const { value: text, type } = controls[key];
    if (text === "") return undefined;
    if (key === "target_modules") return text.includes(",") || text !== "all-linear" ? text.split(/[\s,]+/).filter(Boolean) : text;
    return type === "number" ? Number(text) : text;
  };
  const chosen = (keys) => Object.fromEntries(keys.map((key) => [key, value(key)]).filter(([, one]) => one !== undefined));
  const shape = () => ({ model: model.value, lora: chosen(LORA),
    training: chosen(CHOICES.map(([key]) => key).filter((key) => ![...HYPER, ...LORA, ...TOP].includes(key))) });

  const estimate = debounce(async () => {
    if (!form.isConnected || !model.value) return;
    try {
      const { checkpoint_every: _, ...rest } = shape().training;
      replace(memory, memoryOf(await post("v1/fine_tuning/estimate", { ...shape(), training: rest })));
    } catch (error) {
      replace(memory, refusal(error));
    }
  }, 400);
  const form = h("form", { class: "panel newjob", "aria-label": "New fine-tune" }, h("div", { class: "bar" }, h("h2", {}, "New fine-tune"), button("×", close, { class: "plain", "aria-label": "Close" })),
    h("div", { class: "halves" },
      h("div", { class: "stack" }, h("div", { class: "fields" }, field("Start from", model, "the base, or an adapter to go on from"), field("Name", suffix, "part of the adapter's name")),
        training.element, validation.element),
      h("div", { class: "stack" }, h("div", { class: "fields" }, CHOICES.map(([key, label, , hint]) => field(label, controls[key], hint))), memory)),
    result, h("div", { class: "row" }, h("button", { class: "main" }, "Start"), h("span", { class: "muted" }, "It trains on the resident base, between requests.")));
  form.addEventListener("input", estimate);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    replace(result);
    try {
      if (!training.value()) throw new Error("Choose the training data first.");
      const body = { ...shape(), training_file: training.value(), method: { type: "supervised", supervised: { hyperparameters: chosen(HYPER) } }, ...chosen(TOP) };
      if (validation.value()) body.validation_file = validation.value();
      if (suffix.value) Object.assign(body, { suffix: suffix.value, metadata: { name: suffix.value } });
      started(await post(JOBS, body));
    } catch (error) {
      replace(result, refusal(error));
    }
  });
  baseName().then((name) => { model.value ||= name; estimate(); });
  const [first, second] = dropped;
  if (first) training.take(first);
  if (second) validation.take(second);
  return form;
}

function memoryOf(plan) {
  const parts = [["Adapter", plan.adapter], ["Gradients", plan.gradients], ["Optimiser", plan.optimizer], ["Checkpoint", plan.checkpoint],
    ["Activations", plan.activations[plan.mode || "recompute"]]];
  const total = plan.total[plan.mode || "recompute"];
  return [h("h3", {}, `Memory: ${bytes(total)} of ${bytes(plan.available)} available`),
    h("meter", { min: 0, max: plan.available, high: plan.available * 0.8, value: Math.min(total, plan.available), "aria-label": "Memory" }, percent(total / plan.available)),
    facts([...parts.map(([name, size]) => [name, bytes(size)]), ["Trained numbers", compact(plan.parameters)], ["Tokens of a pass", count(plan.tokens)]]),
    plan.mode ? h("p", { class: "muted" }, plan.mode === "keep" ? "Activations are kept: the faster way." : "Activations are computed twice, to save memory.")
      : h("p", { class: "warning" }, "It does not fit: fewer tokens of a pass, or a lower rank.")];
}

// --- data files ---------------------------------------------------------------------------------------

// Choose an uploaded file or bring one; the report and a look at its lines are below it.
export function fileChooser(label, required) {
  const select = h("select", {}), below = h("div", { class: "stack" });
  const picker = h("input", { type: "file", accept: ".jsonl,.json", "aria-label": `Upload ${label.toLowerCase()}`, onchange: () => picker.files[0] && take(picker.files[0]) });
  const element = h("fieldset", { class: "file" }, h("legend", {}, label), h("div", { class: "row" },
    h("label", { class: "grow" }, h("span", { class: "hidden" }, label), select), picker), below);
  const target = new AbortController();
  droppable(element, (files) => files[0] && take(files[0]), target.signal);
  element.addEventListener("drop", (event) => event.stopPropagation());

  async function list(chosen = "") {
    const { data } = await get("v1/files?purpose=fine-tune&limit=200");
    replace(select, h("option", { value: "" }, required ? (data.length ? "Choose a file" : "Upload a file first") : "None"),
      data.map((one) => h("option", { value: one.id }, `${one.filename} – ${count(one.report?.examples)} examples, ${ago(one.created_at)}`)));
    select.value = chosen;
    const file = data.find((one) => one.id === chosen);
    replace(below, file ? fileReport(file) : null);
  }
  async function take(file) {
    const bar = h("progress", { max: 1, value: 0, "aria-label": `Upload of ${file.name}` });
    replace(below, bar);
    const form = new FormData();
    form.set("purpose", "fine-tune");
    form.set("file", file, file.name);
    try {
      const stored = await upload("v1/files", form, (share) => { bar.value = share; });
      await list(stored.id);
      element.dispatchEvent(new Event("input", { bubbles: true }));
    } catch (error) {
      replace(below, refusal(error));
    }
  }
  select.addEventListener("change", () => list(select.value));
  list().catch((error) => toast(refusal(error)));
  return { element, take, value: () => select.value };
}

function fileReport(file) {
  const report = file.report || {};
  const lines = h("div", { class: "lines" });
  let after = 0;
  const more = button("More lines", async () => {
    more.disabled = true;
    try {
      const page = await get(`v1/files/${file.id}/preview?limit=5&after=${after}`);
      lines.append(...page.data.map(lineOf));
      after = page.data.at(-1)?.line ?? after;
      more.hidden = !page.has_more;
    } catch (error) {
      lines.append(refusal(error));
    }
    more.disabled = false;
  });
  const look = h("details", { ontoggle: () => look.open && !after && more.click() }, h("summary", {}, "A look at what is trained on"),
    h("p", { class: "muted" }, "Every token of a line; ", h("mark", {}, "marked"), " ones count in the loss."), lines, more);
  return [facts([["Examples", count(report.examples)], ["Tokens", compact(report.tokens)],
    ["Trained on", `${compact(report.trained_tokens)} (${percent(report.trained_tokens / report.tokens)})`],
    ["Duplicates", count(report.duplicates)], ["Empty", count(report.empty)], ["Cut", count(report.over_long)]]), look];
}

function lineOf(line) {
  const trained = line.sequences.reduce((sum, one) => sum + one.trained.filter(Boolean).length, 0);
  const notes = [line.cut ? badge("cut", "bad") : null, trained ? null : badge("nothing to learn: left out", "bad")];
  return h("div", { class: "line-of" }, h("p", { class: "muted" }, `Line ${count(line.line)}: ${count(line.length)} tokens, ${count(trained)} trained on `, notes),
    line.sequences.map((one) => h("p", { class: "tokens" }, one.tokens.map((text, i) => h(one.trained[i] ? "mark" : "span", {}, text)))));
}
