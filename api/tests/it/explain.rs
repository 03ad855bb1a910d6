//! `GET /admin/explain`: what api knows of one event of a feed.

use std::time::Duration;

use api::{config::Keep, pruner::prune_after};
use protocol::ids::UserId;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{App, database, execute};

impl App {
    async fn explain(&self, query: &str) -> (u16, String) {
        let answer = self.client.get(format!("{}/admin/explain?{query}", self.ops)).send().await.unwrap();
        (answer.status, answer.text())
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn explain_tells_operators_the_fate_of_an_event(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let john_said =
        john.post_message(&conversation, "a secret").header("x-request-id", "asked-about").expect(201).await;
    let message = john_said.json()["id"].as_str().unwrap().to_owned();
    john.say(&conversation, "another one").await;
    let head = app.feed(jane.id).await.len();

    // By message, then by the seq from that answer.
    let (status, by_message) = app.explain(&format!("user={}&message={message}", jane.id)).await;
    assert_eq!(status, 200, "{by_message}");
    let report: Value = serde_json::from_str(&by_message).unwrap();
    assert_eq!(report["username"], "jane");
    assert_eq!(report["event"]["messageId"], json!(message));
    assert_eq!(report["event"]["requestId"], "asked-about");
    assert_eq!(report["feed"]["head"], json!(head));
    assert_eq!(report["feed"]["first"], 1);
    assert!(!by_message.contains("secret"), "{by_message}");
    let seq = report["event"]["seq"].as_u64().unwrap();
    let (status, by_seq) = app.explain(&format!("user={}&seq={seq}", jane.id)).await;
    assert_eq!((status, by_seq), (200, by_message));
    assert!(report["says"][0].as_str().unwrap().contains("was written at"), "{report}");

    let (_, beyond) = app.explain(&format!("user={}&seq={}", jane.id, head + 1)).await;
    assert!(beyond.contains(&format!("was never written: the feed ends at {head}")), "{beyond}");
    let (_, none) = app.explain(&format!("user={}&message=999999", jane.id)).await;
    assert!(none.contains("No event of this feed is about message 999999"), "{none}");

    let database = database(&pool, 1);
    let hour = Duration::from_hours(1);
    let keep = Keep { age: hour, events: 1, idempotency_keys: hour, messages: None, edit_window: hour };
    prune_after(&database, keep, UserId(0)).await.unwrap();
    let (_, pruned) = app.explain(&format!("user={}&seq=1", jane.id)).await;
    assert!(pruned.contains(&format!("has been pruned: the feed begins at {head}")), "{pruned}");
    database.close().await;

    assert_eq!(app.explain("user=999999&seq=1").await, (404, "There is no user 999999\n".into()));
    assert_eq!(app.explain("user=jane&seq=1").await, (400, "user must be a user's id\n".into()));
    // The public listener does not have this route; unknown paths are the web client's page.
    let outside = app.client.get(format!("{}/admin/explain?user={}&seq=1", app.public, jane.id)).send().await;
    assert!(outside.unwrap().header("content-type").is_some_and(|form| form.starts_with("text/html")));

    execute(&pool, "ALTER TABLE messenger.feed RENAME TO away").await;
    let failed = (500, "The query failed; the log has the error\n".into());
    assert_eq!(app.explain(&format!("user={}&seq=1", jane.id)).await, failed, "Postgres answers");
    app.stop().await;
}
