// Messages to send. A text is stored before the first attempt, so a reload or a crash loses nothing; it is sent once, because all
// attempts carry one idempotency key; and what one tab writes in a conversation arrives in that order.
//
// All tabs see all entries. The tab that made one sends it; after a long silence another tab takes over. Two that send at the
// same time do no harm: the server knows the key.

import { ApiError, backOff, passes, pause, post, sentence } from "./api.js";
import { Changes } from "./dom.js";
import { who } from "./storage.js";

/**
 * `waiting` is to be sent, `sent` was answered but not yet streamed, `failed` waits for the user.
 *
 * @typedef {{ key: string, conversationId: string, content: string, createdAt: number, state: "waiting" | "sent" | "failed",
 *   error: string, owner: string, touched: number, tried: boolean, messageId: string | null, sent: string | null }} Entry
 */

/** About a minute, waits included. */
const TRIES = 8;
/** An entry is taken over after this silence of its owner; longer than an attempt and the wait after it. */
const ABANDONED_MS = 45_000;
const PREFIX = "outbox:";
/** How long entries of earlier attempts stay hidden after a load: they may be among the messages. */
const UNSURE_MS = 3_000;

export class Outbox {
  changes = new Changes();
  /** @type {Map<string, Entry>} */
  #entries = new Map();
  /** @type {Set<string>} Finished keys: late writes of other tabs must not bring them back. */
  #done = new Set();
  /** @type {Set<string>} Keys that the server may have. */
  #unsure = new Set();
  /** @type {Set<string>} Conversations with a send under way. */
  #busy = new Set();
  #user;
  #drawer;
  #signal;
  #tab = tabId();

