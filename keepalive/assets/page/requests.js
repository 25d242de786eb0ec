// The requests of the last minutes, and what was asked for that the config does not name, with the lines that would.

import { ask } from "./ask.js";
import { moment, time } from "./clock.js";
import { byId, h, say, show } from "./dom.js";
import { contact } from "./live.js";
import { picture } from "./picture.js";
import { many, short, span } from "./words.js";

const EVERY = 5000;
const SHOWN = 12;
const FINE = new Set(["ok", "client_gone"]);

let drawn = "";

export function startRequests() {
  look();
  setInterval(look, EVERY);
}

async function look() {
  // Nobody sees it, or nobody answers.
  if (document.hidden || contact.lost !== null) return;
  let read;
  try {
    read = await (await ask("/api/requests")).json();
  } catch {
    return; // The page says elsewhere whether there is contact.
  }
  const text = JSON.stringify(read);
  if (text === drawn) return;
  drawn = text;
  drawRequests(read.requests);
  drawUnnamed(read.unnamed);
}

function drawRequests(requests) {
  show(byId("requests"), requests.length > 0);
  byId("requests-list").replaceChildren(...requests.slice(0, SHOWN).map(row));
  const rest = requests.length - SHOWN;
  say(byId("requests-rest"), rest > 0 ? `and ${many(rest, "earlier one")} in the last 15 minutes` : "");
}

function row(request) {
  const cell = (name, text) => h("td", { "data-of": name }, text);
  const waited = request.wait_seconds >= 0.05 ? `waited ${span(request.wait_seconds)}` : "";
  const first = request.first_token_seconds === null ? "" : `first token ${span(request.first_token_seconds)}`;
  const rate = request.tokens_per_second === null ? "" : `${request.tokens_per_second.toFixed(0)} tokens/s`;
  const outcome = request.outcome.replace("_", " ") + (FINE.has(request.outcome) ? "" : ` (${[request.status || "no answer", request.error].filter(Boolean).join(", ")})`);
  return h("tr", { "data-tone": FINE.has(request.outcome) ? "warm" : "failing" },
    h("td", {}, moment(time(request.at))), h("th", { scope: "row" }, request.model === null ? "another model" : short(request.model, 60)), cell("route", request.route),
    cell("wait", waited), cell("first", first), cell("rate", rate), cell("took", span(request.seconds)), cell("outcome", outcome));
}

/** The lines of config that keep them loaded. A key is text from elsewhere: TOML reads a string as JSON writes it. */
export function tables(unnamed, models, several) {
  return unnamed.map(({ key, upstream }) => {
    const model = models.find((one) => one.key === key && one.upstream === upstream);
    const context = model?.context_length ? `context_length = ${model.context_length}\n` : "";
    const where = several ? `upstream = ${JSON.stringify(upstream)}\n` : "";
    return `[[models]]\nkey = ${JSON.stringify(key)}\n${where}${context}`;
  }).join("\n");
}

function about({ requests, kept }) {
  if (!requests) return kept ? "no answer has ended yet" : "loaded by somebody else";
  return `${many(requests, "request")}${kept ? "" : ", passed on as they came"}`;
}

function drawUnnamed(unnamed) {
  const bare = picture.config.path === null && picture.config.unlisted === "auto";
  show(byId("unnamed"), unnamed.length > 0 || bare);
  const kept = picture.config.unlisted === "auto";
  const init = h("code", {}, "keepalive init");
  byId("unnamed-about").replaceChildren(
    ...(bare ? ["There is no config: what is asked for is kept while memory lasts. "] : []),
    ...(unnamed.length === 0 ? ["Nothing is loaded, and nothing was asked for yet. ", init, " writes a config."] :
      bare ? ["As config.toml, these lines pin what was asked for or is loaded; ", init, " writes them, too:"] :
        [`These lines ${kept ? "pin" : "keep"} what was asked for:`]),
  );
  byId("unnamed-list").replaceChildren(...unnamed.slice(0, SHOWN).map((one) =>
    h("li", {}, `${short(one.key, 80)}: ${about(one)}`)));
  const lines = byId("unnamed-lines");
  show(lines, unnamed.length > 0);
  say(lines, tables(unnamed.slice(0, SHOWN), picture.models, picture.upstreams.length > 1));
}
