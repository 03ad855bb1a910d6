// @ts-check
/**
 * The messenger's stream for web pages: each event once to each tab, in the order in which the server tells them, whatever
 * happens to networks, servers, credentials, tabs and laptops. It imports nothing. docs/stream-client.md says how to use it.
 *
 * One connection for all tabs. A browser opens six HTTP/1.1 connections to one host, so tabs share a stream. The tab that
 * holds a Web Lock leads: it has the connection, and tells the others by a BroadcastChannel. When it closes, is frozen or
 * enters the back/forward cache, the lock goes to the next tab, which connects from the last event that it has itself.
 *
 * What tabs say to each other:
 *   event   leader to all: an event, and the id of the one before it (`prev`)
 *   status  leader to all: the state and the id of its last event. Said when it begins to lead, when the state changes, at each
 *           heartbeat of the server, and in answer to a question; then it also has the events that follow the asker's last one
 *   ask     follower to leader: "I have all up to this id, what follows?"
 *
 * Ids are opaque: they are compared for equality, never by order. Each tab keeps its recent events (`History`). An event whose
 * `prev` is the tab's last id is the next one; one that the tab knows is dropped; any other shows that something is missing,
 * and the tab asks. If the leader does not know the tab's last id, then one of the two is ahead: a page that was just loaded, or a
 * leader that was. The tab waits shortly, then reads what it misses from the server by a connection of its own, until it
 * has an id that the leader knows. One tab at a time does so, so that all tabs together need two connections at most.
 *
 * What the leader says has a number that grows from leader to leader. So a tab that hung, lost the lock meanwhile, and
 * wakes with much to say is not listened to. A follower takes the lock from a leader that does not answer.
 */

/** Kept for tabs that missed something: at most this many events, of this many characters. */
const HISTORY_EVENTS = 256;
const HISTORY_SIZE = 256 * 1024;

// All times in milliseconds. Timers of background tabs may run once a minute only; nothing below relies on more.
const TICK = 5_000;
/** Without a sign of life for so long, something is wrong; what the server says about its heartbeat counts first. */
const SILENCE = 40_000;
/** The longest time for which the server may ask to stay away when it is busy. */
const BUSY = 120_000;
const LONGEST_RETRY = 30_000;
/** A stream that lived so long was a success: what fails next is a first failure. */
const STEADY = 10_000;
/** How long a tab and its leader may disagree before the tab asks the server, and how long it may then take. */
const SHORTLY = 1_000;
const CATCH_UP = 30_000;

const DURABLE = ["message", "message.sent", "conversation.created", "conversation.read", "receipt.read", "resync"];

/**
 * @typedef {"connecting" | "live" | "offline" | "signed-out"} State
 *
 * @typedef {object} Options
 * @property {string | null} [cursor] the `Stream-Cursor` of what was read by REST; without one, the stream begins now
 * @property {string} [url] `/api/messages` by default
 * @property {string} [scope] tabs with the same scope share a stream: one per user, or per token where tabs have different ones
 * @property {boolean} [shared] false: a connection for this tab alone
 * @property {() => Promise<string | null>} [token] asked before each connection and sent as `?token=`; null says that nobody is
 *   logged in; if it throws it is asked again later. Without it the browser's cookie counts
 * @property {() => Promise<boolean>} [refresh] asked when the credential has ended or was refused: true, try again; false, signed
 *   out; if it throws it is asked again later. By default `POST refresh_token` beside `url` with the cookie, or just `token` again
 * @property {string[]} [events] names of events with an id, besides those of the messenger
 * @property {boolean} [withCredentials] sends the cookie to another origin
 *
 * @typedef {{ prev: string | null, id: string, name: string, text: string }} Entry
 * @typedef {{ kind: "ask", from: string, after: string | null, hurry: boolean }} Ask
 * @typedef {{ kind: "event", term: number, entry: Entry }} Tell
 * @typedef {object} Status
 * @property {"status"} kind
 * @property {number} term
 * @property {State} state
 * @property {string} reason
 * @property {string | null} cursor
 * @property {{ to: string, after: string | null, events: Entry[] | null }} [answer] null: the leader does not know that id
 *
 * @typedef {object} Hears what a connection tells
 * @property {(cursor: string) => void} begin where a stream without a cursor begins
 * @property {(entry: Entry) => void} event
 * @property {(state: State, reason: string) => void} state
 * @property {() => void} beat
 */

