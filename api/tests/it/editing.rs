//! Editing and deleting messages: permissions, events, and removal of the text.

use std::time::Duration;

use api::config::RateLimits;
use futures_util::{StreamExt, stream};
use protocol::feed::RangeAfter;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use service_kit::limiter::Limit;
use sqlx::PgPool;
use testkit::http::{Answer, Call};

use crate::{
    failures::{Listener, metric, with_redis},
    support::{
        ApiUser, App, ORIGIN_NOT_ALLOWED, assert_problem, assert_unacceptable, execute, number,
        once_not_busy, redis_url, text,
    },
};

/// A group of these users, made by SQL. The first is its owner.
pub(crate) async fn group(pool: &PgPool, members: &[&ApiUser]) -> String {
    let id: i64 = sqlx::query_scalar(
        "INSERT INTO messenger.conversations (title, participant_count) VALUES ('group', $1) RETURNING id",
    )
    .bind(members.len() as i64)
    .fetch_one(pool)
    .await
    .unwrap();
    for (n, member) in members.iter().enumerate() {
        join(pool, id, member, n == 0).await;
    }
    id.to_string()
}

/// From now on a member: earlier messages are not theirs to see.
async fn join(pool: &PgPool, group: i64, member: &ApiUser, is_owner: bool) {
    execute(
        pool,
        format!(
            "INSERT INTO messenger.participants (conversation_id, user_id, is_owner, joined_number, last_read_number)
             SELECT id, {}, {is_owner}, last_number, last_number FROM messenger.conversations WHERE id = {group}",
            member.id
        ),
    )
    .await;
}

async fn seen(user: &ApiUser, conversation: &str) -> Value {
    user.conversation(conversation).expect(200).await.json()
}

async fn page(user: &ApiUser, conversation: &str) -> Vec<Value> {
    let page = user.messages(conversation, "?markRead=false").expect(200).await.json();
    page.as_array().unwrap().clone()
}

async fn unread_total(user: &ApiUser) -> Value {
    user.auth_user().expect(200).await.json()["unreadTotal"].clone()
}

/// The events of a feed after this many.
async fn events(app: &App, user: &ApiUser, after: usize) -> Vec<(String, Value)> {
    app.feed(user.id).await.split_off(after)
}

