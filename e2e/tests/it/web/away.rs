//! A page that was away receives everything once, whatever the reason.

use e2e::{Browser, Front, World};
use serde_json::json;
use testkit::proxy::Proxy;

use super::{
    messenger::{Messenger, assert_all_show},
    site::{Site, site},
};
use crate::support::Two;

async fn users(site: &Site) -> Two {
    let two = Two::meet(&site.world, site.api()).await;
    two.say(&site.world, site.api(), 3).await;
    two
}

async fn meanwhile(world: &World, site: &Site, two: &Two) -> String {
    two.say(world, site.api(), 2).await;
    world.say(site.api(), &two.john, two.conversation).await["content"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn offline_messages_are_sent_when_the_network_returns() {
    let browser = Browser::launch().await;
    let front = Front::plain();
    let cable = Proxy::start(front.address()).await;
    let origin = format!("http://localhost:{}", cable.address().port());
    let site = site(front.known_as(&origin), &[]).await;
    let (world, two) = (&site.world, users(&site).await);
    let context = site.signed_in(&browser, &two.jane).await;
    context.expect("Failed to load resource");
    let jane = Messenger::at(&context, two.conversation).await;
    for noticed in [true, false] {
        if noticed {
            context.set_offline(true).await;
        }
        cable.refuse();
        jane.is("offline").await;
        let written = world.text();
        jane.say(&written).await;
        jane.css("li.message[data-pending]").with_text(&written).appears().await;
        let missed = meanwhile(world, &site, &two).await;
        assert!(!jane.rows().await.iter().any(|row| row.text == missed), "the cable is out");
        cable.resume();
        context.set_offline(false).await;
        assert_all_show(world, two.conversation, &[(&two.jane, &jane)]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_slept_shows_the_missed_messages() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, users(&site).await);
    let context = site.signed_in(&browser, &two.jane).await;
    let jane = Messenger::at(&context, two.conversation).await;
    for _ in 0..2 {
        jane.freeze().await;
        meanwhile(world, &site, &two).await;
        jane.thaw().await;
        assert_all_show(world, two.conversation, &[(&two.jane, &jane)]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_from_the_back_forward_cache_catches_up() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, users(&site).await);
    let context = site.signed_in(&browser, &two.jane).await;
    let jane = Messenger::at(&context, two.conversation).await;
    let draft = "whispered while leaving";
    jane.field().fill(draft).await;
    jane.evaluate("addEventListener('pageshow', (event) => { window.kept = event.persisted })").await;
    jane.goto("/api/openapi.json").await;
    let missed = meanwhile(world, &site, &two).await;
    jane.back().await;
    let reasons = "JSON.stringify(performance.getEntriesByType('navigation')[0].notRestoredReasons)";
    jane.wait_for("the page is back", "location.pathname.startsWith('/conversations/')").await;
    let kept = jane.evaluate("window.kept").await;
    assert_eq!(kept, true, "it was not kept: {}", jane.evaluate(reasons).await);
    jane.shows_last(&missed).await;
    assert_eq!(jane.field().value().await, draft);
    assert_all_show(world, two.conversation, &[(&two.jane, &jane)]).await;
    assert_eq!(jane.evaluate("window.kept").await, json!(true), "the same page still");
}
