// The head: is it warm? In one line, in the title and in the icon; with a few figures, and whether there is contact.

import { glyph } from "./charts.js";
import { now } from "./clock.js";
import { byId, h, keep, mark, say } from "./dom.js";
import { histories, history } from "./history.js";
import { contact } from "./live.js";
import { picture } from "./picture.js";
import { answer, kind, many, span } from "./words.js";

const DAY = 86_400_000;
const LISTED_MAX = 20;

const text = document.createElement("span");
let tone = "";

/** What there is to say: how it looks, in full, and without what counts each second. */
function said() {
  if (contact.lost !== null) {
    const seconds = Math.floor((performance.now() - contact.lost) / 1000);
    return { tone: "gone", text: `Lost contact ${seconds} s ago, trying again`, spoken: "Lost contact with the daemon, trying again" };
  }
  return picture.version ? answer(picture, now()) : { tone: "unknown", text: "Asking the daemon", spoken: "" };
}

export function drawHead() {
  const line = said();
  if (!text.isConnected) byId("answer").replaceChildren(text);
  if (tone !== line.tone) {
    tone = line.tone;
    mark(byId("answer"), "tone", tone);
    text.previousSibling?.remove();
    text.before(glyph(tone));
    document.querySelector("link[rel=icon]").href = tone === "unknown" ? "/favicon.svg" : `/favicon-${tone}.svg`;
  }
  say(text, line.text);
  say(byId("spoken"), line.spoken);
  const title = `${line.text} · keepalive`;
  if (document.title !== title) document.title = title;
  drawContact();
  if (picture.version) drawFigures();
}

function drawContact() {
  const lost = contact.lost !== null;
  document.body.classList.toggle("lost", lost && Boolean(picture.version));
  say(byId("contact"), lost ? "no contact" : contact.live ? "live" : "");
  mark(byId("contact"), "live", String(contact.live && !lost));
}

const figures = new Map();

function drawFigures() {
  const sum = (value) => picture.models.reduce((total, model) => total + value(model), 0);
  const wanted = picture.models.filter((model) => kind(model) !== "off");
  const known = [...histories.values()];
  const waits = { seconds: 0, requests: 0 };
  for (const entry of known) {
    waits.seconds += entry.waits.seconds;
    waits.requests += entry.waits.requests;
  }
  const recent = (entry, list) => entry[list].filter((one) => one.at > now() - DAY).length;
  const items = [
    ["Warm", `${wanted.filter((model) => model.state === "warm").length} of ${wanted.length}`],
    ["Waiting now", String(sum((model) => model.waiting))],
    ["In flight", String(sum((model) => model.in_flight))],
  ];
  if (history.kept !== null) {
    items.push(["People waited, 24 h", waits.requests ? `${span(waits.seconds)} in ${many(waits.requests, "request")}` : "not at all"]);
    for (const [name, list] of [["Loads, 24 h", "loads"], ["Evictions, 24 h", "evictions"]]) {
      const counts = known.map((entry) => recent(entry, list));
      // A model's list ends at this length: there may have been more.
      const more = counts.includes(LISTED_MAX) ? "+" : "";
      items.push([name, counts.reduce((total, count) => total + count, 0) + more]);
    }
  }
  keep(byId("figures"), items, figures, ([name]) => name, ([name]) => {
    const value = h("dd");
    return { node: h("div", {}, h("dt", {}, name), value), update: ([, figure]) => say(value, figure) };
  });
}
