/**
 * keepalive in a browser: stream a prompt, and show the wait for a model that is not in memory.
 *
 *   streamPrompt()                  the events of one answer, as an async iterator
 *   PromptRun                       one answer after another, as a store that any framework can watch
 *   useStreamingPrompt()            that store as a React hook
 *   <streaming-prompt-executor>     that store as an element: form, loading bar, text, figures
 *
 * No dependencies, no build step. Whatever a server sends becomes text and never markup. Nobody hears of
 * changes more than once per frame, however fast the chunks come. Neither style nor script is written into a
 * document, so that `Content-Security-Policy: default-src 'self'` holds.
 */

const STREAM = "/api/prompts/execute/stream";
const MAX_EVENT = 1 << 20; // characters; a chunk has a few

/** What ended an answer: a refusal (with `status`), an error in the stream, or a connection that broke. */
export class StreamingPromptError extends Error {
  constructor(message, { code = null, status = null, field = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { name: "StreamingPromptError", code, status, field, retryAfter });
  }
}

// --- the wire --------------------------------------------------------------------------------------

/** Bytes of an event stream in, the data of each event out, as the HTML standard reads them. */
class EventParser {
  #decoder = new TextDecoder(); // drops the byte order mark, waits for the rest of a split character
  #line = "";
  #data = null;
  #afterReturn = false;

  *push(bytes) {
    const text = this.#decoder.decode(bytes, { stream: true });
    // The LF of a CRLF whose CR was the last thing to come before.
    let at = this.#afterReturn && text.startsWith("\n") ? 1 : 0;
    if (text) this.#afterReturn = text.endsWith("\r");
    const ends = /\r\n?|\n/g;
    ends.lastIndex = at;
    for (let end; (end = ends.exec(text)); at = ends.lastIndex) {
      const line = this.#line + text.slice(at, end.index);
      this.#line = "";
      if (line) {
        this.#field(line);
      } else if (this.#data !== null) {
        yield this.#data;
        this.#data = null;
      }
    }
    this.#line += text.slice(at);
    if (this.#line.length + (this.#data?.length ?? 0) > MAX_EVENT) throw unreadable("an event without an end");
  }

  #field(line) {
    const [, name, value] = /^([^:]*):? ?([^]*)$/.exec(line);
    if (name === "data") this.#data = this.#data === null ? value : `${this.#data}\n${value}`;
  }
}

/**
 * POST `request` and iterate over what comes: objects of type `start`, `model_loading`, `chunk`, `reasoning`
 * and `done`. An error event, a refusal and a lost connection raise a StreamingPromptError; an aborted
 * `signal` raises its reason, as with fetch. Leaving the loop ends the request at once, and with it the work
 * of the model.
 *
 * `idleTimeout` (milliseconds; 0: never) gives up a silent connection: a daemon that is still there says
 * something every 5 seconds, also while a model loads for minutes.
 */
export function streamPrompt(request, options = {}) {
  const { baseUrl = "", headers, signal, fetch = globalThis.fetch, idleTimeout = 60_000 } = options;
  const controller = new AbortController();
  const abort = () => controller.abort(signal.reason);
  let left = false;
  let whole = false;

  const within = async (step) => {
    const timer = idleTimeout && setTimeout(() => controller.abort(), idleTimeout);
    try {
      return await step;
    } finally {
      clearTimeout(timer);
    }
  };

  async function* read() {
    signal?.throwIfAborted();
    signal?.addEventListener("abort", abort);
    let reader;
    try {
      const response = await within(
        fetch(baseUrl.replace(/\/+$/, "") + STREAM, {
          method: "POST",
          headers: { "Content-Type": "application/json", ...headers },
          body: JSON.stringify(request),
          signal: controller.signal,
        }),
      );
      if (!response.ok) throw await within(refusal(response));
      if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) throw unreadable("no event stream");
      reader = response.body.getReader();
      const parser = new EventParser();
      for (let piece; !(piece = await within(reader.read())).done; ) {
        for (const data of parser.push(piece.value)) {
          const event = parsed(data);
          whole = event.type === "done" || event.type === "error";
          if (event.type === "error") throw new StreamingPromptError(event.message, event);
          yield event;
          if (whole) return;
        }
      }
      throw new TypeError("it ended too early");
    } catch (error) {
      if (left) return;
      if (signal?.aborted) throw signal.reason;
      if (error instanceof StreamingPromptError) throw error;
      throw reader
        ? new StreamingPromptError("The connection broke off before the answer was complete.", {
            code: "connection_lost",
          })
        : new StreamingPromptError(`There is no answer from ${baseUrl || "the server"}.`, { code: "unreachable" });
    } finally {
      signal?.removeEventListener("abort", abort);
      if (whole) void drain(reader, controller);
      else controller.abort();
    }
  }

  const events = read();
  return {
    next: () => events.next(),
    return(value) {
      // A generator alone would queue this behind a read that may take minutes.
      left = true;
      if (!whole) controller.abort();
      return events.return(value);
    },
    [Symbol.asyncIterator]() {
      return this;
    },
  };
}

