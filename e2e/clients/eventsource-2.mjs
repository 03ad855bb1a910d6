// `eventsource` 2: it keeps an id as soon as it reads its line.

import { readFileSync } from "node:fs";
import EventSource from "eventsource-2";

const token = readFileSync(process.env.TOKEN_FILE, "utf8");
const source = new EventSource(process.env.STREAM_URL, { headers: { Authorization: `Bearer ${token}` } });
source.onmessage = ({ lastEventId, data }) => console.log(lastEventId, "message", data);
source.onerror = (error) => console.error("stream:", error);
