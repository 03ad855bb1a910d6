// One real Chromium for one test. The test sends requests as lines of JSON; answers and page events come back as lines of JSON.
// It knows no page of ours: a request names an object and a chain of calls on it.
//
//   test → {"id": 1, "on": 4, "chain": [["getByRole", "button", {"name": "Send"}], ["click"]]}
//        ← {"id": 1, "ok": null}  or  {"id": 1, "error": "…"}
//   What cannot be written as JSON (a context, a page, a session of the DevTools protocol) is answered as {"$": 4}: `on`
//   takes the number, an argument takes the whole. 0 is the browser. An argument {"js": "…"} is a function, run here.
//   A step that names no method is a property: ["keyboard"].
//        ← {"page": 5, "kind": …, "text": …, "url": …}  for each page, as it happens:
//     console.error, console.log, …  what it wrote, and what the browser wrote for it (a failed load, a violated policy)
//     exception                      uncaught
//     dialog                         alert, confirm or prompt; it is dismissed
//     response                       `text` is the status
//     requestfailed                  no answer, or half of one
//
// It exits when its standard input closes, and so with the test.

import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const objects = new Map();
const numbers = new Map();

function say(line) {
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

function number(object) {
  if (!numbers.has(object)) {
    numbers.set(object, numbers.size);
    objects.set(numbers.get(object), object);
  }
  return numbers.get(object);
}

/** From JSON. */
function argument(value) {
  if (Array.isArray(value)) return value.map(argument);
  if (value === null || typeof value !== "object") return value;
  if ("$" in value) return objects.get(value.$);
  if ("js" in value) return new Function(`return (${value.js})`)();
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, argument(inner)]));
}

/** To JSON. */
function answer(value) {
  if (value === undefined || Buffer.isBuffer(value)) return null;
  if (Array.isArray(value)) return value.map(answer);
  // Playwright's own objects are of classes; what pages answer is plain.
  const plain = value === null || typeof value !== "object" || Object.getPrototypeOf(value) === Object.prototype;
  return plain ? value : { $: number(value) };
}

async function follow(chain, start) {
  let object = start;
  for (const [name, ...rest] of chain) {
    const step = object[name];
    object = await (typeof step === "function" ? step.apply(object, rest.map(argument)) : step);
  }
  return object;
}

function watch(page) {
  const report = (kind, text, url) => say({ page: number(page), kind, text, url });
  page.on("console", (message) => report(`console.${message.type()}`, message.text(), message.location().url));
  page.on("pageerror", (error) => report("exception", error.stack ?? String(error), page.url()));
  page.on("dialog", (dialog) => {
    report("dialog", dialog.message(), page.url());
    // The page may close meanwhile.
    dialog.dismiss().catch(() => {});
  });
  page.on("response", (response) => report("response", String(response.status()), response.url()));
  page.on("requestfailed", (request) => report("requestfailed", request.failure()?.errorText ?? "", request.url()));
}

const browser = await chromium.launch({
  executablePath: process.argv[2],
  args: [
    "--no-sandbox", // It runs as root too, and loads nothing but ours.
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    // Loopback goes past the proxy, and everything else to a closed port: nothing leaves this machine.
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=localhost;127.0.0.1",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
  ],
  // As in a person's browser, pages that are left are kept to come back to.
  ignoreDefaultArgs: ["--disable-back-forward-cache"],
});
number(browser);
say({ version: browser.version() });

for await (const line of createInterface({ input: process.stdin })) {
  const { id, on, chain } = JSON.parse(line);
  // Not awaited here: what takes long holds nothing else up.
  follow(chain, objects.get(on))
    .then((value) => {
      if (chain.at(-1)[0] === "newPage") watch(value);
      say({ id, ok: answer(value) });
    })
    .catch((error) => say({ id, error: error.message }));
}
await browser.close();
process.exit();