/** Take what follows the last event, so that the connection can serve the next request. */
async function drain(reader, controller) {
  const timer = setTimeout(() => controller.abort(), 1000);
  try {
    while (!(await reader.read()).done);
  } catch {
    // It is over either way.
  } finally {
    clearTimeout(timer);
  }
}

function parsed(data) {
  try {
    const event = JSON.parse(data);
    if (typeof event?.type === "string") return event;
  } catch {
    // Told below.
  }
  throw unreadable("an event that is none");
}

function unreadable(what) {
  return new StreamingPromptError(`This is not keepalive's answer: ${what}.`, { code: "bad_answer" });
}

async function refusal(response) {
  const { status, headers } = response;
  const text = await response.text();
  let told;
  try {
    told = JSON.parse(text).error;
  } catch {
    // Something between us and the daemon answered.
  }
  const { message = `HTTP ${status} ${response.statusText}`, code, field } =
    typeof told === "string" ? { message: told } : (told ?? {});
  const after = headers.get("Retry-After");
  const seconds = after === null ? NaN : isNaN(after) ? (Date.parse(after) - Date.now()) / 1000 : Number(after);
  return new StreamingPromptError(message, { code, field, status, retryAfter: isNaN(seconds) ? null : seconds });
}

// --- the store -------------------------------------------------------------------------------------

const IDLE = Object.freeze({
  status: "idle", // then waiting, loading, thinking, answering; done, failed or cancelled
  content: "",
  reasoning: "",
  isStreaming: false,
  isModelLoading: false,
  error: null, // a sentence
  failure: null, // the StreamingPromptError behind it
  metadata: null, // what the start event tells, and in the end the totals
  progress: Object.freeze({
    chunks: 0,
    outputLength: 0, // characters
    duration: 0, // milliseconds, as all below, since `execute`
    firstTokenMs: null, // thinking counts
    firstChunkMs: null,
    chunksPerSecond: null, // events, not tokens: those cannot be seen
    elapsed: null, // of the load
    estimatedTime: null, // of the whole load; null: nobody knows yet
    fraction: null, // 0 to 1; null: nobody knows, or longer than estimated
    message: null,
  }),
});

/** What an event makes of a state. */
function apply(state, event, duration) {
  const progress = { ...state.progress, duration };
  switch (event.type) {
    case "start": {
      const { type, ...metadata } = event;
      return { ...state, metadata, progress };
    }
    case "model_loading": {
      const { message = null, elapsed = null, estimatedTime = null } = event;
      const fraction = estimatedTime > 0 && elapsed < estimatedTime ? elapsed / estimatedTime : null;
      Object.assign(progress, { message, elapsed, estimatedTime, fraction });
      return { ...state, status: "loading", isModelLoading: true, progress };
    }
    case "reasoning":
      progress.firstTokenMs ??= duration;
      return {
        ...state,
        status: "thinking",
        isModelLoading: false,
        reasoning: state.reasoning + event.content,
        progress,
      };
    case "chunk": {
      progress.firstTokenMs ??= duration;
      progress.firstChunkMs ??= duration;
      progress.chunks += 1;
      progress.outputLength += [...event.content].length;
      const seconds = (duration - progress.firstChunkMs) / 1000;
      progress.chunksPerSecond = seconds > 0 ? (progress.chunks - 1) / seconds : null;
      return { ...state, status: "answering", isModelLoading: false, content: state.content + event.content, progress };
    }
    case "done": {
      const { type, ...totals } = event;
      progress.chunks = totals.totalChunks ?? progress.chunks;
      progress.outputLength = totals.outputLength ?? progress.outputLength;
      return { ...ended(state, "done"), metadata: { ...state.metadata, ...totals }, progress };
    }
    default:
      return state; // of a newer daemon
  }
}

function ended(state, status, duration) {
  const progress = { ...state.progress, duration };
  return { ...state, status, isStreaming: false, isModelLoading: false, progress };
}

