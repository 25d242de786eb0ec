// A strip for each LM Studio server: whether it answers, since when, and what it is.

import { glyph } from "./charts.js";
import { now } from "./clock.js";
import { byId, h, keep, mark, say } from "./dom.js";
import { picture } from "./picture.js";
import { TIERS, ago, inTrouble, short } from "./words.js";

const strips = new Map();

export function drawUpstreams() {
  keep(byId("upstreams"), picture.upstreams, strips, (upstream) => upstream.name, strip);
}

export function tickUpstreams() {
  for (const one of strips.values()) one.tick();
}

function strip() {
  const [name, state, sign] = [h("b"), h("span", { class: "state" }), h("span", { class: "sign" })];
  const [lasted, detail] = [h("span", { class: "detail" }), h("span", { class: "detail" })];
  let current = null;
  const part = {
    node: h("li", {}, sign, h("span", {}, name, " ", state, " ", lasted), detail),
    update(upstream) {
      current = upstream;
      const tone = upstream.state === "up" ? "warm" : upstream.state === "unknown" ? "unknown" : "failing";
      if (part.node.dataset.tone !== tone) sign.replaceChildren(glyph(tone));
      mark(part.node, "tone", tone);
      say(name, short(upstream.name));
      say(state, upstream.state);
      part.tick();
    },
    tick() {
      say(lasted, current.since ? `for ${ago(current.since, now())}` : "");
      const parts = [TIERS.get(current.tier), short(current.url ?? "", 60)];
      if (!inTrouble(current) && current.error) parts.push(short(current.error, 120));
      say(detail, parts.filter(Boolean).join(" · "));
    },
  };
  return part;
}
