// The messages of one conversation as far as they are known: pages read by REST, joined with what the stream tells. Promises
// that they stand in the server's order, each once, without a hole. Ids are compared for equality only.

/** @typedef {import("./api.js").Message} Message */

export const PAGE = 50;
/** More pages than this are not read again to restore what was on screen. */
const MOST_PAGES = 10;

/** The index of the last that fits, or -1. @template T @param {T[]} list @param {(item: T) => boolean} fits */
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
  /** Whether older messages are being read right now. */
  older = false;
  /** Whether a read failed and will be tried again. */
  waiting = false;

  #read;
  #tell;
  /** So many messages at the front came in pages; the others were told by the stream after those. */
  #paged = 0;
  /** @type {Message[] | null} What the stream told while the newest page was on its way. */
  #held = null;
  /** @type {string | null} */
  #readByOther = null;
  /** Counts loads: an answer to an earlier one is too late. */
  #load = 0;

  /**
   * @param {string} id
   * @param {(query: string, waiting: () => void) => Promise<Message[]>} read Reads a page, newest first, until it succeeds.
   * @param {() => void} tell Something has changed.
   */
  constructor(id, read, tell) {
    this.id = id;
    this.#read = read;
    this.#tell = tell;
  }

  /**
   * Reads the newest messages, and, when there were some before, as many as there were. Until then the old ones stay and new ones
   * are still shown.
   *
   * @returns {Promise<boolean>} Whether this load was the last one, and succeeded.
   */
  async load() {
    const load = (this.#load += 1);
    const wanted = Math.min(this.messages.length, PAGE * MOST_PAGES);
    // What was told before now is in the page, because it is asked for only now.
    this.#held = [];
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
    const paged = newestFirst.reverse();
    const known = new Set(paged.map((message) => message.id));
    // What was told before a message of the page is in it or older than it.
    const after = this.#held.slice(lastIndex(this.#held, (message) => known.has(message.id)) + 1);
    this.messages = paged.concat(after);
    this.#paged = paged.length;
    this.#held = null;
    this.hasOlder = hasOlder;
    this.state = "ready";
    this.waiting = false;
    this.#tell();
    return true;
  }

  /** Reads the page before the oldest message. */
  async loadOlder() {
    if (this.state !== "ready" || this.older || !this.hasOlder || this.#held) return;
    const load = this.#load;
    this.older = true;
    this.#tell();
    try {
      const page = await this.#page(this.messages[0]?.id);
      if (load !== this.#load) return;
      this.messages = page.reverse().concat(this.messages);
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

  /** Takes a message that the stream tells. @param {Message} message */
  append(message) {
    this.#held?.push(message);
    const at = lastIndex(this.messages, (known) => known.id === message.id);
    if (at >= this.#paged) return;
    if (at >= 0) {
      // The page was ahead of the stream. So all that the stream told since is in the page too, or older.
      this.messages.length = this.#paged;
    } else {
      this.messages.push(message);
    }
    this.#tell();
  }

  /** @param {string} id */
  has(id) {
    return this.messages.some((message) => message.id === id);
  }

  /**
   * How many messages, from the oldest known one on, the other has read, given the newest id that they are said to have
   * read. It never gets less: an id that is not here says nothing.
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
