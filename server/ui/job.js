// One fine-tuning job: its curves as they grow, its checkpoints, events and configuration.

import { follow, get, name as path, post } from "./api.js";
import { chart } from "./chart.js";
import { acting, badge, brief, clock, compact, count, duration, facts, fixed, h, refusal, replace, time, when } from "./dom.js";
import { KINDS, titleOf } from "./finetune.js";

const FINAL = new Set(["succeeded", "failed", "cancelled"]);
const RECENT = 20; // steps that the pace and the remaining time are of
const atStep = (x) => `step ${count(x)}`;

export async function showJob(side, id, { signal, jobs, changed }) {
  const at = `v1/fine_tuning/jobs/${id}`;
  const head = h("div", { class: "stack" }, h("p", { class: "muted" }, "…")), result = h("div"), checkpoints = h("div", { class: "stack" });
  const log = h("ol", { class: "events", tabindex: 0, "aria-label": "Events" }), settings = h("div");
  const loss = chart({ title: "Loss", format: (n) => fixed(n, 3), formatTick: brief, formatX: atStep, height: 240 });
  const small = {
    learning_rate: chart({ title: "Learning rate", format: (n) => (n === 0 ? "0" : n.toExponential(1)), formatX: atStep, height: 110, least: 0 }),
    grad_norm: chart({ title: "Gradient norm", format: (n) => fixed(n, 2), formatTick: brief, formatX: atStep, height: 110, least: 0 }),
    speed: chart({ title: "Tokens per second", format: compact, formatX: atStep, height: 110, least: 0 }),
  };
  const other = h("select", { "aria-label": "Compare with" });
  replace(side, head, result, h("label", { class: "check" }, "Compare with ", other), loss.figure,
    h("div", { class: "charts small" }, Object.values(small).map((one) => one.figure)),
    h("div", { class: "halves" }, h("section", { class: "panel" }, h("h3", {}, "Checkpoints"), checkpoints), h("section", { class: "panel" }, h("h3", {}, "Events"), log)),
    h("section", { class: "panel" }, h("h3", {}, "This run's configuration"), settings));

  const own = curves(), compared = curves();
  let job = null, comparing = null, frame = 0;

  function draw() {
    frame = 0;
    const label = comparing ? " of this" : "";
    loss.set([{ name: `training${label}`, points: own.loss }, { name: `validation${label}`, points: own.valid, dots: true, color: 1 },
      ...(comparing ? [{ name: `training of ${comparing}`, points: compared.loss, color: 2 }, { name: "validation", points: compared.valid, dots: true, color: 3 }] : [])]);
    for (const [key, one] of Object.entries(small)) {
      one.set([{ name: label ? "this" : "now", points: own[key] }, ...(comparing ? [{ name: comparing, points: compared[key], color: 2 }] : [])]);
    }
    if (job) heading();
  }
  const later = () => { frame ||= requestAnimationFrame(draw); };

  function heading() {
    const steps = own.loss.length ? own.loss.at(-1)[0] : job.step;
    const left = job.status === "running" ? own.remaining(job.total_steps) : null;
    const steer = (label, verb, props) => acting(label, async () => { await post(`${at}/${verb}`); await refresh(); }, props, result);
    replace(head, h("div", { class: "bar" }, h("h2", {}, titleOf(job)), badge(job.status.replaceAll("_", " "), KINDS[job.status]),
      job.status === "running" || job.status === "queued" ? steer("Pause", "pause") : null,
      job.status === "paused" || job.status === "pausing" ? steer("Resume", "resume") : null,
      FINAL.has(job.status) ? null : steer("Cancel", "cancel", { class: "danger" }),
      job.fine_tuned_model ? h("a", { class: "button main", href: `#/playground?m=${path(job.model)}&m=${path(job.fine_tuned_model)}` }, "Try it") : null),
    job.total_steps ? h("progress", { max: job.total_steps, value: steps, "aria-label": "Steps" }) : null,
    job.error ? refusal(job.error) : null,
    facts([["Step", job.total_steps ? `${count(steps)} of ${count(job.total_steps)}` : null], ["Remaining", left == null ? null : `about ${duration(left)}`],
      ["Ends", left == null ? null : clock(Date.now() / 1000 + left)], ["Loss", own.loss.length ? fixed(own.loss.at(-1)[1], 4) : null],
      ["Tokens trained on", own.tokens ? compact(own.tokens) : null], ["Started", when(job.created_at)], ["Ended", job.finished_at && when(job.finished_at)],
      ["Adapter", job.fine_tuned_model && h("a", { href: `#/adapters/${path(job.fine_tuned_model)}` }, job.fine_tuned_model)]]));
  }

  async function refresh() {
    const [now, made] = await Promise.all([get(at, signal), get(`${at}/checkpoints?limit=100`, signal)]);
    job = now;
    replace(checkpoints, made.data.length ? h("table", { class: "plain" }, h("thead", {}, h("tr", {}, ["Step", "Loss", "Validation", ""].map((title) => h("th", { scope: "col" }, title || h("span", { class: "hidden" }, "Try it"))))),
      h("tbody", {}, made.data.map((one) => h("tr", {}, h("th", { scope: "row" }, count(one.step_number)), h("td", {}, fixed(one.metrics.train_loss, 4)),
        h("td", {}, fixed(one.metrics.full_valid_loss ?? one.metrics.valid_loss, 4)),
        h("td", {}, h("a", { href: `#/playground?m=${path(job.model)}&m=${path(one.fine_tuned_model_checkpoint)}` }, "Try it"))))))
      : h("p", { class: "muted" }, "The first one comes at the end of an epoch, or as often as the job was told."));
    replace(settings, configuration(job));
    choices();
    later();
    await changed();
  }

  function choices() {
    const others = jobs().filter((one) => one.id !== id);
    const before = other.value;
    replace(other, h("option", { value: "" }, others.length ? "nothing" : "no other job yet"), others.map((one) => h("option", { value: one.id }, titleOf(one))));
    other.value = before;
  }
  let watching = null;
  other.addEventListener("change", () => {
    watching?.abort();
    watching = new AbortController();
    signal.addEventListener("abort", () => watching.abort());
    compared.clear();
    comparing = other.value ? other.selectedOptions[0].textContent : null;
    later();
    if (other.value) follow(`v1/fine_tuning/jobs/${other.value}/events`, (event) => { compared.take(event); later(); }, watching.signal).catch((error) => replace(result, refusal(error)));
  });

  try {
    await refresh();
    await follow(`${at}/events`, (event) => {
      if (own.take(event)) { later(); return; }
      log.prepend(h("li", { class: event.level }, time(event.created_at, clock(event.created_at)), " ", event.message));
      refresh().catch(() => {});
    }, signal);
    await refresh();
  } catch (error) {
    if (!signal.aborted) replace(result, refusal(error));
  }
}

