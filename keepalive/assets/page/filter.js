// Finding one of many models: by what they mean to whoever looks, and by name.

import { byId, h, keep, say, show } from "./dom.js";
import { showOnly } from "./models.js";
import { picture } from "./picture.js";
import { KINDS, kind } from "./words.js";

/** With so many models, the filter is shown. */
export const FILTER_FROM = 7;

const kinds = new Map();
let chosen = "all";
let counts = {};

export function startFilter() {
  byId("filter").addEventListener("submit", (event) => event.preventDefault());
  byId("search").addEventListener("input", drawFilter);
}

export function choose(name) {
  chosen = name;
  drawFilter();
  byId("kinds").querySelector(":checked")?.focus();
}

export function drawFilter() {
  show(byId("filter"), picture.models.length >= FILTER_FROM);
  counts = { all: picture.models.length };
  for (const model of picture.models) counts[kind(model)] = (counts[kind(model)] ?? 0) + 1;
  const items = ["all", ...Object.keys(KINDS)].filter((name) => counts[name] || name === chosen || name === "all");
  keep(byId("kinds"), items, kinds, (name) => name, (name) => {
    const count = h("span", { class: "count" });
    const radio = h("input", { type: "radio", name: "kind", value: name, onchange: () => choose(name) });
    return {
      node: h("label", {}, radio, h("span", {}, name === "all" ? "All" : KINDS[name], " ", count)),
      update() {
        say(count, String(counts[name] ?? 0));
        if (radio.checked !== (chosen === name)) radio.checked = chosen === name;
      },
    };
  });
  const wanted = byId("search").value.trim().toLowerCase();
  showOnly((model) =>
    (chosen === "all" || kind(model) === chosen) && `${model.key} ${model.upstream}`.toLowerCase().includes(wanted));
}
