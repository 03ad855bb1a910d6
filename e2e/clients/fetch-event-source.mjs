// `@microsoft/fetch-event-source`, as its README shows it: it keeps an id as soon as it reads its line. One thing differs from
// the README: `Content-Type` may have a charset, so it is not compared by `===`.

import { readFileSync } from "node:fs";
import library from "@microsoft/fetch-event-source";

// It is made for browsers.
globalThis.window = globalThis;
globalThis.document = { removeEventListener() {} };

const { fetchEventSource, EventStreamContentType } = library;
class RetriableError extends Error {}
class FatalError extends Error {}

fetchEventSource(process.env.STREAM_URL, {
  headers: { Authorization: `Bearer ${readFileSync(process.env.TOKEN_FILE, "utf8")}` },
  fetch,
  openWhenHidden: true,
  async onopen(response) {
    if (response.ok && response.headers.get("content-type").startsWith(EventStreamContentType)) {
      return;
    } else if (response.status >= 400 && response.status < 500 && response.status !== 429) {
      throw new FatalError();
    } else {
      throw new RetriableError();
    }
  },
  onmessage({ id, event, data }) {
    if (event === "") console.log(id, "message", data);
  },
  onclose() {
    throw new RetriableError();
  },
  onerror(error) {
    console.error("stream:", error);
    if (error instanceof FatalError) throw error;
  },
});
