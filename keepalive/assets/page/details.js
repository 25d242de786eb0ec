// What only somebody asks for who looks into one model: where it is, what was counted, its last loads and evictions.

import { clock, moment, time } from "./clock.js";
import { h, say, show } from "./dom.js";
import { histories } from "./history.js";
import { causeOf, many, short, span } from "./words.js";

const LISTED_MAX = 10;
const SOURCES = { config: "as the config says", estimate: "by LM Studio's estimate", size: "by its size", measured: "as measured" };
const size = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${Math.max(1, Math.round(bytes / 1e6))} MB`);

export class Details {
  constructor() {
    this.facts = h("dl");
    this.values = new Map(); // what a fact says, by its name
    this.events = h("div", { class: "events" });
    this.node = h("details", { ontoggle: () => this.draw() }, h("summary", {}, h("span", {}, "Details")), this.facts, this.events);
  }

  update(model) {
    this.model = model;
    this.draw();
  }

  draw() {
    if (!this.node.open) return;
    const history = histories.get(this.model.id);
    // Somebody may be reading, or have selected, what has not changed.
    const told = new Map(this.told(history));
    for (const [name, value] of told) {
      if (!this.values.has(name)) {
        this.values.set(name, h("dd"));
        this.facts.append(h("div", {}, h("dt", {}, name), this.values.get(name)));
      }
      say(this.values.get(name), value);
    }
    for (const [name, value] of this.values) show(value.parentElement, told.has(name));
    const drawn = JSON.stringify([history?.loads, history?.evictions]);
    if (this.drawn === drawn) return;
    this.drawn = drawn;
    const line = (at, text) => h("li", {}, moment(at), ` ${text}`);
    const lists = [
      ["Last loads", history?.loads, (load) => `${span(load.seconds)}${load.outcome === "ok" ? "" : `, ${short(load.outcome)}`}`],
      ["Last evictions", history?.evictions, causeOf],
    ];
    this.events.replaceChildren(
      ...lists.filter(([, list]) => list?.length).map(([title, list, text]) =>
        h("div", {}, h("h4", {}, title), h("ul", {}, ...list.toReversed().slice(0, LISTED_MAX).map((one) => line(one.at, text(one)))))),
    );
  }

  told(history) {
    const { model } = this;
    const facts = [
      ["Upstream", short(model.upstream, 200)],
      ["Now", [model.waiting && many(model.waiting, "request waits", "requests wait"), model.in_flight && `${many(model.in_flight, "answer")} under way`].filter(Boolean).join(", ") || "nobody asks"],
      ["Memory", model.memory_bytes ? `${size(model.memory_bytes)}, ${SOURCES[model.memory_source] ?? short(model.memory_source)}` : "not known"],
      ["Instance", model.instance_id ? `${short(model.instance_id)}, ${model.ours ? "loaded by keepalive" : "loaded by somebody else"}` : "none"],
      ["Since the daemon started", `${many(model.loads, "load")}, ${many(model.evictions, "eviction")}`],
    ];
    if (model.primed) facts.push(["Read ahead", readAhead(model.primed)]);
    if (history) {
      const pings = Object.entries(history.pings).filter(([, count]) => count);
      facts.push(["People waited, 24 h", history.waits.requests ? `${span(history.waits.seconds)} in ${many(history.waits.requests, "request")}` : "not at all"]);
      facts.push(["Pings, 24 h", pings.map(([outcome, count]) => `${count} ${short(outcome).replace("_", " ")}`).join(", ") || "none"]);
    }
    return facts;
  }
}

function readAhead({ openings, of, tokens, at, under_way: underWay, reason }) {
  const read = `${openings} of ${many(of, "opening")}${tokens ? `, ${many(tokens, "token")}` : ""}${at ? ` at ${clock(time(at))}` : ""}`;
  return `${read}${underWay ? ", reading" : ""}${reason ? `: ${short(reason, 300)}` : ""}`;
}
