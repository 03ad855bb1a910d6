// The frame of every page of a logged-in user: header, connection state, list of conversations, and the page itself.

import { post, retryNow, sentence } from "./api.js";
import { showBadge } from "./badge.js";
import { usernameField } from "./combobox.js";
import { h, icon, reconcile, setAttribute, setText } from "./dom.js";
import { when } from "./text.js";

/** @typedef {import("./api.js").User} User */

/**
 * Whom a conversation shows: the other one, or the group.
 *
 * @param {import("./api.js").Conversation} conversation
 * @returns {User}
 */
export const faceOf = ({ id, title, otherParticipant }) => otherParticipant ?? { id, username: title ?? "", avatarURL: null };

/** Instead of a text that was deleted. */
export const DELETED = "This message was deleted.";

/** A picture, or the initial of the name. @param {User} user */
export function avatar(user) {
  const face = h("span", { class: "avatar", "aria-hidden": "true" });
  let hash = 0;
  for (const character of user.username) hash = (hash * 31 + (character.codePointAt(0) ?? 0)) % 360;
  face.style.setProperty("--hue", String(hash));
  const initial = [...user.username][0]?.toUpperCase() ?? "?";
  if (user.avatarURL?.startsWith("https://")) {
    const picture = h("img", { src: user.avatarURL, alt: "", loading: "lazy", referrerpolicy: "no-referrer" });
    picture.addEventListener("error", () => face.replaceChildren(initial));
    face.append(picture);
  } else {
    face.append(initial);
  }
  return face;
}

/** For screen readers alone. */
const announcer = h("div", { class: "unseen", "aria-live": "polite" });

/** @param {string} text */
export function announce(text) {
  announcer.replaceChildren(h("p", {}, text));
}

/**
 * @param {import("./session.js").Session} session
 * @param {{ go: (path: string) => void, leave: () => void }} ways `leave` is called after a logout.
 */
