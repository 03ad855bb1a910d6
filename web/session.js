// A user in a tab: stream, model, outbox and drafts, wired together. `end` stops all of them.

import { get, post, retryNow } from "./api.js";
import { Model } from "./model.js";
import { Outbox } from "./outbox.js";
import { Drawer, who } from "./storage.js";
import { MessengerStream } from "./stream.js";

const EVENTS = [
  "message", "message.sent", "message.updated", "message.deleted", "conversation.created", "conversation.updated", "conversation.read",
  "receipt.read", "participant.left",
];
const DAY_MS = 86_400_000;

export class Session {
  #end = new AbortController();
  /** The id of the conversation on screen. @type {string | null} */
  open = null;
  /** @type {import("./stream.js").MessengerStream["state"]} */
  state = "connecting";
  reason = "";
  /** Code points. The server says so; until then its default. */
  longestMessage = 4_000;
  /** Called at each change of state. */
  onState = () => {};

  /**
   * @param {import("./api.js").User} me
   * @param {string | null} cursor Taken before anything is read.
   * @param {() => void} signedOut Called when the stream says that nobody is logged in any more.
   */
  constructor(me, cursor, signedOut) {
    this.me = me;
    this.drawer = new Drawer(me.id);
    this.outbox = new Outbox(me.id, this.drawer, this.signal);
    this.model = new Model(me, this.outbox, this.signal);
    this.stream = new MessengerStream({ cursor, scope: me.id });
    for (const name of EVENTS) {
      this.stream.addEventListener(name, (event) => this.model.apply(name, /** @type {any} */ (event).data));
    }
    this.stream.addEventListener("resync", () => this.#reload());
    this.stream.addEventListener("state", (event) => {
      if (this.signal.aborted) return;
      const { state, reason } = /** @type {any} */ (event);
      this.state = state;
      this.reason = reason ?? "";
      if (state === "live") retryNow();
      if (state === "signed-out") signedOut();
      this.onState();
    });
    this.stream.start();
    this.#reload();
    this.#refresh();
    this.#readLimits();
    document.addEventListener("visibilitychange", () => this.#refresh(), { signal: this.signal });
  }

  get signal() {
    return this.#end.signal;
  }

  #reload() {
    this.model.reload(() => this.open).catch(() => {});
  }

  async #readLimits() {
    try {
      this.longestMessage = (await get("/api/limits", this.signal)).body.maxMessageLength;
    } catch {
      // The server checks each message all the same.
    }
  }

  /** Once per day of use, so that regular users stay logged in. */
  async #refresh() {
    const last = Number(this.drawer.get("refreshed"));
    if (document.visibilityState === "hidden" || Date.now() - last < DAY_MS) return;
    // Before the request, so that other tabs do not repeat it.
    this.drawer.set("refreshed", String(Date.now()));
    await post("/api/refresh_token").catch(() => this.drawer.set("refreshed", last ? String(last) : null));
  }

  end() {
    this.#end.abort();
    this.stream.close();
  }

  /** Ends the session on the server too, and deletes this user's data here. */
  async logOut() {
    await post("/api/logout").catch((error) => {
      if (error.status !== 401) throw error;
    });
    this.end();
    // First, so that no other tab stores anything any more.
    who.set("");
    this.drawer.clear();
  }
}

/** Throws 401 when nobody is logged in. @param {AbortSignal} signal */
export async function whoAmI(signal) {
  const { body, headers } = await get("/api/auth_user", signal);
  return { me: /** @type {import("./api.js").User} */ (body), cursor: headers.get("Feed-Cursor") };
}
