// What should bring a person here, the worst first, each leading to the models that it is about.

import { glyph } from "./charts.js";
import { clock, now } from "./clock.js";
import { byId, h, keep, say, show } from "./dom.js";
import { FILTER_FROM, choose } from "./filter.js";
import { contact } from "./live.js";
import { picture } from "./picture.js";
import { anchorOf } from "./row.js";
import { attention, short } from "./words.js";

const NOTICES_MAX = 6;
const notices = new Map();

function found() {
  const all = picture.version ? attention(picture, picture.models.length >= FILTER_FROM) : [];
  if (contact.lost !== null) {
    all.unshift({ tone: "gone", key: "contact", models: [], text: () => `${contact.why}. What you see is as of ${clock(now() - (performance.now() - contact.lost))}.` });
  } else if (contact.why) {
    all.unshift({ tone: "unknown", key: "live", models: [], text: () => `Not live, looked at every 5 s: ${contact.why}` });
  }
  if (all.length <= NOTICES_MAX) return all;
  const rest = `and ${all.length - NOTICES_MAX} more: show what is failing`;
  return [...all.slice(0, NOTICES_MAX), { tone: "failing", key: "more", models: [], text: () => rest, filter: "failing" }];
}

export function drawNotices() {
  const at = now();
  const shown = found();
  show(byId("notices"), shown.length > 0);
  keep(byId("notices"), shown, notices, (notice) => notice.key, (notice) => {
    const text = h("span", { class: "text" });
    const names = h("span", { class: "names" });
    const filter = notice.filter && h("button", { type: "button", class: "link", onclick: () => choose(notice.filter) }, text);
    const node = h("li", { "data-tone": notice.tone }, glyph(notice.tone), h("p", {}, names, filter ?? text));
    let drawn = "";
    return {
      node,
      update(fresh) {
        say(text, fresh.text(at));
        const about = fresh.models.map((model) => model.id).join("\n");
        if (drawn === about) return;
        drawn = about;
        names.replaceChildren(...linked(fresh.models));
      },
    };
  });
}

/** "a, b and 7 others ", each leading to its row. */
function linked(models) {
  const shown = models.length > 3 ? models.slice(0, 2) : models;
  const links = shown.map((model) => h("a", { href: `#${anchorOf(model)}` }, short(model.key, 60)));
  const rest = models.length - shown.length;
  if (rest) links.push(h("button", { type: "button", class: "link", onclick: () => choose("failing") }, `${rest} others`));
  return links.flatMap((link, i) => [link, i === links.length - 1 ? " " : i === links.length - 2 ? " and " : ", "]);
}
