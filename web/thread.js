// The known messages of a conversation: REST pages joined with stream events, in the server's order, each once, without a gap.
// Ids are compared for equality only.

/** @typedef {import("./api.js").Message} Message */
/** @typedef {Pick<Message, "id" | "content" | "editedAt" | "deletedAt">} MessageChange */

export const PAGE = 50;
/** At most so many pages are read again to restore the screen. */
const MOST_PAGES = 10;

/** The index of the last match, or -1. @template T @param {T[]} list @param {(item: T) => boolean} fits */
export function lastIndex(list, fits) {
  for (let index = list.length - 1; index >= 0; index -= 1) if (fits(/** @type {T} */ (list[index]))) return index;
  return -1;
}

export class Thread {
  /** @type {Message[]} Oldest first. */
  messages = [];
  /** @type {"loading" | "ready" | "gone"} */
  state = "loading";
  hasOlder = false;
  /** Whether older messages are loading. */
  older = false;
  /** A read failed and is retried. */
  waiting = false;

  #read;
  #tell;
  /** How many messages at the front came in pages; the stream delivered the others. */
  #paged = 0;
  /** @type {Message[] | null} Messages buffered while the newest page loads. */
  #buffered = null;
  /** @type {Map<string, MessageChange>} Changes that came while a page loads, which may be older. */
  #changes = new Map();
  /** @type {string | null} */
  #readByOther = null;
  /** Counts loads: answers to earlier ones are dropped. */
  #load = 0;

  /**
   * @param {string} id
   * @param {(query: string, waiting: () => void) => Promise<Message[]>} read Reads a page, newest first, until it succeeds.
   * @param {() => void} tell Called at each change.
   */
  constructor(id, read, tell) {
    this.id = id;
    this.#read = read;
    this.#tell = tell;
  }

  /**
   * Reads the newest messages, as many as there were. Until then the old ones stay, and new ones are added.
   *
   * @returns {Promise<boolean>} Whether this was the last load, and succeeded.
   */
  async load() {
    const load = (this.#load += 1);
    const wanted = Math.min(this.messages.length, PAGE * MOST_PAGES);
    // Earlier messages are in the page, which is requested only now.
    this.#buffered = [];
    this.older = false;
    /** @type {Message[]} */
    let newestFirst = [];
    let hasOlder = true;
    try {
      while (hasOlder && (newestFirst.length === 0 || newestFirst.length < wanted)) {
        const page = await this.#page(newestFirst.at(-1)?.id);
        if (load !== this.#load) return false;
        hasOlder = page.length === PAGE;
        newestFirst = newestFirst.concat(page);
      }
    } catch (error) {
      if (load === this.#load) {
        this.state = "gone";
        this.waiting = false;
        this.#tell();
      }
      throw error;
    }
    const paged = this.#changed(newestFirst.reverse());
    const known = new Set(paged.map((message) => message.id));
    // Messages before one of the page are in it, or older.
    const after = this.#buffered.slice(lastIndex(this.#buffered, (message) => known.has(message.id)) + 1);
    this.messages = paged.concat(after);
    this.#paged = paged.length;
    this.#buffered = null;
    this.hasOlder = hasOlder;
    this.state = "ready";
    this.waiting = false;
    this.#tell();
    return true;
  }

  async loadOlder() {
    if (this.state !== "ready" || this.older || !this.hasOlder || this.#buffered) return;
    const load = this.#load;
    this.older = true;
    this.#tell();
    try {
      const page = await this.#page(this.messages[0]?.id);
      if (load !== this.#load) return;
      this.messages = this.#changed(page.reverse()).concat(this.messages);
      this.#paged += page.length;
      this.hasOlder = page.length === PAGE;
      this.older = false;
      this.waiting = false;
      this.#tell();
    } finally {
      if (load === this.#load) this.older = false;
    }
  }

  /** @param {string | undefined} before */
  #page(before) {
    return this.#read(`limit=${PAGE}${before ? `&before=${encodeURIComponent(before)}` : ""}`, () => {
      this.waiting = true;
      this.#tell();
    });
  }

  /** Adds a message from the stream. @param {Message} message */
  append(message) {
    this.#buffered?.push(message);
    const at = lastIndex(this.messages, (known) => known.id === message.id);
    if (at >= this.#paged) return;
    if (at >= 0) {
      // The page was ahead of the stream, so all that the stream added is in the page too, or older.
      this.messages.length = this.#paged;
    } else {
      this.messages.push(message);
    }
    this.#tell();
  }

  /** An edit or a deletion from the stream. @param {MessageChange} change */
  change(change) {
    if (this.#buffered || this.older) this.#changes.set(change.id, change);
    this.messages = this.messages.map((message) => (message.id === change.id ? { ...message, ...change } : message));
    this.#tell();
  }

  /** A page with the changes that came while it loaded. @param {Message[]} page */
  #changed(page) {
    const changed = page.map((message) => ({ ...message, ...this.#changes.get(message.id) }));
    this.#changes.clear();
    return changed;
  }

  /** @param {string} id */
  has(id) {
    return this.messages.some((message) => message.id === id);
  }

  /**
   * How many messages, from the oldest known one on, the other has read up to this id. It never decreases: an unknown id is
   * ignored.
   *
   * @param {string | null} id
   */
  readCount(id) {
    const known = this.#position(this.#readByOther);
    const said = this.#position(id);
    if (said > known) this.#readByOther = id;
    return Math.max(known, said) + 1;
  }

  /** @param {string | null} id */
  #position(id) {
    return id === null ? -1 : lastIndex(this.messages, (message) => message.id === id);
  }
}