  /** @param {string} user @param {import("./storage.js").Drawer} drawer @param {AbortSignal} signal Ends it. */
  constructor(user, drawer, signal) {
    this.#user = user;
    this.#drawer = drawer;
    this.#signal = signal;
    for (const name of drawer.names(PREFIX)) {
      const entry = parse(drawer.get(name));
      // Sent entries are among the messages.
      if (!entry || entry.state === "sent") drawer.set(name, null);
      else {
        this.#entries.set(entry.key, entry);
        if (entry.tried && entry.state === "waiting") this.#unsure.add(entry.key);
      }
    }
    setTimeout(() => {
      this.#unsure.clear();
      this.changes.tell();
    }, UNSURE_MS);
    drawer.listen((name) => {
      if (!name.startsWith(PREFIX)) return;
      const key = name.slice(PREFIX.length);
      // The present value, which may be newer than the event's.
      const entry = parse(drawer.get(name));
      if (entry && this.#done.has(key)) drawer.set(name, null);
      else if (entry) this.#entries.set(key, entry);
      else this.#entries.delete(key);
      this.changes.tell();
    }, signal);
    const timer = setInterval(() => this.#go(), ABANDONED_MS / 3);
    signal.addEventListener("abort", () => clearInterval(timer));
    addEventListener("pageshow", () => this.#go(), { signal });
    this.#go();
  }

  /** Entries that the stream has not delivered, in the order of writing. @param {string} conversationId */
  of(conversationId) {
    return [...this.#entries.values()]
      .filter((entry) => entry.conversationId === conversationId)
      .sort((a, b) => a.createdAt - b.createdAt);
  }

  /** Of these, what is to be shown below the messages. @param {string} conversationId */
  shown(conversationId) {
    return this.of(conversationId).filter((entry) => !this.#unsure.has(entry.key));
  }

  get hasUnsent() {
    return [...this.#entries.values()].some((entry) => entry.state !== "sent");
  }

  /** @param {string} conversationId @param {string} content */
  add(conversationId, content) {
    const last = this.of(conversationId).at(-1)?.createdAt ?? 0;
    this.#keep({
      key: randomId(), conversationId, content, state: "waiting", error: "", tried: false, messageId: null, sent: null,
      // Distinct, so that two within a millisecond keep their order.
      createdAt: Math.max(Date.now(), last + 1), owner: this.#tab, touched: Date.now(),
    });
    this.#go();
  }

  /** @param {string} key */
  retry(key) {
    const entry = this.#entries.get(key);
    if (!entry) return;
    this.#keep({ ...entry, state: "waiting", error: "", owner: this.#tab, touched: Date.now() });
    this.#go();
  }

  /** Removes an entry that was delivered, is in a page, or was discarded. @param {string} key */
  drop(key) {
    this.#done.add(key);
    this.#drawer.set(PREFIX + key, null);
    if (this.#entries.delete(key)) this.changes.tell();
  }

  /** @param {Entry} entry */
  #keep(entry) {
    if (this.#done.has(entry.key)) return;
    this.#entries.set(entry.key, entry);
    this.#drawer.set(PREFIX + entry.key, JSON.stringify(entry));
    this.changes.tell();
  }

  #go() {
    if (this.#signal.aborted) return;
    for (const entry of this.#entries.values()) {
      if (entry.state !== "waiting") continue;
      if (entry.owner !== this.#tab && Date.now() - entry.touched > ABANDONED_MS) {
        this.#keep({ ...entry, owner: this.#tab, touched: Date.now() });
      }
      void this.#work(entry.conversationId);
    }
  }

  /** Sends one after the other. @param {string} conversationId */
  async #work(conversationId) {
    if (this.#busy.has(conversationId)) return;
    this.#busy.add(conversationId);
    try {
      for (;;) {
        const next = this.of(conversationId).find((entry) => entry.state === "waiting" && entry.owner === this.#tab);
        if (!next || !(await this.#send(next.key))) break;
      }
    } finally {
      this.#busy.delete(conversationId);
    }
  }

  /** @param {string} key @returns {Promise<boolean>} Whether to go on with the next. */
  async #send(key) {
    for (let tries = 1; ; tries += 1) {
      const entry = this.#entries.get(key);
      // Streamed, discarded or taken over meanwhile.
      if (!entry || entry.state !== "waiting" || entry.owner !== this.#tab) return true;
      // The cookie may be another user's by now.
      if (this.#signal.aborted || (who.get() ?? this.#user) !== this.#user) return false;
      this.#keep({ ...entry, tried: true, touched: Date.now() });
      /** @type {ApiError} */
      let error;
      try {
        const path = `/api/conversations/${encodeURIComponent(entry.conversationId)}/messages`;
        const headers = { "Idempotency-Key": key };
        const { body, headers: answer } = await post(path, { content: entry.content }, { headers, signal: this.#signal });
        const now = this.#entries.get(key);
        if (!now) return true;
        // A repeat: the stream may have delivered it long ago.
        this.#unsure.delete(key);
        if (answer.get("Idempotent-Replayed")) this.drop(key);
        else this.#keep({ ...now, state: "sent", messageId: body.id, sent: body.createdAt, error: "" });
        return true;
      } catch (thrown) {
        if (this.#signal.aborted) return false;
        error = thrown instanceof ApiError ? thrown : new ApiError(0);
      }
      this.#unsure.delete(key);
      // Nobody is logged in: it waits for this user.
      if (error.status === 401) return false;
      const now = this.#entries.get(key);
      if (!now || now.state !== "waiting") return true;
      if (!passes(error) || tries >= TRIES) {
        this.#keep({ ...now, state: "failed", error: sentence(error) });
        return true;
      }
      this.#keep({ ...now, touched: Date.now(), error: sentence(error) });
      const offline = navigator.onLine === false;
      const good = await pause(Math.max(backOff(tries - 1), error.retryAfterMs), this.#signal).catch(() => false);
      // Attempts without a network do not count.
      if (good || offline) tries = 0;
    }
  }
}

/** @param {string | null} text @returns {Entry | null} */
function parse(text) {
  try {
    const entry = JSON.parse(text ?? "null");
    return typeof entry?.key === "string" && typeof entry.content === "string" ? entry : null;
  } catch {
    return null;
  }
}

/** The same after a reload. */
function tabId() {
  try {
    const id = sessionStorage.getItem("messenger:tab") ?? randomId();
    sessionStorage.setItem("messenger:tab", id);
    return id;
  } catch {
    return randomId();
  }
}

/** `crypto.randomUUID` exists in secure contexts only. */
function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
