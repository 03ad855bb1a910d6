import { h } from "../dom.js";
import { backLink } from "../shell.js";

/** @param {string} text @returns {import("../app.js").Page} */
export function notFoundPage(text) {
  const heading = h("h1", { tabindex: -1 }, "Not found");
  const element = h("section", { class: "page" },
    h("div", { class: "bar" }, backLink(), heading),
    h("div", { class: "body scroll" }, h("p", {}, text), h("p", {}, h("a", { href: "/" }, "Go to your conversations"))));
  return { name: "not-found", title: "Not found", element, focus: () => heading.focus() };
}
