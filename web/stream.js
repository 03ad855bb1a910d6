// @ts-check
/**
 * The messenger's stream for web pages: each event once per tab, in order, whatever happens to networks, servers, credentials,
 * tabs and laptops. No imports. `docs/stream-client.md` says how to use it.
 *
 * Tabs share one stream, because a browser opens only six HTTP/1.1 connections to a host. The tab that holds a Web Lock leads:
 * it has the connection and sends events to the others by a BroadcastChannel. When it closes, freezes or enters the
 * back/forward cache, the next tab gets the lock and connects from its own last event.
 *
 * Messages between tabs:
 *   event   leader to all: an event, and the id of the one before it (`prev`)
 *   status  leader to all: the state and the id of its last event; sent when it starts to lead, at each change of state and
 *           each heartbeat, and in answer to `ask`, then with the events that follow the follower's last one
 *   ask     follower to leader: "I have all up to this id, what follows?"
 *
 * Ids are opaque: compared for equality, never by order. Each tab keeps its recent events. An event whose `prev` is the tab's
 * last id is the next one; a known one is dropped; any other shows a gap, and the tab asks. If the leader does not know the
 * tab's last id, one of the two is ahead. The tab waits shortly, then reads from the server by a connection of its own until
 * the leader knows its last id. Tabs do so one at a time, so all of them need two connections at most.
 *
 * `term` grows from leader to leader, so nobody listens to a tab that hung, lost the lock and wakes with old messages. A
 * follower takes the lock from a leader that does not answer.
 */

/** Kept for tabs that missed something: events, and their characters. */
const KEPT_EVENTS = 256;
const KEPT_SIZE = 256 * 1024;

// In milliseconds. Timers of background tabs may run once a minute, which makes things slower and nothing worse.
const TICK = 2_500;
/** The longest silence, unless the server announces another interval of heartbeats. */
const SILENCE = 40_000;
/** The longest `retry` of a busy server. */
const BUSY = 120_000;
const LONGEST_RETRY = 30_000;
/** A stream that lasted this long resets the back-off. */
const STEADY = 10_000;
/** How long a tab and its leader may differ before the tab reads from the server, and how long that may take. */
const SHORTLY = 1_000;
const CATCH_UP = 30_000;

const EVENTS = [
  "message", "message.sent", "message.updated", "message.deleted", "conversation.created", "conversation.updated",
  "conversation.read", "receipt.read", "participant.joined", "participant.left", "participant.updated", "user.updated", "resync",
];

/**
 * @typedef {"connecting" | "live" | "offline" | "signed-out"} State
 *
 * @typedef {object} Options
 * @property {string | null} [cursor] the `Feed-Cursor` of what was read by REST; without one, the stream starts now
 * @property {string} [url] by default `/api/messages`
 * @property {string} [scope] tabs of one scope share a stream: one per user, or per token where tabs have different ones
 * @property {boolean} [shared] false: a connection for this tab alone
 * @property {() => Promise<string | null>} [token] called before each connection and sent as `?token=`; null: nobody is logged
 *   in; if it throws, it is called again later. By default the browser's cookie counts
 * @property {() => Promise<boolean>} [refresh] called when the credential has ended or was refused: true, try again; false,
 *   signed out; if it throws, it is called again later. By default `POST refresh_token` beside `url`, or `token` again
 * @property {string[]} [events] names of more events than the messenger's
 * @property {boolean} [withCredentials] sends the cookie to another origin
 *
 * @typedef {{ prev: string | null, id: string, name: string, text: string }} Entry an event and the id before it
 * @typedef {{ to: string, after: string | null, events: Entry[] | null }} Answer null: the leader does not know that id
 * @typedef {{ kind: "ask", from: string, after: string | null, hurry: boolean }
 *   | { kind: "event", term: number, entry: Entry }
 *   | { kind: "status", term: number, state: State, reason: string, cursor: string | null, answer?: Answer }} Note
 *
 * @typedef {object} Handlers of a connection
 * @property {(cursor: string) => void} begin the first position of a stream without a cursor
 * @property {(entry: Entry) => void} event
 * @property {(state: State, reason: string) => void} state
 * @property {() => void} heartbeat
 */

/** An event of the feed; `type` is its name. */
export class StreamEvent extends Event {
  /** @param {string} name @param {string} id @param {any} data */
  constructor(name, id, data) {
    super(name);
    this.id = id;
    this.data = data;
  }
}

