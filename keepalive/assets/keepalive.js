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
const MAX_EVENT = 1 << 24; // characters; a chunk has a few, and the daemon lets through so many

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
  const { baseUrl, headers, signal, fetch = globalThis.fetch, idleTimeout = 60_000 } = options;
  const body = JSON.stringify(request);
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
      const sent = { method: "POST", headers: { "Content-Type": "application/json", ...headers }, body };
      const response = await within(fetch(join(baseUrl, STREAM), { ...sent, signal: controller.signal }));
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
      throw reader ? lost() : unreachable(baseUrl);
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
  }
  clearTimeout(timer);
}

const join = (base, path) => (base ?? "").replace(/\/+$/, "") + path;

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
  return new StreamingPromptError(`What answers here is not keepalive: ${what}.`, { code: "bad_answer" });
}

function lost() {
  return new StreamingPromptError("The connection broke off before the answer was complete.", { code: "connection_lost" });
}

/** All that a browser tells of a refusal for the page's origin, too. */
function unreachable(baseUrl) {
  const foreign = baseUrl ? `, and is ${globalThis.location?.origin} among its allowed_origins` : "";
  const message = `There is no answer from ${baseUrl || "the server"}. Is keepalive running${foreign}?`;
  return new StreamingPromptError(message, { code: "unreachable" });
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
      const fraction = event.progress ?? (estimatedTime > 0 && elapsed < estimatedTime ? elapsed / estimatedTime : null);
      Object.assign(progress, { message, elapsed, estimatedTime, fraction });
      return { ...state, status: "loading", isModelLoading: true, progress };
    }
    case "reasoning": {
      progress.firstTokenMs ??= duration;
      const reasoning = state.reasoning + event.content;
      return { ...state, status: "thinking", isModelLoading: false, reasoning, progress };
    }
    case "chunk": {
      progress.firstTokenMs ??= duration;
      progress.firstChunkMs ??= duration;
      progress.chunks += 1;
      progress.outputLength += [...event.content].length;
      const seconds = (duration - progress.firstChunkMs) / 1000;
      progress.chunksPerSecond = seconds > 0 ? (progress.chunks - 1) / seconds : null;
      const content = state.content + event.content;
      return { ...state, status: "answering", isModelLoading: false, content, progress };
    }
    case "done": {
      const { type, ...totals } = event;
      progress.chunks = totals.totalChunks ?? progress.chunks;
      progress.outputLength = totals.outputLength ?? progress.outputLength;
      const metadata = { ...state.metadata, ...totals };
      return ended({ ...state, metadata, progress }, "done", totals.duration ?? duration);
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

  /** Ends the answer before. Resolves when this one is over, however it ends, with its last state. */
  execute = async (request) => {
    this.#controller?.abort();
    const controller = (this.#controller = new AbortController());
    const { onEvent, ...options } = this.options;
    this.#began = performance.now();
    let state = { ...IDLE, status: "waiting", isStreaming: true };
    this.#publish(state);
    // What comes late from an answer that was given up is nobody's.
    const current = () => this.#controller === controller;
    try {
      for await (const event of streamPrompt(request, { ...options, signal: controller.signal })) {
        if (!current()) break;
        this.#state = state = apply(state, event, this.clock);
        if (state.isStreaming) this.#callOff ??= soon(() => this.#publish(this.#state));
        else this.#settle(state);
        onEvent?.(event);
      }
    } catch (failure) {
      if (current()) {
        state = { ...ended(state, "failed", this.clock), error: failure.message, failure };
        this.#settle(state);
      }
    }
    return state.isStreaming ? ended(state, "cancelled", this.clock) : state;
  };

  cancel = () => {
    const running = this.#controller;
    if (running) this.#settle(ended(this.#state, "cancelled", this.clock));
    running?.abort();
  };

  reset = () => {
    const running = this.#controller;
    this.#settle(IDLE);
    running?.abort();
  };

  #settle(state) {
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

// Names of its own, with an underscore: on the element, those of the page hold, too.
const STYLE = `
:host {
  --_text: var(--keepalive-text, light-dark(#1c2024, #e6e8ea));
  --_muted: var(--keepalive-muted, light-dark(#5f6872, #9aa3ad));
  --_line: var(--keepalive-line, light-dark(#d8dce1, #343a41));
  --_field: var(--keepalive-field, light-dark(#fff, #14171a));
  --_sunken: var(--keepalive-sunken, light-dark(#f6f7f8, #1a1d21));
  --_accent: var(--keepalive-accent, light-dark(#1f5fbf, #7db0ff));
  --_on-accent: var(--keepalive-on-accent, light-dark(#fff, #0d1420));
  --_good: var(--keepalive-good, light-dark(#1c7a45, #5cc98a));
  --_bad: var(--keepalive-bad, light-dark(#b3261e, #ff9087));
  --_radius: var(--keepalive-radius, 6px);
  display: block;
  color: var(--_text);
  font: 400 0.9375rem/1.5 var(--keepalive-font, system-ui, sans-serif);
  font-variant-numeric: tabular-nums;
}
:host([hidden]), [hidden] { display: none !important; }
* { box-sizing: border-box; }
form, #result { display: grid; gap: 0.75rem; }
#result { margin-top: 1.25rem; }
#title { font-weight: 600; }
label { display: grid; gap: 0.25rem; }
label > span, dt, kbd { color: var(--_muted); font-size: 0.8125rem; }
#status span, #advice, summary { color: var(--_muted); }
select, textarea, button {
  font: inherit; color: inherit; border: 1px solid var(--_line); border-radius: var(--_radius);
}
select, textarea { width: 100%; padding: 0.4rem 0.6rem; background: var(--_field); }
select { height: 2.375rem; }
textarea { display: block; resize: vertical; min-height: 4.75rem; max-height: 20rem; field-sizing: content; }
textarea[rows='1'] { min-height: 2.375rem; resize: none; }
[aria-invalid=true] { border-color: var(--_bad); }
:focus-visible { outline: 2px solid var(--_accent); outline-offset: 1px; }
#variables { display: grid; gap: 0.75rem; grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); }
.actions { display: flex; flex-wrap: wrap; gap: 0.5rem; }
button { min-height: 2.375rem; padding: 0.3rem 0.9rem; background: transparent; cursor: pointer; }
button:hover { border-color: var(--_muted); }
#run { border-color: var(--_accent); background: var(--_accent); color: var(--_on-accent); font-weight: 600; }
#run:hover { filter: brightness(1.08); }
button[aria-disabled=true] { opacity: 0.5; cursor: default; filter: none; }
kbd { margin-left: 0.35rem; font-family: inherit; }
#status { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.6rem; }
#status::before {
  content: ""; width: 0.5rem; height: 0.5rem; border-radius: 50%; background: var(--_accent); align-self: center;
}
#status b { font-weight: 600; }
#clock { margin-left: auto; }
[data-status=cancelled] #status::before { background: var(--_muted); }
[data-status=done] #status::before { background: var(--_good); }
[data-status=failed] #status::before { background: var(--_bad); }
progress {
  appearance: none; display: block; width: 100%; height: 4px; border: 0; border-radius: 2px; overflow: hidden;
  background: var(--_line); color: var(--_accent);
}
progress::-webkit-progress-bar { background: var(--_line); }
progress::-webkit-progress-value { background: var(--_accent); transition: inline-size 0.12s linear; }
progress::-moz-progress-bar { background: var(--_accent); }
progress:indeterminate {
  background: linear-gradient(90deg, transparent, var(--_accent), transparent) 0 0 / 40% 100% no-repeat var(--_line);
  animation: sweep 1.6s ease-in-out infinite alternate;
}
progress:indeterminate::-webkit-progress-bar { background: transparent; }
progress:indeterminate::-moz-progress-bar { background: transparent; }
@keyframes sweep { to { background-position: 100% 0; } }
p { margin: 0; overflow-wrap: anywhere; }
p:empty { display: none; }
#advice { display: block; }
summary { cursor: pointer; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.text > div { contain: layout style; }
#answer, #reasoning {
  max-height: var(--keepalive-answer-height, 24rem); overflow: auto; padding: 0.75rem 0.9rem;
  border: 1px solid var(--_line); border-radius: var(--_radius); background: var(--_sunken);
}
#answer { line-height: 1.6; }
#reasoning { margin-top: 0.4rem; color: var(--_muted); font-size: 0.875rem; max-height: 14rem; }
[data-status=answering] #answer > :last-child::after {
  content: ""; display: inline-block; width: 0.5em; height: 1.05em; margin-left: 1px; border-radius: 1px;
  vertical-align: text-bottom; background: var(--_accent); animation: blink 1.1s steps(2, jump-none) infinite;
}
@keyframes blink { to { opacity: 0.15; } }
#foot { display: flex; flex-wrap: wrap; align-items: end; justify-content: space-between; gap: 0.75rem; }
dl { display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem; margin: 0; }
dd { margin: 0; }
#live, #copy + textarea { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (prefers-reduced-motion: reduce) {
  *, ::before, ::after, ::-webkit-progress-value { animation: none !important; transition: none !important; }
}
@media (forced-colors: active) { #status::before { forced-color-adjust: none; } }
`;

let sheet;

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Set only what differs: an assignment alone costs a layout, and is said again by a screen reader. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const plural = (n, word) => `${n.toLocaleString()} ${word}${n === 1 ? "" : "s"}`;
const rounded = (n) => (n === null ? "–" : n.toFixed(n < 1 ? 2 : n < 100 ? 1 : 0));
const inSeconds = (ms) => (ms === null ? "–" : `${rounded(ms / 1000)} s`);

/** A wait, as people say it: seconds, and minutes from two on. */
function spoken(ms) {
  const seconds = Math.max(1, Math.round(ms / 1000));
  return seconds < 120 ? plural(seconds, "second") : plural(Math.round(seconds / 60), "minute");
}

const LABELS = {
  idle: "",
  waiting: "Waiting for the answer…",
  loading: "Loading model…",
  thinking: "Thinking…",
  answering: "Answering…",
  done: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
};

function advice({ code, status, retryAfter }) {
  if (retryAfter > 0) return `Retry in ${spoken(retryAfter * 1000)}.`;
  if (code === "connection_lost") return "Retry asks anew; what has come so far stays until then.";
  return status >= 500 || status === null ? "Retry asks anew." : "";
}

const BLOCK = 2000; // characters

/** Text that grows at its end. Cut into blocks at line ends, so that only the last one is laid out again. */
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
    while (this.#written < text.length) {
      if (this.#room <= 0) {
        this.element.append(h("div", {}, ""));
        this.#room = BLOCK;
      }
      // A block may end with the first line that reaches its size.
      const end = text.indexOf("\n", this.#written + this.#room - 1) + 1 || text.length;
      this.element.lastChild.firstChild.appendData(text.slice(this.#written, end));
      this.#room -= end - this.#written;
      if (text[end - 1] !== "\n") this.#room = Math.max(1, this.#room);
      this.#written = end;
    }
  }
}

// Frameworks import this file on servers, too.
const Base = globalThis.HTMLElement ?? class {};
const EVENTS = ["start", "model_loading", "reasoning", "chunk", "done"];

/**
 * Runs a prompt in front of somebody: that of `prompt-id`; or what is written here, for `model`; or, with neither,
 * a choice of the configured prompts and of `models` ("a, b"; else those that the daemon keeps). `variables` (JSON)
 * and `prompt` fill the form; `max-tokens`, `timeout`, `base-url` and the property `headers` go with the request.
 * Each attribute is a property in camelCase, too; `models` may be objects with `key` and `state`. Methods:
 * `execute()`, `cancel()`, `reset()`; `state` is that of the hook. Events, with the streamed one as `detail`:
 * `start`, `model_loading`, `reasoning`, `chunk`, `done`; and `error`, with what was raised.
 */
export class StreamingPromptExecutor extends Base {
  static observedAttributes = ["prompt-id", "model", "base-url", "models", "variables", "prompt"];

  #run = new PromptRun({ onEvent: (event) => EVENTS.includes(event.type) && this.#dispatch(event.type, event) });
  #ui = {};
  #objects = {};
  #choices = [];
  #choice = {};
  #inputs = new Map(); // by variable, also without a field at the moment: what was typed is not lost
  #fields = [];
  #request = null;
  #drawn = IDLE;
  #elapsed = 0; // of the load, as shown
  #late = false;
  #follows = true; // the text's end, as long as the reader does
  #configured = null;
  #ticking = null;
  #answer;
  #reasoning;

  constructor() {
    super();
    const root = this.attachShadow({ mode: "open" });
    if (!sheet) (sheet = new CSSStyleSheet()).replaceSync(STYLE);
    root.adoptedStyleSheets = [sheet];

    const button = (id, text, ...more) => h("button", { id, type: "button", part: "button" }, text, ...more);
    const field = (id, text, input) => h("label", { id }, h("span", {}, text), input);
    const figure = (id, text) => h("div", {}, h("dt", {}, text), h("dd", { id }));
    const text = (id, label) => h("div", { id, class: "text", part: id, tabindex: 0, role: "region", "aria-label": label });
    root.append(
      h(
        "form",
        { id: "form", part: "form" },
        h("p", { id: "title" }),
        field("chooser", "Prompt or model", h("select", { id: "choice" })),
        field("own", "Prompt", h("textarea", { id: "prompt", rows: 3, required: "" })),
        h("div", { id: "variables" }),
        h("p", { id: "note", role: "alert" }),
        h("div", { class: "actions" }, button("run", "Run"), button("cancel", "Cancel", h("kbd", {}, "Esc"))),
      ),
      h(
        "div",
        { id: "result" },
        h("div", { id: "status", part: "status" }, h("b", { id: "label" }), h("span", { id: "detail" }), h("span", { id: "clock" })),
        h("progress", { id: "bar", max: 1, "aria-label": "Loading model" }),
        h("p", { id: "error", part: "error" }, h("span", { id: "message" }), " ", h("span", { id: "advice" })),
        h("details", { id: "thoughts" }, h("summary", {}, "Reasoning"), text("reasoning", "Reasoning")),
        text("answer", "Answer"),
        h(
          "div",
          { id: "foot" },
          h(
            "dl",
            { id: "figures" },
            figure("first", "First token"),
            figure("chunks", "Chunks"),
            figure("rate", "Chunks per second"),
            figure("characters", "Characters"),
            figure("time", "Time"),
          ),
          h("div", { class: "actions" }, button("copy", "Copy"), button("retry", "Retry")),
        ),
      ),
      h("div", { id: "live", role: "status" }),
    );
    for (const element of root.querySelectorAll("[id]")) this.#ui[element.id] = element;
    const { form, choice, prompt, run, cancel, copy, retry, answer, reasoning } = this.#ui;
    run.type = "submit";
    this.#answer = new Growing(answer);
    this.#reasoning = new Growing(reasoning);

    choice.addEventListener("change", () => this.#offer());
    prompt.addEventListener("input", () => this.#offer());
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.execute();
    });
    cancel.addEventListener("click", () => this.cancel());
    copy.addEventListener("click", () => this.#copy());
    retry.addEventListener("click", () => this.#start(this.#request));
    answer.addEventListener("scroll", () => {
      this.#follows = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 24;
    });
    root.addEventListener("keydown", (event) => this.#key(event));
    this.#run.subscribe(() => this.#draw());
    this.#draw();
  }

  connectedCallback() {
    // What was set before this class was known hides its accessors.
    for (const [name, value] of Object.entries(this)) {
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
    if (name === "prompt") this.#ui.prompt.value = this.prompt ?? "";
    this.#configure();
  }

  get state() {
    return this.#run.getSnapshot();
  }

  /** What the form says, as it is sent. */
  get request() {
    const { promptId, model } = this.#choice;
    const what = promptId === undefined ? { prompt: this.#ui.prompt.value, model } : { promptId };
    if (promptId !== undefined && this.model) what.modelId = this.model;
    if (this.maxTokens) what.maxTokens = Number(this.maxTokens);
    if (this.timeout) what.timeout = Number(this.timeout);
    // A number that nobody touched stays one.
    const given = { __proto__: null, ...this.variables };
    const typed = ({ name, value }) => (value === String(given[name]) ? given[name] : value);
    return { ...what, variables: Object.fromEntries(this.#fields.map((input) => [input.name, typed(input)])) };
  }

  /** Run what the form says, unless something runs. Resolves with the last state. */
  async execute() {
    await this.#configured;
    // Not the form's: a variable may be called `reportValidity`, and would be that.
    if (this.state.isStreaming || !this.#choices.length || !this.#ui.prompt.reportValidity()) return this.state;
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
    this.#elapsed = 0;
    this.#follows = true;
    Object.assign(this.#run.options, { baseUrl: this.baseUrl, headers: this.headers });
    return this.#run.execute(request);
  }

  #dispatch(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  #key(event) {
    const { key, target } = event;
    if (key === "Escape" && this.state.isStreaming) {
      event.preventDefault(); // a dialog around this stays open
      this.cancel();
    }
    if (key !== "Enter" || event.isComposing || target.localName !== "textarea") return;
    // A prompt has lines; a value seldom.
    if (event.ctrlKey || event.metaKey || (target !== this.#ui.prompt && !event.shiftKey)) {
      event.preventDefault();
      this.execute();
    }
  }

  // --- what can be asked ---

  /** Once for all attributes that change together. */
  #configure() {
    const asked = Promise.resolve().then(() => {
      if (asked !== this.#configured || !this.isConnected) return;
      const { promptId, model, models } = this;
      const known = [promptId === null ? { model } : { promptId }];
      if (promptId !== null || model !== null) this.#set(known);
      if (promptId !== null || model === null) this.#inquire(promptId, models, asked);
    });
    this.#configured = asked;
  }

  async #inquire(promptId, models, asked) {
    const get = async (path) => {
      const response = await fetch(join(this.baseUrl, path), { headers: this.headers ?? {} });
      if (!response.ok) throw await refusal(response);
      return response.json();
    };
    const [prompts, kept] = await Promise.allSettled([
      get("/api/prompts").then(({ data }) => data.map(({ id, ...rest }) => ({ ...rest, promptId: id, model: null }))),
      models ?? (promptId === null ? get("/api/status").then((status) => status.models) : []),
    ]);
    if (asked !== this.#configured || !this.isConnected) return;
    const configured = prompts.value ?? [];
    if (promptId !== null) {
      const found = configured.find((prompt) => String(prompt.promptId) === promptId);
      if (found) this.#set([found]);
      return;
    }
    const own = new Map((kept.value ?? []).map((one) => [one.key ?? one, { model: one.key ?? one, state: one.state }]));
    const failure = prompts.reason ?? kept.reason;
    const nothing = failure ? `What can be run is not known: ${failure.message}` : "Neither prompts nor models are configured.";
    this.#set([...configured, ...own.values()], nothing);
  }

  #set(choices, nothing = "") {
    this.#choices = choices;
    const { choice, note } = this.#ui;
    say(note, choices.length ? "" : nothing);
    const option = ({ promptId, title, model, state }) =>
      promptId === undefined
        ? h("option", { value: `model ${model}` }, state ? `${model} · ${state}` : model)
        : h("option", { value: `prompt ${promptId}` }, title ?? String(promptId));
    const group = (label, found) => (found.length ? [h("optgroup", { label }, ...found.map(option))] : []);
    const groups = [
      ...group("Configured prompts", choices.filter((one) => one.promptId !== undefined)),
      ...group("A prompt of your own, for", choices.filter((one) => one.promptId === undefined)),
    ];
    const { value, children } = choice;
    // A list that is open would close.
    if (groups.length !== children.length || groups.some((made, i) => !made.isEqualNode(children[i]))) {
      choice.replaceChildren(...groups);
      choice.value = value;
      if (choice.selectedIndex < 0) choice.selectedIndex = 0;
    }
    this.#offer();
  }

  /** The form of what is chosen. */
  #offer() {
    const ui = this.#ui;
    const chosen = (this.#choice = this.#choices[ui.choice.selectedIndex] ?? {});
    const own = chosen.promptId === undefined;
    const fixed = this.promptId !== null || this.model !== null;
    const given = { __proto__: null, ...this.variables };
    const written = ui.prompt.value.matchAll(/\{\{\s*([\p{L}\p{N}_.-]+)\s*\}\}/gu);
    const names = own ? Array.from(written, ([, name]) => name) : (chosen.variables ?? Object.keys(given));
    this.#fields = [...new Set(names)].map((name) => {
      if (!this.#inputs.has(name)) {
        const input = h("textarea", { name, rows: 1 }, String(given[name] ?? ""));
        h("label", {}, h("span", {}, name), input);
        this.#inputs.set(name, input);
      }
      return this.#inputs.get(name);
    });
    ui.variables.replaceChildren(...this.#fields.map((input) => input.parentNode));
    ui.variables.hidden = !this.#fields.length;
    say(ui.title, String(chosen.title ?? chosen.promptId ?? chosen.model ?? ""));
    ui.title.hidden = !fixed;
    ui.chooser.hidden = fixed;
    ui.own.hidden = ui.prompt.disabled = !own;
    this.#draw();
  }

  // --- what comes ---

  #draw() {
    const ui = this.#ui;
    const { state } = this;
    const { status, isStreaming, isModelLoading, progress, failure, content } = state;
    const before = this.#drawn;
    const focused = this.shadowRoot.activeElement;
    this.#drawn = state;

    ui.result.dataset.status = status;
    ui.result.hidden = status === "idle";
    ui.run.setAttribute("aria-disabled", isStreaming || !this.#choices.length);
    ui.cancel.hidden = !isStreaming;
    ui.retry.hidden = isStreaming;
    ui.bar.hidden = !isModelLoading;
    ui.error.hidden = !failure;
    ui.thoughts.hidden = !state.reasoning;
    ui.answer.hidden = ui.copy.hidden = !content;
    ui.answer.ariaBusy = isStreaming;
    ui.figures.hidden = progress.firstTokenMs === null;
    // Whoever stood on a button that is gone stands on its successor.
    if (focused?.hidden) (isStreaming ? ui.cancel : ui.run).focus();

    say(ui.label, LABELS[status]);
    say(ui.detail, (isModelLoading ? progress.message?.replace(/^Loading /, "") : state.metadata?.modelName) ?? "");
    say(ui.message, state.error ?? "");
    say(ui.advice, failure ? advice(failure) : "");
    for (const input of this.#fields) {
      input.ariaInvalid = failure?.field?.replaceAll('"', "") === `variables.${input.name}`;
    }
    this.#reasoning.show(state.reasoning);
    this.#answer.show(content);
    if (this.#follows && content !== before.content) ui.answer.scrollTop = ui.answer.scrollHeight;
    say(ui.first, inSeconds(progress.firstTokenMs));
    say(ui.chunks, progress.chunks.toLocaleString());
    say(ui.rate, rounded(progress.chunksPerSecond));
    say(ui.characters, progress.outputLength.toLocaleString());
    this.#tick();
    if (isStreaming) this.#ticking ??= setInterval(() => this.#tick(), 100);
    else this.#ticking = clearInterval(this.#ticking);

    if (status === before.status) return;
    this.#announce();
    if (failure) this.#dispatch("error", failure);
  }

  /** What moves between two events. */
  #tick() {
    const { time, clock, bar, live } = this.#ui;
    const { isStreaming, isModelLoading, progress } = this.state;
    const now = isStreaming ? this.#run.clock : progress.duration;
    say(time, inSeconds(now));
    if (!isModelLoading) return say(clock, "");
    const { estimatedTime } = progress;
    let elapsed = progress.elapsed + now - progress.duration;
    // An event that was long on its way does not turn the clock back; a load that begins again does.
    if (elapsed > this.#elapsed - 1000) elapsed = Math.max(elapsed, this.#elapsed);
    this.#elapsed = elapsed;
    const left = estimatedTime - elapsed;
    if (left > 0) bar.value = elapsed / estimatedTime;
    else bar.removeAttribute("value");
    // Every other load takes a little longer than the estimate.
    const late = estimatedTime !== null && left < -Math.max(2000, estimatedTime / 10);
    const rest = left > 0 ? `about ${spoken(left)} to go` : late ? "longer than usual" : "any moment now";
    say(clock, `${Math.floor(elapsed / 1000)} s${estimatedTime === null ? "" : ` · ${rest}`}`);
    if (late && !this.#late) say(live, "Loading model…, longer than usual");
    this.#late = late;
  }

  /** For those who hear this page: each change of state, and no chunk. */
  #announce() {
    const { status, progress, failure } = this.state;
    const left = progress.estimatedTime - progress.elapsed;
    const more = {
      loading: left > 0 ? `, about ${spoken(left)} to go` : "",
      done: `: ${plural(progress.chunks, "chunk")}, ${plural(progress.outputLength, "character")}, ${inSeconds(progress.duration)}`,
      failed: failure && `: ${failure.message} ${advice(failure)}`,
    };
    say(this.#ui.live, (LABELS[status] + (more[status] ?? "")).trim());
  }

  async #copy() {
    const { copy, live } = this.#ui;
    const { content } = this.state;
    try {
      await navigator.clipboard.writeText(content);
    } catch {
      // A page of plain http has no clipboard.
      const area = h("textarea", {}, content);
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
    const attribute = (name) => ({
      get() {
        return this.getAttribute(name);
      },
      set(value) {
        if (value == null) this.removeAttribute(name);
        else this.setAttribute(name, value);
      },
    });
    const object = (name, parse) => ({
      get() {
        return this.#objects[name] ?? (this.hasAttribute(name) ? parse(this.getAttribute(name)) : null);
      },
      set(value) {
        this.#objects[name] = value;
        this.attributeChangedCallback(name);
      },
    });
    Object.defineProperties(this.prototype, {
      promptId: attribute("prompt-id"),
      model: attribute("model"),
      prompt: attribute("prompt"),
      baseUrl: attribute("base-url"),
      maxTokens: attribute("max-tokens"),
      timeout: attribute("timeout"),
      models: object("models", (text) => text.split(/\s*,\s*/)),
      variables: object("variables", JSON.parse),
      headers: object("headers", JSON.parse),
    });
  }
}

if (globalThis.customElements && !customElements.get("streaming-prompt-executor")) {
  customElements.define("streaming-prompt-executor", StreamingPromptExecutor);
}
