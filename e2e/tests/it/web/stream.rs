//! `web/stream.js`, the client that front ends copy: each event once to each tab, in order, whatever happens to tabs, servers,
//! networks and credentials. What a tab received is compared with its user's feed in the database.

use std::time::Duration;

use chrono::Utc;
use e2e::{
    Browser, Front, Service, TestUser,
    browser::{BrowserContext, WebPage},
    ledger::StoredFeed,
};
use futures_util::future::join_all;
use protocol::{claims::Claims, ids::UserId};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use testkit::{proxy::Proxy, sse::Event, until};

use super::site::{Site, site_of};
use crate::support::{Traffic, Two};

pub(crate) const BLANK: &str = "/blank";

const FOLLOW: &str = "(options) => import('/stream.js').then(({ MessengerStream }) => {
    window.ledger = [];
    window.states = [];
    window.stream = new MessengerStream(options);
    for (const name of ['message', 'message.sent', 'conversation.created', 'conversation.read', 'receipt.read', 'resync']) {
        stream.addEventListener(name, ({ type, id, data }) => ledger.push({ type, id, data: JSON.stringify(data) }));
    }
    stream.addEventListener('state', ({ state, reason }) => states.push(`${state} ${reason}`.trim()));
    stream.start();
})";

/// Time runs ten times as fast.
const HASTE: &str = "{
    const [now, timeout, interval] = [Date.now, setTimeout, setInterval];
    const began = now();
    Date.now = () => began + (now() - began) * 10;
    window.setTimeout = (call, ms) => timeout(call, ms / 10);
    window.setInterval = (call, ms) => interval(call, ms / 10);
}";

/// As in a background tab.
const LATE_TIMERS: &str = "{
    const timeout = setTimeout;
    window.setTimeout = (call, ms) => timeout(call, ms * 20);
}";

/// Drops other tabs' messages while `deaf`.
const DEAFNESS: &str = "{
    const Channel = BroadcastChannel;
    window.deaf = false;
    window.BroadcastChannel = class extends Channel {
        set onmessage(hear) { super.onmessage = (event) => deaf || hear(event); }
    };
}";

/// The 30 s in which a tab may read what it missed never pass.
const NO_TIME_LIMIT: &str = "{
    const later = window.setTimeout;
    window.setTimeout = (call, delay) => (delay === 30_000 ? 0 : later(call, delay));
}";

const LOCKS: &str =
    "navigator.locks.query().then(({ held, pending }) => [...held, ...pending].map(({ name }) => name))";

struct Scene {
    context: BrowserContext,
    two: Two,
    site: Site,
    browser: Browser,
}

impl Scene {
    async fn begin(settings: &[(&str, &str)], scripts: &[&str]) -> Self {
        Self::begin_with(2, settings, scripts).await
    }

    async fn begin_with(gateways: usize, settings: &[(&str, &str)], scripts: &[&str]) -> Self {
        let browser = Browser::launch().await;
        let site = site_of(Front::plain(), [1, gateways], settings).await;
        let two = Two::meet(&site.world, site.api()).await;
        let context = blank(&browser, &site.origin).await;
        context.sign_in(&two.jane).await;
        for script in scripts {
            context.call(json!([["addInitScript", script]])).await;
        }
        Self { context, two, site, browser }
    }

    async fn say(&self, times: usize) {
        self.two.say(&self.site.world, self.site.api(), times).await;
    }

    async fn feed(&self, user: &TestUser) -> StoredFeed {
        StoredFeed::read(&self.site.world.sql, user.id).await
    }

    async fn tab(&self) -> Tab {
        let feed = self.feed(&self.two.jane).await;
        self.tab_after(&feed, feed.head).await
    }

    async fn live_tab(&self) -> Tab {
        let tab = self.tab().await;
        tab.until("live").await;
        tab
    }

