// A user's data: conversations in order, unread counts, and the messages of opened conversations. It joins REST pages and
// stream events and knows no screen. Ids are compared for equality only; the order is the server's.
//
// The stream starts at a position taken before any page is read, so a page is never behind the stream. Events that arrive
// while the list loads are buffered and applied to it; some may be in it already. The page names the last message of each
// conversation: when the stream delivers that message, all before it was in the page, and the page's count holds again.

import { ApiError, get, keepTrying } from "./api.js";
import { Changes } from "./dom.js";
import { Thread, lastIndex } from "./thread.js";

/**
 * @typedef {import("./api.js").Conversation} Conversation
 * @typedef {import("./api.js").Message} Message
 * @typedef {import("./api.js").User} User
 * @typedef {{ buffered: [string, any][], read: Promise<Conversation | null> }} Coming
 */

/** The server's largest page. */
const PAGE = 25;
const MOST_PAGES = 8;
/** Opened conversations whose messages stay in memory. */
const THREADS = 10;

/** @param {string} name */
const isMessage = (name) => name === "message" || name === "message.sent";

/** @param {string} name */
const isChange = (name) => name === "message.updated" || name === "message.deleted";

/**
 * What an edit or a deletion makes of a message.
 *
 * @param {any} data
 * @returns {Pick<Message, "id" | "content" | "editedAt" | "deletedAt">}
 */
const changeOf = ({ id, content = "", editedAt = null, deletedAt = null }) => ({ id, content, editedAt, deletedAt });

/** They say more than a page can that was read before them. */
const GROUP_EVENTS = ["conversation.created", "conversation.updated", "participant.left"];

export class Model {
  changes = new Changes();
  /** @type {Map<string, Conversation>} */
  conversations = new Map();
  /** @type {string[]} The list: newest first. */
  order = [];
  listed = false;
  hasMore = false;
  /** A read of the list failed and is retried. */
  waiting = false;
  /** @type {string | null} The conversation whose newest message is in view: it counts as read. */
  attended = null;
  /** @type {(message: Message & { conversationId: string }, conversation: Conversation | undefined) => void} */
  onMessage = () => {};

  #outbox;
  #signal;
  /** @type {Map<string, Thread>} In the order of opening. */
  #threads = new Map();
  /** @type {[string, any][] | null} Events buffered while the list loads. */
  #buffered = null;
  /** @type {Map<string, Conversation>} As a page described it, until the stream delivers its last message. */
  #pages = new Map();
  /** @type {Map<string, Coming>} Conversations that load, with the events that arrived meanwhile. */
  #coming = new Map();
  #load = 0;
  /** @type {[string, any][] | null} Events buffered while a further page of the list loads. */
  #more = null;

