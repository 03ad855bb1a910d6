//! What the outbox keeps when a page ends in the middle of sending.

use e2e::{Browser, Front};
use serde_json::json;
use shared::test_support::until;

use super::{
    messenger::{Messenger, path_of},
    site::site,
};
use crate::support::Two;

/// The first send reaches the server, and its answer never comes back.
const LOSE_THE_FIRST_ANSWER: &str = "(() => {
    let first = true;
    return (route) => {
        if (route.request().method() !== 'POST' || !first) return route.continue();
        first = false;
        return route.fetch();
    };
})()";

/// From the beginning of each page: the most often that one text stood there at any moment.
const MOST: &str = "
    window.most = 0;
    new MutationObserver(() => {
        const texts = Array.from(document.querySelectorAll('li.message .content'), ({ textContent }) => textContent);
        for (const text of texts) most = Math.max(most, texts.filter((other) => other === text).length);
    }).observe(document, { subtree: true, childList: true });
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_whose_answer_was_lost_is_not_shown_twice_after_a_reload() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, Two::meet(&site.world, site.api()).await);
    let context = browser.context("john", &site.origin).await;
    context.sign_in(&two.john).await;
    context.expect("Failed to load resource");
    let page = context.page().await;
    page.call(json!([["addInitScript", { "content": MOST }]])).await;
    let (stream, sends) = ("**/api/messages?*", "**/api/conversations/*/messages");
    page.call(json!([["route", stream, { "js": "(route) => route.abort()" }]])).await;
    page.call(json!([["route", sends, { "js": LOSE_THE_FIRST_ANSWER }]])).await;
    page.goto(&path_of(two.conversation)).await;
    let john = Messenger::new(page).await;
    let text = world.text();
    john.say(&text).await;
    until("the server has it", || async {
        let count = sqlx::query_scalar("SELECT count(*) FROM messages WHERE content = $1").bind(&text);
        count.fetch_one(&world.sql).await.unwrap_or(0_i64) == 1
    })
    .await;
    let kept = "Object.keys(localStorage).filter((key) => key.includes(':outbox:')).length";
    assert_eq!(john.evaluate(kept).await, 1);

    john.call(json!([["unroute", stream]])).await;
    john.reload().await;
    john.live().await;
    john.shows_last(&text).await;
    john.wait_for("the repeat is answered", &format!("{kept} === 0")).await;
    assert_eq!(john.evaluate("most").await, 1);
}
