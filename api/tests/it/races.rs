//! Concurrent requests to several replicas: one change, one set of events, no deadlock.

use futures_util::future::join_all;
use serde_json::json;
use sqlx::PgPool;

use crate::{
    failures::metric,
    support::{App, number, once_not_busy},
};

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn eight_concurrent_starts_make_one_conversation(pool: PgPool) {
    let apps = [App::start(&pool).await, App::start(&pool).await];
    let (john, jane) = (apps[0].user(&pool, "john").await, apps[0].user(&pool, "jane").await);
    let answers = join_all((0..8).map(|n| {
        let (who, other) = if n % 2 == 0 { (&john, "jane") } else { (&jane, "john") };
        let who = who.at(&apps[n / 2 % 2]);
        once_not_busy(move || who.start_conversation(other))
    }))
    .await;
    let statuses: Vec<_> = answers.into_iter().map(|answer| answer.status).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 201).count(), 1, "{statuses:?}");
    assert_eq!(statuses.iter().filter(|status| **status == 302).count(), 7, "{statuses:?}");
    for user in [&john, &jane] {
        assert_eq!(apps[1].feed(user.id).await.len(), 1);
    }
    for app in apps {
        app.stop().await;
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn twenty_sends_with_one_key_make_one_message(pool: PgPool) {
    let apps = [App::start(&pool).await, App::start(&pool).await];
    let (john, jane, conversation) = apps[0].pair(&pool).await;
    let answers = join_all((0..20).map(|n| {
        let (john, conversation) = (john.at(&apps[n % 2]), &conversation);
        once_not_busy(move || john.post_message(conversation, "once").header("idempotency-key", "the-key"))
    }))
    .await;
    assert!(answers.iter().all(|answer| answer.status == 201));
    assert!(answers.iter().all(|answer| answer.body == answers[0].body));
    let replayed = answers.iter().filter(|answer| answer.header("idempotent-replayed") == Some("true"));
    assert_eq!(replayed.count(), 19);
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.messages").await, 1);
    let names = async |user| apps[1].feed(user).await.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(john.id).await, ["conversation.created", "message.sent"]);
    assert_eq!(names(jane.id).await, ["conversation.created", "message"]);
    for app in apps {
        app.stop().await;
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn one_key_in_two_conversations_sends_one_message(pool: PgPool) {
    let apps = [App::start(&pool).await, App::start(&pool).await];
    let (john, ..) = apps[0].pair(&pool).await;
    apps[0].user(&pool, "bob").await;
    john.start("bob").await;
    for round in 0..20 {
        let key = format!("key-{round}");
        let answers = join_all((0..6).map(|n| {
            let conversation = (n % 2 + 1).to_string();
            let (john, key) = (john.at(&apps[n / 2 % 2]), &key);
            once_not_busy(move || john.post_message(&conversation, "hi").header("idempotency-key", key))
        }))
        .await;
        let first =
            answers.iter().find(|answer| answer.status == 201).expect("one of them came first").json();
        for (n, answer) in answers.iter().enumerate() {
            let winner = first["conversationId"] == json!((n % 2 + 1).to_string());
            assert_eq!(answer.status, if winner { 201 } else { 422 }, "{}", answer.text());
        }
    }
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.messages").await, 20);
    assert_eq!(apps[0].feed(john.id).await.len(), 2 + 20);
    for app in apps {
        app.stop().await;
    }
}

/// Crossing sends and reads would deadlock if locks were taken in any order.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn crossing_sends_and_reads_do_not_deadlock(pool: PgPool) {
    let app = App::start(&pool).await;
    let names = ["ann", "bob", "cid", "dan"];
    let mut users = Vec::new();
    for name in names {
        users.push(app.user(&pool, name).await);
    }
    let mut conversations = Vec::new();
    for (n, a) in users.iter().enumerate() {
        for b in &users[n + 1..] {
            conversations.push((a, b, a.start(&b.name).await));
        }
    }
    let calls = (0..240).map(|n| {
        let (a, b, id) = &conversations[n % conversations.len()];
        let who = if n / 6 % 2 == 0 { a } else { b };
        once_not_busy(move || match n % 4 {
            0 => who.read_messages(id),
            1 => who.messages(id, ""),
            _ => who.post_message(id, "hi"),
        })
    });
    for answer in join_all(calls).await {
        assert!(answer.status < 300, "{}", answer.text());
    }
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(number(&pool, deadlocks).await, 0);
    assert_eq!(metric(&app, "messenger_api_database_conflicts_total").await, Some(0));
    for user in &users {
        app.feed(user.id).await;
    }
    app.stop().await;
}
