//! Feeds have no gaps, whichever process dies while writing.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use e2e::{World, ledger::StoredFeed};
use futures_util::future::join_all;
use serde_json::json;

use crate::support::{Crowd, Traffic, Two, assert_all_exact};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_killed_at_work_leave_no_gap_and_no_duplicate() {
    let world = Arc::new(World::new().await);
    let (mut one, mut two, steady) =
        tokio::join!(world.api().ready(), world.api().ready(), world.api().ready());
    let gateway = world.gateway(steady.internal()).env("RECONCILE_SECONDS", 1).ready().await;
    let crowd = Crowd::gather(&world, &steady, 4).await;
    let watching = crowd.watch(&[&gateway]).await;
    let traffic = Traffic::start(&world, &[&one, &two, &steady], &crowd.lines, Duration::ZERO);
    for _ in 0..4 {
        traffic.more(100).await;
        one.kill();
        traffic.more(30).await;
        two.kill();
        tokio::join!(one.restart(), two.restart());
    }
    let accepted = traffic.stop().await;

    assert_all_exact(&world, &steady, &crowd.lines, &watching).await;
    let different: BTreeSet<&String> = accepted.iter().collect();
    assert_eq!(
        different.len(),
        accepted.len(),
        "a key that was sent again is the same message, and no other is"
    );
    let mut events = 0;
    for user in &crowd.users {
        let feed = StoredFeed::read(&world.sql, user.id).await;
        feed.assert_without_gaps();
        let mut ids = BTreeSet::new();
        for event in &feed.events {
            if event.name.is_none() || event.is("message.sent") {
                let id = event.json()["id"].as_str().unwrap().to_owned();
                assert!(ids.insert(id), "{}'s feed has one message twice: {event:?}", user.name);
                events += 1;
            }
        }
    }
    let messages: i64 =
        sqlx::query_scalar("SELECT count(*) FROM messenger.messages").fetch_one(&world.sql).await.unwrap();
    assert_eq!(events, 2 * messages, "each message is in two feeds");
    assert_eq!(
        usize::try_from(messages).unwrap(),
        accepted.len() + crowd.lines.len(),
        "and each was accepted once"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn key_repeated_at_two_replicas_is_one_message() {
    let world = World::new().await;
    let (one, two) = tokio::join!(world.api().ready(), world.api().ready());
    let pair = Two::meet(&world, &one).await;
    let before = StoredFeed::read(&world.sql, pair.jane.id).await.head;
    let body = json!({ "content": world.text() });
    let calls = (0..20).map(|number| {
        let api = if number % 2 == 0 { &one } else { &two };
        let url = api.url(&format!("/api/conversations/{}/messages", pair.conversation));
        let call = world.client.post(url).bearer(&pair.john.token).json(&body);
        call.header("idempotency-key", "the-same").expect(201)
    });
    let answers = join_all(calls).await;
    assert!(answers.iter().all(|answer| answer.body == answers[0].body));
    let fresh = answers.iter().filter(|answer| answer.header("idempotent-replayed").is_none()).count();
    assert_eq!(fresh, 1);
    for user in [&pair.jane, &pair.john] {
        let feed = StoredFeed::read(&world.sql, user.id).await;
        assert_eq!(feed.head, before + 1);
        feed.assert_without_gaps();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn simultaneous_starts_make_one_conversation() {
    let world = World::new().await;
    let (one, two) = tokio::join!(world.api().ready(), world.api().ready());
    let john = world.user(&one, "john").await;
    let jane = world.user(&two, "jane").await;
    let calls = (0..8).map(|number| {
        let (from, with) = if number % 2 == 0 { (&john, &jane) } else { (&jane, &john) };
        let api = if number < 4 { &one } else { &two };
        world.conversation(api, from, with)
    });
    let ids: BTreeSet<_> = join_all(calls).await.into_iter().collect();
    assert_eq!(ids.len(), 1);
    for user in [&john, &jane] {
        let feed = StoredFeed::read(&world.sql, user.id).await;
        assert_eq!(feed.events.len(), 1, "one event");
        feed.assert_without_gaps();
    }
}
