// What one user knows: conversations in their order, their unread counts, and the messages of those that were opened. REST
// pages and stream events are joined here; nothing here knows the screen. Ids are compared for equality only, and order is the
// order in which the server tells.
//
// The stream starts at a place that was taken before any page is read, so a page can only be ahead of the stream, never behind
// it. Events that come while the list is on its way are held and applied to it afterwards. Some of them may be in it already.
// The page shows which: it says the last message of a conversation, and when the stream tells that very message, all before it
// was in the page, whose count stands again.

import { ApiError, get, keepTrying } from "./api.js";
import { Changes } from "./dom.js";
import { Thread, lastIndex } from "./thread.js";

/**
 * @typedef {import("./api.js").Conversation} Conversation
 * @typedef {import("./api.js").Message} Message
 * @typedef {import("./api.js").User} User
 * @typedef {{ held: [string, any][], read: Promise<Conversation | null> }} Coming
 */

/** What the server gives at most. */
const PAGE = 25;
const MOST_PAGES = 8;
/** Opened conversations whose messages are kept for coming back. */
const THREADS = 10;

/** @param {string} name */
const isMessage = (name) => name === "message" || name === "message.sent";

export class Model {
  changes = new Changes();
  /** @type {Map<string, Conversation>} */
  conversations = new Map();
  /** @type {string[]} The list: newest first. */
  order = [];
  listed = false;
  hasMore = false;
  /** Whether a read of the list failed and will be tried again. */
  waiting = false;
  /** @type {string | null} The conversation whose newest message somebody is looking at: nothing in it is unread to them. */
  attended = null;
  /** @type {(message: Message & { conversationId: string }, conversation: Conversation | undefined) => void} */
  onMessage = () => {};

  #outbox;
  #signal;
  /** @type {Map<string, Thread>} The one opened last is the last. */
  #threads = new Map();
  /** @type {[string, any][] | null} What the stream told while the list was on its way. */
  #held = null;
  /** @type {Map<string, Conversation>} By conversation: as a page told it, until the stream has told its last message. */
  #pages = new Map();
  /** @type {Map<string, Coming>} Conversations on their way, each with the events that came meanwhile. */
  #coming = new Map();
  #load = 0;
  /** @type {[string, any][] | null} What the stream told while a further page of the list was on its way. */
  #more = null;

  /** @param {User} me @param {import("./outbox.js").Outbox} outbox @param {AbortSignal} signal Ends it. */
  constructor(me, outbox, signal) {
    this.me = me;
    this.#outbox = outbox;
    this.#signal = signal;
  }

  /** @param {Conversation} conversation */
  unreadOf(conversation) {
    return conversation.id === this.attended ? 0 : conversation.unreadCount;
  }

  /** In all conversations that are known. */
  get unread() {
    let sum = 0;
    for (const conversation of this.conversations.values()) sum += this.unreadOf(conversation);
    return sum;
  }

  /** @param {string | null} id */
  attend(id) {
    if (this.attended === id) return;
    this.attended = id;
    this.changes.tell();
  }