    async fn tab_after(&self, feed: &StoredFeed, after: u64) -> Tab {
        let options = json!({ "cursor": feed.cursor(after) }).to_string();
        Tab::open(&self.context, self.two.jane.id, after, &options).await
    }

    /// They received everything in the feed after their cursors, once, in order, byte for byte; and so they do with the next
    /// events.
    async fn assert_exact<'a>(&self, tabs: impl IntoIterator<Item = &'a Tab>) {
        let tabs = Vec::from_iter(tabs);
        for _ in 0..2 {
            for (number, tab) in tabs.iter().enumerate() {
                let feed = StoredFeed::read(&self.site.world.sql, tab.user).await;
                let heard = format!("stream.cursor === '{}'", feed.head_cursor());
                tab.page.wait_for("everything is heard", &heard).await;
                feed.assert_is(&format!("tab {number}"), &tab.ledger().await, tab.after);
            }
            self.say(2).await;
        }
    }

    async fn until_open_streams(&self, wanted: f64) {
        until("so many streams are open", || async {
            self.site.metric("messenger_gateway_streams").await == wanted
        })
        .await;
    }
}

pub(crate) async fn blank(browser: &Browser, origin: &str) -> BrowserContext {
    let context = browser.context("jane", origin).await;
    let answer = json!({ "contentType": "text/html", "body": "<!doctype html><title>Blank</title><link rel=icon href=data:,>" });
    let fulfill = format!("(route) => route.fulfill({answer})");
    context.call(json!([["route", format!("**{BLANK}*"), { "js": fulfill }]])).await;
    context
}

struct Tab {
    page: WebPage,
    user: UserId,
    after: u64,
}

impl Tab {
    /// With options as in JavaScript.
    async fn open(context: &BrowserContext, user: UserId, after: u64, options: &str) -> Self {
        let page = context.open(BLANK).await;
        page.evaluate(&format!("({FOLLOW})({options})")).await;
        Self { page, user, after }
    }

    /// Without waiting, while everything else continues.
    async fn run(&self, statements: &str) {
        self.page.evaluate(&format!("void setTimeout(() => {{ {statements} }})")).await;
    }

    async fn until(&self, state: &str) {
        self.page.wait_for(state, &format!("stream.state === '{state}'")).await;
    }

    async fn until_was(&self, state: &str) {
        self.page.wait_for(state, &format!("states.includes('{state}')")).await;
    }

    async fn ledger(&self) -> Vec<Event> {
        let text = |value: &Value| value.as_str().expect("a string").to_owned();
        let event = |entry: &Value| Event {
            id: Some(text(&entry["id"])),
            name: Some(text(&entry["type"])).filter(|name| name != "message"),
            data: text(&entry["data"]),
        };
        self.page.evaluate("ledger").await.as_array().expect("a list").iter().map(event).collect()
    }

    /// How many of its requests for a stream were answered.
    fn streams(&self) -> usize {
        self.page.statuses("/api/messages").len()
    }

    async fn until_it_leads(&self) {
        until("it has the stream", || async { self.streams() > 0 }).await;
        self.until("live").await;
    }

    async fn go_elsewhere(&self) {
        self.page.evaluate("window.kept = true").await;
        self.page.goto(&format!("{BLANK}?elsewhere")).await;
    }

    /// From the back-forward cache.
    async fn come_back(&self) {
        self.page.back().await;
        self.page.wait_for("the page was kept", "window.kept").await;
    }
}