export function makeShell(session, { go, leave }) {
  const { me, model, signal } = session;
  const page = { name: "", title: "" };

  const connection = h("div", { id: "connection", role: "status", "data-state": session.state });
  let wasAway = false;
  let quiet = 0;
  const showState = () => {
    const { state, reason } = session;
    setAttribute(connection, "data-state", state);
    clearTimeout(quiet);
    if (state === "live") {
      setText(connection, wasAway ? "Back online" : "");
      if (wasAway) quiet = setTimeout(() => setText(connection, ""), 3000);
      wasAway = false;
      connection.classList.toggle("good", true);
    } else {
      connection.classList.toggle("good", false);
      if (state === "offline") wasAway = true;
      setText(connection, words(state, reason, wasAway));
    }
  };
  session.onState = showState;
  addEventListener("online", showState, { signal });
  addEventListener("offline", showState, { signal });
  showState();

  const problem = h("p", { class: "problem", role: "alert" });
  let warned = false;
  const logOut = h("button", { type: "button", class: "plain", click: async () => {
    if (session.outbox.hasUnsent && !warned) {
      problem.textContent = "Some messages are not sent yet and would be lost. Press “Log out” again if you want that.";
      warned = true;
      return;
    }
    problem.textContent = "";
    logOut.disabled = true;
    try {
      await session.logOut();
      leave();
    } catch (error) {
      logOut.disabled = false;
      problem.textContent = `You are still logged in. ${sentence(error)}`;
    }
  } }, "Log out");

  const header = h("header", { class: "bar" },
    avatar(me),
    h("a", { class: "me", href: "/", dir: "auto", "aria-label": `Messenger, ${me.username}` }, me.username),
    h("a", { class: "plain", href: "/sessions" }, "Sessions"),
    logOut);

  const label = "New conversation with";
  const { field, list: options } = usernameField({ id: "start", label, placeholder: `${label}…`, signal });
  const problemLine = h("p", { id: "start-problem", class: "problem", role: "alert" });
  field.setAttribute("aria-describedby", problemLine.id);
  field.addEventListener("input", () => { problemLine.textContent = ""; });
  const button = h("button", { class: "primary" }, "Start");
  const form = h("form", { class: "start", submit: async (/** @type {SubmitEvent} */ event) => {
    event.preventDefault();
    if (button.getAttribute("aria-disabled")) return;
    problemLine.textContent = "";
    setAttribute(button, "aria-disabled", "true");
    try {
      const { body } = await post("/api/conversations", { username: field.value }, { signal });
      field.value = "";
      model.add(body);
      go(`/conversations/${body.id}`);
    } catch (error) {
      if (!signal.aborted) {
        problemLine.textContent = sentence(error);
        field.focus();
      }
    } finally {
      setAttribute(button, "aria-disabled", null);
    }
  } }, h("div", { class: "combobox" }, field, options), button);

  const list = h("ul", { class: "conversations" });
  const more = h("button", { type: "button", class: "plain more", click: () => model.loadMore().catch(() => {}) }, "Load more");
  const trouble = h("button", { type: "button", class: "trouble", click: retryNow },
    "The list could not be loaded. Trying again… ", h("b", {}, "Try now"));
  const empty = h("p", { class: "empty" }, "No conversations yet. Start one with a username above.");
  const scroller = h("div", { class: "scroll" }, list, more, trouble, empty);
  const nav = h("nav", { "aria-label": "Conversations" }, form, problemLine, scroller);
  const main = h("main", { id: "main", tabindex: -1 });
  const aside = h("div", { class: "aside" }, header, problem, nav);
  const element = h("div", { class: "app" },
    h("a", { class: "skip", href: "#main", click: (/** @type {Event} */ event) => {
      event.preventDefault();
      const composer = main.querySelector("textarea");
      (composer ?? main).focus();
    } }, "Skip to the page"),
    connection, aside, main, announcer);

  const loadMore = new IntersectionObserver(([entry]) => {
    if (entry?.isIntersecting) model.loadMore().catch(() => {});
  }, { root: scroller, rootMargin: "400px" });
  signal.addEventListener("abort", () => loadMore.disconnect());

  const render = () => {
    const items = model.order.flatMap((id) => {
      const conversation = model.conversations.get(id);
      return conversation ? [{ key: id, conversation }] : [];
    });
    reconcile(list, items, ({ key, conversation }) => {
      return h("li", { "data-conversation-id": key }, h("a", { href: `/conversations/${encodeURIComponent(key)}` },
        avatar(faceOf(conversation)),
        h("span", { class: "name", dir: "auto" }),
        h("time", {}),
        h("span", { class: "preview", dir: "auto" })));
    }, (row, { key, conversation }) => {
      const link = /** @type {HTMLElement} */ (row.firstElementChild);
      const [, name, time, preview] = /** @type {any} */ (link.children);
      setText(name, faceOf(conversation).username);
      const last = conversation.lastMessage;
      setText(time, last ? when(last.createdAt) : "");
      setAttribute(time, "datetime", last?.createdAt);
      // One line is visible: a short text is cheaper to lay out.
      const text = last?.deletedAt ? DELETED : last?.content.slice(0, 200) ?? "";
      setText(preview, last ? `${last.mine ? "You: " : ""}${text}` : "");
      const unread = model.unreadOf(conversation);
      let badge = link.querySelector(".unread");
      if (unread > 0) {
        badge ??= link.appendChild(h("span", { class: "unread" }, h("span", {}), h("span", { class: "unseen" }, " unread")));
        setText(/** @type {Element} */ (badge.firstElementChild), unread > 99 ? "99+" : String(unread));
      } else {
        badge?.remove();
      }
      setAttribute(link, "aria-current", key === session.open ? "page" : null);
    });
    more.hidden = !model.hasMore;
    trouble.hidden = !model.waiting;
    empty.hidden = !model.listed || items.length > 0;
    setAttribute(scroller, "aria-busy", model.listed ? null : "true");
    showBadge(model.unread, page.title);
    // It reports changes only, and the end of the list may still be in view.
    loadMore.unobserve(more);
    if (model.hasMore && !model.waiting) loadMore.observe(more);
  };
  model.changes.listen(render, signal);
  const eachMinute = setInterval(render, 60_000);
  signal.addEventListener("abort", () => clearInterval(eachMinute));

  model.onMessage = (message, conversation) => {
    if (document.visibilityState === "hidden") return;
    const from = message.sender.username;
    if (message.conversationId === session.open) announce(`${from ?? ""}: ${message.content}`);
    else announce(`New message${from ? ` from ${from}` : ""}`);
  };

  let scrolled = 0;
  return {
    element,
    /**
     * @param {string} name
     * @param {string} title
     * @param {HTMLElement} content
     */
    show(name, title, content) {
      // A hidden list loses its scroll position.
      if (page.name === "home") scrolled = scroller.scrollTop;
      page.name = name;
      page.title = title;
      element.dataset.page = name;
      main.replaceChildren(content);
      if (name === "home") scroller.scrollTop = scrolled;
      render();
    },
    /** @param {string} title */
    setTitle(title) {
      page.title = title;
      showBadge(model.unread, title);
    },
  };
}

/** @param {string} state @param {string} reason @param {boolean} wasAway */
function words(state, reason, wasAway) {
  if (navigator.onLine === false) return "You are offline. Messages will wait.";
  if (state === "signed-out") return "Logged out";
  if (reason === "busy") return "The server is busy. Trying again…";
  if (reason === "replaced") return "Too many windows are open. Trying again…";
  return wasAway ? "Reconnecting…" : "Connecting…";
}

/** Back to the list, where there is no room for both. */
export function backLink() {
  return h("a", { class: "back", href: "/", "aria-label": "Conversations" }, icon("M15 5l-7 7 7 7"));
}