export class StateEvent extends Event {
  /** @param {State} state @param {string} reason */
  constructor(state, reason) {
    super("state");
    this.state = state;
    /** Why it is not live: `network`, `silent`, `refused`, or the server's: `drain`, `busy`, `expired`, …; or empty. */
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
  /** While the page is active. @type {number | undefined} */
  #ticking;
  /** @type {BroadcastChannel | null} */
  #channel = null;
  /** Our turn in the queue for the lock, then the lock. @type {AbortController | null} */
  #turn = null;
  /** Of a tab that leads. @type {Connection | null} */
  #connection = null;
  /** Of a tab that catches up by itself. @type {AbortController | null} */
  #reading = null;

  /** Of the newest leader that we know. */
  #term = 0;
  #heardAt = 0;
  /** When we sent the unanswered `ask`, and how many ticks ago. */
  #askedAt = 0;
  #unanswered = 0;
  /** Since when the leader does not know our last id. */
  #apartSince = 0;

  /** @param {Options} [options] */
  constructor(options = {}) {
    super();
    const url = new URL(options.url ?? "/api/messages", document.baseURI);
    this.#options = { ...options, url };
    this.#shared = options.shared !== false && "locks" in navigator && "BroadcastChannel" in globalThis;
    // Pages from before and after a deploy may listen to different events; then they do not share.
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

  /** Continues from the cursor, until `close()` or until nobody is logged in. */
  start() {
    if (this.#run) return;
    this.#run = new AbortController();
    const { signal } = this.#run;
    // The back/forward cache takes no page that holds a lock or a channel.
    document.addEventListener("freeze", () => this.#leave(), { signal });
    document.addEventListener("resume", () => this.#join(), { signal });
    addEventListener("pagehide", () => this.#leave(), { signal });
    addEventListener("pageshow", (event) => event.persisted && this.#join(), { signal });
    addEventListener("online", () => this.#connection?.connect("network"), { signal });
    // The browser may be wrong: an event that arrives makes it live again.
    addEventListener("offline", () => this.#connection && this.#setState("offline", "network"), { signal });
    const looked = () => document.visibilityState === "visible" && this.#hurry();
    document.addEventListener("visibilitychange", looked, { signal });
    this.#setState("connecting", "");
    this.#join();
  }

  /** Ends the stream of this tab immediately, without an event. */
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
    // Jitter, so that tabs do not act together.
    this.#ticking = setInterval(() => this.#tick(), TICK * (1 + Math.random() / 5));
    if (!this.#shared) return this.#lead();
    this.#channel = new BroadcastChannel(this.#name);
    this.#channel.onmessage = ({ data }) => this.#receive(data);
    this.#queue();
    this.#ask();
  }

  #leave() {
    clearInterval(this.#ticking);
    this.#ticking = undefined;
    this.#agree();
    this.#connection?.close();
    this.#connection = null;
    this.#turn?.abort();
    this.#turn = null;
    this.#channel?.close();
    this.#channel = null;
  }

  /** Waits for the lock, or steals it, and leads until we release it or another tab steals it. */
  #queue(steal = false) {
    this.#unanswered = 0;
    this.#turn?.abort();
    const { signal } = (this.#turn = new AbortController());
    const lead = () => {
      if (signal.aborted) return;
      const held = new Promise((release) => signal.addEventListener("abort", release));
      this.#lead();
      return held;
    };
    navigator.locks.request(this.#name, steal ? { steal } : { signal }, lead).catch((error) => {
      if (signal.aborted) return;
      if (error.name === "AbortError") return this.#follow();
      // No locks here, as in a sandboxed frame.
      this.#shared = false;
      this.#leave();
      this.#join();
    });
  }

  #lead() {
    this.#agree();
    this.#term = Math.max(this.#term + 1, Date.now());
    const connection = (this.#connection = new Connection(this.#options, this.cursor, {
      begin: (cursor) => this.#history.restart(cursor),
      event: (entry) => this.#take(entry),
      state: (state, reason) => this.#setState(state, reason),
      heartbeat: () => this.#tell(),
    }));
    // A change of leader alone does not change the state.
    this.#tell();
    connection.connect();
  }

  #follow() {
    this.#connection?.close();
    this.#connection = null;
    this.#queue();
    this.#ask();
  }

  /** @param {Note} note */
  #post(note) {
    this.#channel?.postMessage(note);
  }

  /** Sends our status, if we lead. @param {Answer} [answer] */
  #tell(answer) {
    if (!this.#connection) return;
    this.#post({ kind: "status", term: this.#term, state: this.#state, reason: this.#reason, cursor: this.cursor, answer });
  }

  #ask(hurry = false) {
    // One at a time: an answer may be long.
    if (!hurry && !isOver(this.#askedAt, SHORTLY)) return;
    this.#askedAt = Date.now();
    this.#post({ kind: "ask", from: this.#tab, after: this.cursor, hurry });
  }

  /** @param {Note} note */
  #receive(note) {
    if (note.kind === "ask") {
      const { from: to, after, hurry } = note;
      this.#tell({ to, after, events: after === null ? [] : this.#history.after(after) });
      if (hurry) this.#connection?.hurry();
      return;
    }
    if (note.term < this.#term || (this.#connection && note.term === this.#term)) return;
    if (this.#connection) this.#follow();
    // The previous leader will not answer any more.
    if (note.term > this.#term) this.#askedAt = 0;
    this.#term = note.term;
    this.#heardAt = Date.now();
    this.#unanswered = 0;
    if (note.kind === "status") {
      this.#setState(note.state, note.reason);
      this.#compare(note.cursor, note.answer);
    } else {
      if (this.cursor === null) this.#history.restart(note.entry.prev);
      this.#take(note.entry);
      this.#compare(note.entry.id);
    }
  }

  /**
   * Compares our position with the leader's. Without a cursor we begin at its position.
   * @param {string | null} cursor
   * @param {Answer} [answer]
   */
  #compare(cursor, answer) {
    const mine = answer?.to === this.#tab;
    if (mine) {
      this.#askedAt = 0;
      for (const entry of answer.events ?? []) this.#take(entry);
    }
    if (!this.#run || cursor === null) return;
    if (this.cursor === null) this.#history.restart(cursor);
    if (this.#history.after(cursor)) this.#agree();
    else if (mine && !answer.events && answer.after === this.cursor) this.#differ();
    else this.#ask();
  }

  #agree() {
    this.#askedAt = 0;
    this.#apartSince = 0;
    this.#reading?.abort();
    this.#reading = null;
  }

  /** The leader does not know our last id. If that lasts, we read from the server. */
  #differ() {
    if (this.#state !== "live" || this.#reading) return;
    if (this.#apartSince && isOver(this.#apartSince, SHORTLY)) return this.#catchUp();
    if (!this.#apartSince) setTimeout(() => this.#apartSince && this.#ask(), SHORTLY);
    this.#apartSince ||= Date.now();
  }

  #catchUp() {
    const { signal } = (this.#reading = new AbortController());
    const reading = this.#reading;
    const end = () => {
      reading.abort();
      if (this.#reading === reading) this.#reading = null;
    };
    const read = () => {
      if (signal.aborted) return;
      const connection = new Connection(this.#options, this.cursor, {
        begin: () => {},
        event: (entry) => {
          this.#take(entry);
          this.#ask();
        },
        state: (state) => (state === "offline" || state === "signed-out") && end(),
        heartbeat: () => this.#ask(),
      });
      // Other tabs wait for their turn.
      const late = setTimeout(end, CATCH_UP);
      const ended = new Promise((release) => signal.addEventListener("abort", release));
      connection.connect();
      return ended.then(() => {
        clearTimeout(late);
        connection.close();
      });
    };
    navigator.locks.request(`${this.#name} catch-up`, { signal }, read).catch(() => {});
  }

  /** Passes the next event to the page, and to the other tabs if we lead; drops any other. @param {Entry} entry */
  #take(entry) {
    if (!this.#run || entry.prev !== this.cursor) return;
    // A restored database reuses ids.
    if (entry.name === "resync") this.#history.restart(entry.prev);
    this.#history.add(entry);
    if (this.#connection) this.#post({ kind: "event", term: this.#term, entry });
    this.dispatchEvent(new StreamEvent(entry.name, entry.id, JSON.parse(entry.text)));
  }

  /** @param {State} state @param {string} reason */
  #setState(state, reason) {
    if (!this.#run || (state === this.#state && reason === this.#reason)) return;
    this.#state = state;
    this.#reason = reason;
    this.#tell();
    if (state === "signed-out") {
      this.#run?.abort();
      this.#run = null;
      this.#leave();
    }
    this.dispatchEvent(new StateEvent(state, reason));
  }

  #hurry() {
    if (this.#connection) this.#connection.hurry();
    else this.#ask(true);
  }

  #tick() {
    if (this.#connection) return this.#connection.check();
    // In ticks and not by the clock: if this tab hung, the answer arrives before the next tick.
    if (this.#askedAt && ++this.#unanswered > 2) return this.#queue(true);
    if (this.#askedAt || this.#apartSince || isOver(this.#heardAt, SILENCE)) this.#ask();
  }
}

/** The recent events of a tab, each following the one before it. */
class History {
  /** @type {Entry[]} */
  #entries = [];
  #size = 0;
  /** The id before the first one. */
  #base;

  /** @param {string | null} base */
  constructor(base) {
    this.#base = base;
  }

  get cursor() {
    return this.#entries.at(-1)?.id ?? this.#base;
  }

  /** The events after this id; null if it is unknown. @param {string} id */
  after(id) {
    const at = this.#entries.map((entry) => entry.id).lastIndexOf(id);
    return at < 0 && id !== this.#base ? null : this.#entries.slice(at + 1);
  }

  /** @param {Entry} entry */
  add(entry) {
    this.#entries.push(entry);
    this.#size += entry.text.length;
    while (this.#entries.length > KEPT_EVENTS || this.#size > KEPT_SIZE) {
      const { id, text } = this.#entries[0];
      this.#entries.shift();
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

/** One EventSource after another, each from the last event on. */
class Connection {
  #options;
  #cursor;
  #handlers;
  #isClosed = false;
  /** @type {EventSource | null} */
  #source = null;
  #attempt = new AbortController();
  /** @type {number | undefined} */
  #timer;
  /** Uncertain: the answer was no stream, and an EventSource does not say why. @type {"good" | "uncertain" | "ended"} */
  #credential = "good";
  #failures = 0;
  /** 0: there is no stream. */
  #readyAt = 0;
  /** The reason of the server's `goodbye`. */
  #goodbye = "";
  /** Why the last stream ended. */
  #reason = "";
  /** The last sign of life, and how long the next one may take. */
  #heardAt = 0;
  #patience = SILENCE;
  #silence = SILENCE;

  /** @param {Omit<Options, "url"> & { url: URL }} options @param {string | null} cursor @param {Handlers} handlers */
  constructor(options, cursor, handlers) {
    this.#options = options;
    this.#cursor = cursor;
    this.#handlers = handlers;
  }

  close() {
    this.#isClosed = true;
    this.#drop();
  }

  /** Connects now; `reason` says why an open connection is abandoned. @param {string} [reason] */
  async connect(reason) {
    if (reason) this.#end(reason);
    if (this.#isClosed) return;
    this.#drop();
    const { signal } = (this.#attempt = new AbortController());
    this.#expectWithin(SILENCE);
    try {
      const address = await this.#address(signal);
      if (signal.aborted) return;
      if (address) this.#listen(address);
      else this.#handlers.state("signed-out", this.#reason);
    } catch (error) {
      if (!signal.aborted) this.#retry(error instanceof TypeError ? "network" : "refused");
    }
  }

  /** The user is waiting: connects now, unless an attempt has just started or the server is busy. */
  hurry() {
    this.check();
    if (!this.#readyAt && !isBusy(this.#reason) && isOver(this.#heardAt, SHORTLY)) this.connect();
  }

  /** Replaces a silent connection: a dead network, or a laptop that slept. */
  check() {
    if (isOver(this.#heardAt, this.#patience)) this.connect("silent");
  }

  /** @param {number} patience */
  #expectWithin(patience) {
    this.#heardAt = Date.now();
    this.#patience = patience;
  }

  #drop() {
    clearTimeout(this.#timer);
    this.#attempt.abort();
    this.#source?.close();
    this.#source = null;
  }

  /** Connects later, with back-off. @param {string} reason */
  #retry(reason) {
    this.#end(reason);
    this.#drop();
    // A credential that is about to end is renewed without a delay.
    const isUrgent = this.#credential === "ended" && this.#failures === 0;
    const longest = Math.min(LONGEST_RETRY, 1_000 * 2 ** this.#failures++);
    const delay = isUrgent ? 0 : longest * (0.5 + Math.random() / 2);
    this.#timer = setTimeout(() => this.connect(), delay);
    this.#expectWithin(delay + SILENCE);
  }

  /** A stream ended, which is usual, or none came, which means offline. @param {string} reason */
  #end(reason) {
    if (this.#isClosed) return;
    const readyAt = this.#readyAt;
    if (readyAt && isOver(readyAt, STEADY)) this.#failures = 0;
    this.#readyAt = 0;
    this.#goodbye = "";
    this.#reason = reason;
    this.#handlers.state(readyAt && !isBusy(reason) ? "connecting" : "offline", reason);
  }

  /** The address with a credential; null when nobody is logged in. @param {AbortSignal} signal */
  async #address(signal) {
    const { token, withCredentials } = this.#options;
    const url = new URL(this.#options.url);
    url.searchParams.set("heartbeat", "event");
    if (this.#cursor) url.searchParams.set("lastEventId", this.#cursor);
    const addToken = async () => {
      const text = token ? await token() : "";
      signal.throwIfAborted();
      if (text) url.searchParams.set("token", text);
      return text !== null;
    };

    if (this.#credential === "uncertain") {
      if (!(await addToken())) return null;
      const headers = { Accept: "text/event-stream" };
      const credentials = withCredentials ? "include" : "same-origin";
      const answer = await fetch(url, { headers, credentials, cache: "no-store", signal });
      await answer.body?.cancel();
      if (!answer.ok && answer.status !== 401) throw new Error(`${answer.status}`);
      this.#credential = answer.ok ? "good" : "ended";
    }
    if (this.#credential === "ended") {
      if (!(await this.#refresh(signal))) return null;
      this.#credential = "good";
    }
    return (await addToken()) ? url : null;
  }

  /** @param {AbortSignal} signal */
  async #refresh(signal) {
    const { refresh, token, url, withCredentials } = this.#options;
    if (refresh) return refresh();
    if (token) return true;
    const credentials = withCredentials ? "include" : "same-origin";
    const answer = await fetch(new URL("refresh_token", url), { method: "POST", credentials, signal });
    if (!answer.ok && answer.status !== 401) throw new Error(`${answer.status}`);
    return answer.ok;
  }

  /** @param {URL} url */
  #listen(url) {
    const { events = [], withCredentials = false } = this.#options;
    const source = (this.#source = new EventSource(url, { withCredentials }));
    /** @param {string} name @param {(event: MessageEvent<string>) => void} handle */
    const on = (name, handle) =>
      source.addEventListener(name, (event) => {
        this.#expectWithin(this.#silence);
        if (this.#readyAt) this.#handlers.state("live", "");
        handle(event);
      });

    on("ready", ({ data }) => {
      const { cursor, heartbeatSeconds } = JSON.parse(data);
      if (heartbeatSeconds > 0) this.#silence = heartbeatSeconds * 2_500;
      if (this.#cursor === null) this.#handlers.begin((this.#cursor = cursor));
      this.#readyAt = Date.now();
      this.#handlers.state("live", "");
    });
    for (const name of [...EVENTS, ...events]) {
      on(name, ({ lastEventId: id, data: text }) => {
        const prev = this.#cursor;
        this.#cursor = id;
        this.#handlers.event({ prev, id, name, text });
      });
    }
    on("heartbeat", () => this.#handlers.heartbeat());
    on("goodbye", ({ data }) => {
      const { reason, reconnect } = JSON.parse(data);
      this.#goodbye = reason;
      if (reconnect) return;
      this.#credential = "ended";
      this.#retry(reason);
    });
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) {
        this.#credential = "uncertain";
        this.#retry("refused");
      } else {
        // The browser reconnects by itself after the server's `retry`.
        const reason = this.#goodbye || "network";
        this.#expectWithin(SILENCE + (isBusy(reason) ? BUSY : 0));
        this.#end(reason);
      }
    };
  }
}

/** Over a limit: the server's `retry` is minutes. @param {string} reason */
const isBusy = (reason) => reason === "busy" || reason === "replaced";

/** Clocks may be set back. @param {number} since @param {number} time */
const isOver = (since, time) => Math.abs(Date.now() - since) >= time;
