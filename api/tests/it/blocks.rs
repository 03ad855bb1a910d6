//! Blocks: the blocked user sees no difference, and the blocker receives nothing.

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    failures::{Listener, with_redis},
    support::{
        ApiUser, App, ORIGIN, ORIGIN_NOT_ALLOWED, assert_common_headers, assert_problem, number, redis_url,
        text,
    },
};

async fn block(user: &ApiUser, other: &ApiUser) {
    let answer = user.call("PUT", &format!("/api/blocks/{}", other.id)).expect(204).await;
    assert!(answer.body.is_empty());
    assert_common_headers(&answer);
}

async fn unblock(user: &ApiUser, other: &ApiUser) {
    user.call("DELETE", &format!("/api/blocks/{}", other.id)).expect(204).await;
}

/// The contents of a page of messages, marking nothing.
async fn page(user: &ApiUser, conversation: &str, query: &str) -> Vec<String> {
    let page = user.messages(conversation, &format!("?markRead=false{query}")).expect(200).await.json();
    page.as_array().unwrap().iter().map(|message| text(&message["content"])).collect()
}

async fn see(user: &ApiUser, conversation: &str) -> Value {
    user.conversation(conversation).expect(200).await.json()
}

async fn count(app: &App, user: &ApiUser) -> usize {
    app.feed(user.id).await.len()
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn blocking_is_repeatable_and_needs_another_user(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    let gone = app.login("jane").await;
    gone.call("POST", "/api/logout").expect(204).await;
    for _ in 0..2 {
        unblock(&jane, &john).await;
        block(&jane, &john).await;
        block(&jane, &john).await;
    }
    let blocks = "SELECT count(*) FROM messenger.blocks";
    let hers = format!("{blocks} WHERE (blocker_id, blocked_id) = ({}, {})", jane.id, john.id);
    assert_eq!((number(&pool, blocks).await, number(&pool, hers).await), (1, 1));
    for method in ["PUT", "DELETE"] {
        for nobody in ["999".to_owned(), "no-id".into(), "0".into(), jane.id.to_string()] {
            let path = format!("/api/blocks/{nobody}");
            assert_problem(&jane.call(method, &path).send().await.unwrap(), 404, "User not found");
            assert_problem(&gone.call(method, &path).send().await.unwrap(), 401, "Unauthorized");
            let other_site = || app.call(method, &path).header("origin", "http://evil.example");
            let answer = other_site().header("cookie", &gone.cookie).send().await.unwrap();
            assert_problem(&answer, 401, "Unauthorized");
            let answer = other_site().header("cookie", &jane.cookie).send().await.unwrap();
            assert_problem(&answer, 403, ORIGIN_NOT_ALLOWED);
        }
        let path = format!("/api/blocks/{}", john.id);
        app.call(method, &path).header("cookie", &jane.cookie).header("origin", ORIGIN).expect(204).await;
        gone.call(method, &path).expect(401).await;
    }
    let bob = app.user(&pool, "bob").await;
    block(&jane, &john).await;
    block(&jane, &bob).await;
    let blocked = |user: &ApiUser| json!({ "id": user.id, "username": user.name, "avatarURL": null });
    let list = async || jane.call("GET", "/api/blocks").expect(200).await.json();
    assert_eq!(list().await, json!([blocked(&bob), blocked(&john)]));
    assert_eq!(john.call("GET", "/api/blocks").expect(200).await.json(), json!([]));
    unblock(&jane, &bob).await;
    assert_eq!(list().await, json!([blocked(&john)]));
    unblock(&jane, &john).await;
    assert_eq!(number(&pool, blocks).await, 0);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn blocker_receives_nothing_and_blocked_user_sees_no_difference(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let before = john.say(&conversation, "before").await;
    let mut heard = Listener::start(&redis_url(), &channels.user(jane.id)).await;
    block(&jane, &john).await;
    let (janes_before, janes_events) = (see(&jane, &conversation).await, count(&app, &jane).await);

    let key = "once";
    let send = || john.post_message(&conversation, "hidden").header("idempotency-key", key);
    let hidden = send().expect(201).await;
    assert_eq!(hidden.json()["content"], "hidden");
    let again = send().expect(201).await;
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    assert_eq!(again.json(), hidden.json());
    let hidden = text(&hidden.json()["id"]);
    let events = app.feed(john.id).await;
    let (kind, data) = events.last().unwrap();
    assert_eq!((kind.as_str(), &data["id"]), ("message.sent", &json!(hidden)));
    assert_eq!(page(&john, &conversation, "").await, ["hidden", "before"]);
    assert_eq!(see(&john, &conversation).await["lastMessage"]["content"], "hidden");
    assert_eq!(john.conversations("").expect(200).await.json()[0]["lastMessage"]["content"], "hidden");
    john.read_messages(&conversation).expect(204).await;
    let johns = see(&john, &conversation).await;
    assert_eq!((&johns["lastReadMessageId"], &johns["unreadCount"]), (&json!(hidden), &json!(0)));

    // She sees nothing of it; his read mark is clipped to what she sees.
    let mut janes_now = janes_before.clone();
    janes_now["otherLastReadMessageId"] = json!(before);
    assert_eq!(see(&jane, &conversation).await, janes_now);
    assert_eq!(jane.conversations("").expect(200).await.json(), json!([janes_now]));
    for query in ["", "&limit=1"] {
        assert_eq!(page(&jane, &conversation, query).await, ["before"]);
    }
    assert_eq!(page(&jane, &conversation, "&after=1").await, Vec::<String>::new());
    for query in [format!("?before={hidden}"), format!("?after={hidden}")] {
        let answer = jane.messages(&conversation, &query).expect(422).await;
        assert_eq!(answer.json()["message"], "No such message", "as if it did not exist");
    }
    // Nor receipts, of hidden messages or of others.
    john.say(&conversation, "hidden too").await;
    john.read_messages(&conversation).expect(204).await;
    assert_eq!(count(&app, &jane).await, janes_events);

    // Her read mark ends at what she sees, and he gets it.
    jane.read_messages(&conversation).expect(204).await;
    assert_eq!(heard.next().await.event, "conversation.read", "nothing was published before it");
    let janes = see(&jane, &conversation).await;
    assert_eq!((&janes["lastReadMessageId"], &janes["unreadCount"]), (&json!(before), &json!(0)));
    assert_eq!(see(&john, &conversation).await["otherLastReadMessageId"], before.as_str());
    assert_eq!(jane.messages(&conversation, "").expect(200).await.json().as_array().unwrap().len(), 1);
    assert_eq!(see(&jane, &conversation).await["lastReadMessageId"], before.as_str());
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn block_is_one_way_and_hidden_messages_stay_hidden(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    block(&jane, &john).await;
    let hidden = john.say(&conversation, "hidden").await;
    // She may write to him, and he receives it.
    let own = jane.say(&conversation, "go away").await;
    let (kind, data) = app.feed(john.id).await.pop().unwrap();
    assert_eq!((kind.as_str(), &data["content"]), ("message", &json!("go away")));
    assert_eq!(see(&john, &conversation).await["unreadCount"], 1);
    assert_eq!(page(&john, &conversation, "").await, ["go away", "hidden"]);
    assert_eq!(page(&jane, &conversation, "").await, ["go away"]);
    john.say(&conversation, "hidden, two").await;

    unblock(&jane, &john).await;
    assert_eq!(page(&jane, &conversation, "").await, ["go away"], "it stays unseen");
    let new = john.say(&conversation, "sorry").await;
    let (kind, data) = app.feed(jane.id).await.pop().unwrap();
    assert_eq!((kind.as_str(), &data["content"]), ("message", &json!("sorry")));
    let janes = see(&jane, &conversation).await;
    assert_eq!((&janes["unreadCount"], &janes["lastMessage"]["id"]), (&json!(1), &json!(new)));
    assert_eq!(page(&jane, &conversation, "").await, ["sorry", "go away"]);
    jane.messages(&conversation, &format!("?after={hidden}")).expect(422).await;
    // Pages are full whatever is hidden between.
    assert_eq!(page(&jane, &conversation, "&limit=2").await, ["sorry", "go away"]);
    // After her own message one is unread; hidden ones do not count.
    jane.messages(&conversation, &format!("?before={new}&limit=1")).expect(200).await;
    let janes = see(&jane, &conversation).await;
    assert_eq!((&janes["lastReadMessageId"], &janes["unreadCount"]), (&json!(own), &json!(1)));
    jane.read_messages(&conversation).expect(204).await;
    assert_eq!(see(&jane, &conversation).await["lastReadMessageId"], new.as_str());
    assert_eq!(see(&john, &conversation).await["otherLastReadMessageId"], new.as_str());
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn conversation_of_a_blocked_user_is_not_in_the_blockers_list(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    block(&jane, &john).await;
    let answer = john.start_conversation("jane").expect(201).await;
    let conversation = text(&answer.json()["id"]);
    let events = app.feed(john.id).await;
    assert_eq!(events, [("conversation.created".into(), answer.json())]);
    john.say(&conversation, "hello").await;
    assert_eq!(john.conversations("").expect(200).await.json().as_array().unwrap().len(), 1);
    john.start_conversation("jane").expect(302).await;

    assert_eq!(count(&app, &jane).await, 0);
    assert_eq!(jane.conversations("").expect(200).await.json(), json!([]));
    // She finds the conversation, empty, when she starts it herself.
    jane.start_conversation("john").expect(302).await;
    let seen = see(&jane, &conversation).await;
    assert_eq!(seen["lastMessage"], Value::Null);
    assert_eq!((&seen["unreadCount"], &seen["otherLastReadMessageId"]), (&json!(0), &Value::Null));
    assert_eq!(page(&jane, &conversation, "").await, Vec::<String>::new());
    jane.read_messages(&conversation).expect(204).await;
    assert_eq!(count(&app, &jane).await, 0, "there was nothing to read");

    // If she starts it, both get the event.
    let ann = app.user(&pool, "ann").await;
    block(&jane, &ann).await;
    jane.start("ann").await;
    assert_eq!((count(&app, &jane).await, count(&app, &ann).await), (1, 1));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn counts_match_lists_while_blocks_change_under_load(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let writing = async {
        for number in 0..60 {
            john.say(&conversation, &format!("message {number}")).await;
        }
    };
    let changing = async {
        for _ in 0..20 {
            block(&jane, &john).await;
            jane.read_messages(&conversation).expect(204).await;
            unblock(&jane, &john).await;
        }
    };
    tokio::join!(writing, changing);
    let seen = page(&jane, &conversation, "&limit=100").await;
    let heard = app.feed(jane.id).await;
    let heard: Vec<_> =
        heard.iter().filter(|(kind, _)| kind == "message").map(|(_, data)| text(&data["content"])).collect();
    assert_eq!(seen.iter().rev().collect::<Vec<_>>(), heard.iter().collect::<Vec<_>>());
    let unread = number(
        &pool,
        "SELECT p.unread_count - count(m.id)
         FROM messenger.participants AS p
         LEFT JOIN messenger.messages AS m ON m.conversation_id = p.conversation_id AND m.sender_id <> p.user_id
            AND m.number > p.last_read_number AND m.hidden_from IS DISTINCT FROM p.user_id
         WHERE p.user_id = 2 GROUP BY p.unread_count",
    );
    assert_eq!(unread.await, 0, "the count is what a recount gives");
    assert_eq!(page(&john, &conversation, "&limit=100").await.len(), 60);
    app.stop().await;
}
