// `extended-eventsource`, as its README shows it: it keeps an id as soon as it reads its line.

import { readFileSync } from "node:fs";
import { EventSource } from "extended-eventsource";

const token = readFileSync(process.env.TOKEN_FILE, "utf8");
const source = new EventSource(process.env.STREAM_URL, {
  headers: { Authorization: `Bearer ${token}` },
  retry: 3000,
  disableLogger: true,
});
source.onmessage = ({ lastEventId, data }) => console.log(lastEventId, "message", data);
source.onerror = () => console.error("stream: error");
