// The status page: reads the daemon's status, follows its changes, and draws them.
//
//   start      wires the rest                         words, charts   what is said and shown; pure
//   live       the connection, and whether there is any
//   picture    the last status                        history         what is remembered of each model
//   head, notices, upstreams, filter, models, requests, playground    a part of the page each
//   row        one model, with its actions and details
//   ask, clock, dom                                   one question, the daemon's time, elements
//
// Imports lead down and never round: a part reads what is known and draws itself, and is told here when to. An
// element lives as long as what it shows. What cannot be known any more (contact is lost) is greyed, not removed.

import { now } from "./clock.js";
import { byId, say } from "./dom.js";
import { drawFilter, startFilter } from "./filter.js";
import { drawHead } from "./head.js";
import { history, noteChanges, remember } from "./history.js";
import { contact, follow } from "./live.js";
import { allowChanges, drawModels, tickModels } from "./models.js";
import { drawNotices } from "./notices.js";
import { picture, take } from "./picture.js";
import { drawPlayground, startPlayground } from "./playground.js";
import { startRequests } from "./requests.js";
import { drawUpstreams, tickUpstreams } from "./upstreams.js";
import { ago, short, together } from "./words.js";

/** Draws everything; of the models only those with these ids, if any are given. */
function draw(changed = null) {
  drawAnswer();
  drawUpstreams();
  drawModels(changed);
  drawPlayground();
  drawFilter();
  drawFooter();
}

function drawAnswer() {
  drawHead();
  drawNotices();
}

function drawFooter() {
  if (!picture.version) return;
  say(byId("version"), picture.version);
  const scraped = "scraped_at" in picture ? (picture.scrapedAt ? `metrics last read ${ago(picture.scrapedAt, now())} ago` : "nobody reads /metrics: no alert can wake you") : "";
  const kept = history.kept === false ? `history ends with the daemon: ${short(history.reason ?? "", 200)}` : "";
  say(byId("footer"), [`Running for ${ago(picture.startedAt, now())}`, together(picture), scraped, kept].filter(Boolean).join(" · "));
}

let playing = null;

function took(document) {
  const changes = take(document);
  noteChanges(changes, !document.partial);
  draw(document.partial ? new Set(changes.map(([, model]) => model.id)) : null);
  // After the first picture, since that is what people come for.
  playing ??= setTimeout(() => (startPlayground(), startRequests()), 50);
}

function contactChanged() {
  allowChanges();
  drawAnswer();
}

function tick() {
  drawAnswer();
  if (contact.lost !== null) return;
  tickModels();
  tickUpstreams();
  drawFooter();
}

startFilter();
drawAnswer();
setInterval(tick, 1000);
remember(draw);
follow({ took, changed: contactChanged });
