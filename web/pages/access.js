// The login page.

import { get, keepTrying, post, sentence } from "../api.js";
import { h } from "../dom.js";
import { who } from "../storage.js";

/** @type {Record<string, string>} */
const PROVIDERS = { github: "Continue with GitHub", oidc: "Continue with single sign-on" };

/**
 * @param {{ said: string, signal: AbortSignal, done: () => void }} options
 */
export function accessPage({ said, signal, done }) {
  const heading = h("h1", { tabindex: -1 }, "Messenger");
  const ways = h("div", { class: "ways" }, h("p", { class: "quiet" }, "One moment…"));
  const element = h("main", { class: "access" }, h("div", { class: "card" },
    h("img", { src: "/icon.svg", alt: "", width: 72, height: 72 }),
    heading,
    h("p", { class: "quiet" }, "Every message, once, in order."),
    said && h("p", { class: "said", role: "alert" }, said),
    ways));

  /** @param {{ providers: string[], devLogin: boolean }} options */
  const show = ({ providers, devLogin }) => {
    const links = providers.map((name) => {
      const href = `/api/oauth/${encodeURIComponent(name)}`;
      return h("a", { class: "primary", href }, PROVIDERS[name] ?? `Continue with ${name}`);
    });
    ways.replaceChildren(...links);
    if (devLogin) ways.append(loginForm(links.length > 0, done, signal));
    if (!ways.hasChildNodes()) ways.append(h("p", { class: "said" }, "This server offers no way to log in yet."));
    /** @type {HTMLElement | null} */
    const first = ways.querySelector("input, a");
    if (document.activeElement === heading) first?.focus();
  };
  keepTrying(() => get("/api/login_options", signal), signal, (error) => {
    ways.replaceChildren(h("p", { class: "said", role: "status" }, `${error.message} Trying again…`));
  }).then(({ body }) => show(body), (error) => {
    if (!signal.aborted) ways.replaceChildren(h("p", { class: "said", role: "alert" }, sentence(error)));
  });
  return { element, focus: () => heading.focus() };
}

/** For development. @param {boolean} divided @param {() => void} done @param {AbortSignal} signal */
function loginForm(divided, done, signal) {
  const field = h("input", {
    id: "username", name: "username", type: "text", required: true,
    autocomplete: "username", autocapitalize: "none", spellcheck: "false", enterkeyhint: "go",
    "aria-describedby": "login-problem",
  });
  const problem = h("p", { id: "login-problem", class: "problem", role: "alert" });
  const button = h("button", { class: "primary" }, "Log in");
  return h("form", { class: divided ? "login divided" : "login", submit: async (/** @type {SubmitEvent} */ event) => {
    event.preventDefault();
    if (button.getAttribute("aria-disabled")) return;
    button.setAttribute("aria-disabled", "true");
    problem.textContent = "";
    try {
      const { body } = await post("/api/login", { username: field.value.trim() }, { signal });
      who.set(body.authUser.id);
      done();
    } catch (error) {
      button.removeAttribute("aria-disabled");
      problem.textContent = sentence(error);
      field.select();
    }
  } }, h("label", { for: "username" }, "Username"), h("div", { class: "row" }, field, button), problem);
}
