//! Two users talk, one of them on two devices.

use e2e::{Browser, Front, World, browser::BrowserContext};
use futures_util::future::join_all;
use serde_json::{Value, json};
use testkit::until;

use super::{
    messenger::{Messenger, assert_all_show},
    site::site,
};

async fn log_in(context: &BrowserContext, name: &str) -> Messenger {
    // The page learns by a 401 that the user is not logged in.
    context.expect("status of 401");
    let page = Messenger::visit(context, "/").await;
    page.shows_login().await;
    page.role("textbox", "Username").fill(name).await;
    page.role("button", "Log in").click().await;
    page.live().await;
    page
}

/// As the server signs them, so that the logs can be searched for them.
async fn known_to(world: &World, context: &BrowserContext) {
    let cookies = context.call(json!([["cookies"]])).await;
    let is_session = |cookie: &&Value| cookie["name"].as_str().unwrap().ends_with("messenger_session");
    let session = cookies.as_array().unwrap().iter().find(is_session).unwrap();
    assert_eq!(session["secure"], session["name"].as_str().unwrap().starts_with("__Host-"));
    assert_eq!(session["httpOnly"], true, "no script sees it");
    world.remember(session["value"].as_str().unwrap());
}

async fn two_users_and_a_third_device_talk(front: Front, protocol: &str) {
    let browser = Browser::launch().await;
    let site = site(front, &[]).await;
    let world = &site.world;
    world.person("john").await;
    world.person("jane").await;
    let context = async |who: &str, options| browser.context_with(who, &site.origin, options).await;
    let phone = json!({ "viewport": { "width": 390, "height": 844 }, "hasTouch": true, "isMobile": true });
    let laptop = context("john's laptop", json!({})).await;
    let phone = context("john's phone", phone).await;
    let janes = context("jane", json!({})).await;
    let (john, johns_phone, jane) =
        (log_in(&laptop, "john").await, log_in(&phone, "john").await, log_in(&janes, "jane").await);
    assert_eq!(john.protocol().await, protocol);
    for context in [&laptop, &phone, &janes] {
        known_to(world, context).await;
    }
    until("both gateways have some of the three streams", || async {
        let streams =
            join_all(site.gateways.iter().map(|gateway| gateway.metric("messenger_gateway_streams")));
        let streams = streams.await;
        streams.iter().sum::<f64>() == 3.0 && streams.iter().all(|streams| *streams > 0.0)
    })
    .await;

    john.role("combobox", "New conversation with").fill("ja").await;
    john.role("option", "jane").click().await;
    john.role("button", "Start").click().await;
    john.role("heading", "jane").appears().await;
    let conversation =
        sqlx::query_scalar("SELECT id FROM messenger.conversations").fetch_one(&world.sql).await;
    let conversation = protocol::ids::ConversationId(conversation.unwrap());
    let hello = world.text();
    john.say(&hello).await;
    john.shows_last(&hello).await;

    jane.line(conversation).css(".unread").appears().await;
    jane.wait_for("the title counts", "document.title === '(1) Messenger'").await;
    johns_phone.line(conversation).with_text(&hello).appears().await;
    assert_eq!(johns_phone.line(conversation).css(".unread").count().await, 0);
    let sent = john.messages().last().role("img", "Sent");
    sent.appears().await;
    jane.line(conversation).css("a").click().await;
    jane.shows_last(&hello).await;
    john.messages().last().role("img", "Read").appears().await;
    jane.wait_for("nothing is unread", "document.title === 'john – Messenger'").await;

    let answer = world.text();
    jane.say(&answer).await;
    john.shows_last(&answer).await;
    jane.messages().last().role("img", "Read").appears().await;
    johns_phone.line(conversation).with_text(&answer).appears().await;
    johns_phone.line(conversation).css(".unread").disappears().await;

    johns_phone.line(conversation).css("a").click().await;
    johns_phone.shows_last(&answer).await;
    let on_the_way = world.text();
    johns_phone.say(&on_the_way).await;
    john.shows_last(&on_the_way).await;
    let (john_is, jane_is) = (world.login(site.api(), "john").await, world.login(site.api(), "jane").await);
    let watching = [(&john_is, &john), (&john_is, &johns_phone), (&jane_is, &jane)];
    assert_all_show(world, conversation, &watching).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_users_and_a_third_device_talk_through_two_gateways() {
    two_users_and_a_third_device_talk(Front::plain(), "http/1.1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_talk_through_nginx_with_tls_and_http_2() {
    two_users_and_a_third_device_talk(Front::tls(), "h2").await;
}
