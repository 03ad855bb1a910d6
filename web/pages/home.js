// The list, and where there is room a welcome beside it.

import { h } from "../dom.js";

/** @param {import("../app.js").Context} context @returns {import("../app.js").Page} */
export function homePage({ session }) {
  const heading = h("h1", { tabindex: -1 }, "Messenger");
  const element = h("section", { class: "welcome" },
    h("img", { src: "/icon.svg", alt: "", width: 96, height: 96 }),
    heading,
    h("p", { class: "quiet" }, "Hello, ", h("bdi", {}, session.me.username), ". Choose a conversation, or start a new one."));
  return { name: "home", title: "", element, focus: () => heading.focus({ preventScroll: true }) };
}
