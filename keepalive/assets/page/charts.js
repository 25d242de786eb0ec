// Two small charts. Both are also told in words: as a label here, and as lists in the details of a model.

import { counted, many, span } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A state is a shape beside a colour: warm fills the band, loading climbs from below, backoff hangs from above,
// cold is the ground, unknown floats. Where the daemon did not run there is nothing.
const TALLEST = 16;
const BANDS = new Map([
  ["warm", [0, TALLEST]],
  ["cold", [14.5, 1.5]],
  ["unknown", [7, 2]],
  ["loading", [6, 10]],
  ["backoff", [0, 10]],
]);
const WIDE = 1440; // a minute of a day each
const NARROWEST = 4; // what is shorter is drawn as wide as that, lest it vanish

/** What was the case at a moment: "03:12 loading". */
export function stateAt(entries, at) {
  return entries.findLast((entry) => entry.at <= at)?.state ?? "nothing known";
}

/** The last `length` of one model. `entries`: {at, state}, the oldest first; `evictions`: {at, cause}. */
export function timeline(entries, evictions, now, length) {
  const began = now - length;
  const x = (at) => ((Math.max(at, began) - began) / length) * WIDE;
  const paths = new Map([...BANDS.keys()].map((state) => [state, ""]));
  const shares = new Map();
  entries.forEach((entry, i) => {
    const end = Math.min(entries[i + 1]?.at ?? now, now);
    const band = BANDS.get(entry.state);
    if (end <= began || !band) return;
    const [from, to] = [x(entry.at), x(end)];
    const width = Math.max(to - from, NARROWEST);
    const [top, height] = band;
    const place = `M${Math.min(from, WIDE - width).toFixed(1)} ${top}h${width.toFixed(1)}v${height}h${(-width).toFixed(1)}z`;
    paths.set(entry.state, paths.get(entry.state) + place);
    shares.set(entry.state, (shares.get(entry.state) ?? 0) + (to - from) / WIDE);
  });
  const band = svg("svg", { viewBox: `0 0 ${WIDE} ${TALLEST}`, preserveAspectRatio: "none", width: "100%", height: TALLEST, y: 6 });
  for (const [state, d] of paths) if (d) band.append(svg("path", { d, class: state }));
  const marks = evictions
    .filter((eviction) => eviction.at > began)
    .map((eviction) => svg("svg", { x: `${((eviction.at - began) / length) * 100}%`, class: "mark" }, svg("path", { d: "M-3 0h6L0 4.5z" })));
  const said = [...shares].map(([state, part]) => `${state} ${percent(part)}`);
  const thrown = marks.length ? `; ${many(marks.length, "eviction")}` : "";
  return svg(
    "svg",
    { class: "timeline", role: "img", "aria-label": `Last ${counted(length / 1000)}: ${said.join(", ") || "nothing known"}${thrown}`, height: TALLEST + 6, width: "100%" },
    band,
    ...marks,
  );
}

const percent = (part) => (part > 0.995 && part < 1 ? "over 99 %" : `${part < 0.01 ? "under 1" : Math.round(part * 100)} %`);

const BAR = 5;
const TALL = 22;

/** How long the last loads took, the newest on the right; one that failed is hollow. `loads`: {at, outcome, seconds}. */
export function loadsChart(loads) {
  const most = Math.max(...loads.map((load) => load.seconds ?? 0), 0.001);
  const bars = loads.map((load, i) => {
    const height = Math.max(2, ((load.seconds ?? 0) / most) * (TALL - 1));
    const well = load.outcome === "ok";
    const edge = well ? 0 : 0.5;
    return svg("rect", {
      x: i * (BAR + 1) + edge, y: TALL - height + edge, width: BAR - 2 * edge, height: Math.max(1, height - 2 * edge),
      class: well ? "bar" : "bar failed",
    });
  });
  const last = loads.at(-1);
  const failed = loads.filter((load) => load.outcome !== "ok").length;
  const label = `Last ${many(loads.length, "load")}${failed ? `, ${failed} of them without success` : ""}; the newest took ${span(last?.seconds ?? 0)}`;
  const width = Math.max(1, loads.length) * (BAR + 1) - 1;
  return svg("svg", { class: "loads", role: "img", "aria-label": label, width, height: TALL, viewBox: `0 0 ${width} ${TALL}` }, ...bars);
}

const GLYPHS = {
  warm: () => [svg("circle", { cx: 8, cy: 8, r: 6, class: "fill" })],
  loading: () => [svg("circle", { cx: 8, cy: 8, r: 5.25, class: "line" }), svg("path", { d: "M8 2.75a5.25 5.25 0 0 1 0 10.5z", class: "fill" })],
  cold: () => [svg("circle", { cx: 8, cy: 8, r: 5.25, class: "line" })],
  failing: () => [svg("path", { d: "M8 1.5 15 14H1z", class: "fill" }), svg("path", { d: "M8 6v3.6M8 11.2v1.3", class: "cut" })],
  unknown: () => [svg("circle", { cx: 8, cy: 8, r: 5.25, class: "line dashes" })],
  off: () => [svg("path", { d: "M4.5 3h2.5v10H4.5zM9 3h2.5v10H9z", class: "fill" })],
  gone: () => [svg("circle", { cx: 8, cy: 8, r: 5.25, class: "line" }), svg("path", { d: "M4 12 12 4", class: "line" })],
};

/** The sign of a tone: its shape says as much as its colour. */
export function glyph(tone) {
  return svg("svg", { class: "glyph", viewBox: "0 0 16 16", "aria-hidden": "true" }, ...(GLYPHS[tone] ?? GLYPHS.unknown)());
}