/** Call `step` with the next frame, or soon where none is drawn; returns how to call it off. */
function soon(step) {
  const off = () => (globalThis.cancelAnimationFrame?.(frame), clearTimeout(timer));
  const once = () => (off(), step());
  const frame = globalThis.requestAnimationFrame?.(once);
  const timer = setTimeout(once, 250); // a tab in the background has no frames
  return off;
}

/**
 * One answer after another. `getSnapshot()` is immutable; it changes, and `subscribe`rs are told, at most once
 * per frame, and at once when an answer begins and when it ends. `options` are those of streamPrompt, and
 * `onEvent(event)` for who wants every single one.
 */
export class PromptRun {
  #snapshot = IDLE;
  #state = IDLE;
  #listeners = new Set();
  #controller = null;
  #began = 0;
  #callOff = null;

  constructor(options = {}) {
    this.options = options;
  }

  /** Milliseconds since `execute`. */
  get clock() {
    return performance.now() - this.#began;
  }

  subscribe = (listener) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  getSnapshot = () => this.#snapshot;

  /** Ends the answer before. Resolves when this one is over, however it ends, with its last snapshot. */
  execute = async (request) => {
    this.#controller?.abort();
    const controller = new AbortController();
    const { onEvent, ...options } = this.options;
    this.#controller = controller;
    this.#began = performance.now();
    this.#publish({ ...IDLE, status: "waiting", isStreaming: true });
    let state = this.#state;
    // What comes late from an answer that was given up is nobody's.
    const current = () => this.#controller === controller;
    try {
      for await (const event of streamPrompt(request, { ...options, signal: controller.signal })) {
        if (!current()) break;
        this.#state = state = apply(state, event, this.clock);
        this.#callOff ??= soon(() => this.#publish(this.#state));
        onEvent?.(event);
      }
    } catch (error) {
      state = { ...ended(state, "failed", this.clock), error: error.message, failure: error };
    }
    if (current()) {
      this.#controller = null;
      this.#publish(state);
      return state;
    }
    return ended(state, "cancelled", this.clock);
  };

  cancel = () => {
    if (this.#controller) this.#stop(ended(this.#state, "cancelled", this.clock));
  };

  reset = () => this.#stop(IDLE);

  #stop(state) {
    this.#controller?.abort();
    this.#controller = null;
    this.#publish(state);
  }

