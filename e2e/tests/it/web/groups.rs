//! Groups in our page: made elsewhere, they are in the list, can be written to, and are gone when their user is taken out.

use e2e::{Browser, Front};
use protocol::ids::ConversationId;
use serde_json::json;

use super::{
    messenger::{Messenger, path_of},
    site::site,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_listed_written_to_renamed_and_left() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let world = &site.world;
    let john = world.user(site.api(), "john").await;
    let jane = world.user(site.api(), "jane").await;
    let context = site.signed_in(&browser, &jane).await;
    context.expect("status of 404"); // Once it has been left.
    let page = Messenger::open(&context, "/").await;

    let url = site.api().url("/api/conversations");
    let group = json!({ "title": "Kite club", "usernames": ["jane"] });
    let group = world.client.post(&url).bearer(&john.token).json(&group).expect(201).await.json();
    let id = ConversationId(group["id"].as_str().unwrap().parse().unwrap());
    page.line(id).css(".name").with_text("Kite club").appears().await;
    let text = world.say(site.api(), &john, id).await["content"].as_str().unwrap().to_owned();
    page.line(id).css(".unread").appears().await;
    page.goto(&path_of(id)).await;
    page.live().await;
    page.role("heading", "Kite club").appears().await;
    page.shows_last(&text).await;
    page.css("li.message .sender").with_text("john").appears().await;
    let answer = world.text();
    page.say(&answer).await;
    page.messages().with_text(&answer).role("img", "Sent").appears().await;

    // What others edit and delete changes on the screen and in the list.
    let this = format!("{url}/{id}");
    let other = world.say(site.api(), &john, id).await["id"].as_str().unwrap().to_owned();
    let other = format!("{this}/messages/{other}");
    let edited = world.text();
    world
        .client
        .call("PATCH", &other)
        .bearer(&john.token)
        .json(&json!({ "content": edited }))
        .expect(200)
        .await;
    page.messages().with_text(&edited).appears().await;
    page.line(id).css(".preview").with_text(&edited).appears().await;
    world.client.call("DELETE", &other).bearer(&john.token).expect(204).await;
    page.messages().with_text("This message was deleted.").appears().await;
    page.line(id).css(".preview").with_text("This message was deleted.").appears().await;
    page.messages().with_text(&edited).disappears().await;

    world
        .client
        .call("PATCH", &this)
        .bearer(&john.token)
        .json(&json!({ "title": "Kites" }))
        .expect(200)
        .await;
    page.role("heading", "Kites").appears().await;
    world
        .client
        .call("DELETE", format!("{this}/participants/{}", jane.id))
        .bearer(&john.token)
        .expect(204)
        .await;
    page.text("There is no such conversation.").appears().await;
    page.goto("/").await;
    page.live().await;
    page.text("Kites").disappears().await;
}
