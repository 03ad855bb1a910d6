//! Concurrent requests to several replicas: one change, one set of events, no deadlock.

use futures_util::{StreamExt, future::join_all, stream};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use sqlx::PgPool;

use crate::{
    failures::metric,
    support::{App, assert_counts_agree, number, once_not_busy, text},
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

/// The same members in several groups: every command takes the locks of all of them.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn commands_on_overlapping_groups_do_not_deadlock(pool: PgPool) {
    const USERS: usize = 8;
    let commands: usize = std::env::var("GROUP_COMMANDS").map_or(2_000, |commands| commands.parse().unwrap());
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let apps = [App::start(&pool).await, App::start(&pool).await];
    let mut users = Vec::new();
    for n in 0..USERS {
        users.push(apps[0].user(&pool, &format!("user{n}")).await);
    }
    let mut groups = Vec::new();
    for owner in 0..4 {
        let names = [1, 2, 3, 5].map(|step| users[(owner + step) % USERS].name.as_str());
        groups.push(users[owner].group("Team", &names).await);
        // Two owners, so that the group outlives the one who leaves.
        users[owner].set_role(&groups[owner], &users[owner + 1], "owner").expect(200).await;
    }
    let calls: Vec<_> = (0..commands)
        .map(|n| {
            let who = users[random.random_range(0..USERS)].at(&apps[n % 2]);
            let other = users[random.random_range(0..USERS)].clone();
            let group = groups[random.random_range(0..groups.len())].clone();
            let kind = random.random_range(0..20);
            async move {
                let answer = once_not_busy(|| match kind {
                    0..8 => who.post_message(&group, "hi"),
                    8..11 => who.read_messages(&group),
                    11..13 => who.messages(&group, "?limit=3"),
                    13..16 => who.add(&group, &other.name),
                    16 => who.remove(&group, &who),
                    17 => who.remove(&group, &other),
                    18 => who.rename(&group, &format!("Team {n}")),
                    _ => who.set_role(&group, &other, if n % 3 == 0 { "member" } else { "owner" }),
                })
                .await;
                assert!(answer.status < 500, "{}", answer.text());
                if kind < 3 && answer.status == 201 {
                    let id = text(&answer.json()["id"]);
                    once_not_busy(|| who.edit_message(&group, &id, "hello")).await;
                    once_not_busy(|| who.delete_message(&group, &id)).await;
                }
            }
        })
        .collect();
    stream::iter(calls).buffer_unordered(32).for_each(async |()| {}).await;
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    assert_eq!(number(&pool, deadlocks).await, 0);
    for app in &apps {
        assert_eq!(metric(app, "messenger_api_database_conflicts_total").await, Some(0));
    }
    assert_counts_agree(&pool).await;
    for user in &users {
        apps[0].feed(user.id).await;
    }
    for app in apps {
        app.stop().await;
    }
}