  #publish(state) {
    this.#callOff?.();
    this.#callOff = null;
    this.#state = this.#snapshot = state;
    for (const listener of [...this.#listeners]) listener();
  }
}

/**
 * `content, isStreaming, isModelLoading, error, metadata, progress, execute, cancel, reset`, and beside these
 * `status, reasoning, failure`. React is handed in, so that this file needs nothing:
 *
 *   export const useStreamingPrompt = (options) => keepalive.useStreamingPrompt(React, options);
 *
 * The three functions are the same for the life of the component; its end ends the answer.
 */
export function useStreamingPrompt(React, options) {
  const [run] = React.useState(() => new PromptRun(options));
  const state = React.useSyncExternalStore(run.subscribe, run.getSnapshot, run.getSnapshot);
  React.useEffect(() => {
    run.options = options ?? {};
  });
  React.useEffect(() => run.cancel, [run]);
  return { ...state, execute: run.execute, cancel: run.cancel, reset: run.reset };
}

// --- the element -----------------------------------------------------------------------------------

const STYLE = `
:host {
  --text: var(--keepalive-text, light-dark(#1c2024, #e6e8ea));
  --muted: var(--keepalive-muted, light-dark(#5f6872, #9aa3ad));
  --line: var(--keepalive-line, light-dark(#d8dce1, #343a41));
  --field: var(--keepalive-field, light-dark(#fff, #14171a));
  --sunken: var(--keepalive-sunken, light-dark(#f6f7f8, #1a1d21));
  --accent: var(--keepalive-accent, light-dark(#1f5fbf, #7db0ff));
  --on-accent: var(--keepalive-on-accent, light-dark(#fff, #0d1420));
  --good: var(--keepalive-good, light-dark(#1c7a45, #5cc98a));
  --bad: var(--keepalive-bad, light-dark(#b3261e, #ff9087));
  --radius: var(--keepalive-radius, 6px);
  display: block;
  color: var(--text);
  font: 400 0.9375rem/1.5 var(--keepalive-font, system-ui, sans-serif);
  font-variant-numeric: tabular-nums;
}
:host([hidden]), [hidden] { display: none !important; }
* { box-sizing: border-box; }
form, .result { display: grid; gap: 0.75rem; }
.result { margin-top: 1.25rem; }
.title { margin: 0; font-weight: 600; }
label { display: grid; gap: 0.25rem; }
label > span, dt { color: var(--muted); font-size: 0.8125rem; }
select, textarea, button {
  font: inherit; color: inherit; border: 1px solid var(--line); border-radius: var(--radius);
}
select, textarea { width: 100%; padding: 0.4rem 0.6rem; background: var(--field); }
select { height: 2.375rem; }
textarea { display: block; resize: vertical; min-height: 4.75rem; max-height: 20rem; field-sizing: content; }
textarea[rows='1'] { min-height: 2.375rem; resize: none; }
[aria-invalid=true] { border-color: var(--bad); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.variables { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); }
.actions { display: flex; flex-wrap: wrap; gap: 0.5rem; }
button { min-height: 2.375rem; padding: 0.3rem 0.9rem; background: transparent; cursor: pointer; }
button:hover { border-color: var(--muted); }
button.primary { border-color: var(--accent); background: var(--accent); color: var(--on-accent); font-weight: 600; }
button.primary:hover { filter: brightness(1.08); }
button[aria-disabled=true] { opacity: 0.5; cursor: default; filter: none; }
kbd { margin-left: 0.35rem; color: var(--muted); font: inherit; font-size: 0.8125rem; }
.status { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.6rem; }
.status::before {
  content: ""; width: 0.5rem; height: 0.5rem; border-radius: 50%; background: var(--muted); align-self: center;
}
.status b { font-weight: 600; }
.status span { color: var(--muted); }
.status .clock { margin-left: auto; }
[data-status=waiting] .status::before, [data-status=loading] .status::before,
[data-status=thinking] .status::before, [data-status=answering] .status::before { background: var(--accent); }
[data-status=done] .status::before { background: var(--good); }
[data-status=failed] .status::before { background: var(--bad); }
progress {
  appearance: none; display: block; width: 100%; height: 4px; border: 0; border-radius: 2px; overflow: hidden;
  background: var(--line); color: var(--accent);
}
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--accent); transition: inline-size 0.12s linear; }
progress::-moz-progress-bar { background: var(--accent); }
progress:indeterminate {
  background: linear-gradient(90deg, transparent, var(--accent), transparent) 0 0 / 40% 100% no-repeat var(--line);
  animation: sweep 1.6s ease-in-out infinite alternate;
}
progress:indeterminate::-webkit-progress-bar { background: transparent; }
progress:indeterminate::-moz-progress-bar { background: transparent; }
@keyframes sweep { to { background-position: 100% 0; } }
.error { margin: 0; overflow-wrap: anywhere; }
.error:empty { display: none; }
.error + span { color: var(--muted); margin-top: -0.75rem; }
summary { color: var(--muted); cursor: pointer; border-radius: var(--radius); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.text > div { contain: layout style; }
.answer, details .text {
  max-height: var(--keepalive-answer-height, 24rem); overflow: auto; padding: 0.75rem 0.9rem;
  border: 1px solid var(--line); border-radius: var(--radius); background: var(--sunken);
}
.answer { min-height: 3rem; line-height: 1.6; }
details .text { margin-top: 0.4rem; color: var(--muted); font-size: 0.875rem; max-height: 14rem; }
[data-status=answering] .answer > :last-child::after, [data-status=waiting] .answer::after,
[data-status=thinking] .answer::after {
  content: ""; display: inline-block; width: 0.5em; height: 1.05em; margin-left: 1px; border-radius: 1px;
  vertical-align: text-bottom; background: var(--accent); animation: blink 1.1s steps(2, jump-none) infinite;
}
@keyframes blink { to { opacity: 0.15; } }
.foot { display: flex; flex-wrap: wrap; align-items: end; justify-content: space-between; gap: 0.75rem; }
dl { display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem; margin: 0; }
dd { margin: 0; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (prefers-reduced-motion: reduce) {
  *, ::before, ::after, ::-webkit-progress-value { animation: none !important; transition: none !important; }
}
@media (forced-colors: active) { .status::before { forced-color-adjust: none; } }
`;

let sheet;

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Set what differs: an assignment alone costs a layout, and repeats what a screen reader said. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const plural = (n, word) => `${n.toLocaleString()} ${word}${n === 1 ? "" : "s"}`;
const rounded = (n) => n.toFixed(n < 1 ? 2 : n < 100 ? 1 : 0);
const duration = (ms) => `${rounded(ms / 1000)} s`;

/** A wait, as people say it: whole seconds, minutes from two on. */
function spoken(ms) {
  const whole = Math.max(1, Math.round(ms / 1000));
  return whole < 120 ? plural(whole, "second") : plural(Math.round(whole / 60), "minute");
}

const LABELS = {
  waiting: "Waiting for the answer…",
  loading: "Loading model…",
  thinking: "Thinking…",
  answering: "Answering…",
  done: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
};

function advice({ code, status, retryAfter }) {
  if (code === "unreachable") return "Is keepalive running? Retry when it is.";
  if (code === "connection_lost") return "What came so far is kept below. Retry asks anew.";
  if (code === "bad_answer") return "Does the base URL lead to keepalive?";
  if (retryAfter !== null) return `Retry in ${spoken(retryAfter * 1000)}.`;
  return status === null || status >= 500 ? "Retry asks anew." : "";
}

const BLOCK = 2000; // characters

/** Text that grows at its end. It is cut into blocks at line ends: only the last one is ever laid out again. */
class Growing {
  #written = 0;
  #room = 0;

