// Holds the messenger's model against a server that is played here: it has one user's conversations and their feed, and its
// pages and its stream arrive late, at any pace, in any order to each other, with failures and lost positions in between. When
// all is quiet, the model must say what the server says. A function of a seed and a number of rounds; answers what was wrong,
// each with the seed that shows it.

async (seed, rounds) => {
  const { Model } = await import("/model.js");
  const { retryNow } = await import("/api.js");
  const PAGE = 25;
  const MESSAGES = 50;
  const STEPS = 300;

  /** mulberry32 @param {number} state */
  const random = (state) => () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const turn = () => new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => resolve(port1.close());
    port2.postMessage(null);
  });

  /** What the server knows of one user. */
  class Server {
    conversations = new Map();
    feed = [];
    #changes = 0;

    start() {
      const id = `c${this.conversations.size}`;
      this.conversations.set(id, { id, messages: [], read: 0, readByOther: 0, changed: 0 });
      this.feed.push(["conversation.created", this.view(id)]);
    }
    write(id, mine) {
      const conversation = this.conversations.get(id);
      this.#changes += 1;
      // Ids whose order says nothing.
      const message = { id: `m${(this.#changes * 7919) % 100_003}`, content: "text", createdAt: "2026-01-01T00:00:00Z", mine };
      conversation.messages.push(message);
      conversation.changed = this.#changes;
      const data = { ...message, conversationId: id };
      this.feed.push(mine ? ["message.sent", { ...data, idempotencyKey: null }] : ["message", data]);
    }
    read(id) {
      const conversation = this.conversations.get(id);
      if (conversation.read === conversation.messages.length) return;
      conversation.read = conversation.messages.length;
      const lastReadMessageId = conversation.messages.at(-1).id;
      this.feed.push(["conversation.read", { conversationId: id, lastReadMessageId, unreadCount: 0 }]);
    }
    readByOther(id) {
      const conversation = this.conversations.get(id);
      if (conversation.readByOther === conversation.messages.length) return;
      conversation.readByOther = conversation.messages.length;
      this.feed.push(["receipt.read", { conversationId: id, userId: "u", lastReadMessageId: conversation.messages.at(-1).id }]);
    }
    view(id) {
      const { messages, read, readByOther } = this.conversations.get(id);
      return {
        id, otherParticipant: { id: `u${id}`, username: id, avatarURL: null }, lastMessage: messages.at(-1) ?? null,
        unreadCount: messages.slice(read).filter(({ mine }) => !mine).length,
        lastReadMessageId: messages[read - 1]?.id ?? null, otherLastReadMessageId: messages[readByOther - 1]?.id ?? null,
      };
    }
    order() {
      const talked = [...this.conversations.values()].filter(({ messages }) => messages.length > 0);
      return talked.sort((a, b) => b.changed - a.changed).map(({ id }) => id);
    }
    answer(path) {
      const url = new URL(path, location.origin);
      const [, , , id, messages] = url.pathname.split("/");
      const before = url.searchParams.get("before");
      if (id === undefined) {
        const order = this.order();
        const from = order.indexOf(before) + 1;
        return order.slice(from, from + PAGE).map((each) => this.view(each));
      }
      if (messages === undefined) return this.view(id);
      const all = this.conversations.get(id).messages;
      const end = before ? all.findIndex((message) => message.id === before) : all.length;
      return all.slice(Math.max(0, end - MESSAGES), end).reverse();
    }
  }

  async function play(seed) {
    const chance = random(seed);
    const below = (/** @type {number} */ limit) => Math.floor(chance() * limit);
    const server = new Server();
    const some = (among) => [...server.conversations.keys()][below(Math.min(among, server.conversations.size))];
    let open = null;
    const happen = () => {
      const id = some(chance() < 0.6 ? 4 : Infinity);
      const what = chance();
      if (what < 0.02) server.start();
      else if (what < 0.03) {
        // More than a page holds.
        for (let count = MESSAGES + below(20); count > 0; count -= 1) server.write(open ?? id, chance() < 0.5);
      } else if (what < 0.5) server.write(id, false);
      else if (what < 0.75) server.write(id, true);
      else if (what < 0.9) server.read(id);
      else server.readByOther(id);
    };
    for (let count = 3 + below(40); count > 0; count -= 1) server.start();
    for (let count = 200; count > 0; count -= 1) happen();

    // A request is read at one moment and answered at a later one.
    const requests = [];
    globalThis.fetch = (path) => new Promise((resolve) => requests.push({ path, resolve, answer: null }));
    const read = (request) => {
      const fails = chance() < 0.03;
      request.answer ??= new Response(JSON.stringify(fails ? {} : server.answer(request.path)), { status: fails ? 503 : 200 });
    };
    const end = new AbortController();
    let position = server.feed.length;
    const model = new Model({ id: "me", username: "me", avatarURL: null }, { of: () => [], drop: () => {}, changes: { listen: () => {} } }, end.signal);
    const hear = () => position < server.feed.length && model.apply(...structuredClone(server.feed[position++]));
    let thread = null;
    const reload = () => void model.reload(() => open).catch(() => {});
    reload();
    for (let step = 0; step < STEPS; step += 1) {
      const what = chance();
      if (what < 0.35) happen();
      else if (what < 0.7) for (let count = below(chance() < 0.1 ? 100 : 4); count > 0; count -= 1) hear();
      else if (what < 0.9 && requests.length > 0) {
        const index = below(requests.length);
        const request = requests[index];
        if (request.answer) requests.splice(index, 1)[0].resolve(request.answer);
        else read(request);
      } else if (what < 0.93) {
        open = some(8);
        thread = model.thread(open);
        model.conversation(open).catch(() => {});
      } else if (what < 0.95) thread?.loadOlder().catch(() => {});
      else if (what < 0.96) model.loadMore().catch(() => {});
      else if (what < 0.97) {
        // The stream has lost its position.
        position = server.feed.length;
        reload();
      }
      await turn();
    }
    for (let quiet = 0; quiet < 30; quiet += 1) {
      if (requests.length > 0 || position < server.feed.length) quiet = 0;
      retryNow();
      hear();
      for (const request of requests.splice(0)) {
        read(request);
        request.resolve(request.answer);
      }
      await turn();
    }
    end.abort();

    const wrong = [];
    const same = (what, ...values) => {
      const [here, there] = values.map((value) => JSON.stringify(value));
      if (here !== there) wrong.push(`seed ${seed}: ${what}: ${here}, not ${there}`);
    };
    const order = server.order();
    same("the list", model.order, order.slice(0, Math.max(model.order.length, Math.min(PAGE, order.length))));
    for (const id of new Set(open ? [...model.order, open] : model.order)) {
      same("a conversation", strip(model.conversations.get(id)), strip(server.view(id)));
    }
    if (thread) {
      const { messages, readByOther } = server.conversations.get(open);
      const known = thread.messages.length;
      same("messages", thread.messages.map(({ id }) => id), messages.slice(-known || messages.length).map(({ id }) => id));
      const read = thread.readCount(model.conversations.get(open)?.otherLastReadMessageId ?? null);
      same("read by the other", read, Math.max(0, readByOther - (messages.length - known)));
    }
    return wrong;
  }
  /** What both sides say, in one order. */
  const strip = (conversation) => conversation && [
    conversation.id, conversation.lastMessage?.id, conversation.unreadCount,
    conversation.lastReadMessageId, conversation.otherLastReadMessageId,
  ];

  const { fetch } = globalThis;
  try {
    const wrong = [];
    for (let round = 0; round < rounds; round += 1) wrong.push(...await play(seed + round));
    return wrong;
  } finally {
    globalThis.fetch = fetch;
  }
}
