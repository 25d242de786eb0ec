// What is remembered of each model: read now and then, and written on from what the page sees itself.

import { ask } from "./ask.js";
import { now, time } from "./clock.js";
import { idOf, picture } from "./picture.js";

const MAX_AGE = 300_000;
const ASKED_MAX = 20; // above this, all of it is asked for
// As much of the last 24 hours as anything is known of.
const SPANS = [600_000, 3_600_000, 21_600_000, 86_400_000];

export const histories = new Map(); // by model id
/** What holds for all: `kept` and `reason` (null until it was read), and the oldest time that any tells of. */
export const history = { kept: null, reason: null, knownSince: Infinity };

/** The length of the time that charts show. */
export function shownSpan() {
  return SPANS.find((length) => now() - history.knownSince <= length) ?? SPANS.at(-1);
}

const due = new Set(); // ids of models whose history has changed
let timer = 0;
let whenRead = () => {};

/** Reads it all from time to time. `read(ids)` is told whose was read, each time that any was. */
export function remember(read) {
  whenRead = read;
  setInterval(() => readHistory(), MAX_AGE);
}

/** Takes models that may have changed, each as [before, after]; in a `whole` document are no others than these. */
export function noteChanges(changes, whole) {
  for (const [before, after] of changes) noteChange(before, after);
  if (!whole) return;
  // There may be other models, or another daemon.
  const ids = new Set(changes.map(([, model]) => model.id));
  for (const known of histories.keys()) if (!ids.has(known)) histories.delete(known);
  readHistory();
}

/** Between two readings, the page writes its own: what it has seen itself. */
function noteChange(before, after) {
  const known = histories.get(after.id);
  if (known && before && before.state !== after.state) known.timeline.push({ at: after.since, state: after.state });
  if (!before || (before.loads === after.loads && before.evictions === after.evictions && before.waiting === after.waiting)) return;
  due.add(after.id);
  // All open pages see the same change at the same time; they need not all ask at the same time.
  timer ||= setTimeout(readDue, 1000 + Math.random() * 2000);
}

async function readDue() {
  const models = picture.models.filter((model) => due.has(model.id));
  due.clear();
  const keys = new Set(models.map((model) => model.key));
  await readHistory(keys.size > ASKED_MAX ? [] : [...keys]);
  timer = 0;
}

async function readHistory(keys = []) {
  const query = keys.map((key) => `model=${encodeURIComponent(key)}`).join("&");
  let read;
  try {
    read = await (await ask(`/api/history${query && "?"}${query}`)).json();
  } catch {
    return; // The page says elsewhere whether there is contact; the next reading may do better.
  }
  for (const entry of read.models) {
    const at = (one) => ({ ...one, at: time(one.at) });
    histories.set(idOf(entry), {
      ...entry, loads: entry.loads.map(at), evictions: entry.evictions.map(at), timeline: entry.timeline.map(at),
    });
  }
  const knownSince = Math.min(...[...histories.values()].map((entry) => entry.timeline[0]?.at ?? Infinity));
  Object.assign(history, { kept: read.kept, reason: read.reason, knownSince });
  whenRead(new Set(read.models.map(idOf)));
}
