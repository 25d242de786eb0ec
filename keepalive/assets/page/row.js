// One model: what it is, its last day, what its loads took, who asks for it now, and what can be done about it.

import { Actions } from "./actions.js";
import { glyph, loadsChart, stateAt, timeline } from "./charts.js";
import { clock, now } from "./clock.js";
import { Details } from "./details.js";
import { byId, h, mark, say, show } from "./dom.js";
import { histories, shownSpan } from "./history.js";
import { ago, ahead, causeOf, kind, many, progress, short, span } from "./words.js";

let anchors = 0;
const anchorNames = new Map();

/** A key may hold anything; a fragment may not. */
export function anchorOf(model) {
  if (!anchorNames.has(model.id)) anchorNames.set(model.id, `model-${++anchors}`);
  return anchorNames.get(model.id);
}

/** Its element is made once; `update` takes a new picture of the model, `tick` lets time pass. */
export class Row {
  constructor(several) {
    this.several = several;
    this.sign = h("span", { class: "sign" });
    this.name = h("h3");
    this.state = h("span", { class: "state" });
    this.since = h("span", { class: "since" });
    this.where = h("span", { class: "where" });
    this.size = h("span", { class: "size" });
    this.bar = h("progress", { "aria-label": "Load" });
    this.left = h("span", { class: "left" });
    this.loading = h("div", { class: "loading" }, this.bar, this.left);
    this.band = h("div", { class: "band", onpointermove: (event) => this.point(event), onpointerleave: () => show(byId("tip"), false) });
    this.evicted = h("span", { class: "note" });
    this.loads = h("div", { class: "chart" });
    this.took = h("span", { class: "note" });
    this.traffic = h("span", { class: "traffic" });
    this.ping = h("span", { class: "note" });
    this.why = h("p", { class: "why" });
    this.actions = new Actions();
    this.details = new Details();
    this.node = h(
      "li",
      {},
      h("div", { class: "who" }, this.sign, h("div", {}, this.name, h("p", {}, h("span", {}, this.state, " ", this.since), this.where, this.size))),
      h("div", { class: "day" }, this.loading, this.band, this.evicted),
      h("div", { class: "cost" }, this.loads, this.took),
      h("div", { class: "now" }, this.traffic, this.ping),
      this.actions.node,
      this.why,
      this.actions.error,
      this.details.node,
    );
  }

  update(model, several = this.several) {
    const history = histories.get(model.id);
    this.several = several;
    this.model = model;
    const what = kind(model);
    if (this.node.id !== anchorOf(model)) {
      this.node.id = anchorOf(model);
      this.name.title = model.key.slice(0, 1000);
      say(this.name, short(model.key, 120));
    }
    // An unwanted model shows what it is, quietly.
    const tone = what === "off" ? (model.state === "warm" || model.state === "loading" ? model.state : "off") : what;
    if (this.node.dataset.tone !== tone) this.sign.replaceChildren(glyph(tone));
    mark(this.node, "tone", tone);
    mark(this.node, "kind", what);
    say(this.state, model.listed ? model.state + (model.busy ? ", busy" : "") : "not listed");
    say(this.where, several ? short(model.upstream, 40) : "");
    const size = [model.context_length && many(model.context_length, "token")];
    if (model.instances > 1) size.push(`${model.instances} copies`);
    if (model.keep === "auto") size.push("on demand");
    else if (!model.wanted && model.state !== "cold") size.push(model.ours ? "not wanted" : "not wanted; stays, as somebody else loaded it");
    say(this.size, size.filter(Boolean).join(" · "));
    show(this.loading, model.load !== null);
    say(this.traffic, traffic(model));
    mark(this.traffic, "idle", String(!model.waiting && !model.in_flight));
    say(this.took, model.last_load_seconds === null ? "" : `last load ${span(model.last_load_seconds)}`);
    if (this.drawn !== history) {
      this.drawn = history;
      this.loads.replaceChildren(...(history?.loads.length ? [loadsChart(history.loads)] : []));
      this.band.replaceChildren();
    }
    this.actions.update(model);
    this.details.update(model);
    this.tick();
  }

  tick() {
    const { model } = this;
    const at = now();
    say(this.since, model.since === null ? "" : `for ${ago(model.since, at)}`);
    if (model.load) this.drawProgress(at);
    this.drawBand(at);
    const retry = model.retry ? `Next try ${ahead(model.retry, at)}` : "";
    const due = model.due ? `There ${ahead(model.due, at)}, about` : "";
    say(this.why, [model.reason && sentence(short(model.reason, 600)).replace(/\.$/, ""), retry, due].filter(Boolean).join(". "));
    show(this.why, this.why.textContent !== "");
    const gone = model.lastEviction;
    say(this.evicted, gone ? `evicted ${ago(gone.at, at)} ago: ${causeOf(gone)}` : "");
    say(this.ping, pingOf(model, at));
  }

  drawProgress(at) {
    const { load } = this.model;
    const total = load.ends === null ? null : load.ends - load.began;
    if (load.progress !== null) this.bar.value = load.progress;
    else if (total > 0) this.bar.value = Math.min(1, Math.max(0, (at - load.began) / total));
    else this.bar.removeAttribute("value");
    const attempt = load.attempt > 1 ? `, attempt ${load.attempt}` : "";
    say(this.left, progress(load, at) + attempt);
  }

  /** When something happened, and as often as it can be seen that time has passed. */
  drawBand(at) {
    const history = histories.get(this.model.id);
    if (!history) return;
    const length = shownSpan();
    const drawn = `${Math.floor(at / Math.max(5000, length / 1440))} ${length} ${history.timeline.length}`;
    if (this.bandDrawn === drawn && this.band.firstChild) return;
    this.bandDrawn = drawn;
    this.band.replaceChildren(timeline(history.timeline, history.evictions, at, length));
  }

  /** Says what was the case at the time under the pointer. */
  point(event) {
    const history = histories.get(this.model.id);
    const chart = this.band.firstElementChild;
    if (!history || !chart) return;
    const place = chart.getBoundingClientRect();
    const at = now() - (1 - (event.clientX - place.left) / place.width) * shownSpan();
    const tip = byId("tip");
    say(tip, `${clock(at)} ${stateAt(history.timeline, at)}`);
    tip.style.left = `${Math.min(event.clientX, innerWidth - 120)}px`;
    tip.style.top = `${place.top - 30}px`;
    show(tip, true);
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function traffic(model) {
  const parts = [];
  if (model.waiting) parts.push(`${model.waiting} waiting`);
  if (model.in_flight) parts.push(`${model.in_flight} in flight`);
  return parts.join(", ") || "idle";
}

function pingOf(model, at) {
  const last = model.lastPing;
  if (last && last.outcome !== "ok" && last.outcome !== "skipped") return `ping ${ago(last.at, at)} ago: ${short(last.outcome).replace("_", " ")}`;
  if (model.nextPing) return `next ping ${ahead(model.nextPing, at)}`;
  return "";
}
