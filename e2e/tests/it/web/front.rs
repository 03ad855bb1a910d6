//! nginx between browser and gateway delivers immediately, over HTTP/1.1 and HTTP/2, although it buffers by default.

use std::{collections::BTreeSet, net::IpAddr};

use e2e::{Browser, Front, browser::POLL, ledger::StoredFeed};
use testkit::until;

use super::site::site;
use crate::support::Two;

const LISTEN: &str = "new Promise((ready, failed) => {
    window.heard = [];
    window.source = new EventSource('/api/messages');
    source.onmessage = (event) => heard.push(event.lastEventId);
    source.addEventListener('conversation.created', source.onmessage);
    source.addEventListener('ready', () => ready(performance.getEntriesByType('navigation')[0].nextHopProtocol));
    source.onerror = () => failed(new Error('the stream broke'));
})";

async fn a_bare_event_source_receives_immediately(front: Front, protocol: &str) {
    let browser = Browser::launch().await;
    let site = site(front, &[]).await;
    let two = Two::meet(&site.world, site.api()).await;
    let context = site.signed_in(&browser, &two.jane).await;
    context.expect("/favicon.ico"); // The document below is no page of ours.
    let page = context.open("/api/openapi.json").await;
    let spoken = page.evaluate(LISTEN).await;
    assert_eq!(spoken, protocol);
    for _ in 0..3 {
        two.say(&site.world, site.api(), 1).await;
        let head = StoredFeed::read(&site.world.sql, two.jane.id).await.head_cursor();
        page.wait_for("it is heard, and nothing follows it", &format!("heard.at(-1) === '{head}'")).await;
    }
    assert_eq!(page.evaluate("heard.length").await, 3, "each once");
    assert_eq!(page.statuses("/api/messages"), [200]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn event_source_receives_events_immediately_behind_nginx() {
    a_bare_event_source_receives_immediately(Front::plain(), "http/1.1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn event_source_receives_events_immediately_over_http_2() {
    a_bare_event_source_receives_immediately(Front::tls(), "h2").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn browser_opens_no_socket_beyond_loopback() {
    // Chromium connects a UDP socket to this address to learn whether there is IPv6, and sends nothing.
    const PROBE: &str = "2001:4860:4860::8888";
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let john = site.world.user(site.api(), "john").await;
    let visit = async {
        let context = site.signed_in(&browser, &john).await;
        context.expect("ERR_");
        context.expect("/favicon.ico");
        // A document without a content policy, so that only the browser's own settings prevent requests.
        let page = context.open("/api/openapi.json").await;
        page.evaluate(LISTEN).await;
        for elsewhere in ["http://192.0.2.1/", "https://example.com/", "http://[2001:db8::1]/"] {
            let call = format!("fetch('{elsewhere}', {{ mode: 'no-cors' }}).then(() => true, () => false)");
            assert_eq!(page.evaluate(&call).await, false, "{elsewhere}");
        }
        until("the stream's own socket is seen", async || browser.peers().iter().any(IpAddr::is_loopback))
            .await;
    };
    let mut seen = BTreeSet::new();
    let watch = async {
        loop {
            seen.extend(browser.peers());
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::select! {
        () = visit => {}
        () = watch => {}
    }
    let within = |peer: &IpAddr| peer.is_loopback() || peer.is_unspecified() || peer.to_string() == PROBE;
    seen.retain(|peer| !within(peer));
    assert!(seen.is_empty(), "{seen:?}");
}