fn streams(tabs: &[Tab]) -> usize {
    tabs.iter().map(Tab::streams).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seven_tabs_over_http_1_share_one_stream() {
    let scene = Scene::begin(&[], &[]).await;
    let tabs = join_all((0..7).map(|_| scene.tab())).await;
    for tab in &tabs {
        tab.until("live").await;
    }
    scene.say(50).await;
    scene.assert_exact(&tabs).await;
    assert_eq!(streams(&tabs), 1);
    for tab in &tabs {
        // Each can still make other requests.
        let request = "fetch('/api/conversations').then(({ status }) => status)";
        assert_eq!(tab.page.evaluate(request).await, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn next_tab_leads_without_loss_when_the_leader_closes() {
    let scene = Scene::begin(&[], &[]).await;
    let mut tabs = join_all((0..6).map(|_| scene.tab())).await;
    let line = (scene.two.john.clone(), scene.two.conversation);
    let traffic = Traffic::start(&scene.site.world, &[scene.site.api()], &[line], Duration::from_millis(5));
    while tabs.len() > 1 {
        until("a tab leads", || async { streams(&tabs) > 0 }).await;
        traffic.more(30).await;
        let leading = tabs.iter().position(|tab| tab.streams() > 0).expect("a tab leads");
        tabs.remove(leading).page.close().await;
    }
    until("the last one leads", || async { streams(&tabs) > 0 }).await;
    traffic.more(30).await;
    traffic.stop().await;
    scene.assert_exact(&tabs).await;
    assert_eq!(streams(&tabs), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frozen_leader_hands_over_and_catches_up_when_it_wakes() {
    let scene = Scene::begin(&[], &[]).await;
    let frozen = scene.live_tab().await;
    let next = scene.live_tab().await;
    frozen.page.freeze().await;
    next.until_it_leads().await;
    scene.say(5).await;
    scene.assert_exact([&next]).await;
    frozen.page.thaw().await;
    scene.assert_exact([&frozen, &next]).await;
    assert_eq!((frozen.streams(), next.streams()), (1, 1), "it receives from the other tab");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hanging_leader_loses_the_lead_and_sends_nothing_stale() {
    // At ten times the speed, this is the ten seconds that a stream may be silent.
    let scene = Scene::begin(&[("HEARTBEAT_SECONDS", "40")], &[HASTE]).await;
    let hung = scene.live_tab().await;
    let others = [scene.live_tab().await, scene.live_tab().await];
    scene.say(3).await;
    scene.assert_exact([&hung]).await;
    // Before it learns that it does not lead any more, it broadcasts.
    hung.run(
        "const end = performance.now() + 12_000;
        while (performance.now() < end);
        dispatchEvent(new Event('offline'));",
    )
    .await;
    until("another tab has a stream", || async { streams(&others) > 0 }).await;
    scene.assert_exact(&others).await;
    // Messages are in order: before it answers this, it has read all that came while it hung.
    scene.assert_exact(others.iter().chain([&hung])).await;
    for tab in &others {
        assert_eq!(
            tab.page.evaluate("states.includes('offline network')").await,
            false,
            "a former leader's state"
        );
    }
    scene.until_open_streams(1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_from_the_back_forward_cache_resumes_its_stream() {
    let scene = Scene::begin(&[], &[]).await;
    let left = scene.live_tab().await;
    left.go_elsewhere().await;
    scene.until_open_streams(0.0).await;
    scene.say(3).await;
    left.come_back().await;
    scene.assert_exact([&left]).await;

    let other = scene.live_tab().await;
    left.go_elsewhere().await;
    other.until_it_leads().await;
    scene.assert_exact([&other]).await;
    left.come_back().await;
    scene.assert_exact([&left, &other]).await;
    scene.until_open_streams(1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn follower_that_missed_events_gets_them_from_the_leader() {
    let scene = Scene::begin(&[], &[DEAFNESS, NO_TIME_LIMIT]).await;
    let leader = scene.live_tab().await;
    let deaf = scene.live_tab().await;

    deaf.page.evaluate("deaf = true").await;
    scene.say(20).await;
    scene.assert_exact([&leader]).await;
    deaf.page.evaluate("deaf = false").await;
    scene.assert_exact([&leader, &deaf]).await;
    assert_eq!((leader.streams(), deaf.streams()), (1, 0), "the leader kept what was missed");

    deaf.page.evaluate("deaf = true").await;
    scene.say(300).await;
    scene.assert_exact([&leader]).await;
    deaf.page.evaluate("deaf = false").await;
    scene.assert_exact([&leader, &deaf]).await;
    assert_eq!((leader.streams(), deaf.streams()), (1, 1), "that was more than the leader keeps");
    // It stops reading when it has met the leader; its time never passes here.
    scene.until_open_streams(1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_older_or_newer_than_the_leader_misses_nothing() {
    let mut scene = Scene::begin(&[], &[]).await;
    let old = scene.feed(&scene.two.jane).await;
    scene.say(10).await;
    let leader = scene.live_tab().await;
    let before = scene.tab_after(&old, old.head).await;
    scene.assert_exact([&leader, &before]).await;
    assert_eq!(
        (leader.streams(), before.streams()),
        (1, 1),
        "what was before the leader's time it reads itself"
    );
    scene.until_open_streams(1.0).await;

    // The leader's next stream is slow.
    scene.site.gateways.iter_mut().for_each(Service::freeze);
    leader.run("dispatchEvent(new Event('online'))").await;
    leader.until("connecting").await;
    scene.say(10).await;
    let after = scene.tab().await;
    scene.site.gateways.iter_mut().for_each(Service::thaw);
    scene.assert_exact([&leader, &before, &after]).await;
    assert_eq!(after.streams(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tabs_without_a_cursor_begin_at_the_same_position() {
    let mut scene = Scene::begin(&[], &[]).await;
    scene.site.gateways.iter_mut().for_each(Service::freeze);
    let jane = scene.two.jane.id;
    let mut tabs = join_all((0..3).map(|_| Tab::open(&scene.context, jane, 0, "{}"))).await;
    scene.say(3).await;
    scene.site.gateways.iter_mut().for_each(Service::thaw);
    let feed = scene.feed(&scene.two.jane).await;
    for tab in &mut tabs {
        tab.page.wait_for("it has a position", &format!("stream.cursor === '{}'", feed.head_cursor())).await;
        tab.after = feed.head;
    }
    scene.say(3).await;
    let feed = scene.feed(&scene.two.jane).await;
    tabs.push(Tab::open(&scene.context, jane, feed.head, "{}").await);
    tabs[3].until("live").await;
    scene.assert_exact(&tabs).await;
    assert_eq!(streams(&tabs), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tabs_that_wait_for_their_leader_wait_quietly() {
    let count = "{
        const Channel = BroadcastChannel;
        window.said = 0;
        window.BroadcastChannel = class extends Channel {
            postMessage(note) { said++; super.postMessage(note); }
        };
    }";
    let mut scene = Scene::begin(&[], &[count]).await;
    let leader = scene.live_tab().await;
    scene.site.gateways.iter_mut().for_each(Service::freeze);
    leader.run("dispatchEvent(new Event('online'))").await;
    leader.until("connecting").await;
    let before = scene.tab().await;
    let without_cursor = Tab::open(&scene.context, scene.two.jane.id, 0, "{}").await;
    scene.say(3).await;
    let after = scene.tab().await;
    let passes = "new Promise((resolve) => setTimeout(resolve, 1_000)).then(() => said)";
    let said = [&leader, &before, &without_cursor, &after].map(|tab| tab.page.evaluate(passes));
    for said in join_all(said).await {
        assert!(said.as_u64().is_some_and(|said| said < 20), "{said}");
    }
    scene.site.gateways.iter_mut().for_each(Service::thaw);
    scene.assert_exact([&leader, &before, &after]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_position_is_reported_once_to_each_tab() {
    let scene = Scene::begin(&[], &[]).await;
    scene.say(3).await;
    let jane = scene.two.jane.id;
    let lost = "{ cursor: 'a-position-that-never-was' }";
    let mut tabs = join_all((0..3).map(|_| Tab::open(&scene.context, jane, 0, lost))).await;
    let feed = scene.feed(&scene.two.jane).await;
    for tab in &mut tabs {
        tab.page.wait_for("it has an event", "ledger.length").await;
        let events = tab.page.evaluate("ledger.splice(0).map(({ type, id }) => [type, id])").await;
        assert_eq!(events, json!([["resync", feed.head_cursor()]]));
        tab.after = feed.head;
    }
    tabs.push(scene.live_tab().await);
    scene.assert_exact(&tabs).await;
    assert_eq!(streams(&tabs), 1);

    // One that comes later, with a position that the leader does not know.
    let mut late = Tab::open(&scene.context, jane, 0, "{ cursor: 'another-one' }").await;
    late.page.wait_for("it has an event", "ledger.length").await;
    assert_eq!(late.page.evaluate("ledger.shift().type").await, "resync");
    late.after = scene.feed(&scene.two.jane).await.head;
    tabs.push(late);
    scene.assert_exact(&tabs).await;
    scene.until_open_streams(1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logout_in_one_tab_signs_out_all_until_the_next_login() {
    let scene = Scene::begin(&[], &[]).await;
    scene.context.expect("401");
    let tabs = [scene.live_tab().await, scene.live_tab().await, scene.live_tab().await];
    scene.assert_exact(&tabs).await;
    tabs[1].page.evaluate("fetch('/api/logout', { method: 'POST' }).then(() => null)").await;
    for tab in &tabs {
        tab.until("signed-out").await;
    }
    assert_eq!(tabs[0].page.evaluate("states.at(-1)").await, "signed-out revoked");
    scene.until_open_streams(0.0).await;
    assert_eq!(tabs[0].page.evaluate(LOCKS).await, json!([]));

    tabs[2].run("stream.start()").await;
    tabs[2].until_was("signed-out refused").await;

    let jane = scene.site.world.login(scene.site.api(), "jane").await;
    scene.context.sign_in(&jane).await;
    for tab in &tabs {
        tab.run("stream.start()").await;
    }
    scene.assert_exact(&tabs).await;
    scene.until_open_streams(1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credential_is_renewed_before_it_expires() {
    let scene = Scene::begin(&[], &[LATE_TIMERS]).await;
    let claims = scene.site.world.claims(&scene.two.jane);
    let token = scene.site.world.sign(&Claims { exp: Utc::now().timestamp() + 8, ..claims });
    let cookie = scene.site.world.cookie(&token);
    scene.context.sign_in(&TestUser { cookie, ..scene.two.jane.clone() }).await;
    let tabs = [scene.live_tab().await, scene.live_tab().await];
    for tab in &tabs {
        tab.until_was("connecting expired").await;
        tab.until("live").await;
    }
    scene.assert_exact(&tabs).await;
    assert_eq!(tabs[0].page.statuses("/api/refresh_token"), [200]);
    assert_eq!(streams(&tabs), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_are_no_stream_are_retried() {
    let mut scene = Scene::begin(&[], &[]).await;
    scene.context.expect("502");
    scene.context.expect("net::ERR_INCOMPLETE_CHUNKED_ENCODING"); // A stream whose gateway was killed.
    let tabs = [scene.live_tab().await, scene.live_tab().await];
    let alone = Tab::open(&scene.context, scene.two.jane.id, 0, "{ shared: false }").await;
    alone.until("live").await;
    alone
        .page
        .evaluate("stream.addEventListener('state', ({ state }) => state === 'offline' && stream.close())")
        .await;
    scene.site.gateways.iter_mut().for_each(Service::kill);
    for tab in &tabs {
        tab.until("offline").await;
        assert_eq!(tab.page.evaluate("stream.reason").await, "refused");
    }
    alone.until_was("offline refused").await;
    scene.say(5).await;
    for gateway in &mut scene.site.gateways {
        gateway.restart().await;
    }
    scene.assert_exact(&tabs).await;
    assert!(tabs[0].page.statuses("/api/refresh_token").is_empty(), "no credential was doubted");
    scene.until_open_streams(1.0).await;
    assert_eq!(
        alone.page.statuses("/api/messages"),
        [200, 502],
        "what was closed as its stream failed stays closed"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_network_is_detected_by_missing_heartbeats() {
    let scene = Scene::begin(&[("HEARTBEAT_SECONDS", "1")], &[]).await;
    let network = Proxy::start(scene.site.nginx.address()).await;
    let origin = format!("http://localhost:{}", network.address().port());
    let context = blank(&scene.browser, &origin).await;
    context.expect("Failed to load resource");
    context.sign_in(&scene.two.jane).await;
    let feed = scene.feed(&scene.two.jane).await;
    let options = json!({ "cursor": feed.cursor(feed.head) }).to_string();
    let jane = scene.two.jane.id;
    let tabs = join_all((0..2).map(|_| Tab::open(&context, jane, feed.head, &options))).await;
    tabs[0].until("live").await;
    scene.assert_exact(&tabs).await;
    network.silence();
    scene.say(3).await;
    for tab in &tabs {
        tab.until_was("connecting silent").await;
    }
    network.cut();
    network.resume();
    scene.assert_exact(&tabs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_users_in_one_browser_each_have_their_own_stream() {
    let scene = Scene::begin(&[], &[]).await;
    scene.context.call(json!([["clearCookies"]])).await;
    scene.context.expect("401");
    let mut tabs = Vec::new();
    for user in [&scene.two.john, &scene.two.jane, &scene.two.john, &scene.two.jane] {
        let feed = scene.feed(user).await;
        let options = format!(
            "{{ cursor: '{}', scope: '{}', token: () => {{
                window.attempts = (window.attempts ?? 0) + 1;
                // Failed at first, it is requested again.
                if (attempts === 1) return Promise.reject(new Error('not now'));
                if (attempts === 2) return Promise.resolve('no token');
                return fetch('/api/stream_token', {{ method: 'POST', headers: {{ Authorization: 'Bearer {}' }} }})
                    .then((answer) => answer.json()).then(({{ token }}) => token);
            }} }}",
            feed.head_cursor(),
            user.name,
            user.token,
        );
        tabs.push(Tab::open(&scene.context, user.id, feed.head, &options).await);
    }
    for tab in &tabs {
        tab.until("live").await;
    }
    scene.say(10).await;
    scene.assert_exact(&tabs).await;
    assert!(tabs[0].ledger().await.iter().all(|event| event.name.as_deref() == Some("message.sent")));
    scene.until_open_streams(2.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejected_browser_reconnects_when_the_server_said() {
    let scene = Scene::begin_with(1, &[("MAX_STREAMS_PER_USER", "1")], &[]).await;
    let first = scene.live_tab().await;
    let jane = scene.two.jane.id;
    let elsewhere = blank(&scene.browser, &scene.site.origin).await;
    elsewhere.sign_in(&scene.two.jane).await;
    let feed = scene.feed(&scene.two.jane).await;
    let options = json!({ "cursor": feed.head_cursor() }).to_string();
    let second = Tab::open(&elsewhere, jane, feed.head, &options).await;
    second.until("live").await;
    first.until_was("offline replaced").await;
    // Neither focus nor the tick reconnects early, or the two would take the one permit from each other permanently.
    let looked = "new Promise((resolve) => setTimeout(resolve, 1_500))
        .then(() => document.dispatchEvent(new Event('visibilitychange')))";
    first.page.evaluate(looked).await;
    scene.assert_exact([&second]).await;
    assert_eq!((first.streams(), second.streams()), (1, 1));
    // A network change does.
    first.run("dispatchEvent(new Event('online'))").await;
    first.until("live").await;
    second.until_was("offline replaced").await;
    scene.assert_exact([&first]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_and_starting_at_any_moment_leaves_nothing_behind() {
    let scene = Scene::begin(&[], &[]).await;
    let restless = scene.tab().await;
    let restless_for_a_while = "(async () => {
        for (let turn = 0; turn < 60; turn++) {
            stream.start();
            stream.start();
            if (turn % 3) await new Promise((resolve) => setTimeout(resolve, turn));
            stream.close();
        }
        stream.addEventListener('state', () => { stream.close(); stream.start(); }, { once: true });
        stream.start();
    })().then(() => null)";
    restless.page.evaluate(restless_for_a_while).await;
    let other = scene.live_tab().await;
    scene.assert_exact([&restless, &other]).await;
    scene.until_open_streams(1.0).await;
    restless.run("stream.close()").await;
    other.until_it_leads().await;
    scene.assert_exact([&other]).await;
    other.run("stream.close()").await;
    scene.until_open_streams(0.0).await;
    assert_eq!(other.page.evaluate(LOCKS).await, json!([]));
    restless.run("stream.start()").await;
    scene.assert_exact([&restless]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_locks_each_tab_has_a_stream_of_its_own() {
    let no_locks = "delete Navigator.prototype.locks";
    let scene = Scene::begin(&[], &[no_locks]).await;
    let tabs = [scene.live_tab().await, scene.live_tab().await];
    scene.assert_exact(&tabs).await;
    scene.until_open_streams(2.0).await;
    tabs[0].page.freeze().await;
    scene.until_open_streams(1.0).await;
    scene.assert_exact([&tabs[1]]).await;
    tabs[0].page.thaw().await;
    scene.assert_exact(&tabs).await;
}

#[derive(Clone, Copy, PartialEq)]
enum Plight {
    None,
    Frozen,
    Elsewhere,
    Deaf,
}

impl Tab {
    async fn relieve(&self, plight: Plight) {
        match plight {
            Plight::None => {}
            Plight::Frozen => self.page.thaw().await,
            Plight::Elsewhere => self.come_back().await,
            Plight::Deaf => drop(self.page.evaluate("deaf = false").await),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_tab_and_gateway_faults_lose_and_repeat_nothing() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut scene = Scene::begin(&[], &[DEAFNESS]).await;
    scene.context.expect("502");
    scene.context.expect("net::ERR_INCOMPLETE_CHUNKED_ENCODING"); // A stream whose gateway was killed.
    let line = (scene.two.john.clone(), scene.two.conversation);
    let traffic = Traffic::start(&scene.site.world, &[scene.site.api()], &[line], Duration::from_millis(10));
    let mut tabs: Vec<(Tab, Plight)> = Vec::new();
    for _ in 0..60 {
        traffic.more(5).await;
        let which = random.random_range(0..7);
        if which >= tabs.len() {
            tabs.push((scene.tab().await, Plight::None));
            continue;
        }
        let (tab, plight) = &mut tabs[which];
        if *plight != Plight::None {
            tab.relieve(std::mem::replace(plight, Plight::None)).await;
            continue;
        }
        match random.random_range(0..12) {
            0..=2 => {
                tab.page.freeze().await;
                *plight = Plight::Frozen;
            }
            3..=5 => {
                tab.go_elsewhere().await;
                *plight = Plight::Elsewhere;
            }
            6 | 7 => {
                tab.page.evaluate("deaf = true").await;
                *plight = Plight::Deaf;
            }
            8 => tabs.remove(which).0.page.close().await,
            9 => tab.run("dispatchEvent(new Event('online'))").await,
            10 => tab.run("stream.close(); stream.start()").await,
            _ => {
                let gateway = random.random_range(0..scene.site.gateways.len());
                scene.site.gateways[gateway].restart().await;
            }
        }
    }
    for (tab, plight) in &tabs {
        tab.relieve(*plight).await;
    }
    traffic.stop().await;
    scene.assert_exact(tabs.iter().map(|(tab, _)| tab)).await;
    scene.until_open_streams(1.0).await;
}
