// The component of docs/browser.md, and one that hands all of the hook's state to the test; in StrictMode.
import * as React from "react";
import { createRoot } from "react-dom/client";
import { Ask } from "./Ask.jsx";
import { useStreamingPrompt } from "./useStreamingPrompt.js";

const query = new URLSearchParams(location.search);
const baseUrl = query.get("base") ?? "";
const onEvent = () => (bench.events += 1);
const bench = (window.bench = { commits: 0, events: 0, functions: new Set() });

function Everything({ atOnce }) {
  const hook = useStreamingPrompt({ baseUrl, onEvent });
  const { execute, cancel, reset, ...state } = hook;
  React.useEffect(() => {
    bench.commits += 1;
    Object.assign(bench, { execute, cancel, reset, state });
    [execute, cancel, reset].forEach((one) => bench.functions.add(one));
  });
  React.useEffect(() => {
    if (atOnce) execute(JSON.parse(atOnce));
  }, [execute, atOnce]);
  return <pre>{state.content}</pre>;
}

function App() {
  const [shown, show] = React.useState(true);
  bench.show = show;
  if (!shown) return null;
  if (query.has("ask")) return <Ask baseUrl={baseUrl} promptId={28} variables={{ topic: "SSE" }} />;
  return <Everything atOnce={query.get("at-once")} />;
}

createRoot(document.body).render(
  <React.StrictMode>
    <App />
  </React.StrictMode>,
);
