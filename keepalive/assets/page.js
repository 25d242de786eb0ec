// The status page: reads the daemon's status, follows its changes, and draws them.
//
// Rules: text enters the page through text nodes and attributes of our own choosing, never as markup. An element
// lives as long as what it shows, and only what differs is written, so that focus, open details and a selection
// outlive every update. What cannot be known any more (contact is lost) is greyed, not removed.

import { causeOf, glyph, loadsChart, spanFrom, stateAt, timeline } from "/charts.js";
import { KINDS, TIERS, ago, ahead, answer, attention, counted, inTrouble, kind, many, progress, short, span } from "/words.js";

const byId = (id) => document.getElementById(id);

/** An element: attributes, `on…` listeners and properties that only exist as such, then children. */
function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function mark(node, name, value) {
  if (node.dataset[name] !== value) node.dataset[name] = value;
}

function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

/** The children of `parent`, one for each item and in their order; those that stay are left where they are. */
function keep(parent, items, known, keyOf, make) {
  const keys = new Set();
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    keys.add(key);
    let part = known.get(key);
    if (!part) known.set(key, (part = make(item)));
    part.update(item);
    if (part.node === place) place = place.nextElementSibling;
    else parent.insertBefore(part.node, place);
  }
  for (const [key, part] of known) {
    if (!keys.has(key)) {
      part.node.remove();
      known.delete(key);
    }
  }
}

// --- time -------------------------------------------------------------------------------------------

// The daemon's clock, told by ours that only ever goes forward: neither a wrong clock nor its correction shows.
let skew = Date.now() - performance.now();
const now = () => performance.now() + skew;

function synchronize(daemonTime) {
  // What was under way for a moment makes the daemon seem late: small differences are that.
  const found = daemonTime - performance.now();
  if (Math.abs(found - skew) > 500) skew = found;
}

const time = (text) => (text === null || text === undefined ? null : Date.parse(text));

/** Made at first use: a format takes longer to make than a row to draw. */
function formatter(options) {
  let made = null;
  return (at) => (made ??= new Intl.DateTimeFormat(undefined, options)).format(at);
}

