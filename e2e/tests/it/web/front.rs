//! What lies between a browser and a gateway delivers at once: nginx buffers answers by default, and speaks HTTP/2 or not.

use e2e::{Browser, Front, ledger::Feed};

use super::site::site;
use crate::support::Two;

/// What a bare `EventSource` hears, by `id`.
const LISTEN: &str = "new Promise((ready, failed) => {
    window.heard = [];
    window.source = new EventSource('/api/messages');
    source.onmessage = (event) => heard.push(event.lastEventId);
    source.addEventListener('conversation.created', source.onmessage);
    source.addEventListener('ready', () => ready(performance.getEntriesByType('navigation')[0].nextHopProtocol));
    source.onerror = () => failed(new Error('the stream broke'));
})";

async fn a_bare_event_source_hears_at_once(front: Front, protocol: &str) {
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
        let head = Feed::read(&site.world.sql, two.jane.id).await.head_cursor();
        page.wait_for("it is heard, and nothing follows it", &format!("heard.at(-1) === '{head}'")).await;
    }
    assert_eq!(page.evaluate("heard.length").await, 3, "each once");
    assert_eq!(page.statuses("/api/messages"), [200]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_source_hears_each_event_at_once_through_a_default_nginx() {
    a_bare_event_source_hears_at_once(Front::plain(), "http/1.1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_source_hears_each_event_at_once_through_a_default_nginx_with_tls_and_http_2() {
    a_bare_event_source_hears_at_once(Front::tls(), "h2").await;
}
