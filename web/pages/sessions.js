// The user's sessions.

import { ApiError, get, keepTrying, request, sentence } from "../api.js";
import { h, icon, reconcile, setText } from "../dom.js";
import { announce, backLink } from "../shell.js";
import { moment, since } from "../text.js";

/** @typedef {import("../api.js").Session} Device */

const PHONE = "M8 3h8a1 1 0 0 1 1 1v16a1 1 0 0 1-1 1H8a1 1 0 0 1-1-1V4a1 1 0 0 1 1-1Zm3 15h2";
const LAPTOP = "M5 5h14a1 1 0 0 1 1 1v9H4V6a1 1 0 0 1 1-1ZM2 19h20";

/** @param {import("../app.js").Context} context @returns {import("../app.js").Page} */
export function sessionsPage({ signal }) {
  const heading = h("h1", { tabindex: -1 }, "Sessions");
  const status = h("p", { class: "quiet" }, "Loading…");
  const problem = h("p", { class: "problem", role: "alert" });
  const list = h("ul", { class: "sessions" });
  const others = h("button", { type: "button", class: "danger", hidden: true }, "End all others");
  const element = h("section", { class: "page" },
    h("div", { class: "bar" }, backLink(), heading),
    h("div", { class: "body scroll" },
      h("p", { class: "quiet" }, "These devices are logged in as you. Ending a session logs that device out immediately."),
      others, problem, status, list));

  /** @param {Device[]} devices */
  const show = (devices) => {
    const ordered = [...devices.filter((device) => device.current), ...devices.filter((device) => !device.current)];
    reconcile(list, ordered.map((device) => ({ key: device.id, device })), ({ device }) => {
      const end = h("button", {
        type: "button", class: "plain", "aria-label": `End ${device.device}, logged in ${moment(device.createdAt)}`,
        click: () => act(`/api/sessions/${encodeURIComponent(device.id)}`, `${device.device} is logged out`),
      }, "End");
      return h("li", { "data-session-id": device.id, "data-current": device.current ? "true" : null },
        icon(/iPhone|iPad|Android/.test(device.device) ? PHONE : LAPTOP),
        h("div", {},
          h("p", {}, h("b", {}, device.device), device.current && h("span", { class: "current" }, "This device")),
          h("p", { class: "quiet" }, h("span", {}), ` · Logged in ${moment(device.createdAt)}`)),
        !device.current && end);
    }, (row, { device }) => {
      setText(/** @type {Element} */ (row.querySelector(".quiet span")), `Last used ${since(device.lastUsedAt)}`);
    });
    status.hidden = true;
    others.hidden = devices.length < 2;
  };

  const load = async () => {
    try {
      const { body } = await keepTrying(() => get("/api/sessions", signal), signal, (error) => {
        status.hidden = false;
        status.textContent = `${error.message} Trying again…`;
      });
      show(body);
    } catch (error) {
      if (!signal.aborted) problem.textContent = sentence(error);
    }
  };

  /** @param {string} path @param {string} done */
  const act = async (path, done) => {
    problem.textContent = "";
    try {
      await request(path, { method: "DELETE", signal });
    } catch (error) {
      if (signal.aborted) return;
      // It had ended already.
      if (!(error instanceof ApiError && error.status === 404)) {
        problem.textContent = sentence(error);
        return;
      }
    }
    announce(done);
    await load();
    // The focused button is gone.
    if (document.activeElement === document.body) heading.focus();
  };
  others.addEventListener("click", () => act("/api/sessions", "All other devices are logged out"));
  load();
  return { name: "sessions", title: "Sessions", element, focus: () => heading.focus() };
}
