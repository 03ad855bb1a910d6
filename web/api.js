// Requests to the REST API: JSON in and out, one kind of error, a time limit, and retries of temporary errors.

/**
 * @typedef {{ id: string, username: string, avatarURL: string | null }} User
 * @typedef {{ id: string, content: string, sender: User, createdAt: string, mine: boolean,
 *   editedAt: string | null, deletedAt: string | null, idempotencyKey?: string | null }} Message
 * @typedef {{ id: string, kind: "direct" | "group", title: string | null, otherParticipant: User | null, lastMessage: Message | null,
 *   unreadCount: number, lastReadMessageId: string | null, otherLastReadMessageId: string | null }} Conversation
 * @typedef {{ id: string, device: string, createdAt: string, lastUsedAt: string, current: boolean }} Session
 */

const PATIENCE_MS = 20_000;

/** `status` is 0 when there was no answer. */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {{ code?: string, message?: string, errors?: Record<string, string> }} [problem]
   * @param {number} [retryAfterMs]
   */
  constructor(status, problem = {}, retryAfterMs = 0) {
    super(problem.message ?? (status ? `Something is wrong with the server (${status}).` : "The server cannot be reached."));
    this.status = status;
    this.code = problem.code ?? "";
    this.errors = problem.errors ?? {};
    this.retryAfterMs = retryAfterMs;
  }

  /** Whether the same request may succeed later. */
  get passes() {
    return this.status === 0 || this.status === 408 || this.status === 429 || this.status >= 500;
  }
}

/** @param {unknown} error @returns {error is ApiError} */
export const passes = (error) => error instanceof ApiError && error.passes;

/** @param {unknown} error */
export const sentence = (error) => (error instanceof ApiError ? error.message : "Something went wrong.");

/**
 * `unauthorized`: a request got 401. `again`: a good moment to retry, because the network or the server is back.
 */
export const apiEvents = new EventTarget();
/** Repeats immediately what waits for its next attempt. */
export const retryNow = () => void apiEvents.dispatchEvent(new Event("again"));
addEventListener("online", retryNow);

/**
 * @typedef {{ method?: string, body?: unknown, headers?: Record<string, string>, signal?: AbortSignal }} Options
 * @typedef {{ body: any, headers: Headers }} Answer
 */

/**
 * @param {string} path
 * @param {Options} [options]
 * @returns {Promise<Answer>}
 */
export async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  const limit = new AbortController();
  const end = () => limit.abort();
  const timer = setTimeout(end, PATIENCE_MS);
  signal?.addEventListener("abort", end);
  try {
    signal?.throwIfAborted();
    const response = await fetch(path, {
      method,
      headers: body === undefined ? headers : { "Content-Type": "application/json", ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: limit.signal,
    });
    const text = await response.text();
    /** @type {any} */
    let json = null;
    // A proxy may answer anything.
    try { json = JSON.parse(text); } catch { /* not JSON */ }
    if (response.ok && (json !== null || response.status === 204)) return { body: json, headers: response.headers };
    if (response.status === 401) apiEvents.dispatchEvent(new Event("unauthorized"));
    const problem = json && typeof json === "object" ? json : {};
    throw new ApiError(response.ok ? 502 : response.status, problem, 1000 * (Number(response.headers.get("Retry-After")) || 0));
  } catch (error) {
    if (error instanceof ApiError) throw error;
    signal?.throwIfAborted();
    throw new ApiError(0);
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", end);
  }
}

/** @param {string} path @param {AbortSignal} [signal] */
export const get = (path, signal) => request(path, { signal });

/** @param {string} path @param {unknown} [body] @param {Omit<Options, "method" | "body">} [options] */
export const post = (path, body, options) => request(path, { ...options, method: "POST", body });

/** The wait after an attempt, counted from 0: doubling, at most 15 s, with jitter. @param {number} attempt */
export const backOff = (attempt) => Math.min(15_000, 500 * 2 ** attempt) * (0.75 + Math.random() / 2);

/**
 * Waits, at most until `again`.
 *
 * @param {number} ms
 * @param {AbortSignal} [signal]
 * @returns {Promise<boolean>} Whether `again` came.
 */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const over = new AbortController();
    /** @param {() => void} settle */
    const end = (settle) => {
      clearTimeout(timer);
      over.abort();
      settle();
    };
    const timer = setTimeout(() => end(() => resolve(false)), ms);
    apiEvents.addEventListener("again", () => end(() => resolve(true)), { signal: over.signal });
    signal?.addEventListener("abort", () => end(() => reject(signal.reason)), { signal: over.signal });
    if (signal?.aborted) end(() => reject(signal.reason));
  });
}

/**
 * Reads until it succeeds or fails permanently.
 *
 * @template T
 * @param {() => Promise<T>} read
 * @param {AbortSignal} signal
 * @param {(error: ApiError) => void} waiting Called before each wait.
 * @returns {Promise<T>}
 */
export async function keepTrying(read, signal, waiting) {
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await read();
    } catch (error) {
      if (signal.aborted || !passes(error)) throw error;
      waiting(error);
      const good = await pause(Math.max(backOff(attempt), error.retryAfterMs), signal);
      if (good) attempt = -1;
    }
  }
}
