// Playground: one prompt to the base, adapters or versions, side by side.

import { adapterInput } from "./adapters.js";
import { address, baseName, events, get, name as path, send } from "./api.js";
import { acting, button, count, digest, field, fixed, h, refusal, replace, toast } from "./dom.js";

const MOST = 4;
const KEPT = "lorakeet-talk"; // the conversations of this tab
// [name, label, kind, hint]; what is left empty is not sent, and the server's default holds.
const PARAMETERS = [
  ["temperature", "Temperature", { type: "number", min: 0, max: 2, step: 0.05, placeholder: "1" }],
  ["top_p", "Top p", { type: "number", min: 0, max: 1, step: 0.01, placeholder: "1" }],
  ["top_k", "Top k", { type: "number", min: -1, step: 1, placeholder: "off" }],
  ["min_p", "Min p", { type: "number", min: 0, max: 1, step: 0.01, placeholder: "0" }],
  ["repetition_penalty", "Repetition penalty", { type: "number", min: 0, max: 2, step: 0.05, placeholder: "1" }],
  ["max_tokens", "Max tokens", { type: "number", min: 1, step: 1, placeholder: "256" }],
  ["seed", "Seed", { type: "number", step: 1, placeholder: "random" }],
];

export async function mount(page, { params, signal }) {
  const base = await baseName();
  const controls = {}, columns = [], grid = h("div", { class: "columns" }), fault = h("div");
  let stop = null, turns = JSON.parse(sessionStorage.getItem(KEPT) || "[]");

  // --- what is asked
  for (const [key, , props] of PARAMETERS) controls[key] = h("input", { ...props, value: params.get(key) || "" });
  controls.system = h("textarea", { rows: 2, value: params.get("system") || "" });
  controls.stop = h("input", { value: params.get("stop") || "", placeholder: "a string" });
  controls.tools = h("textarea", { rows: 3, class: "mono", value: params.get("tools") || "", placeholder: '[{"type": "function", "function": {...}}]', spellcheck: "false" });
  controls.schema = h("textarea", { rows: 3, class: "mono", value: params.get("schema") || "", placeholder: '{"type": "object", ...}', spellcheck: "false" });
  controls.logprobs = h("input", { type: "checkbox", checked: params.has("logprobs") });
  const prompt = h("textarea", { rows: 3, value: params.get("prompt") || "", placeholder: "Ask all columns (Enter sends, Shift+Enter is a new line)", "aria-label": "Prompt" });
  const sending = h("button", { class: "main" }, "Send");
  const composer = h("form", { class: "composer panel" }, prompt, h("div", { class: "row" }, sending,
    h("label", { class: "check" }, controls.logprobs, "show probabilities"),
    h("span", { class: "grow" }), button("New conversation", () => { turns = []; keep(); drawAll(); prompt.focus(); })));
  const settings = h("details", { class: "panel", open: params.size > 1 && PARAMETERS.some(([key]) => params.has(key)) },
    h("summary", {}, "Parameters, system prompt, tools, schema"),
    h("div", { class: "fields" }, PARAMETERS.map(([key, label]) => field(label, controls[key])), field("Stop", controls.stop),
      h("div", { class: "wide" }, field("System prompt", controls.system)),
      h("div", { class: "wide" }, field("Tools", controls.tools, "OpenAI's list, in JSON")),
      h("div", { class: "wide" }, field("JSON schema of the answer", controls.schema))));

  // The body of a request. Raises SyntaxError for faulty JSON.
  function body(model, messages) {
    const made = { model, messages: controls.system.value ? [{ role: "system", content: controls.system.value }, ...messages] : messages };
    for (const [key] of PARAMETERS) if (controls[key].value !== "") made[key] = Number(controls[key].value);
    made.max_tokens ??= 256;
    if (controls.stop.value) made.stop = controls.stop.value;
    if (controls.tools.value.trim()) made.tools = json("Tools", controls.tools.value);
    if (controls.schema.value.trim()) {
      made.response_format = { type: "json_schema", json_schema: { name: "answer", schema: json("JSON schema", controls.schema.value) } };
    }
    if (controls.logprobs.checked) Object.assign(made, { logprobs: true, top_logprobs: 5 });
    return { ...made, stream: true, stream_options: { include_usage: true } };
  }

  function keep() {
    sessionStorage.setItem(KEPT, JSON.stringify(turns));
    const kept = new URLSearchParams(columns.map((one) => ["m", one.model()]));
    for (const key of [...PARAMETERS.map(([one]) => one), "system", "stop", "tools", "schema"]) if (controls[key].value) kept.set(key, controls[key].value);
    if (controls.logprobs.checked) kept.set("logprobs", "1");
    if (prompt.value) kept.set("prompt", prompt.value);
    if (!signal.aborted) history.replaceState(null, "", `#/playground?${kept}`);
  }
  page.addEventListener("change", keep);

  // --- columns
  const adding = button("Add a column", () => { addColumn(base).focus(); keep(); });
  function addColumn(model) {
    const column = makeColumn(model, base, keep, () => {
      if (columns.length === 1) return;
      columns.splice(columns.indexOf(column), 1);
      column.element.remove();
      arrange();
      keep();
    });
    columns.push(column);
    grid.append(column.element);
    arrange();
    column.draw(turns);
    return column;
  }
  function arrange() {
    grid.dataset.columns = columns.length;
    adding.disabled = columns.length === MOST;
  }
  const drawAll = () => columns.forEach((one) => one.draw(turns));

  // --- asking
  composer.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (stop) { stop.abort(); return; }
    const text = prompt.value.trim();
    if (!text) { prompt.focus(); return; }
    let asked;
    try {
      const said = (one) => turns.flatMap((turn) => [{ role: "user", content: turn.prompt },
        ...(turn.answers[one.model()]?.text ? [{ role: "assistant", content: turn.answers[one.model()].text }] : [])]);
      asked = columns.map((one) => body(one.model(), [...said(one), { role: "user", content: text }]));
    } catch (error) {
      replace(fault, refusal(error));
      return;
    }
    replace(fault);
    const turn = { prompt: text, answers: {} };
    turns.push(turn);
    prompt.value = "";
    stop = new AbortController();
    signal.addEventListener("abort", () => stop?.abort());
    sending.textContent = "Stop";
    await Promise.all(columns.map(async (one, i) => {
      const answer = (turn.answers[one.model()] = { text: "" });
      one.draw(turns);
      await ask(asked[i], answer, one, stop.signal);
      one.draw(turns);
    }));
    stop = null;
    sending.textContent = "Send";
    keep();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); composer.requestSubmit(); }
  });

  // --- what can be taken along
  const asked = () => columns.map((one) => body(one.model(), [{ role: "user", content: prompt.value || turns.at(-1)?.prompt || "Hello!" }]));
  const copying = (label, text) => acting(label, async () => { await navigator.clipboard.writeText(text()); toast("Copied."); }, {}, fault);
  page.append(h("div", { class: "bar" }, h("h1", {}, "Playground"), adding, copying("Copy as curl", () => asCurl(asked())),
    copying("Copy as Python", () => asPython(asked())), copying("Share", () => { keep(); return location.href; })),
  grid, fault, composer, settings);
  for (const model of params.getAll("m").slice(0, MOST)) addColumn(model || base);
  if (!columns.length) addColumn(base);
  prompt.focus();
}

