// The frame around the views: which one the address names, and whether the server is there.

import { get, repeat } from "./api.js";
import { h, refusal, replace } from "./dom.js";

const VIEWS = {
  adapters: ["Adapters", () => import("./adapters.js")],
  playground: ["Playground", () => import("./playground.js")],
  finetune: ["Fine-tune", () => import("./finetune.js")],
  evaluations: ["Evaluations", () => import("./evaluations.js")],
  server: ["Server", () => import("./server.js")],
};
const main = document.getElementById("main");
let leaving = new AbortController();

// #/adapters/NAME?search=... is the view `adapters`, its part `NAME`, and parameters.
async function show() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [asked, ...rest] = path.split("/");
  if (location.hash === "#main") return;
  const view = asked in VIEWS ? asked : "adapters";
  const [title, load] = VIEWS[view];
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  document.title = `${title} – Lorakeet`;
  for (const link of document.querySelectorAll("header nav a")) {
    if (link.hash === `#/${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const page = h("section", { class: `view ${view}` });
  replace(main, page);
  try {
    const part = decodeURIComponent(rest.join("/"));
    const { mount } = await load();
    if (!signal.aborted) await mount(page, { part, params: new URLSearchParams(query), signal });
  } catch (error) {
    if (!signal.aborted) page.prepend(refusal(error));
  }
}

async function watch() {
  const state = document.getElementById("state");
  await repeat(10000, new AbortController().signal, async () => {
    let text = "";
    try {
      await get("ready");
    } catch (error) {
      text = error.message;
    }
    if (state.textContent !== text) state.textContent = text;
  });
}

addEventListener("hashchange", show);
show();
watch();
