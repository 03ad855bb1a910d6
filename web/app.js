// The entry point: finds out who is logged in, shows the page of the address, and keeps all tabs on the same user.

import { ApiError, apiEvents, keepTrying } from "./api.js";
import { showBadge } from "./badge.js";
import { h } from "./dom.js";
import { accessPage } from "./pages/access.js";
import { exchange } from "./pages/callback.js";
import { conversationPage } from "./pages/conversation.js";
import { homePage } from "./pages/home.js";
import { notFoundPage } from "./pages/not_found.js";
import { sessionsPage } from "./pages/sessions.js";
import { Session, whoAmI } from "./session.js";
import { makeShell } from "./shell.js";
import { onWho, who } from "./storage.js";

/**
 * @typedef {{ name: string, title: string, element: HTMLElement, focus: () => void, open?: string }} Page
 * @typedef {{ session: Session, signal: AbortSignal, go: (path: string) => void, setTitle: (title: string) => void,
 *   fail: (name: string) => void }} Context Of a page; `signal` ends with it.
 */

/** @type {{ session: Session, shell: ReturnType<typeof makeShell> } | null} */
let inside = null;
/** Ends the present page. */
let shown = new AbortController();
/** Ends the request for who is logged in; the latest one counts. @type {AbortController | null} */
let asking = null;
const forever = new AbortController().signal;

/** @param {string} [said] What to say when nobody is logged in. */
async function begin(said = "") {
  asking?.abort();
  const mine = (asking = new AbortController());
  const { signal } = mine;
  const slow = setTimeout(() => showWaiting("Connecting…"), 800);
  try {
    const { me, cursor } = await keepTrying(() => whoAmI(signal), signal, (error) => {
      clearTimeout(slow);
      if (!inside) showWaiting(`${error.message} Trying again…`);
    });
    if (inside?.session.me.id === me.id && inside.session.state !== "signed-out") return;
    leave();
    who.set(me.id);
    const session = new Session(me, cursor, () => begin(ENDED));
    const shell = makeShell(session, { go, leave: () => showAccess("You are logged out.", true) });
    inside = { session, shell };
    document.body.replaceChildren(shell.element);
    route();
  } catch (error) {
    if (signal.aborted) return;
    if (error instanceof ApiError && error.status === 401) showAccess(said);
    else showWaiting("Something is wrong with the server. Please try again later.");
  } finally {
    clearTimeout(slow);
    if (asking === mine) asking = null;
  }
}

const ENDED = "Your session has ended. Please log in again.";

/** Ends the session in this tab. Unsent messages and drafts stay stored. */
function leave() {
  shown.abort();
  inside?.session.end();
  inside = null;
}

/** @param {string} said @param {boolean} [forgets] Whether the next user starts at `/`. */
function showAccess(said, forgets = false) {
  if (forgets) history.replaceState(null, "", "/");
  asking?.abort();
  leave();
  shown = new AbortController();
  const page = accessPage({ said, signal: shown.signal, done: () => begin() });
  document.body.replaceChildren(page.element);
  showBadge(0, "");
  page.focus();
}

/** @param {string} text */
function showWaiting(text) {
  if (inside) return;
  document.body.replaceChildren(h("main", { class: "waiting" },
    h("h1", {}, "Messenger"),
    h("p", { role: "status" }, text),
    h("button", { type: "button", class: "primary", click: () => begin() }, "Try now")));
}

/** @param {string} path */
function go(path) {
  if (path !== location.pathname) history.pushState(null, "", path);
  route();
}

function route() {
  if (!inside) return;
  const { session, shell } = inside;
  shown.abort();
  shown = new AbortController();
  const { signal } = shown;
  session.model.attend(null);
  /** @param {Page} page */
  const show = (page) => {
    session.open = page.open ?? null;
    shell.show(page.name, page.title, page.element);
    page.focus();
  };
  /** @type {Context} */
  const context = {
    session, signal, go,
    setTitle: (title) => !signal.aborted && shell.setTitle(title),
    fail: (text) => !signal.aborted && show(notFoundPage(text)),
  };
  const path = location.pathname;
  const conversation = /^\/conversations\/([^/]+)$/.exec(path)?.[1];
  if (path === "/") show(homePage(context));
  else if (conversation) show(conversationPage(context, decode(conversation)));
  else if (path === "/sessions") show(sessionsPage(context));
  else show(notFoundPage("There is no such page."));
}

/** @param {string} part */
function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

addEventListener("popstate", route);

// Links within the application change the page and not the document.
document.addEventListener("click", (event) => {
  if (event.defaultPrevented || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  const link = event.target instanceof Element ? event.target.closest("a") : null;
  if (!inside || !link || link.target || link.origin !== location.origin || link.pathname.startsWith("/api/")) return;
  event.preventDefault();
  go(link.pathname);
});

// The request of `begin` itself may be the one that got 401.
apiEvents.addEventListener("unauthorized", () => inside && !asking && begin(ENDED));

// All tabs share one cookie: when another tab logs out or changes the user, this one follows, immediately or when it wakes.
function follow() {
  const now = who.get();
  if (inside && now !== null && now !== inside.session.me.id) {
    if (now === "") {
      showAccess("You have logged out in another tab.", true);
    } else {
      leave();
      history.replaceState(null, "", "/");
      begin();
    }
  } else if (!inside && now) {
    begin();
  }
}
onWho(follow, forever);
addEventListener("pageshow", (event) => event.persisted && follow());
document.addEventListener("visibilitychange", () => inside && follow());

if (location.pathname === "/callback") {
  showWaiting("Logging in…");
  exchange(new URLSearchParams(location.search)).then((text) => {
    history.replaceState(null, "", "/");
    if (text) showAccess(text);
    else begin();
  });
} else {
  begin();
}
