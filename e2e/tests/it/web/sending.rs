//! Written messages are neither lost nor sent twice.

use e2e::{Browser, Front, browser::WebPage};
use serde_json::json;
use testkit::until;

use super::{
    messenger::{Messenger, assert_all_show, path_of},
    site::{Site, site},
};
use crate::support::Two;

const SEND: &str = "**/api/conversations/*/messages";

/// Handles requests to send until `let_through`.
async fn intercept(page: &WebPage, what: &str) {
    let only_sends = format!(
        "((handle) => (route) => route.request().method() === 'POST' ? handle(route) : route.continue())({what})"
    );
    page.call(json!([["route", SEND, { "js": only_sends }]])).await;
}

/// The first send reaches the server, and its answer is lost.
const LOSE_THE_FIRST_ANSWER: &str = "(() => {
    let first = true;
    return (route) => {
        if (!first) return route.continue();
        first = false;
        return route.fetch();
    };
})()";

async fn let_through(page: &WebPage) {
    page.call(json!([["unroute", SEND]])).await;
}

async fn sent(site: &Site, text: &str) -> i64 {
    let count = sqlx::query_scalar("SELECT count(*) FROM messenger.messages WHERE content = $1").bind(text);
    count.fetch_one(&site.world.sql).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_message_is_kept_and_sent_once_on_retry() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, Two::meet(&site.world, site.api()).await);
    let context = site.signed_in(&browser, &two.john).await;
    context.expect("Failed to load resource");
    let john = Messenger::at(&context, two.conversation).await;
    let problem = "A proxy refuses";
    let body = json!({ "status": 403, "code": "refused", "message": problem }).to_string();
    let refusal = json!({ "status": 403, "contentType": "application/problem+json", "body": body });
    intercept(&john, &format!("(route) => route.fulfill({refusal})")).await;
    let (again, never) = (world.text(), world.text());
    for text in [&again, &never] {
        john.say(text).await;
        let failed = john.css("li.message[data-failed]").with_text(text);
        failed.clone().with_text(problem).appears().await;
    }

    john.reload().await;
    john.css("li.message[data-failed]").with_text(&again).appears().await;
    john.css("li.message[data-failed]").with_text(&never).role("button", "Discard").click().await;
    let_through(&john).await;
    john.css("li.message[data-failed]").with_text(&again).role("button", "Try again").click().await;
    john.messages().with_text(&again).role("img", "Sent").appears().await;
    assert_eq!((sent(&site, &again).await, sent(&site, &never).await), (1, 0));
    let john = Messenger::at(&context, two.conversation).await;
    assert_all_show(world, two.conversation, &[(&two.john, &john)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_is_lost_makes_no_second_message() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, Two::meet(&site.world, site.api()).await);
    let context = site.signed_in(&browser, &two.john).await;
    context.expect("Failed to load resource");
    let john = Messenger::at(&context, two.conversation).await;
    intercept(&john, "(route) => route.fetch().then(() => route.abort())").await;
    let text = world.text();
    john.say(&text).await;
    john.messages().with_text(&text).role("img", "Sent").appears().await;
    let_through(&john).await;
    assert_all_show(world, two.conversation, &[(&two.john, &john)]).await;
    assert_eq!(sent(&site, &text).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn message_with_a_lost_answer_is_shown_once_after_reload() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, Two::meet(&site.world, site.api()).await);
    let context = site.signed_in(&browser, &two.john).await;
    context.expect("Failed to load resource");
    let john = Messenger::blank(&context).await;
    let stream = "**/api/messages?*";
    john.call(json!([["route", stream, { "js": "(route) => route.abort()" }]])).await;
    intercept(&john, LOSE_THE_FIRST_ANSWER).await;
    john.goto(&path_of(two.conversation)).await;
    let text = world.text();
    john.say(&text).await;
    until("the server has it", async || sent(&site, &text).await == 1).await;
    let kept = "Object.keys(localStorage).filter((key) => key.includes(':outbox:')).length";
    assert_eq!(john.evaluate(kept).await, 1);

    john.call(json!([["unroute", stream]])).await;
    john.reload().await;
    john.live().await;
    john.shows_last(&text).await;
    john.wait_for("the repeat is answered", &format!("{kept} === 0")).await;
    assert_eq!(john.evaluate("twice").await, json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draft_survives_a_reload_and_goes_with_its_conversation() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, Two::meet(&site.world, site.api()).await);
    let kate = world.user(site.api(), "kate").await;
    let other = world.conversation(site.api(), &two.john, &kate).await;
    world.say(site.api(), &kate, other).await;
    let context = site.signed_in(&browser, &two.john).await;
    let john = Messenger::at(&context, two.conversation).await;
    let draft = world.text();
    john.field().fill(&draft).await;
    john.reload().await;
    assert_eq!(john.field().value().await, draft);
    john.line(other).css("a").click().await;
    john.role("heading", "kate").appears().await;
    assert_eq!(john.field().value().await, "");
    john.back().await;
    john.role("heading", "jane").appears().await;
    assert_eq!(john.field().value().await, draft);
    john.field().press("Enter").await;
    john.shows_last(&draft).await;
    john.reload().await;
    john.shows_last(&draft).await;
    assert_eq!(john.field().value().await, "");
}