fn assert_refused(answer: &Answer, status: u16, code: &str) {
    assert_eq!((answer.status, &answer.json()["code"]), (status, &json!(code)), "{}", answer.text());
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn edit_reaches_everybody_who_sees_the_message(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let mut heard = Listener::start(&redis_url(), &channels.user(jane.id)).await;
    let said = john.post_message(&conversation, "helo").expect(201).await.json();
    let id = text(&said["id"]);
    heard.next().await;

    let edited = john.edit_message(&conversation, &id, "\nhello \n").expect(200).await.json();
    let mut expected = said.clone();
    expected["content"] = json!("hello");
    expected["editedAt"] = edited["editedAt"].clone();
    assert!(edited["editedAt"].is_string());
    assert_eq!(edited, expected);

    let of_jane = {
        expected["mine"] = json!(false);
        expected.clone()
    };
    assert_eq!(events(&app, &john, 2).await, [("message.updated".into(), edited.clone())]);
    let updated = ("message.updated".to_owned(), of_jane.clone());
    assert_eq!(events(&app, &jane, 2).await, [updated]);
    // The replayed event equals the published one.
    let range = app.ranges(vec![RangeAfter { user: jane.id, after: 2 }]).await.ranges.remove(0);
    assert_eq!(json!(heard.next().await), json!(range.events[0]));

    // Lists show it; it is as unread as before, and where it was.
    let mut listed = of_jane;
    listed.as_object_mut().unwrap().remove("conversationId");
    assert_eq!(page(&jane, &conversation).await, [listed.clone()]);
    let janes = seen(&jane, &conversation).await;
    assert_eq!((&janes["lastMessage"], &janes["unreadCount"]), (&listed, &json!(1)));
    assert_eq!(jane.conversations("").expect(200).await.json(), json!([janes]));
    assert_eq!(unread_total(&jane).await, 1);

    // The same text changes nothing and tells nobody.
    for same in ["hello", "hello \n"] {
        assert_eq!(john.edit_message(&conversation, &id, same).expect(200).await.json(), edited);
    }
    assert_eq!((app.feed(john.id).await.len(), app.feed(jane.id).await.len()), (3, 3));
    // An older message than the last one.
    john.say(&conversation, "second").await;
    john.edit_message(&conversation, &id, "first").expect(200).await;
    assert_eq!(seen(&jane, &conversation).await["lastMessage"]["content"], "second");
    assert_eq!(page(&jane, &conversation).await[1]["content"], "first");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn deletion_lowers_the_counts_it_was_part_of(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let mut ids = Vec::new();
    for n in 0..4 {
        ids.push(john.say(&conversation, &format!("m{n}")).await);
    }
    jane.messages(&conversation, &format!("?before={}&limit=1", ids[1])).expect(200).await;
    let janes = seen(&jane, &conversation).await;
    assert_eq!((&janes["unreadCount"], &janes["lastReadMessageId"]), (&json!(3), &json!(ids[0])));
    let (johns_events, janes_events) = (app.feed(john.id).await.len(), app.feed(jane.id).await.len());
    let mut heard = Listener::start(&redis_url(), &channels.user(jane.id)).await;

    // One that she has read, one that she has not, and the last one.
    for (n, left) in [(0, 3), (2, 2), (3, 1)] {
        assert!(john.delete_message(&conversation, &ids[n]).expect(204).await.body.is_empty());
        let janes = seen(&jane, &conversation).await;
        assert_eq!((&janes["unreadCount"], &janes["hasUnreadMessages"]), (&json!(left), &json!(true)));
        assert_eq!(unread_total(&jane).await, left);
        let heard = heard.next().await;
        let data: Value = serde_json::from_str(heard.data.get()).unwrap();
        assert_eq!((heard.event.as_str(), &data["unreadCount"]), ("message.deleted", &json!(left)));
        // It stays in its place, without its text.
        let listed = page(&jane, &conversation).await;
        let listed = &listed[3 - n];
        assert_eq!((&listed["id"], &listed["content"]), (&json!(ids[n]), &json!("")));
        assert!(listed["deletedAt"].is_string());
        assert_eq!(
            data,
            json!({ "id": ids[n], "conversationId": conversation, "deletedAt": listed["deletedAt"], "unreadCount": left })
        );
        // Again changes nothing and tells nobody.
        john.delete_message(&conversation, &ids[n]).expect(204).await;
    }
    let last = seen(&jane, &conversation).await["lastMessage"].clone();
    assert_eq!((&last["id"], &last["content"]), (&json!(ids[3]), &json!("")), "it stays the last message");
    assert_eq!(jane.conversations("").expect(200).await.json()[0]["lastMessage"], last);
    // A replay has the count of today; own messages never count.
    let told = |events: Vec<(String, Value)>| {
        let told =
            events.into_iter().map(|(name, data)| (name, data["id"].clone(), data["unreadCount"].clone()));
        told.collect::<Vec<_>>()
    };
    let deleted = |n: usize, left: i64| ("message.deleted".to_owned(), json!(ids[n]), json!(left));
    assert_eq!(told(events(&app, &jane, janes_events).await), [0, 2, 3].map(|n| deleted(n, 1)));
    assert_eq!(told(events(&app, &john, johns_events).await), [0, 2, 3].map(|n| deleted(n, 0)));
    // Her read mark passes deleted ones, and counts none of them.
    john.say(&conversation, "m4").await;
    jane.messages(&conversation, "?limit=2").expect(200).await;
    assert_eq!(
        (seen(&jane, &conversation).await["unreadCount"].clone(), unread_total(&jane).await),
        (json!(0), json!(0))
    );
    assert_eq!(told(events(&app, &jane, janes_events).await)[0], deleted(0, 0), "the count of today");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn edits_and_deletions_are_refused_in_the_contracts_order(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, direct) = app.pair(&pool).await;
    let (bob, eve) = (app.user(&pool, "bob").await, app.user(&pool, "eve").await);
    let group = group(&pool, &[&john, &jane, &bob]).await;
    let old = john.say(&group, "before she came").await;
    join(&pool, group.parse().unwrap(), &eve, true).await;
    let [johns, janes] = [john.say(&direct, "his").await, jane.say(&direct, "hers").await];
    let [in_group, deleted] = [john.say(&group, "his").await, john.say(&direct, "deleted").await];
    john.delete_message(&direct, &deleted).expect(204).await;
    let late = john.say(&direct, "too old").await;
    execute(
        &pool,
        format!("UPDATE messenger.messages SET created_at = now() - interval '25 hours' WHERE id = {late}"),
    )
    .await;
    let late_deleted = john.say(&direct, "too old and deleted").await;
    john.delete_message(&direct, &late_deleted).expect(204).await;
    execute(
        &pool,
        format!(
            "UPDATE messenger.messages SET created_at = now() - interval '25 hours' WHERE id = {late_deleted}"
        ),
    )
    .await;

    let none = "message_not_found";
    for (who, conversation, message, edit, delete) in [
        // Whose conversation it is comes first, then the message, then whose it is, then its age.
        (&bob, &direct, &johns, (404, "conversation_not_found"), (404, "conversation_not_found")),
        (&bob, &direct, &"no-id".into(), (404, "conversation_not_found"), (404, "conversation_not_found")),
        (&john, &"999".into(), &johns, (404, "conversation_not_found"), (404, "conversation_not_found")),
        (&john, &"no-id".into(), &johns, (404, "conversation_not_found"), (404, "conversation_not_found")),
        (&john, &direct, &"no-id".into(), (404, none), (404, none)),
        (&john, &direct, &"999".into(), (404, none), (404, none)),
        (&john, &direct, &in_group, (404, none), (404, none)),
        (&john, &group, &johns, (404, none), (404, none)),
        (&john, &direct, &janes, (403, "not_yours"), (403, "not_yours")),
        (&jane, &direct, &late, (403, "not_yours"), (403, "not_yours")),
        (&jane, &direct, &deleted, (404, none), (403, "not_yours")),
        (&john, &direct, &deleted, (404, none), (204, "")),
        (&john, &direct, &late_deleted, (404, none), (204, "")),
        (&john, &direct, &late, (403, "edit_window_over"), (204, "")),
        (&bob, &group, &in_group, (403, "not_yours"), (403, "not_yours")),
        // She owns the group, and came after this message.
        (&eve, &group, &old, (404, none), (404, none)),
        (&eve, &group, &in_group, (403, "not_yours"), (204, "")),
    ] {
        for (method, (status, code)) in [("PATCH", edit), ("DELETE", delete)] {
            let answer = match method {
                "PATCH" => who.edit_message(conversation, message, "new").send().await.unwrap(),
                _ => who.delete_message(conversation, message).send().await.unwrap(),
            };
            let what = format!("{method} {conversation}/{message} by {}: {}", who.name, answer.text());
            assert_eq!(answer.status, status, "{what}");
            if status >= 400 {
                assert_eq!(answer.json()["code"], code, "{what}");
            }
        }
    }
    assert_eq!(page(&john, &direct).await.iter().filter(|message| message["content"] == "new").count(), 0);

    // What the request alone shows comes before all of these.
    let path = |id: &str| format!("/api/conversations/{direct}/messages/{id}");
    let huge = format!(r#"{{"content":"{}"}}"#, "x".repeat(50 * 1024));
    for id in [&johns, &janes, &deleted, "999", "no-id"] {
        let patch = |content_type: &str, body: &str| {
            app.call("PATCH", &path(id)).header("content-type", content_type).body(body.to_owned())
        };
        let json_by = |body: &str, token: &str| patch("application/json", body).bearer(token);
        let other_site =
            |call: Call| call.header("cookie", &john.cookie).header("origin", "http://evil.example");
        for body in [huge.as_str(), "{", "{}"] {
            let answer = patch("text/plain", body).bearer("bad").send().await.unwrap();
            assert_problem(&answer, 415, "Content type of application/json required");
            assert_problem(&json_by(body, "bad").send().await.unwrap(), 401, "Unauthorized");
            let answer = other_site(patch("application/json", body)).send().await.unwrap();
            assert_problem(&answer, 403, ORIGIN_NOT_ALLOWED);
        }
        let answer = other_site(app.call("DELETE", &path(id))).send().await.unwrap();
        assert_problem(&answer, 403, ORIGIN_NOT_ALLOWED);
        json_by(&huge, &john.token).expect(413).await;
        json_by("{", &john.token).expect(400).await;
        json_by(r#"{"content":1}"#, &john.token).expect(400).await;
        for (content, sentence) in [
            (json!({ "content": " \n \t " }), "Message content required"),
            (json!({ "content": null }), "Message content required"),
            (json!({}), "Message content required"),
            (json!({ "content": "é".repeat(4_001) }), "Message too long. 4000 max"),
            (json!({ "content": "a\0b" }), "Message must not contain the character U+0000"),
        ] {
            let answer = john.call("PATCH", &path(id)).json(&content).expect(422).await;
            assert_unacceptable(&answer, "content", sentence);
        }
    }
    let ended = app.login("john").await;
    ended.set_session(&pool, "revoked_at = now()").await;
    for call in [
        ended.edit_message(&direct, &johns, "new"),
        ended.edit_message(&direct, &johns, ""),
        ended.delete_message(&direct, &johns),
    ] {
        assert_problem(&call.send().await.unwrap(), 401, "Unauthorized");
    }
    // As long as a message may be.
    john.edit_message(&direct, &johns, &"😀".repeat(4_000)).expect(200).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn edit_window_is_a_setting_and_its_end_keeps_the_text(pool: PgPool) {
    let app = App::with(&pool, |config| config.keep.edit_window = Duration::from_secs(60)).await;
    assert_eq!(app.get("/api/limits").expect(200).await.json()["editWindowSeconds"], 60);
    let (john, jane, conversation) = app.pair(&pool).await;
    let id = john.say(&conversation, "text").await;
    let age = |seconds: i64| {
        execute(&pool, format!("UPDATE messenger.messages SET created_at = now() - interval '{seconds} s'"))
    };
    age(50).await;
    john.edit_message(&conversation, &id, "in time").expect(200).await;
    age(60).await;
    // Also the same text: nothing is changed, but the answer does not depend on it.
    for late in ["too late", "in time"] {
        assert_refused(
            &john.edit_message(&conversation, &id, late).send().await.unwrap(),
            403,
            "edit_window_over",
        );
    }
    assert_eq!(page(&jane, &conversation).await[0]["content"], "in time");
    assert_eq!(app.feed(jane.id).await.len(), 3);
    john.delete_message(&conversation, &id).expect(204).await;
    app.stop().await;

    let app = App::with(&pool, |config| config.keep.edit_window = Duration::ZERO).await;
    let john = john.at(&app);
    let id = john.say(&conversation, "stays").await;
    assert_refused(
        &john.edit_message(&conversation, &id, "x").send().await.unwrap(),
        403,
        "edit_window_over",
    );
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn group_owners_delete_what_others_wrote_since_they_joined(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    let (bob, eve) = (app.user(&pool, "bob").await, app.user(&pool, "eve").await);
    let group = group(&pool, &[&john, &jane, &bob]).await;
    let early = jane.say(&group, "early").await;
    join(&pool, group.parse().unwrap(), &eve, false).await;
    let late = jane.say(&group, "late").await;
    bob.read_messages(&group).expect(204).await;
    let before: Vec<usize> = {
        let mut lengths = Vec::new();
        for user in [&john, &jane, &bob, &eve] {
            lengths.push(app.feed(user.id).await.len());
        }
        lengths
    };
    jane.edit_message(&group, &early, "earlier").expect(200).await;
    jane.edit_message(&group, &late, "later").expect(200).await;
    for message in [&early, &late] {
        assert_refused(&bob.delete_message(&group, message).send().await.unwrap(), 403, "not_yours");
        john.delete_message(&group, message).expect(204).await;
    }
    let deleted = |id: &String, left: i64| ("message.deleted".to_owned(), json!(id), json!(left));
    let updated = |id: &String| ("message.updated".to_owned(), json!(id), Value::Null);
    for (n, (user, left, sees_early)) in
        [(&john, 0, true), (&jane, 0, true), (&bob, 0, true), (&eve, 0, false)].into_iter().enumerate()
    {
        let told: Vec<_> = events(&app, user, before[n]).await;
        let told =
            told.into_iter().map(|(name, data)| (name, data["id"].clone(), data["unreadCount"].clone()));
        let expected = if sees_early {
            vec![updated(&early), updated(&late), deleted(&early, left), deleted(&late, left)]
        } else {
            vec![updated(&late), deleted(&late, left)]
        };
        assert_eq!(told.collect::<Vec<_>>(), expected, "{}", user.name);
        assert_eq!(
            (seen(user, &group).await["unreadCount"].clone(), unread_total(user).await),
            (json!(0), json!(0))
        );
    }
    // Nobody but its sender edits a message.
    let bobs = bob.say(&group, "bob's").await;
    assert_refused(&john.edit_message(&group, &bobs, "john's").send().await.unwrap(), 403, "not_yours");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn who_had_blocked_never_hears_of_an_edit(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let before = john.say(&conversation, "before").await;
    let block = |method: &str| jane.call(method, &format!("/api/blocks/{}", john.id)).expect(204);
    block("PUT").await;
    let hidden = john.say(&conversation, "hidden").await;
    let (janes, count) = (seen(&jane, &conversation).await, app.feed(jane.id).await.len());
    // He notices nothing.
    let edited = john.edit_message(&conversation, &hidden, "still hidden").expect(200).await.json();
    assert_eq!(edited["content"], "still hidden");
    assert_eq!(page(&john, &conversation).await[0]["content"], "still hidden");
    assert_eq!((seen(&jane, &conversation).await, app.feed(jane.id).await.len()), (janes.clone(), count));
    for call in [jane.edit_message(&conversation, &hidden, "x"), jane.delete_message(&conversation, &hidden)]
    {
        assert_refused(&call.send().await.unwrap(), 404, "message_not_found");
    }
    john.delete_message(&conversation, &hidden).expect(204).await;
    assert_eq!((seen(&jane, &conversation).await, app.feed(jane.id).await.len()), (janes, count));
    assert_eq!(seen(&john, &conversation).await["lastMessage"]["content"], "");

    // What he writes into a message that she saw does not reach her either; the text that she saw is gone.
    john.edit_message(&conversation, &before, "rewritten").expect(200).await;
    assert_eq!(page(&john, &conversation).await[1]["content"], "rewritten");
    assert_eq!(app.feed(jane.id).await.len(), count);
    for shown in [
        page(&jane, &conversation).await[0].clone(),
        seen(&jane, &conversation).await["lastMessage"].clone(),
        app.feed(jane.id).await[1].1.clone(),
    ] {
        assert_eq!((&shown["id"], &shown["content"]), (&json!(before), &json!("")));
        assert!(shown["deletedAt"].is_string() && shown["editedAt"].is_null(), "{shown}");
    }
    assert_eq!(
        (seen(&jane, &conversation).await["unreadCount"].clone(), unread_total(&jane).await),
        (json!(1), json!(1))
    );
    // After an unblock that text stays hidden; one that he writes then does not.
    block("DELETE").await;
    assert_eq!(page(&jane, &conversation).await[0]["content"], "");
    john.edit_message(&conversation, &before, "peace").expect(200).await;
    assert_eq!(page(&jane, &conversation).await[0]["content"], "peace");
    let told = events(&app, &jane, count).await;
    assert_eq!((told.len(), &told[0].1["content"]), (1, &json!("peace")));
    // That a message is gone is told to her whether she blocks him or not.
    block("PUT").await;
    john.delete_message(&conversation, &before).expect(204).await;
    let told = events(&app, &jane, count + 1).await;
    assert_eq!(
        (told.len(), told[0].0.as_str(), &told[0].1["unreadCount"]),
        (1, "message.deleted", &json!(0))
    );
    // In a group, blocks hide nothing.
    let group = group(&pool, &[&john, &jane]).await;
    let id = john.say(&group, "one").await;
    john.edit_message(&group, &id, "two").expect(200).await;
    assert_eq!(page(&jane, &group).await[0]["content"], "two");
    assert_eq!(app.feed(jane.id).await.last().unwrap().0, "message.updated");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn replays_and_repeats_tell_the_text_of_today(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let post =
        |content: &str, key: &str| john.post_message(&conversation, content).header("idempotency-key", key);
    let first = text(&post("first", "k1").expect(201).await.json()["id"]);
    let second = text(&post("second", "k2").expect(201).await.json()["id"]);
    for content in ["v1", "v2", "v3"] {
        john.edit_message(&conversation, &first, content).expect(200).await;
        john.edit_message(&conversation, &second, content).expect(200).await;
    }
    john.delete_message(&conversation, &second).expect(204).await;

    for (user, message) in [(&john, "message.sent"), (&jane, "message")] {
        let feed = events(&app, user, 1).await;
        let names: Vec<_> = feed.iter().map(|(name, _)| name.as_str()).collect();
        let updates = ["message.updated"; 6];
        assert_eq!(names, [&[message, message], &updates[..], &["message.deleted"]].concat());
        for (_, data) in &feed[..8] {
            let (content, is_deleted) = if data["id"] == json!(first) { ("v3", false) } else { ("", true) };
            assert_eq!(
                (&data["content"], data["deletedAt"].is_string()),
                (&json!(content), is_deleted),
                "{data}"
            );
            assert!(data["editedAt"].is_string());
            assert_eq!(data["mine"], message == "message.sent");
        }
    }
    // A repeat of a send answers with the message of today; its first text is still told from another.
    let again = post("first", "k1").expect(201).await;
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    assert_eq!((&again.json()["content"], &again.json()["id"]), (&json!("v3"), &json!(first)));
    let again = post("second", "k2").expect(201).await.json();
    assert_eq!(again["content"], "");
    assert!(again["deletedAt"].is_string());
    post("v3", "k1").expect(422).await;

    // A replay to a former member has no text.
    let group = group(&pool, &[&john, &jane]).await;
    let in_group = john.say(&group, "in the group").await;
    john.edit_message(&group, &in_group, "edited in the group").expect(200).await;
    john.delete_message(&group, &john.say(&group, "gone").await).expect(204).await;
    execute(
        &pool,
        format!(
            "DELETE FROM messenger.participants WHERE conversation_id = {group} AND user_id = {}",
            jane.id
        ),
    )
    .await;
    let feed = events(&app, &jane, 10).await;
    let told: Vec<_> = feed.iter().map(|(name, data)| (name.as_str(), data["content"].clone())).collect();
    let (nothing, none) = (json!(""), Value::Null);
    assert_eq!(
        told,
        [
            ("message", nothing.clone()),
            ("message.updated", nothing.clone()),
            ("message", nothing),
            ("message.deleted", none)
        ]
    );
    assert_eq!(feed[3].1["unreadCount"], 0);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn explain_knows_edits_and_deletions_without_their_text(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let id = john.say(&conversation, "a secret").await;
    john.edit_message(&conversation, &id, "another secret")
        .header("x-request-id", "the-edit")
        .expect(200)
        .await;
    john.delete_message(&conversation, &id).header("x-request-id", "the-deletion").expect(204).await;
    for (seq, name, request) in [(3, "message.updated", "the-edit"), (4, "message.deleted", "the-deletion")] {
        let url = format!("{}/admin/explain?user={}&seq={seq}", app.ops, jane.id);
        let answer = app.client.get(url).expect(200).await;
        let event = answer.json()["event"].clone();
        assert_eq!(
            (&event["name"], &event["messageId"], &event["requestId"]),
            (&json!(name), &json!(id), &json!(request))
        );
        assert!(!answer.text().contains("secret"), "{}", answer.text());
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn edits_count_as_sends_and_deletions_as_changes(pool: PgPool) {
    let hour = Duration::from_hours(1);
    let limits = RateLimits {
        send_per_user: Limit::new(3, hour),
        change_per_user: Limit::new(2, hour),
        ..RateLimits::OFF
    };
    let app = App::with(&pool, |config| config.limits = limits).await;
    let (john, _, conversation) = app.pair(&pool).await;
    let (one, two) = (john.say(&conversation, "1").await, john.say(&conversation, "2").await);
    john.edit_message(&conversation, &one, "1!").expect(200).await;
    let limited = john.edit_message(&conversation, &one, "1!!").expect(429).await;
    assert!(limited.header("retry-after").is_some());
    john.post_message(&conversation, "3").expect(429).await;
    john.delete_message(&conversation, &one).expect(204).await;
    john.delete_message(&conversation, &two).expect(204).await;
    // The limit is checked before the body and the ids.
    john.delete_message(&conversation, "no-id").expect(429).await;
    john.call("PATCH", &format!("/api/conversations/{conversation}/messages/{one}"))
        .json(&json!({}))
        .expect(429)
        .await;
    app.stop().await;
}

/// Two edits of one message, a deletion between two edits, a read mark beside a deletion: each as if alone.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn concurrent_edits_deletions_posts_and_reads_leave_exact_counts(pool: PgPool) {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let apps = [App::start(&pool).await, App::start(&pool).await];
    let mut users = Vec::new();
    for n in 0..5 {
        users.push(apps[0].user(&pool, &format!("user{n}")).await);
    }
    // Overlapping groups, and direct conversations between the same people.
    let all: Vec<&ApiUser> = users.iter().collect();
    let mut conversations = vec![
        (group(&pool, &all).await, vec![0, 1, 2, 3, 4]),
        (group(&pool, &[all[4], all[2], all[0]]).await, vec![4, 2, 0]),
    ];
    for (a, b) in [(0, 1), (1, 2), (2, 0), (3, 4)] {
        conversations.push((users[a].start(&users[b].name).await, vec![a, b]));
    }
    let mut said = Vec::new();
    for (conversation, members) in &conversations {
        for n in 0..6 {
            let who = &users[members[n % members.len()]];
            said.push((conversation.clone(), who.clone(), who.say(conversation, &format!("m{n}")).await));
        }
    }
    let calls = (0..400).map(|n| {
        let app = &apps[random.random_range(0..2)];
        let (conversation, members) = conversations[random.random_range(0..conversations.len())].clone();
        let member = users[members[random.random_range(0..members.len())]].at(app);
        let (its, sender, message) = said[random.random_range(0..said.len())].clone();
        let (sender, kind) = (sender.at(app), random.random_range(0..10));
        once_not_busy(move || match kind {
            0..=2 => sender.edit_message(&its, &message, &format!("edit {n}")),
            3..=4 => sender.delete_message(&its, &message),
            5..=6 => member.post_message(&conversation, "more"),
            7 => member.messages(&conversation, "?limit=3"),
            _ => member.read_messages(&conversation),
        })
    });
    let answers: Vec<Answer> = stream::iter(calls.collect::<Vec<_>>()).buffer_unordered(40).collect().await;
    for answer in answers {
        // A message may be deleted already.
        assert!(answer.status < 300 || answer.status == 404, "{}", answer.text());
    }
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(number(&pool, deadlocks).await, 0);
    for app in &apps {
        assert_eq!(metric(app, "messenger_api_database_conflicts_total").await, Some(0));
    }
    assert_counts(&pool).await;
    assert!(
        number(
            &pool,
            "SELECT count(*) FROM messenger.messages WHERE deleted_at IS NOT NULL AND content = ''"
        )
        .await
            > 0
    );
    assert_eq!(
        number(
            &pool,
            "SELECT count(*) FROM messenger.messages WHERE (deleted_at IS NOT NULL) <> (content = '')"
        )
        .await,
        0
    );
    for user in &users {
        // Asserts that it has no gaps, and that its head is its last event.
        let feed = apps[0].feed(user.id).await;
        let deleted: Vec<_> =
            feed.iter().filter(|(name, _)| name == "message.deleted").map(|(_, data)| &data["id"]).collect();
        let mut once = deleted.clone();
        once.sort_by_key(|id| text(id));
        once.dedup();
        assert_eq!(once.len(), deleted.len(), "a deletion is told once");
        let own = format!(
            "SELECT count(*) FROM messenger.messages AS m JOIN messenger.participants AS p USING (conversation_id)
             WHERE p.user_id = {} AND m.deleted_at IS NOT NULL",
            user.id
        );
        assert_eq!(number(&pool, own).await, deleted.len() as i64);
    }
    for app in apps {
        app.stop().await;
    }
}

/// Counts and totals are what the messages say.
pub(crate) async fn assert_counts(pool: &PgPool) {
    let wrong_counts = number(
        pool,
        "SELECT count(*) FROM messenger.participants AS p
         WHERE p.unread_count <> (SELECT count(*) FROM messenger.messages AS m
            WHERE m.conversation_id = p.conversation_id AND m.sender_id <> p.user_id AND m.deleted_at IS NULL
              AND m.number > p.last_read_number AND m.number > p.joined_number AND m.hidden_from IS DISTINCT FROM p.user_id)",
    );
    assert_eq!(wrong_counts.await, 0);
    let wrong_totals = number(
        pool,
        "SELECT count(*) FROM messenger.feed_heads AS h
         WHERE h.unread_total <> (SELECT coalesce(sum(p.unread_count), 0) FROM messenger.participants AS p WHERE p.user_id = h.user_id)",
    );
    assert_eq!(wrong_totals.await, 0);
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn deleted_and_edited_texts_are_in_no_table(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let mut ids = Vec::new();
    for n in 0..60 {
        let key = format!("key-{n}");
        let call =
            john.post_message(&conversation, &format!("marker {}", n % 3)).header("idempotency-key", &key);
        ids.push(text(&call.expect(201).await.json()["id"]));
    }
    jane.read_messages(&conversation).expect(204).await;
    // Statistics of a column are samples of its values.
    execute(&pool, "ANALYZE").await;
    for (n, id) in ids.iter().enumerate() {
        if n % 2 == 0 {
            john.delete_message(&conversation, id).expect(204).await;
        } else {
            john.edit_message(&conversation, id, "harmless").expect(200).await;
        }
    }
    assert_in_no_table(&pool, "marker").await;
    let kept = "SELECT count(*) FROM messenger.messages WHERE content = 'harmless'";
    assert_eq!(number(&pool, kept).await, 30);
    app.stop().await;
}

pub(crate) async fn assert_in_no_table(pool: &PgPool, marker: &str) {
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT relname::text FROM pg_class WHERE relnamespace = 'messenger'::regnamespace AND relkind = 'r'",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert!(tables.len() > 10);
    for table in tables {
        let found = format!("SELECT count(*) FROM messenger.{table} AS t WHERE t::text LIKE '%{marker}%'");
        assert_eq!(number(pool, found).await, 0, "{table}");
    }
    let statistics = format!(
        "SELECT count(*) FROM pg_stats AS s WHERE s.schemaname = 'messenger' AND s::text LIKE '%{marker}%'"
    );
    assert_eq!(number(pool, statistics).await, 0, "samples of ANALYZE");
}
