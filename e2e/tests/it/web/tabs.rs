//! Many tabs of one browser share one stream: a browser opens six connections to a host of HTTP/1.1, and no more.

use e2e::{Browser, Front};
use futures_util::future::join_all;
use testkit::until;

use super::{
    messenger::{Messenger, assert_all_show},
    site::{Site, site},
};
use crate::support::Two;

async fn streams(site: &Site) -> f64 {
    site.gateways[0].metric("messenger_gateway_streams").await
        + site.gateways[1].metric("messenger_gateway_streams").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seven_tabs_over_http_1_are_all_live() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, Two::meet(&site.world, site.api()).await);
    let context = site.signed_in(&browser, &two.jane).await;
    let mut tabs = Vec::new();
    for _ in 0..7 {
        tabs.push(Messenger::at(&context, two.conversation).await);
    }
    assert_eq!(streams(&site).await, 1.0, "one stream for all of them");
    assert_eq!(tabs[6].protocol().await, "http/1.1");
    for _ in 0..2 {
        let text = world.say(site.api(), &two.john, two.conversation).await["content"].clone();
        join_all(tabs.iter().map(|tab| tab.shows_last(text.as_str().unwrap()))).await;
    }
    let watching: Vec<_> = tabs.iter().map(|tab| (&two.jane, tab)).collect();
    assert_all_show(world, two.conversation, &watching).await;

    tabs.remove(0).close().await;
    two.say(world, site.api(), 1).await;
    let watching: Vec<_> = tabs.iter().map(|tab| (&two.jane, tab)).collect();
    assert_all_show(world, two.conversation, &watching).await;
    until("there is one stream again", || async { streams(&site).await == 1.0 }).await;
}
