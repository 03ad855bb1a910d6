// The unread count in the title, the icon and the badge of the installed app.

const SIZE = 64;
const BUBBLE =
  "M32 6C16.6 6 4 16.2 4 29c0 7.2 4 13.6 10.4 17.8L12 58l12.4-6.8c2.4.6 5 .8 7.6.8 15.4 0 28-10.2 28-23S47.4 6 32 6Z";

let drawn = 0;

/** @param {number} unread @param {string} page Its title, or "" for the application. */
export function showBadge(unread, page) {
  const title = `${unread ? `(${unread}) ` : ""}${page ? `${page} – ` : ""}Messenger`;
  if (document.title !== title) document.title = title;
  if (unread === drawn) return;
  drawn = unread;
  /** @type {HTMLLinkElement | null} */
  const link = document.querySelector("link[rel=icon]");
  if (link) link.href = unread ? picture(unread) : "/icon.svg";
  // Only for installed apps, and not in every browser.
  const shown = unread ? navigator.setAppBadge?.(unread) : navigator.clearAppBadge?.();
  shown?.catch(() => {});
}

/** @param {number} unread */
function picture(unread) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIZE;
  const context = canvas.getContext("2d");
  if (!context) return "/icon.svg";
  context.fillStyle = "#0b6b6b";
  context.fill(new Path2D(BUBBLE));
  context.fillStyle = "#d92d20";
  context.beginPath();
  context.arc(44, 20, 20, 0, 2 * Math.PI);
  context.fill();
  context.fillStyle = "#fff";
  context.font = `bold ${unread > 9 ? 24 : 30}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(unread > 99 ? "99" : String(unread), 44, 22);
  return canvas.toDataURL();
}
