// LM Studio's own JavaScript SDK, which checks every message against its schemas: what it makes of the server at the
// URL given, one line of JSON a step. What it finds wrong with a message it says on stderr.
import { LMStudioClient } from "@lmstudio/sdk";

const [, , baseUrl, ...steps] = process.argv;
const quiet = () => {};
const client = new LMStudioClient({
  baseUrl,
  logger: { debug: quiet, info: quiet, warn: console.error, error: console.error },
});
const progress = [];
const watched = { verbose: false, onProgress: (done) => progress.push(done) };
const does = {
  async downloaded() {
    return (await client.system.listDownloadedModels()).map((model) => [model.type, model.modelKey]);
  },
  async loaded() {
    return (await client.llm.listLoaded()).map((model) => model.identifier);
  },
  async load(key) {
    const model = await client.llm.load(key, { identifier: "mine", ttl: 60, config: { contextLength: 2048 }, ...watched });
    const { identifier, modelKey, contextLength } = await model.getModelInfo();
    return [identifier, modelKey, contextLength, await model.getContextLength(), progress.length > 2];
  },
  async get(key) {
    return (await client.llm.model(key, watched)).identifier;
  },
  async hear(key) {
    client.llm.model(key, watched).catch(console.error);
    while (!progress.some((done) => done >= 0.5 && done < 1)) await new Promise((turn) => setTimeout(turn, 10));
    return true;
  },
  async answer(key) {
    const prediction = (await client.llm.model(key, watched)).respond("hello");
    let heard = "";
    for await (const { content } of prediction) heard += content;
    const { stats, modelInfo } = await prediction.result();
    return [heard, stats.stopReason, modelInfo.modelKey];
  },
  async embed(key) {
    return (await (await client.embedding.model(key, watched)).embed("hello")).embedding.length;
  },
  async unload(identifier) {
    await client.llm.unload(identifier);
  },
};
for (const step of steps) {
  const [name, argument] = step.split("=");
  console.log(JSON.stringify([name, (await does[name](argument)) ?? null]));
}
process.exit(0);
