// The list of models: a row each, what stands above and below it, and what stands there when there are none.

import { byId, h, keep, say, show } from "./dom.js";
import { history, shownSpan } from "./history.js";
import { contact } from "./live.js";
import { picture } from "./picture.js";
import { Row } from "./row.js";
import { counted } from "./words.js";

const COMPACT_FROM = 13;
const EXAMPLE = '[[models]]\nkey = "qwen/qwen3-4b-2507"\n';
const BASE_URL = "http://127.0.0.1:1235/v1";
const LEGEND = { warm: "warm", loading: "loading", cold: "cold", backoff: "backoff", unknown: "unknown", eviction: "evicted" };

const rows = new Map(); // by model id

/** Draws all models, or only those with these ids. */
export function drawModels(changed = null) {
  const list = byId("models");
  for (const part of [list, byId("columns")]) part.classList.toggle("compact", picture.models.length >= COMPACT_FROM);
  const several = picture.upstreams.length > 1;
  if (changed && rows.size) {
    for (const model of picture.models) if (changed.has(model.id)) rows.get(model.id)?.update(model, several);
  } else {
    keep(list, picture.models, rows, (model) => model.id, () => new Row(several));
  }
  drawColumns();
  drawEmpty();
}

/** Lets time pass for the rows that are to be seen. */
export function tickModels() {
  for (const row of rows.values()) if (!row.node.hidden) row.tick();
  drawColumns();
}

export function showOnly(fits) {
  for (const model of picture.models) show(rows.get(model.id).node, fits(model));
}

/** Nothing can be changed while there is no contact. */
export function allowChanges() {
  for (const row of rows.values()) row.actions.allow(contact.lost === null);
}

function drawColumns() {
  const list = byId("legend");
  if (!list.firstChild) for (const [state, text] of Object.entries(LEGEND)) list.append(h("li", { "data-state": state }, text));
  show(byId("columns"), picture.models.length > 0);
  show(list, picture.models.length > 0 && history.kept !== null);
  const length = shownSpan() / 1000;
  const [from, middle] = byId("axis").children;
  say(from, `${counted(length)} ago`);
  say(middle, counted(length / 2));
}

function drawEmpty() {
  const list = byId("models");
  const empty = list.querySelector(".empty");
  if (picture.models.length) return empty?.remove();
  if (!empty) {
    list.append(picture.config.unlisted === "auto" ?
      h("li", { class: "empty" },
        h("p", {}, "Point the base URL of an application at the client address, ", h("code", {}, BASE_URL), " unless it was set otherwise, and ask for a model that LM Studio has: it is loaded, and stays while memory lasts.")) :
      h("li", { class: "empty" },
        h("p", {}, "Nothing is kept warm yet. Write the key of a model into config.toml, as LM Studio and ", h("code", {}, "lms ls"), " show it:"),
        h("pre", {}, EXAMPLE),
        h("p", {}, "then ", h("code", {}, "keepalive check"), " and reload: ", h("code", {}, "systemctl reload keepalive"), ", or SIGHUP. This page will notice.")),
    );
  }
}
