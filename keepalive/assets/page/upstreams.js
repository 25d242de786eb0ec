// A strip for each LM Studio server: whether it answers, since when, and what it is.

import { glyph } from "./charts.js";
import { now } from "./clock.js";
import { byId, h, keep, mark, say, show } from "./dom.js";
import { picture } from "./picture.js";
import { TIERS, acting, ago, inTrouble, memory, short } from "./words.js";

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
  const [bar, share, who] = [h("div", { class: "shares", "aria-hidden": "true" }), h("span"), h("ul", { class: "who" })];
  const room = h("div", { class: "memory" }, bar, h("p", {}, "Memory: ", share), who);
  const [slices, names] = [new Map(), new Map()];
  let current = null;
  const part = {
    node: h("li", {}, sign, h("span", {}, name, " ", state, " ", lasted), detail, room),
    update(upstream) {
      current = upstream;
      const tone = upstream.state === "up" ? "warm" : upstream.state === "unknown" ? "unknown" : "failing";
      if (part.node.dataset.tone !== tone) sign.replaceChildren(glyph(tone));
      mark(part.node, "tone", tone);
      say(name, short(upstream.name));
      say(state, upstream.state);
      part.tick();
    },
    /** Whose memory it is hangs on the models, too. */
    drawMemory() {
      const told = memory(current, picture.models);
      show(room, told !== null);
      if (told === null) return;
      say(share, told.text);
      keep(bar, told.parts.filter((one) => one.share > 0), slices, (one) => one.key, slice);
      keep(who, told.parts, names, (one) => one.key, entry);
    },
    tick() {
      say(lasted, current.since ? `for ${ago(current.since, now())}` : "");
      const parts = [TIERS.get(current.tier), short(current.url ?? "", 60), acting(picture, current)];
      if (!inTrouble(current) && current.error) parts.push(short(current.error, 120));
      say(detail, parts.filter(Boolean).join(" · "));
      part.drawMemory();
    },
  };
  return part;
}

function slice() {
  const node = h("span");
  return {
    node,
    update(one) {
      mark(node, "what", one.what);
      const width = `${(100 * one.share).toFixed(1)}%`;
      if (node.style.width !== width) node.style.width = width;
    },
  };
}

function entry() {
  const node = h("li");
  return {
    node,
    update(one) {
      mark(node, "what", one.what);
      say(node, one.text);
    },
  };
}
