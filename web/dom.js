// Elements from script. Text only ever becomes text nodes, and attributes are set by name: there is no way from a string to
// markup in here.

/** @typedef {Node | string | null | undefined | false} Child */

/**
 * An element. A property that is a function listens to the event of that name; `true` and `false` set and leave out an
 * attribute.
 *
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag
 * @param {Record<string, string | number | boolean | null | undefined | ((event: any) => void)>} [properties]
 * @param {...Child} children
 * @returns {HTMLElementTagNameMap[T]}
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else setAttribute(element, name, value);
  }
  element.append(.../** @type {(Node | string)[]} */ (children.filter((child) => child || child === "")));
  return element;
}

/**
 * Writes only what differs, because a screen reader may read again what is written again.
 *
 * @param {Element} element
 * @param {string} name
 * @param {string | number | boolean | null | undefined} value
 */
export function setAttribute(element, name, value) {
  if (value === false || value === null || value === undefined) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value === true ? "" : value)) {
    element.setAttribute(name, value === true ? "" : String(value));
  }
}

/**
 * @param {Element} element
 * @param {string} text
 */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A picture that says nothing by itself. `d` is drawn by a line on a grid of 24. @param {string} d */
export function icon(d) {
  const NS = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(NS, "svg");
  const path = document.createElementNS(NS, "path");
  for (const [name, value] of [["viewBox", "0 0 24 24"], ["aria-hidden", "true"], ["class", "icon"]]) {
    svg.setAttribute(name, value);
  }
  path.setAttribute("d", d);
  svg.append(path);
  return svg;
}

/** @type {WeakMap<Element, Map<string, HTMLElement>>} */
const keyed = new WeakMap();

/**
 * Makes the children of `parent` those that `items` name by their keys, in that order. An element stays the same as long
 * as its key is there, so focus, selection and place survive.
 *
 * @template {{ key: string }} T
 * @param {Element} parent
 * @param {T[]} items
 * @param {(item: T) => HTMLElement} make
 * @param {(element: HTMLElement, item: T) => void} update
 */
export function reconcile(parent, items, make, update) {
  const old = keyed.get(parent) ?? new Map();
  /** @type {Map<string, HTMLElement>} */
  const now = new Map();
  const focused = document.activeElement;
  for (const item of items) {
    now.set(item.key, old.get(item.key) ?? make(item));
  }
  for (const [key, element] of old) if (!now.has(key)) element.remove();
  let next = parent.firstElementChild;
  for (const element of now.values()) {
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
  }
  for (const item of items) update(/** @type {HTMLElement} */ (now.get(item.key)), item);
  keyed.set(parent, now);
  // An element that was moved has lost the focus.
  if (focused instanceof HTMLElement && focused !== document.activeElement && parent.contains(focused)) {
    focused.focus({ preventScroll: true });
  }
}

/** Tells its listeners once, however often it is told within one turn of the event loop. */
export class Changes {
  /** @type {Set<() => void>} */
  #listeners = new Set();
  #told = false;

  /** @param {() => void} listener @param {AbortSignal} signal */
  listen(listener, signal) {
    if (signal.aborted) return;
    this.#listeners.add(listener);
    signal.addEventListener("abort", () => this.#listeners.delete(listener), { once: true });
  }

  tell() {
    if (this.#told) return;
    this.#told = true;
    // Not an animation frame: those stop in tabs that are not looked at, and their titles count too.
    queueMicrotask(() => {
      this.#told = false;
      for (const listener of [...this.#listeners]) listener();
    });
  }
}