// The curves of a job, made of its events.
function curves() {
  const made = {
    clear() { Object.assign(made, { loss: [], valid: [], learning_rate: [], grad_norm: [], speed: [], times: [], tokens: 0 }); },
    // Whether the event was a step.
    take({ type, data, created_at: at }) {
      if (type !== "metrics" || data?.step == null) return false;
      const { step } = data;
      made.loss.push([step, data.train_loss ?? null]);
      const valid = data.full_valid_loss ?? data.valid_loss;
      if (valid != null) made.valid.push([step, valid]);
      made.learning_rate.push([step, data.learning_rate]);
      made.grad_norm.push([step, data.grad_norm]);
      made.times.push([step, at, data.trained_tokens]);
      const [, since, before] = made.times.at(-RECENT) || made.times[0];
      if (at > since) made.speed.push([step, (data.trained_tokens - before) / (at - since)]);
      made.tokens = data.trained_tokens;
      return true;
    },
    // Seconds to the last step, at the pace of recent ones.
    remaining(total) {
      const last = made.times.at(-1), first = made.times.at(-RECENT) || made.times[0];
      if (!last || last === first || !total) return null;
      return ((last[1] - first[1]) / (last[0] - first[0])) * (total - last[0]);
    },
  };
  made.clear();
  return made;
}

function configuration(job) {
  const shown = (value) => (value !== null && typeof value === "object" ? JSON.stringify(value) : typeof value === "number" ? String(value) : String(value));
  const rows = (group) => Object.entries(group || {}).filter(([, value]) => value !== null && value !== "" && !(typeof value === "object" && Object.keys(value).length === 0))
    .map(([key, value]) => [key, h("code", {}, shown(value))]);
  return h("div", { class: "stack" }, facts([["Model", h("code", {}, job.model)], ["Training file", h("code", {}, job.training_file)],
    ["Validation file", job.validation_file && h("code", {}, job.validation_file)], ["Seed", count(job.seed)], ["Job", h("code", {}, job.id)]]),
  h("h4", {}, "Hyperparameters"), facts(rows(job.hyperparameters)), h("h4", {}, "Adapter"), facts(rows(job.lora)), h("h4", {}, "Training"), facts(rows(job.training)));
}
