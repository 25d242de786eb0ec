// What the page says, in words. Pure: a picture of the daemon and a time go in, text comes out.
//
// A picture is what /api/status says, with its times as milliseconds of the daemon's clock. Times go on between
// two pictures, so everything that counts is said anew each second, from the instants and never from a count.

/** A duration in seconds, as short as people say it; the same as on the command line. */
export function span(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${seconds.toFixed(0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(0)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(0)} h` : `${(seconds / 86400).toFixed(0)} d`;
}

/** The same for what is seen counting: only what has passed. */
export function counted(seconds) {
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
}

export const ago = (at, now) => counted(Math.max(0, (now - at) / 1000));

export const ahead = (at, now) => (at <= now ? "now" : `in ${counted(Math.ceil((at - now) / 1000))}`);

const thousands = (count) => String(count).replace(/\B(?=(\d{3})+$)/g, ",");

export const many = (count, one, more = `${one}s`) => `${thousands(count)} ${count === 1 ? one : more}`;

/** "a, b and c", and no more than three of them. */
export function listed(names) {
  const shown = names.length > 3 ? [...names.slice(0, 2), `${names.length - 2} others`] : names;
  return shown.length < 2 ? shown.join("") : `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}`;
}

/** Both ends tell long names apart, so the middle goes. */
export function short(text, most = 80) {
  return text.length <= most ? text : `${text.slice(0, most / 2)}…${text.slice(-most / 2 + 1)}`;
}

// Maps, since what others write into a status may also be the name of something that every object has.
const CAUSES = new Map([
  ["timer", "its idle timer ran out"],
  ["displaced", "another model took its place"],
  ["crash", "it crashed"],
  ["restart", "LM Studio restarted"],
  ["by_hand", "unloaded by hand"],
  ["unknown", "cause unknown"],
]);

export const causeOf = (eviction) => CAUSES.get(eviction.cause) ?? short(eviction.cause);

export const TIERS = new Map([
  ["v1", "LM Studio 0.4"],
  ["v0", "LM Studio 0.3"],
  ["llama", "llama-server"],
  ["openai", "OpenAI-compatible"],
]);

/** Whether it is here, or awaited, because somebody asked for it: such a model is wanted while that lasts. */
function comesAndGoes(model) {
  return model.keep === "auto" && (model.state === "warm" || model.state === "loading" || model.waiting > 0);
}

const gigabytes = (bytes) => (bytes === null ? "?" : `${(bytes / 1e9).toFixed(1)} GB`);

/**
 * Who has the memory of an upstream: each part with its share of a bar, and in words; null where that is no matter.
 * What is not known to take anything gets no share, and is named all the same.
 */
export function memory(upstream, models) {
  const known = upstream.memory ?? null;
  if (known === null) return null;
  const there = models.filter((model) => model.upstream === upstream.name && (model.instances || model.load));
  const next = known.next_to_go[0] ?? null;
  const parts = there.map((model) => ({
    key: model.key,
    bytes: model.memory_bytes,
    what: model.load ? "loading" : !model.ours ? "foreign" : model.key === next ? "next" : model.keep === "auto" ? "auto" : "always",
  }));
  for (const one of known.strangers) parts.push({ key: one.key, bytes: one.bytes, what: "foreign" });
  const whole = Math.max(known.budget_bytes ?? 0, known.used_bytes, 1);
  const notes = new Map([["loading", "loading"], ["foreign", "not ours"], ["next", "goes next"], ["always", "always kept"]]);
  for (const part of parts) {
    part.share = (part.bytes ?? 0) / whole;
    const note = notes.get(part.what);
    part.text = `${short(part.key, 60)} ${gigabytes(part.bytes)}${note ? ` (${note})` : ""}`;
  }
  const of = known.budget_bytes === null ? "" : ` of ${gigabytes(known.budget_bytes)}`;
  const most = known.places ? `; no more than ${known.places} at a time` : "";
  const waits = known.waiting.length ? `; ${listed(known.waiting.map((key) => short(key, 48)))} ${known.waiting.length > 1 ? "wait" : "waits"} for room` : "";
  return { parts, text: `${gigabytes(known.used_bytes)}${of}${most}${waits}` };
}

/** What a model means to whoever looks: its state, but for those that fail or that nobody wants now. */
export function kind(model) {
  if (!model.wanted && model.state !== "backoff" && !comesAndGoes(model)) return "off";
  if (model.state === "backoff" || !model.listed) return "failing";
  return model.state;
}

export const KINDS = {
  failing: "failing",
  loading: "loading",
  cold: "cold",
  unknown: "unknown",
  warm: "warm",
  off: "not wanted",
};

/** "62 s, about 50 s to go" */
export function progress(load, now) {
  const elapsed = counted((now - load.began) / 1000);
  if (load.progress !== null && load.ends === null) return `${elapsed} so far, ${Math.round(load.progress * 100)} % done`;
  if (load.ends === null) return `${elapsed} so far, no earlier load to tell how long it takes`;
  const left = Math.ceil((load.ends - now) / 1000);
  return left > 0 ? `${elapsed}, about ${counted(left)} to go` : `${elapsed}, longer than usual`;
}

const TROUBLE = new Set(["down", "unauthorized"]);
export const inTrouble = (upstream) => TROUBLE.has(upstream.state);

/** The one-line answer to "is it warm?": how it looks, in full, and without what counts each second. */
export function answer(picture, now) {
  const { models, upstreams } = picture;
  if (picture.draining) return said("gone", "The daemon is stopping; models stay loaded");
  if (!models.length) return said("cold", picture.config.unlisted === "auto" ? "Models are loaded when somebody asks" : "No models are configured");
  const by = Map.groupBy(models, kind);
  const of = (name) => by.get(name) ?? [];
  const wanted = models.length - of("off").length;
  const waiting = models.reduce((sum, model) => sum + model.waiting, 0);
  const waits = waiting ? `; ${many(waiting, "request waits", "requests wait")}` : "";
  const troubled = upstreams.filter(inTrouble);
  if (troubled.length) {
    const [first] = troubled;
    const what = first.state === "down" ? "does not answer" : "refuses our token";
    const who = listed(troubled.map((upstream) => short(upstream.name, 48)));
    const cut = models.filter((model) => troubled.some((upstream) => upstream.name === model.upstream)).length;
    const which = cut === models.length ? "no model can be kept warm" : `${many(cut, "model")} cannot be kept warm`;
    if (cut) return said("failing", `${troubled.length > 1 ? `${who} do not answer` : `${who} ${what}`}: ${which}${waits}`);
  }
  const [failing, loading, cold, unknown] = [of("failing"), of("loading"), of("cold"), of("unknown")];
  const missing = failing.length + loading.length + cold.length + unknown.length;
  if (!missing) return said("warm", `${all(of("warm"), models)}${waits}`);
  const tone = failing.length ? "failing" : loading.length ? "loading" : cold.length ? "cold" : "unknown";
  if (missing === 1 || (loading.length === 1 && !failing.length)) {
    const model = failing[0] ?? loading[0] ?? cold[0] ?? unknown[0];
    const rest = missing > 1 ? `, then ${many(missing - 1, "more model")}` : "";
    return said(tone, `${one(model, now)}${rest}${waits}`, `${short(model.key)} is ${KINDS[kind(model)]}${rest}${waits}`);
  }
  const parts = [];
  if (failing.length) parts.push(`${failing.length} failing`);
  if (loading.length) parts.push(`${loading.length} loading`);
  if (cold.length) parts.push(`${cold.length} cold`);
  if (unknown.length) parts.push(`${unknown.length} not known yet`);
  return said(tone, `${of("warm").length} of ${many(wanted, "model")} warm: ${parts.join(", ")}${waits}`);
}

function said(tone, text, spoken = text) {
  return { tone, text, spoken };
}

function all(warm, every) {
  const [wanted, models] = [warm.length, every.length];
  if (!wanted && every.every((model) => model.keep === "auto")) return "Nothing is loaded: models come when somebody asks for them";
  if (!wanted) return models === 1 ? "The only model is not wanted now" : `None of the ${models} models is wanted now`;
  const rest = models - wanted ? `; ${many(models - wanted, "other is", "others are")} not wanted now` : "";
  if (wanted === 1) return `${short(warm[0].key, 48)} is warm${rest}`;
  return `${wanted === 2 ? "Both" : `All ${wanted}`} ${models === wanted ? "" : "wanted "}models are warm${rest}`;
}

function one(model, now) {
  const key = short(model.key, 48);
  if (model.load && model.state === "loading") return `${key} is loading: ${progress(model.load, now)}`;
  const why = model.reason ? `: ${short(model.reason, 120)}` : "";
  const retry = model.retry ? `; next try ${ahead(model.retry, now)}` : "";
  switch (kind(model)) {
    case "failing":
      return `${key} ${model.listed ? "failed" : "is not there"}${why}${retry}`;
    case "unknown":
      return `${key} is not known yet${why}`;
    default:
      return `${key} is ${model.state}${why}${retry}`;
  }
}

/** Which daemon loads and unloads at an upstream; empty where there is one alone, or nobody can know. */
export function acting({ cluster }, upstream) {
  const who = cluster?.engine.up ? cluster.holders[upstream.name] : null;
  if (!who) return "";
  return who === cluster.instance ? `this daemon acts (${short(who, 40)})` : `${short(who, 40)} acts`;
}

/** The daemons that are one with this, in a line. */
export function together({ cluster }) {
  if (!cluster) return "";
  // They are upgraded one by one.
  const versions = new Set(cluster.members.map((one) => one.version)).size > 1;
  const names = cluster.members.map((one) =>
    `${short(one.instance, 40)}${one.instance === cluster.instance ? " (this one)" : ""}${versions ? ` ${short(one.version, 40)}` : ""}`);
  return `cluster ${short(cluster.name, 40)}: ${names.join(", ") || "nobody has been seen yet"}`;
}

/**
 * What should bring a person here, the worst first: each with a key that stays, and the models that it is about.
 * Where there are few models (`all` false), what their rows say at first sight is not said twice.
 */
export function attention(picture, all) {
  const found = [];
  const add = (tone, key, text, models = []) => found.push({ tone, key, text, models });
  for (const mistake of picture.config.mistakes) {
    add("failing", `config ${mistake}`, () => `Config rejected, the one before it is in use: ${short(mistake, 300)}`);
  }
  const { cluster } = picture;
  if (cluster && !cluster.engine.up) {
    add("failing", "engine", () =>
      `Nothing is loaded or unloaded, what is warm is served: ${short(cluster.engine.error ?? "etcd does not answer", 300)}`);
  }
  for (const upstream of picture.upstreams.filter(inTrouble)) {
    const what = upstream.state === "down" ? "has been down" : "has refused our token";
    add("failing", `upstream ${upstream.name}`, (now) =>
      `${short(upstream.name)} ${what} for ${ago(upstream.since, now)}: ${short(upstream.error ?? "no answer yet", 300)}`);
  }
  for (const difference of cluster?.differences ?? []) {
    add("loading", `differs ${difference}`, () => `The daemons of this cluster differ: ${short(difference, 300)}`);
  }
  const failing = all ? picture.models.filter((model) => kind(model) === "failing") : [];
  // What is wrong is often wrong with many at once.
  for (const [reason, models] of Map.groupBy(failing, (model) => model.reason ?? "no reason given")) {
    add("failing", `failing ${reason}`, () => `cannot be loaded: ${short(reason, 160)}`, models);
  }
  for (const model of picture.models.filter((one) => one.primed?.reason)) {
    add("loading", `primed ${model.id}`, () => `has not read all ahead: ${short(model.primed.reason, 160)}`, [model]);
  }
  for (const model of picture.models.filter((one) => one.instances > 1)) {
    add("loading", `copies ${model.id}`, () =>
      `is in memory ${many(model.instances, "time")}; unload all copies but one in LM Studio`, [model]);
  }
  return found;
}
