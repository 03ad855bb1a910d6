// A field that suggests usernames: WAI-ARIA's "editable combobox with list autocomplete". The focus stays in the field.

import { get } from "./api.js";
import { h, reconcile, setAttribute } from "./dom.js";

const DEBOUNCE_MS = 150;

/**
 * @param {{ id: string, label: string, placeholder: string, signal: AbortSignal }} options
 * @returns {{ field: HTMLInputElement, list: HTMLElement }}
 */
export function usernameField({ id, label, placeholder, signal }) {
  const listId = `${id}-list`;
  const field = h("input", {
    id, placeholder, type: "text",
    role: "combobox", "aria-label": label, "aria-autocomplete": "list", "aria-expanded": "false", "aria-controls": listId,
    autocomplete: "off", autocapitalize: "none", spellcheck: "false", enterkeyhint: "go", maxlength: 100, dir: "auto",
  });
  const list = h("ul", { id: listId, role: "listbox", "aria-label": "People", class: "options", hidden: true });
  /** @type {string[]} */
  let names = [];
  let active = -1;
  let asked = new AbortController();
  let timer = 0;
  signal.addEventListener("abort", () => forget());

  function forget() {
    clearTimeout(timer);
    asked.abort();
  }

  /** @param {string[]} next */
  function show(next) {
    names = next;
    active = -1;
    render();
  }

  function render() {
    list.hidden = names.length === 0;
    setAttribute(field, "aria-expanded", String(names.length > 0));
    setAttribute(field, "aria-activedescendant", active < 0 ? null : `${listId}-${active}`);
    reconcile(list, names.map((name, index) => ({ key: name, index })), ({ key }) => {
      const option = h("li", { role: "option", dir: "auto" }, key);
      // Keeps the focus in the field.
      option.addEventListener("pointerdown", (event) => event.preventDefault());
      option.addEventListener("click", () => choose(key));
      return option;
    }, (option, { index }) => {
      setAttribute(option, "id", `${listId}-${index}`);
      setAttribute(option, "aria-selected", String(index === active));
    });
  }

  /** @param {string} name */
  function choose(name) {
    forget();
    field.value = name;
    show([]);
    field.focus();
  }

  field.addEventListener("input", () => {
    forget();
    const search = field.value.trim();
    if (!search) return show([]);
    timer = setTimeout(async () => {
      asked = new AbortController();
      try {
        const { body } = await get(`/api/usernames?search=${encodeURIComponent(search)}`, asked.signal);
        // The only suggestion is what the field contains.
        show(body.length === 1 && body[0] === search ? [] : body);
      } catch {
        // A field without suggestions is good enough.
        if (!asked.signal.aborted) show([]);
      }
    }, DEBOUNCE_MS);
  });

  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape" && names.length > 0) {
      event.preventDefault();
      return show([]);
    }
    if (event.key === "Enter") {
      const name = names[active];
      forget();
      if (name === undefined) return show([]);
      event.preventDefault();
      return choose(name);
    }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || names.length === 0) return;
    event.preventDefault();
    // The field itself is one of the stops.
    const stops = names.length + 1;
    active = ((active + 1 + step + stops) % stops) - 1;
    render();
  });

  field.addEventListener("blur", () => {
    forget();
    show([]);
  });
  return { field, list };
}