  /** @param {User} me @param {import("./outbox.js").Outbox} outbox @param {AbortSignal} signal Ends it. */
  constructor(me, outbox, signal) {
    this.me = me;
    this.#outbox = outbox;
    // The event may come before the answer that tells the message's id.
    outbox.changes.listen(() => this.#threads.forEach((thread) => this.#dropShown(thread)), signal);
    this.#signal = signal;
  }

  /** @param {Conversation} conversation */
  unreadOf(conversation) {
    return conversation.id === this.attended ? 0 : conversation.unreadCount;
  }

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
   * Reads the list; after a `resync` also the conversation on screen.
   *
   * @param {() => string | null} open
   */
  async reload(open) {
    for (const id of [...this.#threads.keys()]) if (id !== open()) this.#threads.delete(id);
    for (const thread of this.#threads.values()) void this.#loadThread(thread);
    const load = (this.#load += 1);
    const wanted = Math.min(this.order.length, PAGE * MOST_PAGES);
    // Earlier events are in the pages, which are requested only now.
    this.#buffered = [];
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
    // Pages overlap when the list moved between them.
    this.order = [...paged];
    this.hasMore = hasMore;
    this.listed = true;
    this.waiting = false;
    const buffered = this.#buffered ?? [];
    this.#buffered = null;
    for (const [name, data] of buffered) {
      if (GROUP_EVENTS.includes(name)) this.#applyToList(name, data);
      if (isMessage(name)) this.#toTop(data.conversationId);
      if (paged.has(data.conversationId)) this.#change(name, data);
    }
    // Conversations outside these pages may have missed events.
    for (const id of this.conversations.keys()) {
      if (paged.has(id) || load === 1) continue;
      if (id === open() || this.order.includes(id)) this.#readOnce(id).catch(() => {});
      else this.conversations.delete(id);
    }
    this.changes.tell();
  }

  async loadMore() {
    if (this.#more || !this.hasMore || this.#buffered) return;
    /** @type {[string, any][]} */
    const buffered = (this.#more = []);
    const load = this.#load;
    try {
      const page = await this.#readList(this.order.at(-1));
      if (load !== this.#load) return;
      // The stream already delivered the others.
      const found = page.filter((conversation) => !this.order.includes(conversation.id));
      for (const conversation of found) this.#put(conversation);
      this.order.push(...found.map((conversation) => conversation.id));
      for (const [name, data] of buffered) {
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

  /** Stores a conversation from REST. @param {Conversation} conversation */
  #put(conversation) {
    this.conversations.set(conversation.id, { ...conversation });
    this.#pages.set(conversation.id, conversation);
  }

  /** A conversation that this tab made. @param {Conversation} conversation */
  add(conversation) {
    if (!this.conversations.has(conversation.id)) this.#put(conversation);
    this.changes.tell();
  }

  /**
   * A conversation, from memory or the server; `null` when it does not exist.
   *
   * @param {string} id
   * @returns {Promise<Conversation | null>}
   */
  async conversation(id) {
    return this.conversations.get(id) ?? this.#readOnce(id);
  }

  /** @param {string} id @param {[string, any][]} buffered Events that the answer may lack. */
  #readOnce(id, buffered = []) {
    let coming = this.#coming.get(id);
    if (!coming) {
      coming = { buffered, read: Promise.resolve(null) };
      this.#coming.set(id, coming);
      coming.read = this.#readConversation(id, coming);
    }
    return coming.read;
  }

  /** @param {string} id @param {Coming} coming @returns {Promise<Conversation | null>} */
  async #readConversation(id, coming) {
    const { buffered } = coming;
    const isLate = () => this.#coming.get(id) !== coming;
    const path = `/api/conversations/${encodeURIComponent(id)}`;
    try {
      const { body } = await keepTrying(() => get(path, this.#signal), this.#signal, () => {});
      // Requested before the `resync`.
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
    const known = last ? lastIndex(buffered, ([name, data]) => isMessage(name) && data.id === last) : -1;
    for (const [name, data] of buffered.slice(known + 1)) this.#change(name, data);
    this.changes.tell();
    return this.conversations.get(id) ?? null;
  }

  /** The messages of a conversation, which load from the first call on. @param {string} id */
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
    // Answered before the page is requested: they are in it, or older.
    const sent = this.#outbox.of(thread.id).filter((entry) => entry.state === "sent");
    try {
      if (!(await thread.load())) return;
    } catch {
      return;
    }
    for (const entry of sent) this.#outbox.drop(entry.key);
    this.#dropShown(thread);
  }

  /** Drops what the thread shows as a message by now. @param {Thread} thread */
  #dropShown(thread) {
    for (const entry of this.#outbox.of(thread.id)) {
      if (entry.messageId && thread.has(entry.messageId)) this.#outbox.drop(entry.key);
    }
  }

  /** Applies an event of the stream. @param {string} name @param {any} data */
  apply(name, data) {
    if (isMessage(name)) {
      const { conversationId, ...message } = data;
      const thread = this.#threads.get(conversationId);
      thread?.append(message);
      // A replayed event has no key.
      if (thread) this.#dropShown(thread);
      if (data.idempotencyKey) this.#outbox.drop(data.idempotencyKey);
      if (name === "message") this.onMessage(data, this.conversations.get(conversationId));
    }
    if (isChange(name)) this.#threads.get(data.conversationId)?.change(changeOf(data));
    this.#coming.get(data.conversationId)?.buffered.push([name, data]);
    this.#buffered?.push([name, data]);
    this.#more?.push([name, data]);
    this.#applyToList(name, data);
    this.changes.tell();
  }

  /** @param {string} name @param {any} data */
  #applyToList(name, data) {
    if (name === "conversation.created") {
      if (!this.conversations.has(data.id) && !this.#coming.has(data.id)) this.#put(data);
      // A group is in the list from the beginning, other conversations from their first message on.
      if (data.kind === "group") this.#toTop(data.id);
      return;
    }
    if (name === "conversation.updated") {
      const conversation = this.conversations.get(data.id);
      if (conversation) conversation.title = data.title;
      return;
    }
    if (name === "participant.left") {
      if (data.userId === this.me.id) this.#leave(data.conversationId);
      return;
    }
    const id = data.conversationId;
    // Immediately, although the conversation may be unknown: other events may come before it is read.
    if (isMessage(name)) this.#toTop(id);
    if (this.conversations.has(id)) this.#change(name, data);
    // Other events of unknown conversations will be in what is read when they are opened.
    else if (isMessage(name)) this.#readOnce(id, [[name, data]]).catch(() => {});
  }

  /** @param {string} id */
  #leave(id) {
    const thread = this.#threads.get(id);
    if (thread) thread.state = "gone";
    this.conversations.delete(id);
    this.order = this.order.filter((other) => other !== id);
  }

  /** @param {string} id */
  #toTop(id) {
    this.order = [id, ...this.order.filter((other) => other !== id)];
  }

  /** @param {string} name @param {any} data Of a known conversation. */
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
    } else if (isChange(name)) {
      const last = conversation.lastMessage;
      if (last && last.id === data.id) conversation.lastMessage = { ...last, ...changeOf(data) };
      if (name === "message.deleted") conversation.unreadCount = data.unreadCount;
    } else if (name === "conversation.read") {
      conversation.lastReadMessageId = data.lastReadMessageId;
      conversation.unreadCount = data.unreadCount;
    } else if (name === "receipt.read") {
      conversation.otherLastReadMessageId = data.lastReadMessageId;
    }
  }
}
