// Texts and times for display: measured as the server does, with links, times in words. Pure functions.

// White space, and what no font shows: only these make an empty message.
const INVISIBLE = /[\p{White_Space}\p{Default_Ignorable_Code_Point}\u2800]/gu;

/** As the server normalises a text before it measures it; "" if nothing of it can be seen. @param {string} text */
export function normalise(text) {
  const normal = text
    // Half a character cannot be sent.
    .replace(/\p{Surrogate}/gu, "\ufffd")
    .split(/\r\n|\r|\n/)
    .map((line) => line.replace(/\p{White_Space}+$/u, ""))
    .join("\n")
    .replace(/\n{3,}/g, "\n\n")
    .replace(/^\n+|\n+$/g, "");
  return normal.replace(INVISIBLE, "") === "" ? "" : normal;
}

/** @param {string} text */
export const codePoints = (text) => [...text].length;

// An address ends at white space, invalid characters, and direction marks, which could make it look like another.
const ADDRESS = /\bhttps?:\/\/[^\s<>"\p{Cc}\u200e\u200f\u202a-\u202e\u2066-\u2069]+/giu;
const PUNCTUATION = /[.,;:!?'*_~\u2026\u3001\u3002\uff01\uff0c\uff1f]$/u;
const BRACKETS = new Map([[")", "("], ["]", "["], ["}", "{"], ["\uff09", "\uff08"], ["\u300d", "\u300c"]]);

/**
 * Splits a text into plain parts and links, which together are the text, unchanged.
 *
 * @param {string} text
 * @returns {{ text: string, link: boolean }[]}
 */
export function parts(text) {
  const found = [];
  let end = 0;
  for (const match of text.matchAll(ADDRESS)) {
    const address = withoutTail(match[0]);
    if (!isSafe(address)) continue;
    if (match.index > end) found.push({ text: text.slice(end, match.index), link: false });
    found.push({ text: address, link: true });
    end = match.index + address.length;
  }
  if (end < text.length) found.push({ text: text.slice(end), link: false });
  return found;
}

/** Of "(see https://example.org/a_(b))." the last two characters belong to the sentence. @param {string} address */
function withoutTail(address) {
  for (;;) {
    const last = address.at(-1) ?? "";
    const opening = BRACKETS.get(last);
    const isTail = opening ? count(address, last) > count(address, opening) : PUNCTUATION.test(last);
    if (!isTail) return address;
    address = address.slice(0, -1);
  }
}

/** @param {string} text @param {string} character */
const count = (text, character) => text.split(character).length - 1;

/** A user name can disguise an address: `https://bank.example@evil.example`. @param {string} address */
function isSafe(address) {
  try {
    const url = new URL(address);
    return /^https?:$/.test(url.protocol) && url.hostname !== "" && !url.username && !url.password;
  } catch {
    return false;
  }
}

// The words around them are English.
const locale = globalThis.navigator?.languages?.find((language) => language.startsWith("en")) ?? "en-GB";
const CLOCK = new Intl.DateTimeFormat(locale, { hour: "numeric", minute: "2-digit" });
const WEEKDAY = new Intl.DateTimeFormat(locale, { weekday: "short" });
const DATE = new Intl.DateTimeFormat(locale, { day: "numeric", month: "short" });
const DATE_OF_YEAR = new Intl.DateTimeFormat(locale, { day: "numeric", month: "short", year: "numeric" });
const LONG_DATE = new Intl.DateTimeFormat(locale, { weekday: "long", day: "numeric", month: "long" });
const LONG_DATE_OF_YEAR = new Intl.DateTimeFormat(locale, { weekday: "long", day: "numeric", month: "long", year: "numeric" });
const MOMENT = new Intl.DateTimeFormat(locale, { dateStyle: "long", timeStyle: "short" });

/** @param {string | number} time */
export const clock = (time) => CLOCK.format(new Date(time));

/** @param {string | number} time */
export const moment = (time) => MOMENT.format(new Date(time));

/** Calendar days from that day to today. @param {Date} date */
function daysAgo(date) {
  const midnight = (/** @type {Date} */ d) => Date.UTC(d.getFullYear(), d.getMonth(), d.getDate());
  return Math.round((midnight(new Date()) - midnight(date)) / 86_400_000);
}

/** @param {string | number} time */
export function day(time) {
  const date = new Date(time);
  const ago = daysAgo(date);
  if (ago === 0) return "Today";
  if (ago === 1) return "Yesterday";
  return (date.getFullYear() === new Date().getFullYear() ? LONG_DATE : LONG_DATE_OF_YEAR).format(date);
}

/** Short, for a list. @param {string | number} time */
export function when(time) {
  const date = new Date(time);
  const ago = daysAgo(date);
  if (ago <= 0) return CLOCK.format(date);
  if (ago === 1) return "Yesterday";
  if (ago < 7) return WEEKDAY.format(date);
  return (date.getFullYear() === new Date().getFullYear() ? DATE : DATE_OF_YEAR).format(date);
}

/** "5 minutes ago". @param {string | number} time */
export function since(time) {
  const minutes = Math.round((Date.now() - new Date(time).getTime()) / 60_000);
  if (minutes < 2) return "now";
  if (minutes < 60) return `${minutes} minutes ago`;
  return daysAgo(new Date(time)) === 0 ? `today at ${clock(time)}` : moment(time);
}
