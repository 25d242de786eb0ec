// The connection: a picture of the daemon and then its changes, for ever, and whether there is contact at all.

import { Refused, ask } from "./ask.js";
import { picture } from "./picture.js";

const SILENCE = 40_000; // the daemon sends a sign of life every 15 s
const PAUSE_FIRST = 250;
const PAUSE_MAX = 5000;

/** `lost`: since when, by `performance.now()`; null while there is contact. `why`: what is wrong, in words. */
export const contact = { lost: null, why: "", live: false };

/** Follows the daemon for ever. Tells `took(document)` of each status, and `changed()` when contact comes or goes. */
export async function follow({ took, changed }) {
  for (let pause = PAUSE_FIRST; ; pause = Math.min(pause * 2, PAUSE_MAX)) {
    try {
      took(await (await ask("/api/status")).json());
      regain(changed);
      await stream(took, changed);
      lose("The daemon ended the connection", changed);
    } catch (error) {
      if (error instanceof Refused) refuse(error, changed);
      // Each browser has its own words for a connection that was refused or cut.
      else lose(error instanceof TypeError ? `Nothing answers at ${location.host}` : error.message, changed);
    }
    // Whoever could look but not follow must not look ever so often.
    if (contact.live) pause = PAUSE_FIRST;
    contact.live = false;
    await Promise.race([new Promise((done) => setTimeout(done, pause)), nudged()]);
  }
}

/** Takes what changes until the stream ends. It is read by hand, since an EventSource does not say why it fails. */
async function stream(took, changed) {
  const abort = new AbortController();
  let watch = 0;
  const heard = () => {
    clearTimeout(watch);
    watch = setTimeout(() => abort.abort(new Error("Nothing was heard for 40 s")), SILENCE);
  };
  heard();
  try {
    const response = await ask(`/api/events?after=${encodeURIComponent(picture.id)}`, { signal: abort.signal });
    contact.live = true;
    changed();
    let rest = "";
    for await (const text of chunks(response.body.pipeThrough(new TextDecoderStream()))) {
      heard();
      const events = (rest + text).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "));
        if (data) took(JSON.parse(data.slice(6)));
      }
    }
  } finally {
    clearTimeout(watch);
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

function lose(why, changed) {
  if (contact.lost === null) {
    contact.lost = performance.now();
    focused = document.activeElement;
  }
  contact.why = why;
  changed();
}

/** The daemon is there, but does not let us follow: the picture is as of the last look. */
function refuse(error, changed) {
  contact.why = error.message;
  if (!picture.version) contact.lost ??= performance.now();
  changed();
}

function regain(changed) {
  contact.lost = null;
  contact.why = "";
  changed();
  if (focused?.isConnected && document.activeElement === document.body) focused.focus();
  focused = null;
}