/** Something that the server told. */
export class StreamEvent extends Event {
  /** @param {string} name @param {string} id @param {any} data */
  constructor(name, id, data) {
    super(name);
    this.id = id;
    this.data = data;
  }
}

/** The state has changed. */
export class StateEvent extends Event {
  /** @param {State} state @param {string} reason */
  constructor(state, reason) {
    super("state");
    this.state = state;
    /** Why: `network`, `silent`, `refused`, or what the server said, like `busy`, `drain`, `expired`; may be empty. */
    this.reason = reason;
  }
}

export class MessengerStream extends EventTarget {
  #options;
  #shared;
  #name;
  #history;
  #tab = `${Math.random()}`;
  /** @type {State} */
  #state = "offline";
  #reason = "closed";

  /** From `start()` to `close()`. @type {AbortController | null} */
  #run = null;
  /** While the page is not put away. @type {number | undefined} */
  #ticking;
  /** @type {BroadcastChannel | null} */
  #channel = null;
  /** Our place in the queue for the lock, and then the lock. @type {AbortController | null} */
  #place = null;
  /** Of the tab that leads. @type {Connection | null} */
  #connection = null;
  /** Of a tab that reads by itself what it misses. @type {AbortController | null} */
  #reading = null;

  /** The highest number of a leader that was heard of. */
  #term = 0;
  #heardAt = 0;
  #askedAt = 0;
  #unanswered = 0;
  /** Since when the leader does not know our last id. */
  #apartSince = 0;

  /** @param {Options} [options] */
  constructor(options = {}) {
    super();
    const url = new URL(options.url ?? "/api/messages", location.href);
    this.#options = { ...options, url };
    this.#shared = options.shared !== false && "locks" in navigator && "BroadcastChannel" in globalThis;
    // Tabs that were loaded before and after a deploy may listen to different events: they do not share.
    this.#name = ["messenger-stream/1", url, options.scope ?? "messenger", ...(options.events ?? [])].join(" ");
    this.#history = new History(options.cursor || null);
  }

  /** The id of the last event. */
  get cursor() {
    return this.#history.cursor;
  }

  get state() {
    return this.#state;
  }

  get reason() {
    return this.#reason;
  }

  /**
   * @template {string} Name
   * @param {Name} name
   * @param {((event: Name extends "state" ? StateEvent : StreamEvent) => void) | EventListenerObject | null} listener
   * @param {boolean | AddEventListenerOptions} [options]
   */
  addEventListener(name, listener, options) {
    super.addEventListener(name, /** @type {EventListener} */ (listener), options);
  }

