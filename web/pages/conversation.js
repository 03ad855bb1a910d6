// A conversation and its composer. What the reader looks at stays in place whatever is added above or below; at the end, the
// newest message stays in view.

import { apiEvents, post, retryNow } from "../api.js";
import { h, icon, reconcile, setAttribute, setText } from "../dom.js";
import { DELETED, avatar, backLink, faceOf } from "../shell.js";
import { clock, codePoints, day, moment, normalise, parts } from "../text.js";
import { lastIndex } from "../thread.js";

/**
 * @typedef {{ kind: "message", key: string, id: string | null, mine: boolean, sender: string, isDeleted: boolean, content: string, time: string | number,
 *   state: "" | "sending" | "sent" | "read" | "failed", error: string, first: boolean, last: boolean }} MessageItem
 * @typedef {MessageItem | { kind: "day" | "new" | "top", key: string, text: string }} Item
 */

/** @param {import("../api.js").Conversation | undefined} conversation */
const nameOf = (conversation) => (conversation ? faceOf(conversation).username : "");

/** This near to the end counts as the end. */
const NEAR = 32;
/** This near to the beginning, older messages are loaded. */
const AHEAD = 800;
/** Glancing at a conversation is not reading it. */
const READ_AFTER_MS = 250;
/** Messages of one person within this time belong together. */
const TOGETHER_MS = 5 * 60_000;
/** With this many code points left, their number is shown. */
const NEARLY_FULL = 60;

const MARKS = {
  "": ["", ""], sending: ["Sending", "◷"], sent: ["Sent", "✓"], read: ["Read", "✓✓"], failed: ["Not sent", "!"],
};

