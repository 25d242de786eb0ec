// The daemon's clock, told by ours that only ever goes forward: neither a wrong clock nor its correction shows.

import { h } from "./dom.js";

let skew = Date.now() - performance.now();

export const now = () => performance.now() + skew;

export function synchronize(daemonTime) {
  // What was under way for a moment makes the daemon seem late: small differences are that.
  const found = daemonTime - performance.now();
  if (Math.abs(found - skew) > 500) skew = found;
}

/** Milliseconds of a time as the daemon writes it. */
export const time = (text) => (text === null || text === undefined ? null : Date.parse(text));

/** Made at first use: a format takes longer to make than a row to draw. */
function formatter(options) {
  let made = null;
  return (at) => (made ??= new Intl.DateTimeFormat(undefined, options)).format(at);
}

export const clock = formatter({ hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const weekday = formatter({ weekday: "short" });
const date = formatter({ dateStyle: "medium", timeStyle: "medium" });

/** A time as people look for it; the whole of it when they point at it. */
export function moment(at) {
  const day = new Date(at).toDateString() === new Date(now()).toDateString() ? "" : `${weekday(at)} `;
  return h("time", { datetime: new Date(at).toISOString(), title: date(at) }, day + clock(at));
}