function json(label, text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${label}: ${error.message}`);
  }
}

// One answer as it comes: `answer` is what is kept of it.
async function ask(body, answer, column, signal) {
  const began = performance.now();
  const utf8 = new TextDecoder(); // a token may end within a character
  let first = null, last = null;
  try {
    const response = await send("v1/chat/completions", { method: "POST", json: body, signal });
    answer.digest = response.headers.get("X-Adapter-Digest");
    for await (const { data } of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      answer.digest ||= chunk.system_fingerprint;
      if (chunk.usage) Object.assign(answer, { tokens: chunk.usage.completion_tokens, prompt: chunk.usage.prompt_tokens });
      const choice = chunk.choices[0];
      if (!choice) continue;
      const { content, tool_calls: calls } = choice.delta;
      if (choice.finish_reason) answer.finish = choice.finish_reason;
      if (content || calls) { first ??= performance.now(); last = performance.now(); }
      if (content) answer.text += content;
      for (const call of calls || []) {
        const made = ((answer.calls ||= [])[call.index] ||= { name: "", arguments: "" });
        made.name += call.function.name || "";
        made.arguments += call.function.arguments || "";
      }
      for (const token of choice.logprobs?.content || []) {
        (answer.logprobs ||= []).push([utf8.decode(new Uint8Array(token.bytes), { stream: true }), token.logprob, token.top_logprobs.map((one) => [one.token, one.logprob])]);
      }
      column.grow(answer);
    }
  } catch (error) {
    if (error.name !== "AbortError") answer.error = { message: error.message, param: error.param, code: error.code };
    else answer.finish = "stopped";
  }
  if (first != null) {
    answer.ttft = (first - began) / 1000;
    if (answer.tokens > 1 && last > first) answer.rate = (answer.tokens - 1) / ((last - first) / 1000);
  }
}

function makeColumn(model, base, keep, close) {
  const talk = h("div", { class: "talk", tabindex: 0, role: "region", "aria-live": "off" });
  const [first, version] = model.split("@");
  const chosen = adapterInput({ value: first, "aria-label": "Model or adapter", class: "grow" }, [base]);
  const versions = h("select", { "aria-label": "Version", hidden: true });
  const element = h("section", { class: "column" },
    h("div", { class: "row head" }, chosen, versions, button("×", close, { class: "plain", "aria-label": "Remove this column" })), talk);
  let growing = null, frame = 0;

  async function look(digestPrefix) {
    const found = chosen.value === base ? { data: [] } : await get(`v1/adapters/${path(chosen.value)}/versions`).catch(() => ({ data: [] }));
    replace(versions, h("option", { value: "" }, "as served"), found.data.map((one) => h("option", { value: one.digest }, one.digest.slice(7, 15))));
    versions.hidden = found.data.length < 2 && !digestPrefix;
    const match = digestPrefix && found.data.find((one) => one.digest.replace("sha256:", "").startsWith(digestPrefix.replace("sha256:", "")));
    versions.value = match ? match.digest : "";
  }
  const value = () => (versions.value ? `${chosen.value}@${versions.value}` : chosen.value.trim() || base);
  chosen.addEventListener("change", async () => { await look(); name(); keep(); });
  versions.addEventListener("change", () => name());
  const name = () => talk.setAttribute("aria-label", `Answers of ${value()}`);
  const ready = look(version).then(name);
  name();

  function draw(turns) {
    growing = null;
    const said = turns.flatMap((turn) => {
      const answer = turn.answers[value()];
      if (!answer) return [];
      const place = h("div", { class: "answer" });
      growing = { answer, place };
      show(answer, place);
      return [h("p", { class: "said" }, turn.prompt), place];
    });
    replace(talk, said.length ? said : h("p", { class: "muted hint" }, "The answer comes here, with the digest of what answered, the time to the first token and tokens per second."));
    talk.scrollTop = talk.scrollHeight;
  }
  function grow(answer) {
    if (growing?.answer !== answer) return;
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      if (!growing) return;
      show(growing.answer, growing.place);
      talk.scrollTop = talk.scrollHeight;
    });
  }
  return { element, draw, grow, model: value, ready, focus: () => chosen.focus() };
}

function show(answer, place) {
  replace(place,
    answer.logprobs ? shaded(answer.logprobs) : h("p", { class: "text" }, answer.text),
    answer.calls?.map((call) => h("pre", { class: "call" }, `${call.name}(${call.arguments})`)),
    answer.error ? refusal(answer.error) : null,
    h("p", { class: "under muted" }, answer.digest ? digest(answer.digest) : null,
      answer.ttft != null ? h("span", {}, `first token ${fixed(answer.ttft, 2)} s`) : null,
      answer.rate ? h("span", {}, `${fixed(answer.rate, 1)} tokens/s`) : null,
      answer.tokens != null ? h("span", {}, `${count(answer.tokens)} tokens`) : null,
      answer.finish ? h("span", {}, answer.finish) : null));
}

// Tokens shaded by their probability. The one under the pointer, or that the arrow keys reach, tells its alternatives.
function shaded(tokens) {
  const told = h("div", { class: "alternatives", role: "status" });
  const spans = tokens.map(([text, logprob], i) => h("span", { class: `p${Math.min(4, Math.floor(Math.exp(logprob) * 5))}`, "data-i": i }, text));
  let at = -1;
  const tell = (i) => {
    spans[at]?.classList.remove("at");
    at = i;
    if (!spans[at]) { replace(told); return; }
    spans[at].classList.add("at");
    replace(told, tokens[at][2].map(([text, logprob]) => h("span", { class: logprob === tokens[at][1] ? "taken" : "" },
      h("code", {}, JSON.stringify(text).slice(1, -1)), ` ${fixed(Math.exp(logprob) * 100, 1)}%`)));
  };
  const text = h("p", { class: "text shaded", tabindex: 0, role: "group", "aria-label": "Answer, token by token: arrow keys",
    onpointerover: (event) => event.target.dataset.i && tell(Number(event.target.dataset.i)), onpointerleave: () => tell(-1),
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      tell(Math.min(spans.length - 1, Math.max(0, at + step)));
    } }, spans);
  return h("div", { class: "probabilities" }, text, told);
}

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const asCurl = (bodies) => bodies.map((body) => `curl -N ${shell(address("v1/chat/completions"))} \\
  -H "Authorization: Bearer $LORAKEET_API_KEY" -H 'Content-Type: application/json' \\
  -d ${shell(JSON.stringify(body))}\n`).join("\n");

const OPENAI = new Set(["temperature", "top_p", "max_tokens", "seed", "stop", "tools", "response_format", "logprobs", "top_logprobs", "messages"]);
function asPython(bodies) {
  const python = (value) => JSON.stringify(value, null, 4)
    .replace(/("(?:[^"\\]|\\.)*")|\b(true|false|null)\b/g, (_, text, word) => text ?? { true: "True", false: "False", null: "None" }[word]);
  const [{ model, stream, stream_options: options, ...rest }] = bodies;
  const own = Object.fromEntries(Object.entries(rest).filter(([key]) => !OPENAI.has(key)));
  const known = Object.entries(rest).filter(([key]) => OPENAI.has(key)).map(([key, value]) => `        ${key}=${python(value).replaceAll("\n", "\n        ")},\n`);
  const extra = Object.keys(own).length ? `        extra_body=${python(own).replaceAll("\n", "\n        ")},\n` : "";
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(address("v1"))}, api_key=os.environ.get("LORAKEET_API_KEY", "none"))
for model in ${python(bodies.map((body) => body.model)).replace(/\n\s*/g, " ")}:
    stream = client.chat.completions.create(
        model=model,
${known.join("")}${extra}        stream=True,
    )
    print(f"--- {model}")
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
`;
}
