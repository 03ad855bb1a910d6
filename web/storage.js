// localStorage, separated by user, and who is logged in, since all tabs share one cookie. Full or forbidden storage fails
// silently: it only keeps nothing.

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

/** Calls `listener` when another tab changes the user. @param {() => void} listener @param {AbortSignal} signal */
export function onWho(listener, signal) {
  addEventListener("storage", (event) => (event.key === WHO || event.key === null) && listener(), { signal });
}

/** The stored values of one user. */
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

  /** Stores nothing for a user who has logged out. @param {string} name @param {string | null} value `null` or "" removes it. */
  set(name, value) {
    const key = this.#prefix + name;
    if (!value) attempt(() => localStorage.removeItem(key), undefined);
    else if ((who.get() ?? this.#user) === this.#user) attempt(() => localStorage.setItem(key, value), undefined);
  }

  /** Names with this prefix. @param {string} start @returns {string[]} */
  names(start) {
    const keys = attempt(() => Object.keys(localStorage), /** @type {string[]} */ ([]));
    return keys.filter((key) => key.startsWith(this.#prefix + start)).map((key) => key.slice(this.#prefix.length));
  }

  clear() {
    for (const name of this.names("")) this.set(name, null);
  }

  /**
   * Calls `listener` when another tab changes a value.
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