  /**
   * Reads the list; and again, after the stream has lost its place, also the conversation on screen.
   *
   * @param {() => string | null} open
   */
  async reload(open) {
    for (const id of [...this.#threads.keys()]) if (id !== open()) this.#threads.delete(id);
    for (const thread of this.#threads.values()) void this.#loadThread(thread);
    const load = (this.#load += 1);
    const wanted = Math.min(this.order.length, PAGE * MOST_PAGES);
    // What was told before now is in the pages, because they are asked for only now.
    this.#held = [];
    this.#coming.clear();
    /** @type {Conversation[]} */
    let list = [];
    let hasMore = true;
    while (hasMore && (list.length === 0 || list.length < wanted)) {
      const page = await this.#readList(list.at(-1)?.id);
      if (load !== this.#load) return;
      hasMore = page.length === PAGE;
      list = list.concat(page);
    }
    for (const conversation of list) this.#put(conversation);
    const paged = new Set(list.map((conversation) => conversation.id));
    // Two pages overlap when the list has moved between them.
    this.order = [...paged];
    this.hasMore = hasMore;
    this.listed = true;
    this.waiting = false;
    const held = this.#held ?? [];
    this.#held = null;
    for (const [name, data] of held) {
      if (isMessage(name)) this.#toTop(data.conversationId);
      if (paged.has(data.conversationId)) this.#change(name, data);
    }
    // What is known in another way than by these pages may have missed events.
    for (const id of this.conversations.keys()) {
      if (paged.has(id) || load === 1) continue;
      if (id === open() || this.order.includes(id)) this.#readOnce(id).catch(() => {});
      else this.conversations.delete(id);
    }
    this.changes.tell();
  }

  async loadMore() {
    if (this.#more || !this.hasMore || this.#held) return;
    /** @type {[string, any][]} */
    const held = (this.#more = []);
    const load = this.#load;
    try {
      const page = await this.#readList(this.order.at(-1));
      if (load !== this.#load) return;
      // What has a place already has come by the stream.
      const found = page.filter((conversation) => !this.order.includes(conversation.id));
      for (const conversation of found) this.#put(conversation);
      this.order.push(...found.map((conversation) => conversation.id));
      for (const [name, data] of held) {
        if (found.some((conversation) => conversation.id === data.conversationId)) this.#change(name, data);
      }
      this.hasMore = page.length === PAGE;
      this.waiting = false;
      this.changes.tell();
    } finally {
      this.#more = null;
    }
  }

  /** @param {string | undefined} before @returns {Promise<Conversation[]>} */
  #readList(before) {
    const path = `/api/conversations${before ? `?before=${encodeURIComponent(before)}` : ""}`;
    return keepTrying(async () => (await get(path, this.#signal)).body, this.#signal, () => {
      this.waiting = true;
      this.changes.tell();
    });
  }

  /** Takes a conversation as REST tells it. @param {Conversation} conversation */
  #put(conversation) {
    this.conversations.set(conversation.id, { ...conversation });
    this.#pages.set(conversation.id, conversation);
  }

  /** A conversation that was just made by this tab. @param {Conversation} conversation */
  add(conversation) {
    if (!this.conversations.has(conversation.id)) this.#put(conversation);
    this.changes.tell();
  }

  /**
   * A conversation, known or read now; `null` when there is none.
   *
   * @param {string} id
   * @returns {Promise<Conversation | null>}
   */
  async conversation(id) {
    return this.conversations.get(id) ?? this.#readOnce(id);
  }

  /** @param {string} id @param {[string, any][]} held Events that it may lack. */
  #readOnce(id, held = []) {
    let coming = this.#coming.get(id);
    if (!coming) {
      coming = { held, read: Promise.resolve(null) };
      this.#coming.set(id, coming);
      coming.read = this.#readConversation(id, coming);
    }
    return coming.read;
  }

  /** @param {string} id @param {Coming} coming @returns {Promise<Conversation | null>} */
  async #readConversation(id, coming) {
    const { held } = coming;
    const isLate = () => this.#coming.get(id) !== coming;
    const path = `/api/conversations/${encodeURIComponent(id)}`;
    try {
      const { body } = await keepTrying(() => get(path, this.#signal), this.#signal, () => {});
      // Read before the stream lost its place.
      if (isLate()) return this.conversation(id);
      this.#put(body);
    } catch (error) {
      if (isLate()) return this.conversation(id);
      this.#coming.delete(id);
      if (!(error instanceof ApiError && error.status === 404)) throw error;
      this.order = this.order.filter((other) => other !== id);
      return null;
    }
    this.#coming.delete(id);
    const last = this.conversations.get(id)?.lastMessage?.id;
    const known = last ? lastIndex(held, ([, data]) => data.id === last) : -1;
    for (const [name, data] of held.slice(known + 1)) this.#change(name, data);
    this.changes.tell();
    return this.conversations.get(id) ?? null;
  }

  /** The messages of a conversation; reading them begins at the first call. @param {string} id */
  thread(id) {
    let thread = this.#threads.get(id);
    if (thread?.state === "gone") thread = undefined;
    if (!thread) {
      const path = `/api/conversations/${encodeURIComponent(id)}/messages?markRead=false&`;
      const made = new Thread(id, (query, waiting) =>
        keepTrying(async () => (await get(path + query, this.#signal)).body, this.#signal, waiting), () => this.changes.tell());
      void this.#loadThread(made);
      thread = made;
    }
    this.#threads.delete(id);
    this.#threads.set(id, thread);
    const [oldest] = this.#threads.keys();
    if (oldest !== undefined && this.#threads.size > THREADS) this.#threads.delete(oldest);
    return thread;
  }

  /** @param {Thread} thread */
  async #loadThread(thread) {
    // These were answered before the page is asked for, so they are in it, or older than it.
    const sent = this.#outbox.of(thread.id).filter((entry) => entry.state === "sent");
    try {
      if (!(await thread.load())) return;
    } catch {
      return;
    }
    for (const entry of sent) this.#outbox.drop(entry.key);
    for (const entry of this.#outbox.of(thread.id)) {
      if (entry.messageId && thread.has(entry.messageId)) this.#outbox.drop(entry.key);
    }
  }

  /** Takes an event of the stream. @param {string} name @param {any} data */
  apply(name, data) {
    if (isMessage(name)) {
      const { conversationId, ...message } = data;
      this.#threads.get(conversationId)?.append(message);
      if (data.idempotencyKey) this.#outbox.drop(data.idempotencyKey);
      if (name === "message") this.onMessage(data, this.conversations.get(conversationId));
    }
    this.#coming.get(data.conversationId)?.held.push([name, data]);
    this.#held?.push([name, data]);
    this.#more?.push([name, data]);
    // A list that is being read again is still shown.
    this.#applyToList(name, data);
    this.changes.tell();
  }

  /** @param {string} name @param {any} data */
  #applyToList(name, data) {
    if (name === "conversation.created") {
      if (!this.conversations.has(data.id) && !this.#coming.has(data.id)) this.#put(data);
      return;
    }
    const id = data.conversationId;
    // At once, even when nothing else is known of it yet: others may come before that is.
    if (isMessage(name)) this.#toTop(id);
    if (this.conversations.has(id)) this.#change(name, data);
    // What else is said of a conversation that nobody here knows will be in what is read when it is opened.
    else if (isMessage(name)) this.#readOnce(id, [[name, data]]).catch(() => {});
  }

  /** @param {string} id */
  #toTop(id) {
    this.order = [id, ...this.order.filter((other) => other !== id)];
  }

  /** @param {string} name @param {any} data Of a conversation that is known. */
  #change(name, data) {
    const id = data.conversationId;
    const conversation = /** @type {Conversation} */ (this.conversations.get(id));
    if (isMessage(name)) {
      const { conversationId, idempotencyKey, ...message } = data;
      const page = this.#pages.get(id);
      if (page && page.lastMessage?.id === message.id) {
        conversation.unreadCount = page.unreadCount;
        this.#pages.delete(id);
      } else if (name === "message") {
        conversation.unreadCount += 1;
      }
      conversation.lastMessage = message;
    } else if (name === "conversation.read") {
      conversation.lastReadMessageId = data.lastReadMessageId;
      conversation.unreadCount = data.unreadCount;
    } else if (name === "receipt.read") {
      conversation.otherLastReadMessageId = data.lastReadMessageId;
    }
  }
}
