// Server: the last hour, as the server keeps it.

import { get, repeat } from "./api.js";
import { chart } from "./chart.js";
import { brief, bytes, clock, compact, count, duration, facts, fixed, h, percent, refusal, replace } from "./dom.js";

const LAST = 300; // samples that the tiles add up

export async function mount(page, { signal }) {
  const tiles = h("div", { class: "tiles" }), fault = h("div");
  const grid = h("div", { class: "charts" });
  const charts = CHARTS.map(([title, format, columns, options]) => ({ columns, ...chart({ title, format, formatX: clock, least: 0, ...options }) }));
  replace(grid, charts.map((one) => one.figure));
  const about = h("div");
  page.append(h("div", { class: "bar" }, h("h1", {}, "Server"), h("span", { class: "muted" }, "the last hour, kept in memory")),
    fault, tiles, grid, about);

  const known = {};
  await repeat(5000, signal, async () => {
    try {
      const after = known.time?.at(-1) ?? 0;
      const [{ samples, limits }, ready, version] = await Promise.all([
        get(`v1/server/history?after=${after}`, signal),
        get("ready", signal).catch((error) => ({ error })),
        about.childElementCount ? null : get("version", signal),
      ]);
      for (const [name, values] of Object.entries(samples)) known[name] = [...(known[name] || []), ...values].slice(-720);
      replace(fault, ready.error ? refusal(ready.error) : null);
      replace(tiles, tilesOf(known, limits));
      if (version) {
        replace(about, facts([["Version", version.version], ["Engine process", ready.engine_pid && count(ready.engine_pid)],
          ["Base", ready.base_digest && h("code", {}, ready.base_digest)],
          ["KV cache", limits.kv_tokens && `${count(limits.kv_tokens)} tokens`],
          ["Sequences in a batch", count(limits.batch_requests)],
          ["Metrics", h("a", { href: "../metrics" }, "Prometheus page")], ["Reference", h("a", { href: "../docs" }, "HTTP API")]]));
      }
      for (const one of charts) one.set(one.columns.map(([name, column]) => ({ name, points: known.time.map((t, i) => [t, known[column][i]]) })));
    } catch (error) {
      if (!signal.aborted) replace(fault, refusal(error));
    }
  });
}

const CHARTS = [
  ["Tokens per second", compact, [["generated", "generation_tokens_per_second"], ["prompts", "prompt_tokens_per_second"]]],
  ["Requests", compact, [["running", "requests_running"], ["waiting", "requests_waiting"]], { most: 4 }],
  ["Adapters per step", brief, [["mean", "adapters_per_step"]], { most: 4 }],
  ["KV cache", percent, [["in use", "kv_usage"]], { most: 0.1 }],
  ["Adapters in memory", compact, [["device", "adapters_on_device"], ["host", "adapters_in_host_memory"]], { most: 4 }],
  ["Adapter memory", bytes, [["device", "adapter_device_bytes"], ["host", "adapter_host_bytes"]]],
  ["Training", percent, [["share of the device", "training_share"]], { most: 0.4 }],
  ["Faults", compact, [["failed requests", "errors"], ["engine restarts", "engine_restarts"]], { most: 4 }],
];

function tilesOf(known, limits) {
  const last = (name) => known[name]?.at(-1);
  const sum = (name) => (known[name] || []).reduce((a, b) => a + b, 0);
  const of = (used, all) => (all ? `${percent(used / all)} of ${bytes(all)}` : null);
  const hour = known.time?.length > 1 ? duration(known.time.at(-1) - known.time[0]) : "this hour";
  const items = [
    ["Tokens/s", compact(last("generation_tokens_per_second")), `${compact(last("prompt_tokens_per_second"))} of prompts`],
    ["Requests running", count(last("requests_running")), `${count(last("requests_waiting"))} waiting`],
    ["Adapters per step", fixed(known.adapters_per_step?.slice(-LAST).findLast((v) => v != null), 1), "when last busy"],
    ["KV cache", percent(last("kv_usage")), limits.kv_tokens && `of ${count(limits.kv_tokens)} tokens`],
    ["Adapter pool", count(last("adapters_on_device")), of(last("adapter_device_bytes"), limits.adapter_device_bytes)],
    ["Host memory", count(last("adapters_in_host_memory")), of(last("adapter_host_bytes"), limits.adapter_host_bytes)],
    ["Training", percent(last("training_share")), "of the device"],
    ["Failed requests", count(sum("errors")), `in ${hour}`],
    ["Engine restarts", count(sum("engine_restarts")), `in ${hour}`],
  ];
  return items.map(([title, value, more]) => h("div", { class: "tile" }, h("span", {}, title), h("strong", {}, value), h("small", {}, more || "")));
}
