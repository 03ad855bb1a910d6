//! Events for a user's own devices and for the other participant, over real HTTP.

use e2e::World;
use serde_json::{Value, json};

use crate::support::{ready, start};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sender_and_receiver_each_get_their_own_event() {
    let (world, api, gateway, two) = start().await;
    let mut phone = ready(gateway.stream(&two.john)).await;
    let mut laptop = ready(gateway.stream(&world.login(&api, "john").await)).await;
    let mut jane = ready(gateway.stream(&two.jane)).await;
    let url = api.url(&format!("/api/conversations/{}/messages", two.conversation));
    let text = world.text();
    for key in [Some("my-key"), None] {
        let mut call = world.client.post(&url).bearer(&two.john.token).json(&json!({ "content": text }));
        if let Some(key) = key {
            call = call.header("idempotency-key", key);
        }
        let posted = call.expect(201).await.json();
        let mut message = json!({
            "id": posted["id"], "content": text, "conversationId": two.conversation, "createdAt": posted["createdAt"],
            "sender": { "id": two.john.id, "username": two.john.name, "avatarURL": null }, "editedAt": null,
            "deletedAt": null, "mine": false,
        });
        let event = jane.next().await;
        assert_eq!((event.name.as_deref(), event.id.is_some()), (None, true), "a bare onmessage hears it");
        assert_eq!(event.json(), message);
        message["mine"] = true.into();
        message["idempotencyKey"] = key.into();
        for device in [&mut phone, &mut laptop] {
            let event = device.named("message.sent").await;
            assert!(event.id.is_some());
            assert_eq!(event.json(), message);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_users_receive_a_new_conversation_as_they_see_it() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let (john, jane) = (world.user(&api, "john").await, world.user(&api, "jane").await);
    let mut johns = ready(gateway.stream(&john)).await;
    let mut janes = ready(gateway.stream(&jane)).await;
    let id = world.conversation(&api, &john, &jane).await;
    world.conversation(&api, &jane, &john).await; // It exists, so there is no event.
    for (stream, user, other) in [(&mut johns, &john, &jane), (&mut janes, &jane, &john)] {
        let event = stream.named("conversation.created").await;
        assert!(event.id.is_some());
        let wanted = json!({
            "id": id, "kind": "direct", "title": null, "participantCount": 2, "role": "member", "lastMessage": null, "hasUnreadMessages": false, "unreadCount": 0,
            "otherParticipant": { "id": other.id, "username": other.name, "avatarURL": null },
            "lastReadMessageId": null, "otherLastReadMessageId": null,
        });
        assert_eq!(event.json(), wanted);
        let by_rest = world.client.get(api.url(&format!("/api/conversations/{id}"))).bearer(&user.token);
        assert_eq!(by_rest.expect(200).await.json(), wanted);
    }
    let first = world.say(&api, &john, id).await;
    assert_eq!(janes.next().await.json()["id"], first["id"], "and nothing in between");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_event_reaches_both_users_only_if_the_mark_moves() {
    let (world, api, gateway, two) = start().await;
    let first = world.say(&api, &two.john, two.conversation).await;
    let second = world.say(&api, &two.john, two.conversation).await;
    let mut john = ready(gateway.stream(&two.john)).await;
    let mut jane = ready(gateway.stream(&two.jane)).await;
    let path = format!("/api/conversations/{}", two.conversation);

    let mut assert_event = async |position: &Value, unread: u64| {
        let event = jane.named("conversation.read").await;
        assert!(event.id.is_some());
        let wanted = json!({ "conversationId": two.conversation, "lastReadMessageId": position, "unreadCount": unread });
        assert_eq!(event.json(), wanted);
        let event = john.named("receipt.read").await;
        assert!(event.id.is_some());
        let wanted = json!({ "conversationId": two.conversation, "userId": two.jane.id, "lastReadMessageId": position });
        assert_eq!(event.json(), wanted);
    };
    // A page moves the position to its newest message.
    let page = api.url(&format!("{path}/messages?before={}", second["id"].as_str().unwrap()));
    world.client.get(page).bearer(&two.jane.token).expect(200).await;
    assert_event(&first["id"], 1).await;
    let read =
        || world.client.post(api.url(&format!("{path}/read_messages"))).bearer(&two.jane.token).expect(204);
    read().await;
    assert_event(&second["id"], 0).await;
    // Nothing moves, so there is no event; the next event shows it.
    read().await;
    let page = world.client.get(api.url(&format!("{path}/messages"))).bearer(&two.jane.token);
    page.expect(200).await;
    let third = world.say(&api, &two.john, two.conversation).await;
    assert_eq!(jane.next().await.json()["id"], third["id"]);
    assert_eq!(john.named("message.sent").await.json()["id"], third["id"]);
    let page = world.client.get(api.url(&format!("{path}/messages?markRead=false"))).bearer(&two.jane.token);
    page.expect(200).await;
    let own = world.say(&api, &two.jane, two.conversation).await;
    assert_eq!(jane.named("message.sent").await.json()["id"], own["id"]);
    assert_eq!(john.next().await.json()["id"], own["id"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_from_a_rest_answers_cursor_misses_nothing() {
    let (world, api, gateway, two) = start().await;
    two.say(&world, &api, 2).await;
    let paths = [
        "/api/auth_user".to_owned(),
        "/api/conversations".to_owned(),
        format!("/api/conversations/{}/messages?markRead=false", two.conversation),
    ];
    for path in paths {
        let answer = world.client.get(api.url(&path)).bearer(&two.jane.token).expect(200).await;
        let cursor = answer.header("feed-cursor").unwrap().to_owned();
        let posted = world.say(&api, &two.john, two.conversation).await;
        let mut stream = gateway.stream(&two.jane).last_event_id(&cursor).stream().await;
        assert_eq!(stream.named("ready").await.id, Some(cursor), "{path}");
        assert_eq!(stream.next().await.json()["id"], posted["id"], "{path}");
    }
}
