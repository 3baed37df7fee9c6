// The public API, as any client sees it. Paths are relative to the page, so a proxy's prefix does not matter.

const ROOT = new URL("../", document.baseURI);
const KEY = "lorakeet-key";
let asking = null; // the login that everyone waits for

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    Object.assign(this, { status, param: error.param, code: error.code });
  }
}

const url = (path) => new URL(path, ROOT);
export const address = (path) => url(path).href;
export const name = (adapter) => encodeURIComponent(adapter);
const key = () => sessionStorage.getItem(KEY);
const headers = (more) => ({ ...(key() ? { Authorization: `Bearer ${key()}` } : {}), ...more });

// Ask for the key, once for all who wait.
function login(refused) {
  asking ??= new Promise((done) => {
    const dialog = document.getElementById("login"), form = dialog.querySelector("form");
    const told = form.querySelector(".refusal");
    told.hidden = !refused;
    told.textContent = refused || "";
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, form.elements.key.value);
      form.reset();
      dialog.close();
      asking = null;
      done();
    };
    dialog.showModal();
  });
  return asking;
}

async function failure(response) {
  const said = await response.json().catch(() => null);
  return new ApiError(response.status, said?.error || { message: `${response.status} ${response.statusText}` });
}

// The response, once it is a good one. 401 asks for a key and tries again.
export async function send(path, { json, headers: more, ...options } = {}) {
  const body = json === undefined ? options.body : JSON.stringify(json);
  const type = json === undefined ? {} : { "Content-Type": "application/json" };
  for (;;) {
    const used = key();
    let response;
    try {
      response = await fetch(url(path), { cache: "no-store", ...options, body, headers: headers({ ...type, ...more }) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: "The server does not answer." });
    }
    if (response.ok) return response;
    const error = await failure(response);
    if (response.status !== 401) throw error;
    if (used === key()) await login(used ? error.message : "");
  }
}

export const get = async (path, signal) => (await send(path, { signal })).json();
export const post = async (path, json, options) => (await send(path, { method: "POST", json, ...options })).json();
export const remove = async (path) => (await send(path, { method: "DELETE" })).json();

// Upload a form; `progress` hears of 0 to 1. fetch cannot tell how far it is.
export function upload(path, form, progress) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    request.open("POST", url(path));
    request.responseType = "json";
    for (const [header, value] of Object.entries(headers())) request.setRequestHeader(header, value);
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onload = async () => {
      if (request.status < 300) done(request.response);
      else if (request.status === 401) {
        await login(key() ? request.response?.error.message : "");
        upload(path, form, progress).then(done, failed);
      } else failed(new ApiError(request.status, request.response?.error || { message: request.statusText }));
    };
    request.onerror = () => failed(new ApiError(0, { message: "The upload was cut off." }));
    request.send(form);
  });
}

// The events of a stream as { id, data }.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = {};
      for (const line of block.split("\n")) {
        const [, field, content] = /^(\w+): ?(.*)$/.exec(line) || [];
        if (field) event[field] = content;
      }
      if (event.data) yield event;
    }
  }
}

// All events of a path, from the first to [DONE]; one that is cut off goes on after the last event that came.
export async function follow(path, take, signal) {
  let last;
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
      for await (const event of events(await send(path, { headers, signal }))) {
        if (event.data === "[DONE]") return;
        last = event.id || last;
        take(JSON.parse(event.data));
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status >= 400 && error.status < 500) throw error;
    }
    await pause(1000, signal);
  }
}

export const pause = (ms, signal) => new Promise((done) => {
  const timer = setTimeout(done, ms);
  signal?.addEventListener("abort", () => { clearTimeout(timer); done(); }, { once: true });
});

// Do `work` now and every `ms` until the view is left, but not while the page is hidden. Faults are `work`'s matter.
export async function repeat(ms, signal, work) {
  while (!signal.aborted) {
    if (!document.hidden) await work();
    await pause(ms, signal);
  }
}

let base;
export const baseName = async () => (base ??= (await get("v1/models?limit=1")).data[0].id);
