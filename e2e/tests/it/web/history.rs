//! Reading back: the messages in view stay in place, whatever is added above or below.

use e2e::{Browser, Front};
use serde_json::json;

use super::{
    messenger::{Messenger, assert_all_show},
    site::site,
};
use crate::support::Two;

const LIST: &str = "document.querySelector('ol[role=log]')";

impl Messenger {
    async fn place(&self) -> f64 {
        self.evaluate("window.chosen.getBoundingClientRect().top").await.as_f64().unwrap()
    }

    async fn look(&self) -> f64 {
        let choose = "(list) => {
            list.scrollTop = 120;
            const top = list.getBoundingClientRect().top;
            const rows = [...list.querySelectorAll('li.message')];
            window.chosen = rows.find((row) => row.getBoundingClientRect().top >= top);
        }";
        self.evaluate(&format!("({choose})({LIST})")).await;
        self.place().await
    }

    async fn is_at_the_end(&self) -> bool {
        let end = format!("{LIST}.scrollHeight - {LIST}.scrollTop - {LIST}.clientHeight < 8");
        self.evaluate(&end).await == json!(true)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_back_keeps_the_scroll_position() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, Two::meet(&site.world, site.api()).await);
    two.say(world, site.api(), 130).await;
    let context = site.signed_in(&browser, &two.jane).await;
    let jane = Messenger::at(&context, two.conversation).await;
    jane.wait_for("it opens at the end", &format!("{LIST}.scrollTop > 0")).await;
    assert!(jane.is_at_the_end().await);
    let mut rows = jane.rows().await.len();
    while rows < 130 {
        let place = jane.look().await;
        let more = format!("{LIST}.querySelectorAll('li.message').length > {rows}");
        jane.wait_for("what came before is there", &more).await;
        assert!((jane.place().await - place).abs() < 2.0, "what one reads has moved");
        rows = jane.rows().await.len();
    }

    // A new message does not scroll the page.
    let place = jane.look().await;
    let news = world.say(site.api(), &two.john, two.conversation).await["content"].clone();
    let jump = jane.css("button").with_text("Jump to newest");
    jump.clone().with_text("1 new").appears().await;
    assert!((jane.place().await - place).abs() < 2.0, "what one reads has moved");
    assert!(!jane.is_at_the_end().await);
    jump.click().await;
    jane.shows_last(news.as_str().unwrap()).await;
    assert!(jane.is_at_the_end().await);
    jump.disappears().await;
    assert_all_show(world, two.conversation, &[(&two.jane, &jane)]).await;
    assert!(jane.is_at_the_end().await, "one's own words are in view");
}
