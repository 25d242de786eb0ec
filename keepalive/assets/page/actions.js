// What a person may change about a model, at the press of a button.

import { Refused, ask } from "./ask.js";
import { h, say, show } from "./dom.js";
import { contact } from "./live.js";
import { kind, short } from "./words.js";

export class Actions {
  constructor() {
    this.main = h("button", { type: "button", onclick: () => this.change(this.verb) });
    this.again = h("button", { type: "button", onclick: () => this.change("warm") }, "Try now");
    this.node = h("div", { class: "act" }, this.again, this.main);
    this.error = h("p", { class: "error", role: "alert", hidden: true });
  }

  update(model) {
    this.model = model;
    // Of a cold model there is nothing to let go; whoever wants it sooner than its turn comes may say so.
    this.verb = (model.wanted || model.keep === "auto") && model.state !== "cold" ? "release" : "warm";
    const label = this.verb === "release" ? "Release" : "Warm";
    say(this.main, label);
    this.main.setAttribute("aria-label", `${label} ${short(model.key)}`);
    show(this.again, kind(model) === "failing" && this.verb !== "warm");
  }

  allow(allowed) {
    for (const button of [this.main, this.again]) button.disabled = !allowed || this.asking;
  }

  async change(verb) {
    const { model } = this;
    this.asking = true;
    this.allow(false);
    show(this.error, false);
    try {
      await ask(`/api/models/${encodeURIComponent(model.key)}/${verb}?upstream=${encodeURIComponent(model.upstream)}`, { method: "POST" });
    } catch (error) {
      const why = error instanceof Refused ? error.message : "the daemon did not answer";
      say(this.error, `Could not ${verb} it: ${short(why, 300)}`);
      show(this.error, true);
    }
    this.asking = false;
    this.allow(contact.lost === null);
    if (document.activeElement === document.body) this.main.focus();
  }
}