  /** Connects, from the cursor on. Once started it goes on until `close()`, or until nobody is logged in. */
  start() {
    if (this.#run) return;
    this.#run = new AbortController();
    const { signal } = this.#run;
    // A page that is put away must let go of lock and channel, or the browser would end it instead of keeping it.
    document.addEventListener("freeze", () => this.#leave(), { signal });
    document.addEventListener("resume", () => this.#join(), { signal });
    addEventListener("pagehide", () => this.#leave(), { signal });
    addEventListener("pageshow", (event) => event.persisted && this.#join(), { signal });
    document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && this.#hurry(), { signal });
    addEventListener("online", () => this.#connection?.connect("network"), { signal });
    addEventListener("offline", () => this.#connection?.doubt(), { signal });
    this.#setState("connecting", "");
    this.#join();
  }

  /** Ends the stream for this tab; `start()` goes on where it ended. */
  close() {
    this.#run?.abort();
    this.#run = null;
    this.#leave();
    this.#state = "offline";
    this.#reason = "closed";
  }

  #join() {
    if (this.#ticking !== undefined || !this.#run) return;
    this.#heardAt = Date.now();
    // Not all tabs at once.
    this.#ticking = setInterval(() => this.#tick(), TICK * (1 + Math.random() / 5));
    if (!this.#shared) return this.#lead();
    this.#channel = new BroadcastChannel(this.#name);
    this.#channel.onmessage = ({ data }) => this.#hear(data);
    this.#queue();
    this.#ask();
  }

  #leave() {
    clearInterval(this.#ticking);
    this.#ticking = undefined;
    this.#agree();
    this.#connection?.close();
    this.#connection = null;
    this.#place?.abort();
    this.#place = null;
    this.#channel?.close();
    this.#channel = null;
  }

  /** Waits for the lock, or takes it, and then leads until `#place` is aborted or another tab takes the lock. */
  #queue(steal = false) {
    this.#unanswered = 0;
    this.#place?.abort();
    const { signal } = (this.#place = new AbortController());
    const lead = () => {
      if (signal.aborted) return;
      this.#lead();
      return new Promise((release) => signal.addEventListener("abort", release));
    };
    navigator.locks.request(this.#name, steal ? { steal } : { signal }, lead).catch((error) => {
      if (signal.aborted) return;
      if (error.name === "AbortError") return this.#follow();
      // Locks are refused here, as in a sandboxed frame.
      this.#shared = false;
      this.#leave();
      this.#join();
    });
  }

  #lead() {
    this.#agree();
    this.#term = Math.max(this.#term + 1, Date.now());
    this.#connection = new Connection(this.#options, this.#history.cursor, {
      begin: (cursor) => this.#history.restart(cursor),
      event: (entry) => this.#take(entry),
      state: (state, reason) => this.#setState(state, reason),
      beat: () => this.#post(this.#status()),
    });
    this.#setState("connecting", "");
    this.#connection?.connect();
  }

  /** Another tab leads now. */
  #follow() {
    this.#connection?.close();
    this.#connection = null;
    this.#queue();
    this.#ask();
  }

  /** @param {Ask | Tell | Status} note */
  #post(note) {
    this.#channel?.postMessage(note);
  }

  /** @returns {Status} */
  #status() {
    return { kind: "status", term: this.#term, state: this.#state, reason: this.#reason, cursor: this.cursor };
  }

  #ask(hurry = false) {
    // One question at a time: an answer may be long.
    if (!hurry && Date.now() - this.#askedAt < SHORTLY) return;
    this.#askedAt = Date.now();
    this.#post({ kind: "ask", from: this.#tab, after: this.cursor, hurry });
  }

  /** @param {Ask | Tell | Status} note */
  #hear(note) {
    if (note.kind === "ask") return this.#answer(note);
    if (note.term < this.#term || (this.#connection && note.term === this.#term)) return;
    this.#term = note.term;
    this.#heardAt = Date.now();
    this.#unanswered = 0;
    if (this.#connection) this.#follow();
    if (note.kind === "event") {
      // Without a cursor the stream begins now.
      if (this.cursor === null && note.entry.prev !== null) this.#history.restart(note.entry.prev);
      this.#take(note.entry);
      if (this.#history.knows(note.entry.id)) this.#agree();
      else this.#ask();
    } else {
      this.#setState(note.state, note.reason);
      this.#compare(note);
    }
  }

  /** @param {Ask} question */
  #answer({ from, after, hurry }) {
    if (!this.#connection) return;
    const events = after === null ? [] : this.#history.after(after);
    this.#post({ ...this.#status(), answer: { to: from, after, events } });
    if (hurry) this.#connection.hurry();
  }

  /** Have we all that the leader has? @param {Status} status */
  #compare({ state, cursor, answer }) {
    const mine = answer?.to === this.#tab;
    if (mine) {
      this.#askedAt = 0;
      for (const entry of answer.events ?? []) this.#take(entry);
    }
    if (!this.#run || cursor === null) return;
    if (this.cursor === null && state === "live") this.#history.restart(cursor);
    if (this.#history.knows(cursor)) this.#agree();
    else if (mine && !answer.events && answer.after === this.cursor) this.#differ();
    else this.#ask();
  }

  #agree() {
    this.#apartSince = 0;
    this.#askedAt = 0;
    this.#reading?.abort();
    this.#reading = null;
  }

  /** The leader does not know our last id. It may be about to learn it; else we read on by ourselves. */
  #differ() {
    if (!this.#apartSince) {
      this.#apartSince = Date.now();
      setTimeout(() => this.#apartSince && this.#ask(), SHORTLY);
    } else if (isOver(this.#apartSince, SHORTLY) && this.#state === "live" && !this.#reading) {
      this.#catchUp();
    }
  }

  #catchUp() {
    const reading = (this.#reading = new AbortController());
    const end = () => {
      reading.abort();
      if (this.#reading === reading) this.#reading = null;
    };
    const read = () => {
      if (reading.signal.aborted) return;
      const connection = new Connection(this.#options, this.cursor, {
        begin: () => {},
        event: (entry) => {
          this.#take(entry);
          this.#ask();
        },
        state: (state) => (state === "offline" || state === "signed-out") && end(),
        beat: () => this.#ask(),
      });
      connection.connect();
      // Others may wait for their turn. What is still missing then is asked for again.
      const late = setTimeout(end, CATCH_UP);
      return new Promise((release) => {
        reading.signal.addEventListener("abort", () => {
          clearTimeout(late);
          connection.close();
          release(undefined);
        });
      });
    };
    navigator.locks.request(`${this.#name} catch-up`, { signal: reading.signal }, read).catch(() => {});
  }

  /** Gives an event to the page, and to the other tabs if we lead, when it is the next one. @param {Entry} entry */
  #take(entry) {
    if (!this.#run || entry.prev !== this.cursor) return;
    // Ids may come again after a resync, when a database was restored.
    if (entry.name === "resync") this.#history.restart(entry.prev);
    this.#history.add(entry);
    if (this.#connection) this.#post({ kind: "event", term: this.#term, entry });
    this.dispatchEvent(new StreamEvent(entry.name, entry.id, JSON.parse(entry.text)));
  }

  /** @param {State} state @param {string} reason */
  #setState(state, reason) {
    const changed = state !== this.#state || reason !== this.#reason;
    this.#state = state;
    this.#reason = reason;
    if (this.#connection) this.#post(this.#status());
    if (state === "signed-out") {
      this.#run?.abort();
      this.#run = null;
      this.#leave();
    }
    if (changed) this.dispatchEvent(new StateEvent(state, reason));
  }

  /** Somebody looks at this page. */
  #hurry() {
    this.#tick();
    if (this.#connection) this.#connection.hurry();
    else this.#ask(true);
  }

  #tick() {
    if (this.#connection) return this.#connection.check();
    // Counted in ticks: if it was this tab that hung, then the answer is read before the next one.
    if (this.#askedAt && ++this.#unanswered > 2) return this.#queue(true);
    if (this.#askedAt || this.#apartSince || isOver(this.#heardAt, SILENCE)) this.#ask();
  }
}

/** The recent events of a tab, in order, each following the one before it. */
class History {
  /** @type {Entry[]} */
  #entries = [];
  #size = 0;
  /** The id that the oldest entry follows. */
  #base;

  /** @param {string | null} base */
  constructor(base) {
    this.#base = base;
  }

  get cursor() {
    return this.#entries.at(-1)?.id ?? this.#base;
  }

  /** @param {string} id */
  knows(id) {
    return this.after(id) !== null;
  }

  /** All that follows this id; null if it is not known. @param {string} id */
  after(id) {
    const at = this.#entries.map((entry) => entry.id).lastIndexOf(id);
    return at < 0 && id !== this.#base ? null : this.#entries.slice(at + 1);
  }

  /** @param {Entry} entry */
  add(entry) {
    this.#entries.push(entry);
    this.#size += entry.text.length;
    while (this.#entries.length > HISTORY_EVENTS || this.#size > HISTORY_SIZE) {
      const { id, text } = /** @type {Entry} */ (this.#entries.shift());
      this.#base = id;
      this.#size -= text.length;
    }
  }

  /** @param {string | null} base */
  restart(base) {
    this.#entries = [];
    this.#size = 0;
    this.#base = base;
  }
}

/** One `EventSource` after another, each from the last event on. */
class Connection {
  #options;
  #cursor;
  #hears;
  /** @type {EventSource | null} */
  #source = null;
  #attempt = new AbortController();
  /** @type {number | undefined} */
  #timer;
  /** @type {State} */
  #state = "connecting";
  #reason = "";
  /** `doubtful` when the server answered no stream: an EventSource does not say what else. @type {"good" | "doubtful" | "ended"} */
  #credential = "good";
  #failures = 0;
  #begunAt = 0;
  #readyAt = 0;
  #isReady = false;
  /** Why the server will end the stream, once it said so. */
  #goodbye = "";
  /** When there was a sign of life, and how long the next one may take. */
  #heardAt = 0;
  #patience = SILENCE;
  #silence = SILENCE;

  /** @param {Omit<Options, "url"> & { url: URL }} options @param {string | null} cursor @param {Hears} hears */
  constructor(options, cursor, hears) {
    this.#options = options;
    this.#cursor = cursor;
    this.#hears = hears;
  }

  close() {
    clearTimeout(this.#timer);
    this.#attempt.abort();
    this.#source?.close();
    this.#source = null;
  }

  /** Connects now; if there is a connection, it is given up for this reason. @param {string} [reason] */
  async connect(reason) {
    if (reason) this.#tellEnd(reason);
    this.close();
    const { signal } = (this.#attempt = new AbortController());
    this.#begunAt = Date.now();
    this.#expectWithin(SILENCE);
    try {
      const address = await this.#address(signal);
      if (signal.aborted) return;
      if (address) this.#listen(address);
      else this.#tellState("signed-out", this.#reason);
    } catch (error) {
      if (!signal.aborted) this.#retry(error instanceof TypeError ? "network" : "refused");
    }
  }

  /** Somebody is waiting. What is under way or was asked for by the server is left alone. */
  hurry() {
    if (this.#isReady || isBusy(this.#reason) || !isOver(this.#begunAt, SHORTLY)) return;
    this.connect();
  }

  /** The browser thinks that it is offline. It may be wrong: what arrives nevertheless shows it. */
  doubt() {
    this.#tellState("offline", "network");
  }

  /** Makes a new connection if this one has fallen silent: a network that swallows everything, or a laptop that slept. */
  check() {
    if (isOver(this.#heardAt, this.#patience)) this.connect("silent");
  }

  /** @param {number} patience */
  #expectWithin(patience) {
    this.#heardAt = Date.now();
    this.#patience = patience;
  }

  /** Where to connect; null when nobody is logged in. @param {AbortSignal} signal */
  async #address(signal) {
    const { token, refresh, withCredentials } = this.#options;
    const url = new URL(this.#options.url);
    url.searchParams.set("heartbeat", "event");
    if (this.#cursor) url.searchParams.set("lastEventId", this.#cursor);
    /** Whether there is a token at all. */
    const addToken = async () => {
      const text = await token?.();
      if (text) url.searchParams.set("token", text);
      return !token || text !== null;
    };
    /** @type {RequestCredentials} */
    const credentials = withCredentials ? "include" : "same-origin";

    if (this.#credential === "doubtful") {
      if (!(await addToken())) return null;
      const headers = { Accept: "text/event-stream" };
      const answer = await fetch(url, { headers, credentials, cache: "no-store", signal });
      answer.body?.cancel();
      if (!answer.ok && answer.status !== 401) throw new Error(`${answer.status}`);
      this.#credential = answer.ok ? "good" : "ended";
    }
    if (this.#credential === "ended") {
      signal.throwIfAborted();
      if (refresh ? !(await refresh()) : !token && !(await refreshCookie(this.#options.url, credentials, signal))) return null;
      this.#credential = "good";
    }
    signal.throwIfAborted();
    return (await addToken()) ? url : null;
  }

  /** @param {URL} url */
  #listen(url) {
    const source = (this.#source = new EventSource(url, { withCredentials: this.#options.withCredentials ?? false }));
    /** @param {string} name @param {(event: MessageEvent<string>) => void} handle */
    const on = (name, handle) =>
      source.addEventListener(name, (event) => {
        this.#expectWithin(this.#silence);
        if (this.#isReady) this.#tellState("live", "");
        handle(event);
      });
    on("ready", ({ data }) => {
      const { cursor, heartbeatSeconds } = JSON.parse(data);
      if (heartbeatSeconds > 0) this.#silence = heartbeatSeconds * 2_500;
      if (this.#cursor === null) this.#hears.begin((this.#cursor = cursor));
      this.#isReady = true;
      this.#readyAt = Date.now();
      this.#tellState("live", "");
    });
    on("heartbeat", () => this.#hears.beat());
    on("goodbye", ({ data }) => {
      const { reason, reconnect } = JSON.parse(data);
      this.#goodbye = reason;
      if (reconnect) return;
      this.#credential = "ended";
      this.#retry(reason);
    });
    for (const name of [...DURABLE, ...(this.#options.events ?? [])]) {
      on(name, ({ lastEventId: id, data: text }) => {
        const prev = this.#cursor;
        this.#cursor = id;
        this.#hears.event({ prev, id, name, text });
      });
    }
    source.onerror = () => {
      const reason = this.#goodbye || "network";
      if (source.readyState === EventSource.CLOSED) {
        this.#credential = "doubtful";
        return this.#retry("refused");
      }
      // The browser connects again by itself, when the server said.
      this.#tellEnd(reason);
      this.#expectWithin(SILENCE + (isBusy(reason) ? BUSY : 0));
    };
  }

  /** Makes a new connection later: soon, then more and more seldom. @param {string} reason */
  #retry(reason) {
    this.#tellEnd(reason);
    this.close();
    const delay = Math.min(LONGEST_RETRY, 1_000 * 2 ** this.#failures++) * (0.5 + Math.random() / 2);
    this.#timer = setTimeout(() => this.connect(), delay);
    this.#expectWithin(delay + SILENCE);
  }

  /** The stream has ended, or there was none: the first is usual, the second is being offline. @param {string} reason */
  #tellEnd(reason) {
    const wasReady = this.#isReady;
    this.#isReady = false;
    this.#goodbye = "";
    if (wasReady && isOver(this.#readyAt, STEADY)) this.#failures = 0;
    this.#tellState(wasReady && !isBusy(reason) ? "connecting" : "offline", reason);
  }

  /** @param {State} state @param {string} reason */
  #tellState(state, reason) {
    if (state === this.#state && reason === this.#reason) return;
    this.#state = state;
    this.#reason = reason;
    this.#hears.state(state, reason);
  }
}

/** The server is too busy for this user, or the user has too many streams: it says when to come back. @param {string} reason */
const isBusy = (reason) => reason === "busy" || reason === "replaced";

/** Whether this was longer ago; clocks may be set. @param {number} since @param {number} time */
const isOver = (since, time) => Math.abs(Date.now() - since) >= time;

/** @param {URL} url @param {RequestCredentials} credentials @param {AbortSignal} signal */
async function refreshCookie(url, credentials, signal) {
  const answer = await fetch(new URL("refresh_token", url), { method: "POST", credentials, signal });
  if (!answer.ok && answer.status !== 401) throw new Error(`${answer.status}`);
  return answer.ok;
}
