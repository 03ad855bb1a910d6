// What outlives a reload: kept in localStorage, by user, so that nobody finds what another has left. And who is logged in in this
// browser, since all its tabs share one cookie. Storage that is full or forbidden makes nothing fail; it only keeps nothing.

const ROOT = "messenger:";
const WHO = `${ROOT}user`;

/** @template T @param {() => T} action @param {T} otherwise @returns {T} */
function attempt(action, otherwise) {
  try {
    return action();
  } catch {
    return otherwise;
  }
}

/** Who logged in last in this browser: a user's id; "" after a logout; null when nobody ever has. */
export const who = {
  get: () => attempt(() => localStorage.getItem(WHO), null),
  /** @param {string} id */
  set: (id) => attempt(() => localStorage.setItem(WHO, id), undefined),
};

/** Told when another tab changes who is logged in. @param {() => void} listener @param {AbortSignal} signal */
export function onWho(listener, signal) {
  addEventListener("storage", (event) => (event.key === WHO || event.key === null) && listener(), { signal });
}

/** The things that one user keeps in this browser. */
export class Drawer {
  #user;
  #prefix;

  /** @param {string} user */
  constructor(user) {
    this.#user = user;
    this.#prefix = `${ROOT}${user}:`;
  }

  /** @param {string} name @returns {string | null} */
  get(name) {
    return attempt(() => localStorage.getItem(this.#prefix + name), null);
  }

  /** For a user who has logged out nothing is kept. @param {string} name @param {string | null} value `null` or "" removes it. */
  set(name, value) {
    const key = this.#prefix + name;
    if (!value) attempt(() => localStorage.removeItem(key), undefined);
    else if ((who.get() ?? this.#user) === this.#user) attempt(() => localStorage.setItem(key, value), undefined);
  }

  /** All whose names begin so. @param {string} start @returns {string[]} */
  names(start) {
    const keys = attempt(() => Object.keys(localStorage), /** @type {string[]} */ ([]));
    return keys.filter((key) => key.startsWith(this.#prefix + start)).map((key) => key.slice(this.#prefix.length));
  }

  clear() {
    for (const name of this.names("")) this.set(name, null);
  }

  /**
   * Told when another tab changes something here.
   *
   * @param {(name: string, value: string | null) => void} listener
   * @param {AbortSignal} signal
   */
  listen(listener, signal) {
    addEventListener("storage", (event) => {
      if (event.key?.startsWith(this.#prefix)) listener(event.key.slice(this.#prefix.length), event.newValue);
    }, { signal });
  }
}
