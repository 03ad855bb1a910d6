//! Groups whose members come and go, while everything that can die dies: each stream is exactly its user's feed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use e2e::{
    Service, TestUser, World,
    ledger::{StoredFeed, assert_exact},
};
use futures_util::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use testkit::{
    servers::Redis,
    sse::{EventSource, ReconnectBy},
};

use crate::support::RETRY;

const USERS: usize = 8;
const GROUPS: usize = 3;
const WRITERS: usize = 6;
const STEPS: u64 = 90;

/// Users who change groups at random until they are told to stop.
struct Crowd {
    world: Arc<World>,
    apis: Vec<String>,
    users: Vec<TestUser>,
    groups: Vec<String>,
    stop: AtomicBool,
    done: AtomicU64,
}

impl Crowd {
    async fn write(self: Arc<Self>, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let mut sent = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let mut user = &self.users[random.random_range(0..USERS)];
            let other = &self.users[random.random_range(0..USERS)];
            let index = random.random_range(0..GROUPS);
            let group = format!("/api/conversations/{}", self.groups[index]);
            let count = self.done.fetch_add(1, Ordering::Relaxed);
            let member = format!("{group}/participants/{}", other.id);
            let kind = random.random_range(0..24);
            if (14..20).contains(&kind) && random.random_ratio(3, 4) {
                // Who made the group may do it.
                user = &self.users[index];
            }
            let (method, path, body) = match kind {
                20..24 if !sent.is_empty() => {
                    let (sender, message) = &sent[random.random_range(0..sent.len())];
                    user = *sender;
                    let body = json!({ "content": format!("edited {count}") });
                    (if random.random() { "PATCH" } else { "DELETE" }, String::clone(message), body)
                }
                0..12 => ("POST", format!("{group}/messages"), json!({ "content": format!("text {count}") })),
                12..14 => ("POST", format!("{group}/read_messages"), json!({})),
                14..17 => ("POST", format!("{group}/participants"), json!({ "username": other.name })),
                17 => ("DELETE", member, json!({})),
                18 => ("PATCH", member, json!({ "role": "owner" })),
                _ => ("PATCH", group.clone(), json!({ "title": format!("title {count}") })),
            };
            // A replica that is killed takes the answer with it; what it did is in the tables all the same.
            let api = &self.apis[random.random_range(0..self.apis.len())];
            let call = self.world.client.call(method, format!("{api}{path}")).bearer(&user.token).json(&body);
            if let Ok(answer) = call.send().await {
                assert!(answer.status < 500 || answer.status == 503, "{method} {path}: {}", answer.text());
                if answer.status == 201 && path.ends_with("/messages") {
                    sent.push((user, format!("{path}/{}", answer.json()["id"].as_str().unwrap())));
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn more(&self, steps: u64) {
        let wanted = self.done.load(Ordering::Relaxed) + steps;
        testkit::until("the crowd continues", || async { self.done.load(Ordering::Relaxed) >= wanted }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_changing_groups_get_exactly_their_feeds_whatever_dies() {
    let mut redis = Redis::start();
    let world = Arc::new(World::with_redis(redis.url()).await);
    let (mut one, two) = tokio::join!(world.api().ready(), world.api().ready());
    let gateway = |api: &Service| world.gateway(api.internal()).env("RECONCILE_SECONDS", 1).ready();
    let (mut a, b, mut c) = tokio::join!(gateway(&two), gateway(&two), gateway(&two));
    let mut users = Vec::new();
    for number in 0..USERS {
        users.push(world.user(&two, &format!("user{number}")).await);
    }
    let mut watching = Vec::new();
    for (number, user) in users.iter().enumerate() {
        let mut openings = vec![a.stream(user), b.stream(user), c.stream(user)];
        openings.rotate_left(number % 3);
        watching.push((user, EventSource::open(openings, ReconnectBy::Header, RETRY)));
    }
    join_all(watching.iter().map(|(_, browser)| browser.ready())).await;
    let mut groups = Vec::new();
    for number in 0..GROUPS {
        let names: Vec<&str> = (1..5).map(|step| users[(number + step) % USERS].name.as_str()).collect();
        let group = json!({ "title": "Team", "usernames": names });
        let url = two.url("/api/conversations");
        let made = world.client.post(url).bearer(&users[number].token).json(&group).expect(201).await.json();
        groups.push(made["id"].as_str().unwrap().to_owned());
    }

    let crowd = Arc::new(Crowd {
        apis: vec![one.url(""), two.url("")],
        world: world.clone(),
        users: users.clone(),
        groups: groups.clone(),
        stop: AtomicBool::new(false),
        done: AtomicU64::new(0),
    });
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let writers: Vec<_> =
        (0..WRITERS as u64).map(|n| tokio::spawn(crowd.clone().write(seed.wrapping_add(n)))).collect();
    crowd.more(STEPS).await;
    a.kill();
    crowd.more(STEPS).await;
    one.kill();
    crowd.more(STEPS).await;
    tokio::join!(a.restart(), one.restart());
    redis.kill();
    crowd.more(STEPS).await;
    redis.restart();
    crowd.more(STEPS).await;
    c.kill();
    one.kill();
    crowd.more(STEPS).await;
    tokio::join!(c.restart(), one.restart());
    crowd.more(STEPS).await;
    crowd.stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.expect("a writer does not fail");
    }

    // One more event for everybody, after which nothing old can come.
    let title = json!({ "title": "The end", "usernames": users[1..].iter().map(|user| &user.name).collect::<Vec<_>>() });
    let url = two.url("/api/conversations");
    world.client.post(url).bearer(&users[0].token).json(&title).expect(201).await;
    let mut kinds = std::collections::BTreeMap::<String, usize>::new();
    for (user, browser) in &watching {
        assert_exact(&world.sql, user.id, &user.name, browser).await;
        let feed = StoredFeed::read(&world.sql, user.id).await;
        feed.assert_without_gaps();
        for event in &feed.events {
            *kinds.entry(event.name.clone().unwrap_or_default()).or_default() += 1;
        }
        // From the event that says they joined to the one that says they left.
        for group in &groups {
            let mut is_in = false;
            for event in browser.record().ledger() {
                let data = event.json();
                let about = |member: &str| data[member] == json!(group);
                match event.name.as_deref() {
                    Some("conversation.created") if about("id") => is_in = true,
                    Some("conversation.updated") if about("id") => assert!(is_in, "{}: {event:?}", user.name),
                    Some("participant.left")
                        if about("conversationId") && data["userId"] == json!(user.id) =>
                    {
                        assert!(std::mem::take(&mut is_in), "{} left twice: {event:?}", user.name);
                    }
                    _ if about("conversationId") => {
                        assert!(is_in, "{} is told of a group of others: {event:?}", user.name);
                    }
                    _ => {}
                }
            }
            let members =
                world.client.get(two.url(&format!("/api/conversations/{group}"))).bearer(&user.token);
            let now = members.send().await.unwrap();
            assert_eq!(now.status == 200, is_in, "{} in {group}: {}", user.name, now.text());
        }
    }
    let of = |name: &str| kinds.get(name).copied().unwrap_or_default();
    for kind in [
        "",
        "message.sent",
        "participant.joined",
        "participant.left",
        "participant.updated",
        "conversation.updated",
        "message.updated",
        "message.deleted",
    ] {
        assert!(of(kind) > 0, "no event {kind:?} came up: {kinds:?}");
    }
    let moved: usize = watching.iter().map(|(_, browser)| browser.record().opened - 1).sum();
    assert!(moved > 0, "no stream had to move");
}
