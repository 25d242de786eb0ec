// Elements: made, and written only where they differ, so that focus, open details and a selection outlive an update.
//
// Text enters the page through text nodes and attributes of our own choosing, never as markup.

export const byId = (id) => document.getElementById(id);

/** An element: attributes, `on…` listeners and properties that only exist as such, then children. */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function mark(node, name, value) {
  if (node.dataset[name] !== value) node.dataset[name] = value;
}

export function show(node, visible) {
  if (node.hidden === visible) node.hidden = !visible;
}

/** The children of `parent`, one for each item and in their order; those that stay are left where they are. */
export function keep(parent, items, known, keyOf, make) {
  const keys = new Set();
  let place = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    keys.add(key);
    let part = known.get(key);
    if (!part) known.set(key, (part = make(item)));
    part.update(item);
    if (part.node === place) place = place.nextElementSibling;
    else parent.insertBefore(part.node, place);
  }
  for (const [key, part] of known) {
    if (!keys.has(key)) {
      part.node.remove();
      known.delete(key);
    }
  }
}