const clock = formatter({ hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const weekday = formatter({ weekday: "short" });
const date = formatter({ dateStyle: "medium", timeStyle: "medium" });

/** A time as people look for it; the whole of it when they point at it. */
function moment(at) {
  const day = new Date(at).toDateString() === new Date(now()).toDateString() ? "" : `${weekday(at)} `;
  return h("time", { datetime: new Date(at).toISOString(), title: date(at) }, day + clock(at));
}

// --- what is known ----------------------------------------------------------------------------------

const picture = { config: { mistakes: [] }, upstreams: [], models: [], draining: false };
const histories = new Map(); // by model id
let history = null; // {kept, reason}, once it was read
let id = "";

const idOf = (model) => `${model.upstream}\n${model.key}`;

function modelOf(document, at) {
  const load = document.load && {
    began: at - document.load.elapsed_seconds * 1000,
    ends: document.load.eta_seconds === null ? null : at + document.load.eta_seconds * 1000,
    attempt: document.load.attempt,
  };
  return {
    ...document,
    id: idOf(document),
    since: time(document.since),
    retry: time(document.retry_at),
    nextPing: time(document.next_ping_at),
    lastPing: document.last_ping && { ...document.last_ping, at: time(document.last_ping.at) },
    lastEviction: document.last_eviction && { ...document.last_eviction, at: time(document.last_eviction.at) },
    load,
  };
}

/** Takes a status document, whole or partial, as the daemon sends it. */
function take(document) {
  const at = time(document.now);
  synchronize(at);
  id = document.id;
  const models = document.models.map((model) => modelOf(model, at));
  const upstreams = document.upstreams.map((upstream) => ({ ...upstream, since: time(upstream.since) }));
  for (const model of models) noteChange(picture.models.find((old) => old.id === model.id), model);
  Object.assign(picture, document, {
    startedAt: time(document.started_at),
    scrapedAt: time(document.scraped_at),
    models: document.partial ? merged(picture.models, models, (model) => model.id) : models,
    upstreams: document.partial ? merged(picture.upstreams, upstreams, (upstream) => upstream.name) : upstreams,
  });
  if (!document.partial) forgetOthers();
  draw(document.partial ? new Set(models.map((model) => model.id)) : null);
}

/** After a whole document: there may be other models, or another daemon. */
function forgetOthers() {
  const ids = new Set(picture.models.map((model) => model.id));
  for (const known of histories.keys()) if (!ids.has(known)) histories.delete(known);
  readHistory();
}

function merged(old, changed, keyOf) {
  const news = new Map(changed.map((entry) => [keyOf(entry), entry]));
  return old.map((entry) => news.get(keyOf(entry)) ?? entry);
}

// --- the connection ---------------------------------------------------------------------------------

const SILENCE = 40_000; // the daemon sends a sign of life every 15 s
const contact = { lost: null, why: "", live: false };

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** What was answered. Raises Refused with the daemon's own words, or a TypeError where there is no answer. */
async function ask(path, options = {}) {
  const response = await fetch(path, { headers: { Accept: "application/json" }, ...options });
  if (response.ok) return response;
  const text = await response.text();
  let message = `${response.status} ${response.statusText}`;
  try {
    message = JSON.parse(text).error ?? message;
  } catch {
    // Something between us and the daemon has answered; its number has to do.
  }
  throw new Refused(response.status, String(message));
}

/** Follows the daemon for ever: a picture, then its changes; when that ends, again. */
async function follow() {
  for (let pause = 250; ; pause = Math.min(pause * 2, 5000)) {
    try {
      take(await (await ask("/api/status")).json());
      regain();
      pause = 250;
      playground.started ??= setTimeout(startPlayground, 50);
      await changes();
      lose("The daemon ended the connection");
    } catch (error) {
      if (error instanceof Refused) refuse(error);
      // Each browser has its own words for a connection that was refused or cut.
      else lose(error instanceof TypeError ? `Nothing answers at ${location.host}` : error.message);
    }
    await Promise.race([new Promise((done) => setTimeout(done, pause)), nudged()]);
  }
}

/** Takes what changes until the stream ends. It is read by hand, since an EventSource does not say why it fails. */
async function changes() {
  const abort = new AbortController();
  let watch = 0;
  const heard = () => {
    clearTimeout(watch);
    watch = setTimeout(() => abort.abort(new Error("Nothing was heard for 40 s")), SILENCE);
  };
  heard();
  try {
    const response = await ask(`/api/events?after=${encodeURIComponent(id)}`, { signal: abort.signal });
    contact.live = true;
    drawContact();
    let rest = "";
    for await (const text of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
      heard();
      const events = (rest + text).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "));
        if (data) take(JSON.parse(data.slice(6)));
      }
    }
  } finally {
    clearTimeout(watch);
    contact.live = false;
  }
}

async function* chunks(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

/** Somebody looks at the page again, or the network is back: no need to wait. */
function nudged() {
  return new Promise((done) => {
    const stop = new AbortController();
    const wake = () => {
      if (document.visibilityState !== "visible") return;
      stop.abort();
      done();
    };
    addEventListener("online", wake, { signal: stop.signal });
    document.addEventListener("visibilitychange", wake, { signal: stop.signal });
  });
}

let focused = null; // what had the focus when the buttons were disabled

function lose(why) {
  if (contact.lost === null) {
    contact.lost = performance.now();
    focused = document.activeElement;
  }
  contact.why = why;
  drawContact();
}

/** The daemon is there, but does not let us follow: the picture is as of the last look. */
function refuse(error) {
  contact.why = error.message;
  if (!picture.version) contact.lost ??= performance.now();
  drawContact();
}

function regain() {
  contact.lost = null;
  contact.why = "";
  drawContact();
  if (focused?.isConnected && document.activeElement === document.body) focused.focus();
  focused = null;
}

// --- history ----------------------------------------------------------------------------------------

const HISTORY_MAX_AGE = 300_000;
const due = new Set(); // ids of models whose history has changed
let historyTimer = 0;

/** Between two readings, the page writes its own: what it has seen itself. */
function noteChange(before, after) {
  const known = histories.get(after.id);
  if (known && before && before.state !== after.state) known.timeline.push({ at: after.since, state: after.state });
  if (!before || (before.loads === after.loads && before.evictions === after.evictions && before.waiting === after.waiting)) return;
  due.add(after.id);
  // All open pages see the same change at the same time; they need not all ask at the same time.
  historyTimer ||= setTimeout(readDue, 1000 + Math.random() * 2000);
}

async function readDue() {
  const models = picture.models.filter((model) => due.has(model.id));
  due.clear();
  const keys = new Set(models.map((model) => model.key));
  await readHistory(keys.size > 20 ? [] : [...keys]);
  historyTimer = 0;
}

async function readHistory(keys = []) {
  const query = keys.map((key) => `model=${encodeURIComponent(key)}`).join("&");
  try {
    const read = await (await ask(`/api/history${query && "?"}${query}`)).json();
    history = { kept: read.kept, reason: read.reason };
    for (const entry of read.models) {
      const at = (one) => ({ ...one, at: time(one.at) });
      histories.set(idOf(entry), {
        ...entry, loads: entry.loads.map(at), evictions: entry.evictions.map(at), timeline: entry.timeline.map(at),
      });
    }
    knownSince = Math.min(...[...histories.values()].map((entry) => entry.timeline[0]?.at ?? Infinity));
    draw(new Set(read.models.map(idOf)));
  } catch {
    // The page says elsewhere whether there is contact; the next reading may do better.
  }
}

// --- drawing ----------------------------------------------------------------------------------------

/** Draws everything, or of the models only those with these ids. */
function draw(changed) {
  drawHead();
  drawUpstreams();
  drawModels(changed);
  drawFooter();
}

const head = { tone: "" };

function drawHead() {
  const lost = contact.lost === null ? null : Math.floor((performance.now() - contact.lost) / 1000);
  const said = lost !== null
    ? { tone: "gone", text: `Lost contact ${lost} s ago, trying again`, spoken: "Lost contact with the daemon, trying again" }
    : picture.version ? answer(picture, now()) : { tone: "unknown", text: "Asking the daemon", spoken: "" };
  if (!head.text) {
    head.text = document.createElement("span");
    byId("answer").replaceChildren(head.text);
  }
  if (head.tone !== said.tone) {
    head.tone = said.tone;
    mark(byId("answer"), "tone", said.tone);
    head.text.previousSibling?.remove();
    head.text.before(glyph(said.tone));
    document.querySelector("link[rel=icon]").href = said.tone === "unknown" ? "/favicon.svg" : `/favicon-${said.tone}.svg`;
  }
  say(head.text, said.text);
  say(byId("spoken"), said.spoken);
  const title = `${said.text} · keepalive`;
  if (document.title !== title) document.title = title;
  drawFigures();
  drawNotices();
}

const figures = new Map();
const LISTED_MAX = 20;

function drawFigures() {
  if (!picture.version) return;
  const sum = (value) => picture.models.reduce((total, model) => total + value(model), 0);
  const wanted = picture.models.filter((model) => model.wanted);
  const known = [...histories.values()];
  const waits = { seconds: 0, requests: 0 };
  for (const entry of known) {
    waits.seconds += entry.waits.seconds;
    waits.requests += entry.waits.requests;
  }
  const recent = (entry, list) => entry[list].filter((one) => one.at > now() - 86_400_000).length;
  const items = [
    ["Warm", `${wanted.filter((model) => model.state === "warm").length} of ${wanted.length}`],
    ["Waiting now", String(sum((model) => model.waiting))],
    ["In flight", String(sum((model) => model.in_flight))],
  ];
  if (history) {
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
    return { node: h("div", {}, h("dt", {}, name), value), update: ([, text]) => say(value, text) };
  });
}

const notices = new Map();
const NOTICES_MAX = 6;

function drawNotices() {
  const at = now();
  const found = picture.version ? attention(picture, picture.models.length >= FILTER_FROM) : [];
  if (contact.lost !== null) {
    found.unshift({ tone: "gone", key: "contact", models: [], text: () => `${contact.why}. What you see is as of ${clock(now() - (performance.now() - contact.lost))}.` });
  } else if (contact.why) {
    found.unshift({ tone: "unknown", key: "live", models: [], text: () => `Not live, looked at every 5 s: ${contact.why}` });
  }
  const shown = found.slice(0, NOTICES_MAX);
  if (found.length > NOTICES_MAX) {
    const rest = `and ${found.length - NOTICES_MAX} more: show what is failing`;
    shown.push({ tone: "failing", key: "more", models: [], text: () => rest, filter: "failing" });
  }
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

function drawContact() {
  const lost = contact.lost !== null;
  document.body.classList.toggle("lost", lost && Boolean(picture.version));
  say(byId("contact"), lost ? "no contact" : contact.live ? "live" : "");
  mark(byId("contact"), "live", String(contact.live && !lost));
  for (const row of rows.values()) row.allow(!lost);
  drawHead();
}

const strips = new Map();

function drawUpstreams() {
  keep(byId("upstreams"), picture.upstreams, strips, (upstream) => upstream.name, () => {
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
  });
}

// --- models -----------------------------------------------------------------------------------------

const rows = new Map();
const COMPACT_FROM = 13;

function drawModels(changed) {
  const list = byId("models");
  for (const part of [list, byId("columns")]) part.classList.toggle("compact", picture.models.length >= COMPACT_FROM);
  const several = picture.upstreams.length > 1;
  if (changed && rows.size) {
    for (const model of picture.models) if (changed.has(model.id)) rows.get(model.id)?.update(model, several);
  } else {
    keep(list, picture.models, rows, (model) => model.id, () => new Row(several));
  }
  drawColumns();
  drawPlayground();
  drawEmpty();
  drawFilter();
}

let knownSince = Infinity; // the oldest that any history tells

const shownSpan = () => spanFrom(knownSince, now());

function drawColumns() {
  show(byId("columns"), picture.models.length > 0);
  show(byId("legend"), picture.models.length > 0 && history !== null);
  const length = shownSpan() / 1000;
  const [from, middle] = byId("axis").children;
  say(from, `${counted(length)} ago`);
  say(middle, counted(length / 2));
}

let anchors = 0;
const anchorNames = new Map();

/** A key may hold anything; a fragment may not. */
function anchorOf(model) {
  if (!anchorNames.has(model.id)) anchorNames.set(model.id, `model-${++anchors}`);
  return anchorNames.get(model.id);
}

/** One model. Its element is made once; `update` takes a new picture of it, `tick` lets time pass. */
class Row {
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
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.main = h("button", { type: "button", onclick: () => this.change(this.verb) });
    this.again = h("button", { type: "button", onclick: () => this.change("warm") }, "Try now");
    this.facts = h("dl");
    this.events = h("div", { class: "events" });
    this.more = h("details", { ontoggle: () => this.more.open && this.drawDetails() }, h("summary", {}, h("span", {}, "Details")), this.facts, this.events);
    this.node = h(
      "li",
      {},
      h("div", { class: "who" }, this.sign, h("div", {}, this.name, h("p", {}, h("span", {}, this.state, " ", this.since), this.where, this.size))),
      h("div", { class: "day" }, this.loading, this.band, this.evicted),
      h("div", { class: "cost" }, this.loads, this.took),
      h("div", { class: "now" }, this.traffic, this.ping),
      h("div", { class: "act" }, this.again, this.main),
      this.why,
      this.error,
      this.more,
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
    if (!model.wanted && model.state !== "cold") size.push(model.ours ? "not wanted" : "not wanted; stays, as somebody else loaded it");
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
    this.drawBand();
    this.drawActions(what);
    if (this.more.open) this.drawDetails();
    this.tick();
  }

  tick() {
    const { model } = this;
    const at = now();
    say(this.since, model.since === null ? "" : `for ${ago(model.since, at)}`);
    if (model.load) this.drawProgress(at);
    const retry = model.retry ? `Next try ${ahead(model.retry, at)}` : "";
    say(this.why, [model.reason && sentence(short(model.reason, 600)).replace(/\.$/, ""), retry].filter(Boolean).join(". "));
    show(this.why, this.why.textContent !== "");
    const gone = model.lastEviction;
    say(this.evicted, gone ? `evicted ${ago(gone.at, at)} ago: ${causeOf(gone)}` : "");
    say(this.ping, pingOf(model, at));
  }

  drawProgress(at) {
    const { load } = this.model;
    const total = load.ends === null ? null : load.ends - load.began;
    if (total > 0) this.bar.value = Math.min(1, Math.max(0, (at - load.began) / total));
    else this.bar.removeAttribute("value");
    const attempt = load.attempt > 1 ? `, attempt ${load.attempt}` : "";
    say(this.left, progress(load, at) + attempt);
  }

  /** When something happened, and as often as it can be seen that time has passed. */
  drawBand() {
    const history = histories.get(this.model.id);
    if (!history) return;
    const length = shownSpan();
    const drawn = `${Math.floor(now() / Math.max(5000, length / 1440))} ${length} ${history.timeline.length}`;
    if (this.bandDrawn === drawn && this.band.firstChild) return;
    this.bandDrawn = drawn;
    this.band.replaceChildren(timeline(history.timeline, history.evictions, now(), length));
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

  drawActions(what) {
    const { model } = this;
    this.verb = model.wanted ? "release" : "warm";
    say(this.main, model.wanted ? "Release" : "Warm");
    this.main.setAttribute("aria-label", `${model.wanted ? "Release" : "Warm"} ${short(model.key)}`);
    show(this.again, what === "failing");
  }

  drawDetails() {
    const { model } = this;
    const history = histories.get(model.id);
    const pings = Object.entries(history?.pings ?? {}).filter(([, count]) => count);
    const facts = [
      ["Upstream", short(model.upstream, 200)],
      ["Instance", model.instance_id ? `${short(model.instance_id)}, ${model.ours ? "loaded by keepalive" : "loaded by somebody else"}` : "none"],
      ["Since the daemon started", `${many(model.loads, "load")}, ${many(model.evictions, "eviction")}`],
    ];
    if (history) {
      facts.push(["People waited, 24 h", history.waits.requests ? `${span(history.waits.seconds)} in ${many(history.waits.requests, "request")}` : "not at all"]);
      facts.push(["Pings, 24 h", pings.map(([outcome, count]) => `${count} ${short(outcome).replace("_", " ")}`).join(", ") || "none"]);
    }
    // Somebody may be reading, or have selected, what has not changed.
    const drawn = JSON.stringify([facts, history?.loads, history?.evictions]);
    if (this.detailsDrawn === drawn) return;
    this.detailsDrawn = drawn;
    this.facts.replaceChildren(...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    const line = (at, text) => h("li", {}, moment(at), ` ${text}`);
    const lists = [
      ["Last loads", history?.loads, (load) => `${span(load.seconds)}${load.outcome === "ok" ? "" : `, ${short(load.outcome)}`}`],
      ["Last evictions", history?.evictions, causeOf],
    ];
    this.events.replaceChildren(
      ...lists.filter(([, list]) => list?.length).map(([title, list, text]) =>
        h("div", {}, h("h4", {}, title), h("ul", {}, ...list.toReversed().slice(0, 10).map((one) => line(one.at, text(one)))))),
    );
  }

  allow(allowed) {
    for (const button of [this.main, this.again]) button.disabled = !allowed || this.asking;
  }

  async change(verb) {
    const { model } = this;
    this.asking = true;
    this.allow(false);
    show(this.error, false);
    try {
      await ask(`/api/models/${encodeURIComponent(model.key)}/${verb}?upstream=${encodeURIComponent(model.upstream)}`, { method: "POST" });
    } catch (error) {
      const why = error instanceof Refused ? error.message : "the daemon did not answer";
      say(this.error, `Could not ${verb} it: ${short(why, 300)}`);
      show(this.error, true);
    }
    this.asking = false;
    this.allow(contact.lost === null);
    if (document.activeElement === document.body) this.main.focus();
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

// --- nothing to show --------------------------------------------------------------------------------

const EXAMPLE = '[[models]]\nkey = "qwen/qwen3-4b-2507"\n';

function drawEmpty() {
  const list = byId("models");
  if (picture.models.length || list.querySelector(".empty")) {
    if (picture.models.length) list.querySelector(".empty")?.remove();
    return;
  }
  list.append(
    h("li", { class: "empty" },
      h("p", {}, "Nothing is kept warm yet. Write the key of a model into config.toml, as LM Studio and ", h("code", {}, "lms ls"), " show it:"),
      h("pre", {}, EXAMPLE),
      h("p", {}, "then ", h("code", {}, "keepalive check"), " and reload: ", h("code", {}, "systemctl reload keepalive"), ", or SIGHUP. This page will notice.")),
  );
}

// --- the playground -----------------------------------------------------------------------------------

const playground = { started: null, element: null, keys: null, told: "" };

/**
 * Offers the models. The element reads the prompts anew each time that it is told; so it is when there are other
 * models, and of their states only when somebody turns to it.
 */
function drawPlayground(isTurnedTo = false) {
  if (!playground.element) return;
  show(byId("playground"), picture.models.length > 0);
  const models = picture.models.map(({ key, state }) => ({ key, state }));
  const keys = models.map((model) => model.key).join("\n");
  const told = JSON.stringify(models);
  if (keys === playground.keys && (!isTurnedTo || told === playground.told)) return;
  Object.assign(playground, { keys, told });
  playground.element.models = models;
}

/** After the first picture, since that is what people come for. */
async function startPlayground() {
  await import("/keepalive.js");
  playground.element = document.createElement("streaming-prompt-executor");
  drawPlayground();
  byId("playground").append(playground.element);
  for (const turn of ["pointerenter", "focusin"]) byId("playground").addEventListener(turn, () => drawPlayground(true));
}

// --- finding one of many ------------------------------------------------------------------------------

const FILTER_FROM = 7;
const kinds = new Map();
let chosen = "all";
let kindCounts = {};

function choose(name) {
  chosen = name;
  drawFilter();
  byId("kinds").querySelector(":checked")?.focus();
}

function drawFilter() {
  show(byId("filter"), picture.models.length >= FILTER_FROM);
  kindCounts = { all: picture.models.length };
  for (const model of picture.models) kindCounts[kind(model)] = (kindCounts[kind(model)] ?? 0) + 1;
  const items = ["all", ...Object.keys(KINDS)].filter((name) => kindCounts[name] || name === chosen || name === "all");
  keep(byId("kinds"), items, kinds, (name) => name, (name) => {
    const count = h("span", { class: "count" });
    const radio = h("input", { type: "radio", name: "kind", value: name, onchange: () => choose(name) });
    return {
      node: h("label", {}, radio, h("span", {}, name === "all" ? "All" : KINDS[name], " ", count)),
      update() {
        say(count, String(kindCounts[name] ?? 0));
        if (radio.checked !== (chosen === name)) radio.checked = chosen === name;
      },
    };
  });
  const wanted = byId("search").value.trim().toLowerCase();
  for (const model of picture.models) {
    const fits = (chosen === "all" || kind(model) === chosen) && `${model.key} ${model.upstream}`.toLowerCase().includes(wanted);
    show(rows.get(model.id).node, fits);
  }
}

// --- the rest -----------------------------------------------------------------------------------------

function drawFooter() {
  say(byId("version"), picture.version ?? "");
  if (!picture.version) return;
  const scraped = "scraped_at" in picture ? (picture.scrapedAt ? `metrics last read ${ago(picture.scrapedAt, now())} ago` : "nobody reads /metrics: no alert can wake you") : "";
  const kept = history && !history.kept ? `history ends with the daemon: ${short(history.reason ?? "", 200)}` : "";
  say(byId("footer"), [`Running for ${ago(picture.startedAt, now())}`, scraped, kept].filter(Boolean).join(" · "));
}

function start() {
  byId("filter").addEventListener("submit", (event) => event.preventDefault());
  byId("search").addEventListener("input", drawFilter);
  for (const [state, text] of [["warm", "warm"], ["loading", "loading"], ["cold", "cold"], ["backoff", "backoff"], ["unknown", "unknown"], ["eviction", "evicted"]]) {
    byId("legend").append(h("li", { "data-state": state }, text));
  }
  drawHead();
  setInterval(() => {
    drawHead();
    if (contact.lost !== null) return;
    for (const row of rows.values()) {
      if (row.node.hidden) continue;
      row.tick();
      row.drawBand();
    }
    drawColumns();
    for (const strip of strips.values()) strip.tick();
    drawFooter();
  }, 1000);
  setInterval(() => readHistory(), HISTORY_MAX_AGE);
  follow();
}

start();
