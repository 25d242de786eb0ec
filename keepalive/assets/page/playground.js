// The playground: the public module's element, told of the models that there are.

import { byId, show } from "./dom.js";
import { picture } from "./picture.js";

let element = null;
let keys = null;
let told = "";

/**
 * Offers the models. The element reads the prompts anew each time that it is told; so it is when there are other
 * models, and of their states only when somebody turns to it.
 */
export function drawPlayground(isTurnedTo = false) {
  if (!element) return;
  show(byId("playground"), picture.models.length > 0);
  const models = picture.models.map(({ key, state }) => ({ key, state }));
  const [keysNow, toldNow] = [models.map((model) => model.key).join("\n"), JSON.stringify(models)];
  if (keysNow === keys && (!isTurnedTo || toldNow === told)) return;
  [keys, told] = [keysNow, toldNow];
  element.models = models;
}

export async function startPlayground() {
  await import("../keepalive.js");
  element = document.createElement("streaming-prompt-executor");
  drawPlayground();
  byId("playground").append(element);
  for (const turn of ["pointerenter", "focusin"]) byId("playground").addEventListener(turn, () => drawPlayground(true));
}
