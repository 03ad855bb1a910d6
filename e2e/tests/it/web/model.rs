//! The messenger's state when pages and events overtake each other.

use e2e::{Browser, Front};

use super::site::site;

const PLAYED: &str = include_str!("../../../browser/model.js");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_and_events_in_any_order_end_in_the_server_state() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let context = browser.context("nobody", &site.origin).await;
    context.expect("/api/auth_user"); // Not logged in.
    let page = context.open("/").await;
    // The page has loaded what it asks for itself: from then on the test answers its requests.
    page.role("textbox", "Username").appears().await;
    let wrong = page.evaluate(&format!("({PLAYED})(1, 150)")).await;
    assert_eq!(wrong, serde_json::json!([]));
}