  constructor(element) {
    this.element = element;
  }

  show(text) {
    if (text.length < this.#written) {
      this.element.replaceChildren();
      this.#written = this.#room = 0;
    }
    for (let from = this.#written; from < text.length; from = this.#written) {
      if (!this.element.lastChild || this.#room <= 0) {
        this.element.append(h("div", null, ""));
        this.#room = BLOCK;
      }
      // A block may end after the first line end beyond its size.
      const cut = text.indexOf("\n", from + this.#room - 1) + 1 || text.length;
      this.element.lastChild.firstChild.appendData(text.slice(from, cut));
      this.#room = text[cut - 1] === "\n" ? this.#room - (cut - from) : Math.max(1, this.#room - (cut - from));
      this.#written = cut;
    }
  }
}

const ATTRIBUTES = {
  promptId: "prompt-id",
  model: "model",
  baseUrl: "base-url",
  maxTokens: "max-tokens",
  timeout: "timeout",
};
const OBJECTS = { models: (text) => text.split(/\s*,\s*/), variables: JSON.parse, headers: JSON.parse };
const EVENTS = ["start", "model_loading", "reasoning", "chunk", "done"];

// Frameworks import this file on servers, too.
const Base = globalThis.HTMLElement ?? class {};

/**
 * Runs a prompt in front of somebody: the one of `prompt-id`; or one that is written here, for `model`; or, with
 * neither, a choice of the configured prompts and of `models` ("a, b"; else those that the daemon keeps).
 * `variables` (JSON) fills the form, `max-tokens`, `timeout` and `base-url` go with the request, and so does the
 * property `headers`. Each attribute is a property, too, in camelCase; `models` may be objects with `key` and
 * `state`. Methods: `execute()`, `cancel()`, `reset()`; `state` is that of the hook. Events, with the streamed
 * one as `detail`: `start`, `model_loading`, `reasoning`, `chunk`, `done`; and `error` with what was raised.
 */
export class StreamingPromptExecutor extends Base {
  static observedAttributes = ["prompt-id", "model", "base-url", "models", "variables"];

  #run = new PromptRun({
    onEvent: (event) => EVENTS.includes(event.type) && this.#dispatch(event.type, event),
  });
  #objects = {};
  #choices = [];
  #inputs = new Map(); // each variable that ever had a field, so that what was typed is not lost
  #request = null;
  #drawn = IDLE;
  #follows = true; // the text's end, as long as the reader does
  #late = false;
  #choice = {};
  #fields = new Map(); // those of them that are shown
  #configured = null;
  #ticking = null;
  #ui;
  #answer;
  #reasoning;

