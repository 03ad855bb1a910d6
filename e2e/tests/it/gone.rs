//! Gone means gone: a minute after a deletion or an edit the old text is nowhere, and with a group that everybody has left go its texts
//! and its title; with a user who is erased, all that they wrote, and their name. Looked for in a dump of the database, in Redis, in every log and trace, and in every answer and replay.

use std::time::{Duration, Instant};

use e2e::{Collector, Service, TestUser, World, world::WorldOptions};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use testkit::{
    http::Call,
    servers::{Postgres, Redis},
    soon,
};

use crate::support::{Two, ready, watch};

/// Deleted, and as many edited.
const MESSAGES: usize = 1_000;
const IN_GROUP: usize = 50;
/// By a user who is erased, in a direct conversation and in a group.
const ERASED: usize = 100;
/// In every text that must be gone. Others are to be found, or the search would prove nothing.
const MARKER: &str = "unspeakable";
const KEPT: &str = "presentable";
const AT_ONCE: usize = 8;

fn call(world: &World, api: &Service, user: &TestUser, method: &str, path: &str) -> Call {
    world.client.call(method, api.url(path)).bearer(&user.token)
}

async fn say(
    world: &World,
    api: &Service,
    user: &TestUser,
    conversation: &str,
    key: &str,
    text: &str,
) -> Value {
    let path = format!("/api/conversations/{conversation}/messages");
    let post = call(world, api, user, "POST", &path).header("idempotency-key", key);
    post.json(&json!({ "content": text })).expect(201).await.json()
}

/// Runs calls, some at the same time, and returns their results in order.
async fn all<T>(calls: impl IntoIterator<Item = impl Future<Output = T>>) -> Vec<T> {
    stream::iter(calls).buffered(AT_ONCE).collect().await
}

/// Every page of a conversation, as its reader gets it.
async fn pages(world: &World, api: &Service, user: &TestUser, conversation: &str) -> String {
    let (mut text, mut before) = (String::new(), String::new());
    loop {
        let path = format!("/api/conversations/{conversation}/messages?markRead=false&limit=100{before}");
        let answer = call(world, api, user, "GET", &path).expect(200).await;
        text.push_str(&answer.text());
        let page: Vec<Value> = serde_json::from_str(&answer.text()).unwrap();
        let Some(last) = page.last() else { return text };
        before = format!("&before={}", last["id"].as_str().unwrap());
    }
}

