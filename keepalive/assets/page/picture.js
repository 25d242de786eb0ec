// What is known of the daemon: its last status, with its times as milliseconds of its clock.

import { synchronize, time } from "./clock.js";

export const picture = { config: { mistakes: [] }, upstreams: [], models: [], draining: false };

export const idOf = (model) => `${model.upstream}\n${model.key}`;

function modelOf(document, at) {
  const load = document.load && {
    began: at - document.load.elapsed_seconds * 1000,
    progress: document.load.progress ?? null,
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
    due: load === null && typeof document.eta_seconds === "number" ? at + document.eta_seconds * 1000 : null,
  };
}

/** Takes a status document, whole or partial, as the daemon sends it. Returns its models, each as [before, after]. */
export function take(document) {
  const at = time(document.now);
  synchronize(at);
  const models = document.models.map((model) => modelOf(model, at));
  const upstreams = document.upstreams.map((upstream) => ({ ...upstream, since: time(upstream.since) }));
  const changes = models.map((model) => [picture.models.find((old) => old.id === model.id), model]);
  Object.assign(picture, document, {
    startedAt: time(document.started_at),
    scrapedAt: time(document.scraped_at),
    models: document.partial ? merged(picture.models, models, (model) => model.id) : models,
    upstreams: document.partial ? merged(picture.upstreams, upstreams, (upstream) => upstream.name) : upstreams,
  });
  return changes;
}

function merged(old, changed, keyOf) {
  const news = new Map(changed.map((entry) => [keyOf(entry), entry]));
  return old.map((entry) => news.get(keyOf(entry)) ?? entry);
}