  constructor() {
    super();
    const root = this.attachShadow({ mode: "open" });
    if (!sheet) (sheet = new CSSStyleSheet()).replaceSync(STYLE);
    root.adoptedStyleSheets = [sheet];

    const button = (text, attributes, act) => {
      const made = h("button", { type: "button", part: "button", ...attributes }, text);
      if (act) made.addEventListener("click", act);
      return made;
    };
    const region = (label, attributes) => h("div", { tabindex: 0, role: "region", "aria-label": label, ...attributes });
    const ui = (this.#ui = {
      title: h("p", { class: "title" }),
      choice: h("select", { name: "choice" }),
      prompt: h("textarea", { name: "prompt", rows: 3, required: "" }),
      variables: h("div", { class: "variables" }),
      note: h("p", { class: "error", role: "alert" }),
      run: button("Run", { type: "submit", class: "primary" }),
      cancel: button("Cancel", {}, () => this.cancel()),
      label: h("b"),
      detail: h("span"),
      clock: h("span", { class: "clock" }),
      bar: h("progress", { max: 1, "aria-label": "Loading model" }),
      error: h("p", { class: "error", part: "error" }),
      advice: h("span"),
      reasoning: region("Reasoning", { class: "text" }),
      answer: region("Answer", { class: "answer text", part: "answer" }),
      copy: button("Copy", {}, () => this.#copy()),
      retry: button("Retry", {}, () => this.#start(this.#request)),
      live: h("div", { class: "unseen", role: "status" }),
    });
    const figure = (name, label) => h("div", {}, h("dt", {}, label), (ui[name] = h("dd")));
    ui.cancel.append(h("kbd", {}, "Esc"));
    ui.thoughts = h("details", {}, h("summary", {}, "Reasoning"), ui.reasoning);
    ui.figures = h(
      "dl",
      {},
      figure("first", "First token"),
      figure("chunks", "Chunks"),
      figure("rate", "Chunks per second"),
      figure("characters", "Characters"),
      figure("time", "Time"),
    );
    ui.chooser = h("label", {}, h("span", {}, "Prompt or model"), ui.choice);
    ui.own = h("label", {}, h("span", {}, "Prompt"), ui.prompt);
    ui.form = h("form", { part: "form" }, ui.title, ui.chooser, ui.own, ui.variables, ui.note);
    ui.form.append(h("div", { class: "actions" }, ui.run, ui.cancel));
    ui.status = h("div", { class: "status", part: "status" }, ui.label, ui.detail, ui.clock);
    ui.result = h("div", { class: "result" }, ui.status, ui.bar, ui.error, ui.advice, ui.thoughts, ui.answer);
    ui.result.append(h("div", { class: "foot" }, ui.figures, h("div", { class: "actions" }, ui.copy, ui.retry)));
    root.append(ui.form, ui.result, ui.live);
    this.#answer = new Growing(ui.answer);
    this.#reasoning = new Growing(ui.reasoning);

    ui.choice.addEventListener("change", () => this.#offer());
    ui.prompt.addEventListener("input", () => this.#offer());
    ui.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.execute();
    });
    ui.answer.addEventListener("scroll", () => {
      this.#follows = ui.answer.scrollHeight - ui.answer.scrollTop - ui.answer.clientHeight < 24;
    });
    root.addEventListener("keydown", (event) => this.#key(event));
    this.#run.subscribe(() => this.#draw());
    this.#draw();
  }

  connectedCallback() {
    // What was set before this class was known hides its accessors.
    for (const name of [...Object.keys(ATTRIBUTES), ...Object.keys(OBJECTS)]) {
      if (!Object.hasOwn(this, name)) continue;
      const value = this[name];
      delete this[name];
      this[name] = value;
    }
    this.#configure();
  }

  disconnectedCallback() {
    // To be moved is to be taken out and put in again.
    queueMicrotask(() => this.isConnected || this.cancel());
  }

  attributeChangedCallback(name) {
    if (name === "variables") this.#inputs.clear();
    this.#configure();
  }

  get state() {
    return this.#run.getSnapshot();
  }

  /** What the form says, as it is sent. */
  get request() {
    const { promptId, model } = this.#choice;
    const given = this.variables ?? {};
    const variables = {};
    for (const [name, { value }] of this.#fields) {
      // A number that nobody touched stays one.
      variables[name] = value === String(given[name]) ? given[name] : value;
    }
    const what =
      promptId === undefined ? { prompt: this.#ui.prompt.value, model } : { promptId, modelId: this.model ?? undefined };
    const limits = { maxTokens: Number(this.maxTokens) || undefined, timeout: Number(this.timeout) || undefined };
    return { ...what, variables, ...limits };
  }

  /** Run what the form says, unless it is running. Resolves with the last state. */
  async execute() {
    await this.#configured;
    if (this.state.isStreaming || !this.#ui.form.reportValidity()) return this.state;
    return this.#start(this.request);
  }

  cancel() {
    this.#run.cancel();
  }

  reset() {
    this.#run.reset();
  }

  #start(request) {
    this.#request = request;
    this.#follows = true;
    Object.assign(this.#run.options, { baseUrl: this.baseUrl ?? "", headers: this.headers });
    return this.#run.execute(request);
  }

  #dispatch(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #key(event) {
    const { key, target, isComposing } = event;
    if (key === "Escape" && this.state.isStreaming) {
      event.preventDefault(); // a dialog around this stays open
      this.cancel();
    } else if (key === "Enter" && target.localName === "textarea" && !isComposing) {
      // A prompt has lines; a value seldom.
      const runs = target === this.#ui.prompt ? event.ctrlKey || event.metaKey : !event.shiftKey;
      if (!runs) return;
      event.preventDefault();
      this.execute();
    }
  }

  // --- what can be asked ---

  /** Find out what there is; once for all attributes that change together. */
  #configure() {
    const asked = Promise.resolve().then(async () => {
      const outdated = () => asked !== this.#configured || !this.isConnected;
      if (outdated()) return;
      const { promptId, model, models, headers } = this;
      const get = async (path, field) => {
        const response = await fetch((this.baseUrl ?? "").replace(/\/+$/, "") + path, { headers: headers ?? {} });
        if (!response.ok) throw await refusal(response);
        return (await response.json())[field];
      };
      const alone = promptId === null && model !== null;
      const [prompts, kept] = await Promise.allSettled([
        alone ? [] : get("/api/prompts", "data"),
        alone ? [model] : promptId !== null ? [] : (models ?? get("/api/status", "models")),
      ]);
      if (outdated()) return;
      const described = (prompts.value ?? []).map(({ id, title, variables }) => ({ promptId: id, title, variables }));
      const keys = (kept.value ?? []).map((one) => ({ model: one.key ?? one, state: one.state }));
      this.#choices =
        promptId === null
          ? [...described, ...new Map(keys.map((one) => [one.model, one])).values()]
          : [described.find((prompt) => String(prompt.promptId) === promptId) ?? { promptId }];
      const failure = prompts.reason ?? kept.reason;
      const why = failure ? `What can be run cannot be read: ${failure.message}` : "No prompt and no model is configured.";
      say(this.#ui.note, this.#choices.length ? "" : why);
      this.#list();
      this.#offer();
    });
    this.#configured = asked;
  }

  #list() {
    const { choice } = this.#ui;
    const groups = [
      ["Configured prompts", this.#choices.filter((one) => one.promptId !== undefined)],
      ["A prompt of your own, for", this.#choices.filter((one) => one.promptId === undefined)],
    ];
    const made = groups
      .filter(([, choices]) => choices.length)
      .map(([label, choices]) => h("optgroup", { label }, ...choices.map(option)));
    const old = [...choice.children];
    if (made.length === old.length && made.every((group, i) => group.isEqualNode(old[i]))) return; // it may be open
    const { value } = choice;
    choice.replaceChildren(...made);
    choice.value = value;
    if (choice.selectedIndex < 0) choice.selectedIndex = 0;
  }

  /** The form of what is chosen. */
  #offer() {
    const ui = this.#ui;
    const chosen = (this.#choice = this.#choices[ui.choice.selectedIndex] ?? {});
    const fixed = this.promptId !== null || this.model !== null;
    const own = chosen.promptId === undefined;
    const given = this.variables ?? {};
    const names = own
      ? [...ui.prompt.value.matchAll(/\{\{\s*([\p{L}\p{N}_.-]+)\s*\}\}/gu)].map(([, name]) => name)
      : (chosen.variables ?? Object.keys(given));
    this.#fields = new Map();
    for (const name of names) {
      if (!this.#inputs.has(name)) {
        const input = h("textarea", { name, rows: 1 });
        input.value = given[name] ?? "";
        this.#inputs.set(name, input);
      }
      this.#fields.set(name, this.#inputs.get(name));
    }
    const labels = [...this.#fields].map(([name, input]) => input.parentNode ?? h("label", {}, h("span", {}, name), input));
    ui.variables.replaceChildren(...labels);
    say(ui.title, String(chosen.title ?? chosen.promptId ?? chosen.model ?? ""));
    ui.title.hidden = !fixed;
    ui.chooser.hidden = fixed;
    ui.own.hidden = ui.prompt.disabled = !own;
    ui.variables.hidden = !labels.length;
    this.#draw();
  }

  // --- what comes ---

  #draw() {
    const ui = this.#ui;
    const state = this.state;
    const before = this.#drawn;
    const { status, isStreaming, progress, failure, content } = state;
    const focused = this.shadowRoot.activeElement;
    this.#drawn = state;

    ui.result.dataset.status = status;
    ui.result.hidden = status === "idle";
    ui.run.setAttribute("aria-disabled", isStreaming || !this.#choices.length);
    ui.cancel.hidden = !isStreaming;
    ui.bar.hidden = !state.isModelLoading;
    ui.error.hidden = ui.advice.hidden = !failure;
    ui.thoughts.hidden = !state.reasoning;
    ui.answer.hidden = ui.copy.hidden = !content;
    ui.answer.setAttribute("aria-busy", isStreaming);
    ui.figures.hidden = progress.firstTokenMs === null;
    ui.retry.hidden = isStreaming;
    // Whoever stood on a button that is gone stands on its successor.
    if (focused?.hidden) (isStreaming ? ui.cancel : ui.run).focus();

    say(ui.label, LABELS[status] ?? "");
    const detail = state.isModelLoading ? progress.message?.replace(/^Loading /, "") : state.metadata?.modelName;
    say(ui.detail, detail ?? "");
    say(ui.error, state.error ?? "");
    say(ui.advice, failure ? advice(failure) : "");
    for (const [name, input] of this.#fields) {
      input.setAttribute("aria-invalid", failure?.field?.replaceAll('"', "") === `variables.${name}`);
    }
    this.#reasoning.show(state.reasoning);
    this.#answer.show(content);
    if (this.#follows && content.length > before.content.length) ui.answer.scrollTop = ui.answer.scrollHeight;

    const or = (value, shown) => (value === null ? "–" : shown(value));
    say(ui.first, or(progress.firstTokenMs, duration));
    say(ui.chunks, progress.chunks.toLocaleString());
    say(ui.rate, or(progress.chunksPerSecond, rounded));
    say(ui.characters, progress.outputLength.toLocaleString());
    this.#tick();
    if (isStreaming) this.#ticking ??= setInterval(() => this.#tick(), 100);
    else this.#ticking = clearInterval(this.#ticking);

    if (status !== before.status) this.#announce();
    if (status === "failed" && before !== state && before.status !== "failed") this.#dispatch("error", failure);
  }

  /** What moves between two events. */
  #tick() {
    const ui = this.#ui;
    const { isStreaming, isModelLoading, progress } = this.state;
    say(ui.time, duration(isStreaming ? this.#run.clock : progress.duration));
    if (!isModelLoading) {
      say(ui.clock, "");
      return;
    }
    const { estimatedTime } = progress;
    const elapsed = progress.elapsed + this.#run.clock - progress.duration;
    const late = estimatedTime !== null && elapsed >= estimatedTime;
    if (estimatedTime === null || late) ui.bar.removeAttribute("value");
    else ui.bar.value = elapsed / estimatedTime;
    const rest = late ? "longer than usual" : `about ${spoken(estimatedTime - elapsed)} to go`;
    say(ui.clock, [`${Math.floor(elapsed / 1000)} s`, ...(estimatedTime === null ? [] : [rest])].join(" · "));
    if (late && !this.#late) say(ui.live, "Loading model…, longer than usual");
    this.#late = late;
  }

  /** For those who hear this page: changes of state, and none of the chunks. */
  #announce() {
    const { status, progress, failure } = this.state;
    const { elapsed, estimatedTime, chunks, outputLength } = progress;
    const told = [LABELS[status] ?? ""];
    if (status === "loading" && estimatedTime > elapsed) told.push(`about ${spoken(estimatedTime - elapsed)} to go`);
    if (status === "done") told.push(plural(chunks, "chunk"), plural(outputLength, "character"), duration(progress.duration));
    if (failure) told.push(failure.message, advice(failure));
    say(this.#ui.live, told.filter(Boolean).join(", ").replace(/^(Done|Failed), /, "$1: "));
  }

  async #copy() {
    const { copy, live } = this.#ui;
    const { content } = this.state;
    try {
      await navigator.clipboard.writeText(content);
    } catch {
      // Pages of a plain http address in the network have no clipboard.
      const area = h("textarea", { class: "unseen" });
      area.value = content;
      copy.after(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      copy.focus();
    }
    say(copy, "Copied");
    say(live, "Copied");
    setTimeout(() => say(copy, "Copy"), 2000);
  }

  static {
    const accessor = (name, get, set) => Object.defineProperty(this.prototype, name, { get, set, enumerable: true });
    for (const [property, attribute] of Object.entries(ATTRIBUTES)) {
      accessor(
        property,
        function () {
          return this.getAttribute(attribute);
        },
        function (value) {
          this.toggleAttribute(attribute, value != null);
          if (value != null) this.setAttribute(attribute, value);
        },
      );
    }
    for (const [property, parse] of Object.entries(OBJECTS)) {
      accessor(
        property,
        function () {
          const text = this.getAttribute(property);
          return this.#objects[property] ?? (text === null ? null : parse(text));
        },
        function (value) {
          this.#objects[property] = value;
          this.attributeChangedCallback(property);
        },
      );
    }
  }
}

function option({ promptId, title, model, state }) {
  if (promptId !== undefined) return h("option", { value: `prompt ${promptId}` }, title ?? String(promptId));
  return h("option", { value: `model ${model}` }, state ? `${model} · ${state}` : model);
}

if (globalThis.customElements && !customElements.get("streaming-prompt-executor")) {
  customElements.define("streaming-prompt-executor", StreamingPromptExecutor);
}
