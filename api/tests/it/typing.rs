//! Typing is told to the others in a conversation who are connected, and is stored nowhere.

use std::time::Duration;

use api::config::{Config, RateLimits};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use service_kit::limiter::Limit;
use sqlx::PgPool;

use crate::{
    failures::{Listener, metric, with_redis},
    support::{
        ApiUser, App, add_users, assert_common_headers, assert_problem, check_event, execute, number,
        redis_url,
    },
};

fn types(user: &ApiUser, conversation: &str) -> testkit::http::Call {
    user.call("POST", &format!("/api/conversations/{conversation}/typing"))
}

/// What the next message on a channel says of who types; `None`: it is an event of the feed.
async fn next_typing(heard: &mut Listener) -> Option<Value> {
    let message: Value = heard.next_as().await;
    let name = message.get("ephemeral")?;
    assert_eq!((name, &message["v"], message.get("seq")), (&json!("typing"), &json!(1), None));
    check_event(Some("typing"), &message["data"]);
    Some(message["data"].clone())
}

/// A group with these members; its id.
async fn group(pool: &PgPool, members: &[&ApiUser], others: usize) -> String {
    let ids: Vec<_> = members.iter().map(|member| member.id.to_string()).collect();
    let id = number(
        pool,
        format!(
            "WITH made AS (INSERT INTO messenger.conversations (title, participant_count) VALUES ('group', {count}) RETURNING id),
                  members AS (
                      INSERT INTO messenger.participants (conversation_id, user_id)
                      SELECT made.id, u.id FROM made, (
                          SELECT unnest('{{{ids}}}'::bigint[]) AS id
                          UNION ALL (SELECT id FROM messenger.users WHERE username LIKE 'other%' LIMIT {others})
                      ) AS u)
             SELECT id FROM made",
            count = members.len() + others,
            ids = ids.join(","),
        ),
    );
    id.await.to_string()
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn typing_is_told_once_in_three_seconds_and_stored_nowhere(pool: PgPool) {
    let (_, channels) = with_redis(&pool, &redis_url());
    // With a limit, so that replicas count together.
    let limits = RateLimits { search_per_user: Limit::new(9, Duration::from_mins(1)), ..RateLimits::OFF };
    let config = || Config { channels: channels.clone(), limits, ..crate::support::config(&pool) };
    let (app, other_replica) = (App::start_with(config()).await, App::start_with(config()).await);
    let (john, jane, conversation) = app.pair(&pool).await;
    let bob = app.user(&pool, "bob").await;
    let with_bob = john.start("bob").await;
    let mut janes = Listener::start(&redis_url(), &channels.user(jane.id)).await;
    let mut johns = Listener::start(&redis_url(), &channels.user(john.id)).await;
    let mut bobs = Listener::start(&redis_url(), &channels.user(bob.id)).await;
    let before = Utc::now();
    let answer = types(&john, &conversation).expect(204).await;
    assert!(answer.body.is_empty());
    assert_common_headers(&answer);
    let typing = next_typing(&mut janes).await.unwrap();
    let expires: DateTime<Utc> = typing["expiresAt"].as_str().unwrap().parse().unwrap();
    let ahead = (expires - before).as_seconds_f64();
    assert!((5.0..8.0).contains(&ahead), "{ahead}");
    assert_eq!(typing["conversationId"], conversation);
    assert_eq!(typing["userId"], john.id.to_string());

    // Too soon, at any replica; but another user, and another conversation, count for themselves.
    types(&john, &conversation).expect(204).await;
    types(&john.at(&other_replica), &conversation).expect(204).await;
    types(&jane.at(&other_replica), &conversation).expect(204).await;
    types(&john, &with_bob).expect(204).await;
    assert_eq!(next_typing(&mut johns).await.unwrap()["userId"], jane.id.to_string());
    assert_eq!(next_typing(&mut bobs).await.unwrap()["conversationId"], with_bob);
    john.say(&conversation, "hi").await;
    assert_eq!(next_typing(&mut janes).await, None, "the message is next");
    tokio::time::sleep(Duration::from_millis(3_100).saturating_sub((Utc::now() - before).to_std().unwrap()))
        .await;
    types(&john.at(&other_replica), &conversation).expect(204).await;
    assert!(next_typing(&mut janes).await.is_some());

    assert_eq!(app.feed(jane.id).await.len(), 2, "the conversation and the message");
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.events").await, 2, "two conversations");
    assert_eq!(metric(&app, "messenger_api_published_ephemeral_events_total").await, Some(2));
    assert_eq!(metric(&app, "messenger_api_rate_limited_total").await.unwrap_or_default(), 0);
    app.stop().await;
    other_replica.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn typing_needs_a_conversation_of_the_caller(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let bob = app.user(&pool, "bob").await;
    for (user, id) in [(&bob, &*conversation), (&john, "999999"), (&john, "no-id")] {
        assert_problem(&types(user, id).send().await.unwrap(), 404, "Conversation not found");
    }
    let gone = app.login("jane").await;
    gone.call("POST", "/api/logout").expect(204).await;
    assert_problem(&types(&gone, &conversation).send().await.unwrap(), 401, "Unauthorized");
    types(&jane, &conversation).expect(204).await;
    let group = group(&pool, &[&john, &bob], 0).await;
    types(&bob, &group).expect(204).await;
    execute(&pool, format!("DELETE FROM messenger.participants WHERE user_id = {}", bob.id)).await;
    types(&bob, &group).expect(404).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn typing_does_not_reach_a_user_who_blocks_the_one_who_types(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let mut janes = Listener::start(&redis_url(), &channels.user(jane.id)).await;
    let mut johns = Listener::start(&redis_url(), &channels.user(john.id)).await;
    let group = group(&pool, &[&john, &jane], 0).await;
    let block = |method| jane.call(method, &format!("/api/blocks/{}", john.id)).expect(204);
    block("PUT").await;
    types(&john, &conversation).expect(204).await;
    // In a group, blocks hide nothing; and the one who blocks is heard.
    types(&john, &group).expect(204).await;
    assert_eq!(next_typing(&mut janes).await.unwrap()["conversationId"], group);
    types(&jane, &conversation).expect(204).await;
    assert_eq!(next_typing(&mut johns).await.unwrap()["conversationId"], conversation);
    block("DELETE").await;
    // The call during the block told nobody, so it does not count.
    types(&john, &conversation).expect(204).await;
    assert_eq!(next_typing(&mut janes).await.unwrap()["conversationId"], conversation);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn in_a_group_of_more_than_a_hundred_nobody_is_told_who_types(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    let names: Vec<_> = (0..99).map(|n| format!("other{n}")).collect();
    for name in &names {
        add_users(&pool, [name.as_str()]).await;
    }
    let mut janes = Listener::start(&redis_url(), &channels.user(jane.id)).await;
    let (large, largest) = (group(&pool, &[&john, &jane], 99).await, group(&pool, &[&john, &jane], 98).await);
    types(&john, &large).expect(204).await;
    types(&john, &largest).expect(204).await;
    assert_eq!(next_typing(&mut janes).await.unwrap()["conversationId"], largest);
    app.stop().await;
}
