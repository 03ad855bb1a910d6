// Elements from script. Text becomes text nodes and attributes are set by name: no string becomes markup.

/** @typedef {Node | string | null | undefined | false} Child */

/**
 * An element. A property that is a function listens to that event; `true` and `false` set and omit an attribute.
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
 * Writes only what differs, because a screen reader may repeat what is written again.
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

/** A decorative icon; `d` is a path on a grid of 24. @param {string} d */
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
 * Makes the children of `parent` match `items` by key and order. An element lives as long as its key, so focus, selection and
 * scroll position survive.
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
  // A moved element loses the focus.
  if (focused instanceof HTMLElement && focused !== document.activeElement && parent.contains(focused)) {
    focused.focus({ preventScroll: true });
  }
}

/** Notifies its listeners at most once per turn of the event loop. */
export class Changes {
  /** @type {Set<() => void>} */
  #listeners = new Set();
  #pending = false;

  /** @param {() => void} listener @param {AbortSignal} signal */
  listen(listener, signal) {
    if (signal.aborted) return;
    this.#listeners.add(listener);
    signal.addEventListener("abort", () => this.#listeners.delete(listener), { once: true });
  }

  tell() {
    if (this.#pending) return;
    this.#pending = true;
    // Not an animation frame: hidden tabs have none, and their titles count too.
    queueMicrotask(() => {
      this.#pending = false;
      for (const listener of [...this.#listeners]) listener();
    });
  }
}
