//! Everything works by keyboard.

use e2e::{Browser, Front};
use serde_json::json;

use super::{messenger::Messenger, site::site};

impl Messenger {
    async fn tab_to(&self, selector: &str) {
        for _ in 0..40 {
            let focused = format!("Boolean(document.activeElement?.matches({}))", json!(selector));
            if self.evaluate(&focused).await == true {
                let style = "(({ outlineStyle, boxShadow, borderColor }) => outlineStyle !== 'none' || boxShadow !== 'none' || borderColor)(getComputedStyle(document.activeElement))";
                assert_ne!(self.evaluate(style).await, json!(false), "the focus on {selector} is not seen");
                return;
            }
            self.press("Tab").await;
        }
        panic!("no way to {selector} by Tab");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keyboard_alone_is_enough_to_use_the_messenger() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    site.world.person("john").await;
    site.world.person("jane").await;
    let context = browser
        .context_with("john", &site.origin, json!({ "viewport": { "width": 390, "height": 844 } }))
        .await;
    context.expect("status of 401");
    let john = Messenger::visit(&context, "/").await;
    john.role("textbox", "Username").appears().await;
    john.tab_to("#username").await;
    john.type_text("john").await;
    john.press("Enter").await;
    john.live().await;

    john.tab_to("[role=combobox]").await;
    john.type_text("jan").await;
    john.role("option", "jane").appears().await;
    john.press("ArrowDown").await;
    john.press("Enter").await;
    if john.css("ol[role=log]").count().await == 0 {
        john.press("Enter").await;
    }
    john.role("heading", "jane").appears().await;

    john.tab_to("textarea").await;
    let text = site.world.text();
    john.type_text(&text).await;
    john.press("Shift+Enter").await;
    john.type_text("and more").await;
    john.press("Enter").await;
    john.shows_last(&format!("{text}\nand more")).await;

    john.press("Shift+Tab").await;
    for _ in 0..10 {
        let is_back = "document.activeElement?.matches('a.back, a[aria-label=Conversations]')";
        if john.evaluate(&format!("Boolean({is_back})")).await == true {
            break;
        }
        john.press("Shift+Tab").await;
    }
    john.press("Enter").await;
    john.wait_for("home again", "location.pathname === '/'").await;
    john.css("nav[aria-label=Conversations] li").with_text(&text).appears().await;
}
