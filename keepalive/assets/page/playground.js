// The playground: the public module's element, told of the models that there are.

import { byId, show } from "./dom.js";
import { picture } from "./picture.js";

let element = null;
let keys = null;
let told = "";
let asking = false;
let failures = 0;

/**
 * Offers the models. The element reads the prompts anew each time that it is told; so it is when there are other
 * models, and of their states only when somebody turns to it.
 */
export function drawPlayground(isTurnedTo = false) {
  if (!element) {
    if (failures > 0) startPlayground();
    return;
  }
  show(byId("playground"), picture.models.length > 0);
  const models = picture.models.map(({ key, state }) => ({ key, state }));
  const [keysNow, toldNow] = [models.map((model) => model.key).join("\n"), JSON.stringify(models)];
  if (keysNow === keys && (!isTurnedTo || toldNow === told)) return;
  [keys, told] = [keysNow, toldNow];
  element.models = models;
}

/** Brings it onto the page. Where contact is lost meanwhile, the next picture has it tried again. */
export async function startPlayground() {
  if (asking) return;
  asking = true;
  try {
    // Some browsers never ask again for a module by the address at which they once failed to get it.
    await (failures > 0 ? import(`../keepalive.js?${failures}`) : import("../keepalive.js"));
  } catch {
    failures += 1;
    return;
  } finally {
    asking = false;
  }
  element = document.createElement("streaming-prompt-executor");
  drawPlayground();
  byId("playground").append(element);
  for (const turn of ["pointerenter", "focusin"]) byId("playground").addEventListener(turn, () => drawPlayground(true));
}
