//! Typing, from a call to the other streams.

use serde_json::json;

use crate::support::{ready, start, watch};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn typing_is_seen_by_the_others_and_moves_no_cursor() {
    let (world, api, gateway, two) = start().await;
    let mut johns = ready(gateway.stream(&two.john)).await;
    let mut janes = ready(gateway.stream(&two.jane)).await;
    let browser = watch(&gateway, &two.jane).await;
    let types = async || {
        let url = api.url(&format!("/api/conversations/{}/typing", two.conversation));
        world.client.post(url).bearer(&two.john.token).expect(204).await;
    };
    types().await;
    let typing = janes.named("typing").await;
    assert_eq!(typing.id, None);
    let (conversation, user) = (two.conversation, two.john.id);
    assert_eq!(typing.json()["conversationId"], json!(conversation));
    assert_eq!(typing.json()["userId"], json!(user));
    let message = world.say(&api, &two.john, two.conversation).await;
    assert_eq!(janes.next().await.json()["id"], message["id"]);
    assert_eq!(johns.next().await.json()["id"], message["id"], "the one who types hears nothing of it");
    testkit::ledger::assert_exact(&world.sql, two.jane.id, "jane", &browser).await;
    assert_eq!(browser.record().named("typing").count(), 1);
}