/// The whole feed, by the stream.
async fn replay(gateway: &Service, user: &TestUser, from: &str, events: usize) -> String {
    let mut replayed = gateway.stream(user).last_event_id(from).stream().await;
    let mut text = String::new();
    for _ in 0..=events {
        let event = soon("an event of the replay", replayed.event()).await.unwrap();
        text.push_str(&event.data);
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_and_replaced_texts_are_nowhere_a_minute_later() {
    let (redis, postgres) = (Redis::start(), Postgres::start());
    // Redis records every command, not only slow ones.
    redis.tell(&["CONFIG", "SET", "slowlog-max-len", "100000"]);
    redis.tell(&["CONFIG", "SET", "slowlog-log-slower-than", "0"]);
    let options = WorldOptions {
        database_url: Some(postgres.url()),
        redis: vec![("REDIS_URL", redis.url())],
        ..WorldOptions::default()
    };
    let (world, collector) = tokio::join!(World::with(options), Collector::start());
    let traced = |plan: e2e::service::Plan| {
        plan.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()).env("TRACES_PER_SECOND", 10_000)
    };
    let api = traced(world.api()).env("OTEL_TRACES_SAMPLER_ARG", 1).ready().await;
    let gateway = traced(world.gateway(api.internal())).ready().await;
    let two = Two::meet(&world, &api).await;
    let (john, jane, direct) = (&two.john, &two.jane, two.conversation.to_string());
    let start = ready(gateway.stream(jane)).await;
    let cursor = e2e::ledger::StoredFeed::read(&world.sql, jane.id).await.cursor(0);
    let tabs = [watch(&gateway, jane).await, watch(&gateway, john).await];
    // One that takes nothing: what it misses waits in the gateway, but not for long.
    let lagging = ready(gateway.stream(jane).tiny_receive_buffer()).await;

    let group = json!({ "usernames": [&jane.name], "title": format!("{MARKER} title") });
    let group = call(&world, &api, john, "POST", "/api/conversations").json(&group).expect(201).await;
    let group = group.json()["id"].as_str().unwrap().to_owned();
    let text = |what: &str, n: usize| format!("{MARKER} {what} {n} {}", "padding ".repeat(20));
    let say_many = async |conversation: &str, what: &str, many: usize| {
        let said = (0..many).map(async |n| {
            let message = say(&world, &api, john, conversation, &format!("{what}-{n}"), &text(what, n)).await;
            message["id"].as_str().unwrap().to_owned()
        });
        all(said).await
    };
    let erased = world.user(&api, &format!("{MARKER} mary")).await;
    let personal = [
        "INSERT INTO messenger.identities (issuer, subject, user_id) VALUES ('https://id.example', $2, $1)",
        "UPDATE messenger.users SET avatar_url = 'https://a.example/' || $2 WHERE id = $1",
    ];
    for row in personal {
        sqlx::query(row).bind(erased.id.0).bind(MARKER).execute(&world.sql).await.unwrap();
    }
    let mut erased_stream = ready(gateway.stream(&erased)).await;
    let erased_id = format!(r#""userId":"{}""#, erased.id);
    for to in
        [json!({ "username": jane.name }), json!({ "usernames": [&jane.name, &john.name], "title": KEPT })]
    {
        let made =
            call(&world, &api, &erased, "POST", "/api/conversations").json(&to).expect(201).await.json();
        let id = made["id"].as_str().unwrap();
        say(&world, &api, jane, id, &format!("kept-{id}"), KEPT).await;
        all((0..ERASED).map(|n| {
            let (key, text) = (format!("erased-{id}-{n}"), text("erased", n));
            let (world, api, erased) = (&world, &api, &erased);
            async move { say(world, api, erased, id, &key, &text).await }
        }))
        .await;
    }
    let deleted = say_many(&direct, "deleted", MESSAGES).await;
    let edited = say_many(&direct, "edited", MESSAGES).await;
    say_many(&group, "grouped", IN_GROUP).await;
    // Statistics of the planner are samples of texts.
    sqlx::query("ANALYZE").execute(&world.sql).await.unwrap();
    // A statement that fails for want of a lock: its text is a parameter.
    let mut holder = world.sql.begin().await.unwrap();
    sqlx::query("SELECT FROM messenger.conversations FOR UPDATE").execute(&mut *holder).await.unwrap();
    let path = format!("/api/conversations/{direct}/messages/{}", edited[0]);
    let blocked = call(&world, &api, john, "PATCH", &path);
    blocked.json(&json!({ "content": format!("{MARKER} never written") })).expect(503).await;
    holder.rollback().await.unwrap();

    let one = |id: &String| format!("/api/conversations/{direct}/messages/{id}");
    all(deleted.iter().map(|id| call(&world, &api, john, "DELETE", &one(id)).expect(204))).await;
    all(edited.iter().enumerate().map(|(n, id)| {
        let body = json!({ "content": format!("{KEPT} {n}") });
        call(&world, &api, john, "PATCH", &one(id)).json(&body).expect(200)
    }))
    .await;
    // Repeats of sends, whose answers were lost.
    let again = say(&world, &api, john, &direct, "deleted-0", &text("deleted", 0)).await;
    assert_eq!(again["content"], "");
    let again = say(&world, &api, john, &direct, "edited-0", &text("edited", 0)).await;
    assert_eq!(again["content"], format!("{KEPT} 0"));
    for user in [jane, john] {
        let path = format!("/api/conversations/{group}/participants/{}", user.id);
        call(&world, &api, john, "DELETE", &path).expect(204).await;
    }
    let erase = world.client.call("DELETE", api.url(&format!("/api/users/{}", erased.id)));
    erase.bearer(&world.service_token("crm", "admin").await).expect(204).await;
    let gone_at = Instant::now() + Duration::from_secs(60);
    // Created; the group and its leaving; sent, then deleted or edited. John was in the group of the erased user alone.
    for (tab, erased) in tabs.iter().zip([2 * ERASED, ERASED]) {
        tab.until("everything has arrived", |record| {
            record.named("message.deleted").count() == MESSAGES + erased
                && record.named("message.updated").count() == MESSAGES
                && record.named("participant.left").any(|event| event.data.contains(&erased_id))
        })
        .await;
    }
    let (received, _) = soon("the end of the erased user's stream", erased_stream.rest()).await;
    let last = received.last().unwrap();
    assert!(last.is("goodbye") && last.json()["reason"] == "revoked", "{last:?}");

    tokio::time::sleep_until(gone_at.into()).await;
    let mut found = Vec::new();
    let mut search = |whom: &str, text: &str| {
        assert!(!text.is_empty(), "nothing of {whom} was searched");
        if let Some(at) = text.find(MARKER) {
            let from = text[..at].char_indices().rev().nth(80).map_or(0, |(index, _)| index);
            found.push(format!("{whom}: …{}", text[from..].chars().take(200).collect::<String>()));
        }
    };
    let dump = postgres.dump(&world.database_url());
    assert!(dump.contains(KEPT), "a text that is there is found");
    search("the dump of the database", &dump);
    search("the log of Postgres", &postgres.log());
    search("Redis", &redis.dump());
    search("the collector", &collector.text());
    for service in [&api, &gateway] {
        search(&format!("the log of {}", service.log().name), &service.log().lines().join("\n"));
    }
    let statistics =
        "SELECT coalesce(string_agg(s::text, ''), 'none') FROM pg_stats AS s WHERE schemaname = 'messenger'";
    let statistics: String = sqlx::query_scalar(statistics).fetch_one(&world.sql).await.unwrap();
    search("the statistics of Postgres", &statistics);
    let events = usize::try_from(e2e::ledger::StoredFeed::read(&world.sql, jane.id).await.head).unwrap();
    for user in [john, jane] {
        let shown = pages(&world, &api, user, &direct).await;
        assert!(shown.contains(KEPT), "a text that is there is shown");
        search("the pages", &shown);
        for path in ["/api/conversations".to_owned(), format!("/api/conversations/{direct}")] {
            search(&path, &call(&world, &api, user, "GET", &path).expect(200).await.text());
        }
    }
    let replayed = replay(&gateway, jane, &cursor, events).await;
    assert!(replayed.contains(KEPT), "a text that is there is replayed");
    search("the replay", &replayed);
    for seq in (1..=events).step_by(97) {
        for service in [&api, &gateway] {
            let url = format!("http://{}/admin/explain?user={}&seq={seq}", service.ops(), jane.id);
            search("an explanation", &world.client.get(url).send().await.unwrap().text());
        }
    }
    assert_eq!(found, Vec::<String>::new());
    // Nothing waits in the gateway for the stream that takes nothing.
    assert_eq!(gateway.metric("messenger_gateway_replay_buffer_bytes").await, 0.0);
    drop((start, lagging));
}
