// One question to the daemon, and its answer or its refusal.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** What was answered. Raises Refused with the daemon's own words, or a TypeError where there is no answer. */
export async function ask(path, options = {}) {
  const response = await fetch(path, { headers: { Accept: "application/json" }, ...options });
  if (response.ok) return response;
  const text = await response.text();
  let message = `${response.status} ${response.statusText}`;
  try {
    message = JSON.parse(text).error ?? message;
  } catch {
    // Something between us and the daemon has answered; its number has to do.
  }
  throw new Refused(response.status, String(message));
}