/** @param {import("../app.js").Context} context @param {string} id @returns {import("../app.js").Page} */
export function conversationPage({ session, signal, setTitle, fail }, id) {
  const { model, outbox, drawer } = session;
  const thread = model.thread(id);
  const draft = `draft:${id}`;

  const face = h("span", { class: "avatar", "aria-hidden": "true" });
  const heading = h("h1", { tabindex: -1, dir: "auto" });
  const bar = h("div", { class: "bar" }, backLink(), face, heading);
  // Not a log: it would announce history and own messages too. The shell announces what is new.
  const list = h("ol", { class: "messages scroll", role: "log", "aria-label": "Messages", "aria-live": "off", tabindex: 0 });
  const fresh = h("span", { class: "count" });
  const jump = h("button", { type: "button", class: "jump", hidden: true },
    icon("M12 5v14m-6-6 6 6 6-6"), "Jump to newest", fresh);
  const field = h("textarea", {
    id: "message", "aria-label": "Message", "aria-describedby": "room", rows: 1, dir: "auto",
    enterkeyhint: "send", autocapitalize: "sentences", autocomplete: "off",
  });
  const room = h("span", { id: "room" });
  const send = h("button", { class: "send", "aria-label": "Send" }, icon("M4 12 20 4l-5 16-4-7-7-1Zm7 1 9-9"));
  const form = h("form", { class: "composer" }, h("div", { class: "field" }, field, room), send);
  const element = h("section", { class: "page conversation" }, bar, h("div", { class: "history" }, list, jump), form);

  /** @type {HTMLElement[]} The messages on screen, in order. */
  let rows = [];
  /** @type {WeakMap<HTMLElement, string>} What they show. */
  const drawn = new WeakMap();
  /** Whether to stay at the end. */
  let stick = true;
  let size = { inner: 0, outer: 0 };
  /** @type {string | null | undefined} The newest message that was in view; `undefined` before there was any view. */
  let seen;
  /** @type {string | null} The first message that came while nobody looked. */
  let divider = null;
  let named = "";

  // --- Scroll position -----------------------------------------------------------------------------------------------------

  const atEnd = () => list.scrollHeight - list.scrollTop - list.clientHeight < NEAR;

  /** The first message in view, and where it is. */
  function place() {
    let low = 0;
    let high = rows.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      const row = rows[middle];
      if (row && row.offsetTop + row.offsetHeight > list.scrollTop) high = middle;
      else low = middle + 1;
    }
    const row = rows[low];
    return row && { row, offset: row.offsetTop - list.scrollTop };
  }

  /** @param {ReturnType<typeof place>} [was] */
  function keepPlace(was) {
    if (stick) list.scrollTop = list.scrollHeight;
    else if (was?.row.isConnected) list.scrollTop = was.row.offsetTop - was.offset;
    size = { inner: list.scrollHeight, outer: list.clientHeight };
    at = place();
    showDay();
  }

  /** Days are sticky; of those at the top only the last is visible. */
  function showDay() {
    /** @type {NodeListOf<HTMLElement>} */
    const days = list.querySelectorAll(".day");
    days.forEach((row, index) => row.classList.toggle("past", (days[index + 1]?.offsetTop ?? Infinity) - row.offsetTop < NEAR));
  }

  /** The place before the size changed. */
  let at = place();

  list.addEventListener("scroll", () => {
    stick = atEnd();
    at = place();
    attend();
    showDay();
    showJump();
    readOlder();
  }, { passive: true });
  const resized = new ResizeObserver(() => keepPlace(at));
  resized.observe(list);
  signal.addEventListener("abort", () => resized.disconnect());

  jump.addEventListener("click", () => {
    stick = true;
    keepPlace();
    attend();
    showJump();
    field.focus();
  });

  function readOlder() {
    if (list.scrollTop < AHEAD && list.clientHeight > 0) thread.loadOlder().catch(() => {});
  }

  // --- Read position -------------------------------------------------------------------------------------------------------

  let timer = 0;
  let reading = false;
  /** @type {string | undefined} The newest message when the read mark was sent last. */
  let marked;

  function attend() {
    if (signal.aborted) return;
    const looks = document.visibilityState === "visible" && stick && thread.state === "ready";
    model.attend(looks ? id : null);
    if (looks) seen = thread.messages.at(-1)?.id ?? null;
    clearTimeout(timer);
    if (looks && isUnread()) timer = setTimeout(tell, READ_AFTER_MS);
  }

  const isUnread = () => (model.conversations.get(id)?.unreadCount ?? 0) > 0 && thread.messages.at(-1)?.id !== marked;

  async function tell() {
    if (reading || signal.aborted) return;
    reading = true;
    const newest = thread.messages.at(-1)?.id;
    try {
      // Continues after the page is left: it was read all the same.
      await post(`/api/conversations/${encodeURIComponent(id)}/read_messages`, undefined, { signal: session.signal });
      marked = newest;
    } catch {
      // The next message, visit or `again` retries.
    } finally {
      reading = false;
    }
    if (marked === newest) attend();
  }
  document.addEventListener("visibilitychange", attend, { signal });
  apiEvents.addEventListener("again", attend, { signal });

  /** The first message of the other after the one with this id. @param {string | null} after */
  function firstAfter(after) {
    const from = after === null ? 0 : lastIndex(thread.messages, (message) => message.id === after) + 1;
    return thread.messages.slice(from).filter((message) => !message.mine);
  }

  function showJump() {
    const count = seen === undefined ? 0 : firstAfter(seen).length;
    jump.hidden = stick || thread.state !== "ready";
    setText(fresh, count ? `${count} new` : "");
  }

  // --- Messages ------------------------------------------------------------------------------------------------------------

  /** @returns {Item[]} */
  function items() {
    const conversation = model.conversations.get(id);
    const read = thread.readCount(conversation?.otherLastReadMessageId ?? null);
    /** @type {Omit<MessageItem, "first" | "last">[]} */
    const all = thread.messages.map((message, index) => ({
      kind: "message", key: message.idempotencyKey ?? message.id, id: message.id,
      mine: message.mine, sender: message.sender.username, time: message.createdAt,
      content: message.deletedAt ? DELETED : message.content, isDeleted: message.deletedAt !== null,
      state: !message.mine ? "" : index < read ? "read" : "sent", error: "",
    }));
    for (const entry of outbox.shown(id)) {
      // In a page before the stream delivered it.
      if (entry.messageId && thread.has(entry.messageId)) continue;
      all.push({
        kind: "message", key: entry.key, id: entry.messageId,
        mine: true, sender: model.me.username, isDeleted: false, content: entry.content, time: entry.sent ?? entry.createdAt,
        state: entry.state === "waiting" ? "sending" : entry.state, error: entry.error,
      });
    }
    /** @type {Item[]} */
    const shown = [];
    if (thread.older || thread.waiting) {
      const text = thread.waiting ? "Older messages could not be loaded. Trying again…" : "Loading…";
      shown.push({ kind: "top", key: "top", text });
    } else if (!thread.hasOlder) {
      const text = all.length > 0 ? `The beginning of your conversation with ${named}` : "No messages yet. Say hello!";
      shown.push({ kind: "top", key: "begin", text });
    }
    /** @type {MessageItem | undefined} */
    let previous;
    for (const message of all) {
      const item = { ...message, first: true, last: true };
      const date = new Date(item.time);
      let together = previous?.mine === item.mine && previous.sender === item.sender && date.getTime() - new Date(previous.time).getTime() < TOGETHER_MS;
      if (!previous || date.toDateString() !== new Date(previous.time).toDateString()) {
        shown.push({ kind: "day", key: `day ${item.key}`, text: day(item.time) });
        together = false;
      }
      if (divider !== null && item.id === divider) {
        shown.push({ kind: "new", key: "new", text: "New messages" });
        together = false;
      }
      if (together && previous) {
        previous.last = false;
        item.first = false;
      }
      shown.push(item);
      previous = item;
    }
    return shown;
  }

  function render() {
    if (thread.state === "gone") return fail("There is no such conversation.");
    const conversation = model.conversations.get(id);
    const name = nameOf(conversation);
    if (conversation && name !== named) {
      named = name;
      setText(heading, name);
      face.replaceWith(avatar(faceOf(conversation)));
      field.placeholder = `Write to ${name}`;
      setTitle(name);
    }
    const ready = thread.state === "ready" && conversation !== undefined;
    setAttribute(list, "aria-busy", ready ? null : "true");
    if (!ready) {
      const text = thread.waiting ? "The messages could not be loaded. Trying again…" : "Loading…";
      show([{ kind: "top", key: "top", text }]);
      return;
    }
    if (seen === undefined) {
      // From the end backwards, as many as are unread.
      let first = thread.messages.length;
      for (let unread = conversation.unreadCount; first > 0 && unread > 0;) if (!thread.messages[(first -= 1)]?.mine) unread -= 1;
      divider = thread.messages[first]?.id ?? null;
      seen = thread.messages[first - 1]?.id ?? null;
    }
    // A scroll event may be pending.
    if (list.scrollHeight === size.inner && list.clientHeight === size.outer) stick = atEnd();
    attend();
    if (model.attended !== id) {
      const unseen = firstAfter(seen);
      const isNew = divider === null || !unseen.some((message) => message.id === divider);
      if (unseen[0] && isNew) divider = unseen[0].id;
    }
    show(items());
    attend();
    showJump();
    readOlder();
  }

  /** @param {Item[]} shown */
  function show(shown) {
    const was = place();
    reconcile(list, shown, make, update);
    rows = /** @type {HTMLElement[]} */ ([...list.children].filter((row) => row.classList.contains("message")));
    keepPlace(was);
  }

  /** @param {Item} item */
  function make(item) {
    if (item.kind === "day") return h("li", { class: "day", role: "heading", "aria-level": 2 }, h("span", {}));
    if (item.kind === "new") {
      const text = h("span", { "aria-hidden": "true" }, item.text);
      return h("li", { class: "new", role: "separator", "aria-label": item.text }, text);
    }
    if (item.kind !== "message") {
      return h("li", { class: "top", role: "none" }, h("span", {}),
        h("button", { type: "button", class: "plain", click: retryNow }, "Try now"));
    }
    return h("li", { class: "message", role: "article", "data-mine": String(item.mine) },
      h("span", {}),
      h("div", { class: "bubble" },
        h("div", { class: "content", dir: "auto" }),
        h("div", { class: "meta" }, h("time", {}), item.mine && h("span", { class: "mark", role: "img" }))));
  }

  /** @param {HTMLElement} row @param {Item} item */
  function update(row, item) {
    if (item.kind === "top") {
      setText(/** @type {Element} */ (row.firstElementChild), item.text);
      /** @type {HTMLElement} */ (row.lastElementChild).hidden = !thread.waiting;
      return;
    }
    if (item.kind !== "message") return setText(/** @type {Element} */ (row.firstElementChild), item.text);
    // Most are unchanged, and there may be thousands.
    const now = JSON.stringify(item);
    if (drawn.get(row) === now) return;
    drawn.set(row, now);
    setAttribute(row, "data-id", item.id);
    setAttribute(row, "data-pending", item.state === "sending");
    setAttribute(row, "data-failed", item.state === "failed");
    row.classList.toggle("deleted", item.isDeleted);
    row.classList.toggle("first", item.first);
    row.classList.toggle("last", item.last);
    const [sender, bubble] = /** @type {any} */ (row.children);
    setText(sender, item.mine ? "You:" : `${item.sender}:`);
    const isGroup = model.conversations.get(id)?.kind === "group";
    setAttribute(sender, "class", isGroup && item.first && !item.mine ? "sender" : "unseen");
    const [content, meta] = /** @type {any} */ (bubble.children);
    if (content.textContent !== item.content || !content.hasChildNodes()) content.replaceChildren(...nodes(item.content));
    const [time, mark] = meta.children;
    setText(time, clock(item.time));
    setAttribute(time, "datetime", new Date(item.time).toISOString());
    setAttribute(time, "title", moment(item.time));
    if (mark) {
      const [label = "", glyph = ""] = MARKS[item.state];
      setAttribute(mark, "aria-label", label);
      setAttribute(mark, "data-state", item.state);
      setText(mark, glyph);
    }
    showFailure(row, item);
  }

  /** @param {HTMLElement} row @param {MessageItem} item */
  function showFailure(row, item) {
    const box = row.querySelector(".failure");
    if (item.state !== "failed") return box?.remove();
    if (box) return setText(/** @type {Element} */ (box.firstElementChild), `Not sent. ${item.error}`);
    /** @param {() => void} action */
    const then = (action) => () => {
      action();
      // The focused button is gone.
      field.focus();
    };
    row.append(h("div", { class: "failure" }, h("span", { role: "alert" }, `Not sent. ${item.error}`),
      h("button", { type: "button", class: "plain", click: then(() => outbox.retry(item.key)) }, "Try again"),
      h("button", { type: "button", class: "plain", click: then(() => outbox.drop(item.key)) }, "Discard")));
  }

  // --- Composer ------------------------------------------------------------------------------------------------------------

  const grows = CSS.supports("field-sizing", "content");

  function measure() {
    if (!grows) {
      field.style.height = "auto";
      field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
    }
    const left = session.longestMessage - codePoints(normalise(field.value));
    setText(room, left > NEARLY_FULL ? "" : left < 0 ? `${-left} too many` : `${left} left`);
    setAttribute(field, "aria-invalid", left < 0 ? "true" : null);
    send.classList.toggle("idle", left === session.longestMessage || left < 0);
  }

  field.value = drawer.get(draft) ?? "";
  field.addEventListener("input", () => {
    drawer.set(draft, field.value);
    measure();
  });
  // Another tab sent its draft; this one is still stored.
  drawer.listen((name, value) => name === draft && !value && drawer.set(draft, field.value), signal);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  // The field keeps the focus, and a phone its keyboard.
  send.addEventListener("pointerdown", (event) => event.preventDefault());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const content = normalise(field.value);
    if (!content || codePoints(content) > session.longestMessage) return field.focus();
    field.value = "";
    drawer.set(draft, null);
    measure();
    stick = true;
    size.inner = -1;
    divider = null;
    outbox.add(id, content);
  });

  model.changes.listen(render, signal);
  outbox.changes.listen(render, signal);
  // Today becomes yesterday.
  const eachMinute = setInterval(render, 60_000);
  signal.addEventListener("abort", () => {
    clearInterval(eachMinute);
    clearTimeout(timer);
  });
  model.conversation(id).then((conversation) => (conversation ? render() : fail("There is no such conversation.")), () => {});
  return {
    name: "conversation", title: nameOf(model.conversations.get(id)), element, open: id,
    focus: () => {
      measure();
      render();
      // On a phone the field would bring up the keyboard.
      (matchMedia("(pointer: coarse)").matches ? heading : field).focus({ preventScroll: true });
    },
  };
}

/** A text as nodes. Only what is surely an address on the web becomes a link. @param {string} text */
function nodes(text) {
  const how = { target: "_blank", rel: "noopener noreferrer", referrerpolicy: "no-referrer", dir: "ltr" };
  return parts(text).map(({ text: part, link }) => (link ? h("a", { href: part, ...how }, part) : part));
}
