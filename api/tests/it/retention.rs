//! `MESSAGE_KEEP_DAYS`, and groups that nobody is left in.

use std::time::Duration;

use api::{
    config::Keep,
    pruner::{ExpireStep, delete_left_group, empty_left_group, expire_after},
};
use protocol::{feed::RangeAfter, ids::ConversationId};
use serde_json::{Value, json};
use sqlx::PgPool;
use testkit::until;

use crate::{
    editing::{assert_counts, assert_in_no_table, group},
    failures::{Listener, metric, with_redis},
    support::{App, database, execute, number, redis_url, text},
};

const DAY: Duration = Duration::from_hours(24);

/// Messages for ten days; their rows for as long as a feed may refer to them.
fn keep() -> Keep {
    Keep {
        age: 30 * DAY,
        events: 1_000_000,
        idempotency_keys: 20 * DAY,
        messages: Some(10 * DAY),
        edit_window: DAY,
    }
}

async fn age(pool: &PgPool, message: &str, days: i64) {
    execute(
        pool,
        format!(
            "UPDATE messenger.messages SET created_at = now() - interval '{days} days' WHERE id = {message}"
        ),
    )
    .await;
}

async fn walk(pool: &PgPool, keep: Keep) -> (u64, u64) {
    let database = database(pool, 2);
    // Two replicas at the same time.
    let one = async || {
        let (mut after, mut texts, mut rows) = (ConversationId(0), 0, 0);
        loop {
            let step: ExpireStep = expire_after(&database, None, keep, after).await.unwrap();
            texts += step.texts;
            rows += step.rows;
            match step.next {
                Some(next) => after = next,
                None => return (texts, rows),
            }
        }
    };
    let (one, other) = tokio::join!(one(), one());
    database.close().await;
    (one.0 + other.0, one.1 + other.1)
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn old_texts_are_removed_and_counts_stay_exact(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let bob = app.user(&pool, "bob").await;
    let group = group(&pool, &[&john, &jane, &bob]).await;
    let mut ids = Vec::new();
    for n in 0..450 {
        ids.push(john.say(&conversation, &format!("marker {n}")).await);
    }
    let janes = jane.say(&conversation, "marker of hers").await;
    let old_in_group = john.say(&group, "marker in the group").await;
    let young = john.say(&conversation, "young").await;
    jane.messages(&conversation, &format!("?after={}&limit=1", ids[98])).expect(200).await;
    assert_eq!(jane.conversation(&conversation).expect(200).await.json()["unreadCount"], 351);
    bob.read_messages(&group).expect(204).await;
    for id in ids.iter().chain([&janes, &old_in_group]) {
        age(&pool, id, 11).await;
    }
    // One that is too old by a clock that was wrong stays behind a young one, and goes with it.
    let behind = john.say(&conversation, "young, too").await;
    age(&pool, &behind, 12).await;
    let lengths = async || {
        let mut lengths = Vec::new();
        for user in [&john, &jane, &bob] {
            lengths.push(app.feed(user.id).await.len());
        }
        lengths
    };
    let before = lengths().await;

    assert_eq!(walk(&pool, Keep { messages: None, ..keep() }).await, (0, 0), "off by default");
    assert_eq!(walk(&pool, keep()).await, (452, 0));
    assert_in_no_table(&pool, "marker").await;
    assert_counts(&pool).await;
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.messages WHERE deleted_at IS NULL").await, 2);
    // Nobody is told but who had some of them unread: one event a step of 200, with what is left.
    let after = lengths().await;
    assert_eq!(
        [after[0] - before[0], after[1] - before[1], after[2] - before[2]],
        [1, 4, 0],
        "{before:?} {after:?}"
    );
    let told = app.feed(jane.id).await.split_off(before[1]);
    let in_direct: Vec<_> =
        told.iter().filter(|(_, data)| data["conversationId"] == json!(conversation)).collect();
    assert_eq!(in_direct.len(), 3);
    assert!(told.iter().all(|(name, _)| name == "message.deleted"));
    assert_eq!(in_direct[2].1["id"], json!(ids[449]), "the newest of those that she had unread");
    let janes_view = jane.conversation(&conversation).expect(200).await.json();
    assert_eq!(
        (&janes_view["unreadCount"], &janes_view["lastMessage"]["content"]),
        (&json!(2), &json!("young, too"))
    );
    let of_group = bob.conversation(&group).expect(200).await.json();
    assert_eq!(
        (&of_group["lastMessage"]["id"], &of_group["lastMessage"]["content"]),
        (&json!(old_in_group), &json!(""))
    );
    let page = jane.messages(&conversation, "?limit=4&markRead=false").expect(200).await.json();
    let contents: Vec<_> = page.as_array().unwrap().iter().map(|message| text(&message["content"])).collect();
    assert_eq!(contents, ["young, too", "young", "", ""]);
    // The feed is whole: a client that was away reads all of it.
    assert_eq!(app.feed(jane.id).await[1].1["content"], "");
    assert_eq!(walk(&pool, keep()).await, (0, 0));
    age(&pool, &young, 13).await;
    assert_eq!(walk(&pool, keep()).await, (2, 0));
    assert_counts(&pool).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn rows_are_deleted_when_no_feed_can_refer_to_them(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.push(john.say(&conversation, &format!("m{n}")).await);
    }
    john.edit_message(&conversation, &ids[1], "edited").expect(200).await;
    jane.messages(&conversation, &format!("?before={}&limit=1", ids[1])).expect(200).await;
    // Texts after ten days; rows after the feed's 30, the day in which an edit may have come, and a day for its pruning.
    for (days, rows) in [(11, 5), (31, 5), (32, 4)] {
        for id in &ids[..4] {
            age(&pool, id, days).await;
        }
        let left = if days > 31 { 1 } else { 5 };
        walk(&pool, keep()).await;
        let found = number(&pool, "SELECT count(*) FROM messenger.messages").await;
        assert_eq!(found, if days == 32 { left } else { rows }, "{days}");
        if days == 31 {
            // No feed has a gap yet, and none resyncs.
            assert_eq!(app.feed(jane.id).await.len(), 1 + 5 + 1 + 1 + 1);
        }
    }
    // The last message stays, whatever its age, so the conversation stays where it is in the list.
    age(&pool, &ids[4], 400).await;
    walk(&pool, keep()).await;
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.messages").await, 1);
    let seen = jane.conversations("").expect(200).await.json();
    let last = &seen[0]["lastMessage"];
    assert_eq!(
        (&last["id"], &last["content"], &seen[0]["unreadCount"]),
        (&json!(ids[4]), &json!(""), &json!(0))
    );
    assert_counts(&pool).await;
    // The next message has the next number, and then the last row is deleted too.
    let next = john.say(&conversation, "again").await;
    assert_eq!(number(&pool, format!("SELECT number FROM messenger.messages WHERE id = {next}")).await, 6);
    assert_eq!(walk(&pool, keep()).await.1, 1);
    let page = jane.messages(&conversation, "").expect(200).await.json();
    assert_eq!(page.as_array().unwrap().len(), 1);
    assert_eq!(jane.conversation(&conversation).expect(200).await.json()["unreadCount"], 0);
    jane.messages(&conversation, &format!("?before={}", ids[4])).expect(422).await;

    // A row that is gone before its feed rows, as by hand: a deletion is replayed all the same.
    john.delete_message(&conversation, &next).expect(204).await;
    execute(&pool, "DELETE FROM messenger.messages").await;
    let head =
        number(&pool, format!("SELECT head_seq FROM messenger.feed_heads WHERE user_id = {}", jane.id)).await;
    let after = head.cast_unsigned() - 1;
    let range = app.ranges(vec![RangeAfter { user: jane.id, after }]).await.ranges.remove(0);
    assert_eq!((range.events.len(), range.events[0].event.as_str()), (1, "message.deleted"));
    app.stop().await;
}

/// The service does both by itself, with a metric, and publishes what it tells.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn running_service_removes_old_texts_and_those_of_left_groups(pool: PgPool) {
    let (mut config, channels) = with_redis(&pool, &redis_url());
    config.keep = keep();
    let first = App::start(&pool).await;
    let (john, jane, conversation) = first.pair(&pool).await;
    let left = group(&pool, &[&john, &jane]).await;
    let stays = group(&pool, &[&john, &jane]).await;
    let old = john.say(&conversation, "marker").await;
    age(&pool, &old, 11).await;
    john.say(&left, "marker").await;
    john.say(&stays, "stays").await;
    let mut heard = Listener::start(&redis_url(), &channels.user(jane.id)).await;
    first.stop().await;
    let app = App::start_with(config).await;
    let deleted = heard.next().await;
    let data: Value = serde_json::from_str(deleted.data.get()).unwrap();
    assert_eq!(
        (deleted.event.as_str(), &data["id"], &data["unreadCount"]),
        ("message.deleted", &json!(old), &json!(0))
    );
    until("the text is counted", async || {
        metric(&app, "messenger_api_expired_messages_total").await == Some(1)
    })
    .await;

    // The last member leaves while the service runs.
    execute(
        &pool,
        format!(
            "DELETE FROM messenger.participants WHERE conversation_id = {left};
             UPDATE messenger.conversations SET participant_count = 0 WHERE id = {left};
             UPDATE messenger.feed_heads AS h SET unread_total =
                 (SELECT coalesce(sum(p.unread_count), 0) FROM messenger.participants AS p WHERE p.user_id = h.user_id)"
        ),
    )
    .await;
    until("the group's text is gone", async || {
        metric(&app, "messenger_api_emptied_group_messages_total").await == Some(1)
    })
    .await;
    assert_in_no_table(&pool, "marker").await;
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.messages WHERE content = 'stays'").await, 1);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn left_group_loses_its_texts_first_and_its_rows_later(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    let id = group(&pool, &[&john, &jane]).await;
    execute(&pool, format!("UPDATE messenger.conversations SET title = 'marker' WHERE id = {id}")).await;
    john.say(&id, "marker").await;
    execute(
        &pool,
        format!(
            "INSERT INTO messenger.messages (conversation_id, number, sender_id, content)
             SELECT {id}, n, {}, 'marker' FROM generate_series(2, 4500) AS n;
             UPDATE messenger.conversations SET last_number = 4500 WHERE id = {id}",
            john.id
        ),
    )
    .await;
    // The service itself would be as quick.
    app.stop().await;
    let database = database(&pool, 2);
    assert_eq!(empty_left_group(&database).await.unwrap(), None, "it has members");
    execute(
        &pool,
        format!(
            "DELETE FROM messenger.participants WHERE conversation_id = {id};
             UPDATE messenger.conversations SET participant_count = 0 WHERE id = {id}"
        ),
    )
    .await;
    // In steps; while one works on it, another replica finds nothing to do.
    let group = ConversationId(id.parse().unwrap());
    let mut holder = pool.begin().await.unwrap();
    sqlx::query("SELECT FROM messenger.empty_left_group(10)").execute(&mut *holder).await.unwrap();
    assert_eq!(empty_left_group(&database).await.unwrap(), None);
    holder.rollback().await.unwrap();
    for texts in [2_000, 2_000, 500] {
        assert_eq!(empty_left_group(&database).await.unwrap(), Some((group, texts)));
    }
    assert_eq!(empty_left_group(&database).await.unwrap(), None);
    assert_in_no_table(&pool, "marker").await;

    let keep = Keep { messages: None, ..keep() };
    let emptied = |days: i64| {
        execute(
            &pool,
            format!("UPDATE messenger.conversations SET emptied_at = now() - interval '{days} days'"),
        )
    };
    emptied(31).await;
    assert_eq!(delete_left_group(&database, keep).await.unwrap(), None, "a feed may still refer to it");
    emptied(33).await;
    for rows in [1_000, 1_000, 1_000, 1_000, 500] {
        assert_eq!(delete_left_group(&database, keep).await.unwrap(), Some(rows));
    }
    assert_eq!(delete_left_group(&database, keep).await.unwrap(), None);
    for table in ["messages", "conversations"] {
        assert_eq!(number(&pool, format!("SELECT count(*) FROM messenger.{table}")).await, 0);
    }
    database.close().await;
}
