// The theme that somebody chose, before the first paint: the other one does not flash by. A classic script, for that.

{
  const root = document.documentElement;
  const key = "keepalive.theme";
  const set = (theme) => (theme ? (root.dataset.theme = theme) : delete root.dataset.theme);
  try {
    set(localStorage.getItem(key));
  } catch {
    // A browser that keeps nothing still shows the page.
  }
  addEventListener("DOMContentLoaded", () => {
    for (const radio of document.querySelectorAll("#theme input")) {
      radio.checked = radio.value === (root.dataset.theme ?? "");
      radio.addEventListener("change", () => {
        set(radio.value);
        try {
          localStorage.setItem(key, radio.value);
        } catch {
          // It holds until the page is closed.
        }
      });
    }
  });
}
