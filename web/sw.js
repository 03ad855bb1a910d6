// The original client left a service worker of this name in browsers, which still serves its old files. This one replaces
// it, deletes its caches, and unregisters itself.

self.addEventListener("install", () => self.skipWaiting());

self.addEventListener("activate", (event) => {
  const leave = async () => {
    const kept = await caches.keys();
    await Promise.all(kept.filter((name) => name.startsWith("static-v")).map((name) => caches.delete(name)));
    await self.registration.unregister();
    for (const page of await self.clients.matchAll({ type: "window" })) page.navigate(page.url);
  };
  event.waitUntil(leave());
});
