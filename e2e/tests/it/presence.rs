//! Who is online, from streams that open and end to what partners see, and after crashes.

use std::time::Duration;

use e2e::{Service, TestUser, World};
use serde_json::{Value, json};
use testkit::{
    cluster::Cluster,
    servers::Redis,
    sse::{EventSource, Stream},
};
use tokio::time::{Instant, sleep, timeout};

use crate::support::{ready, watch};

/// A state is wrong for so long at most, and a moment for the test itself.
const BOUND: Duration = Duration::from_secs(30);

async fn partners(world: &World, api: &Service, one: &TestUser, other: &TestUser) {
    let conversation = world.conversation(api, one, other).await;
    world.say(api, one, conversation).await;
    world.say(api, other, conversation).await;
}

/// As `GET /api/presence` says it: the online ones of these users.
async fn online(world: &World, api: &Service, reader: &TestUser, users: &[&TestUser]) -> Vec<bool> {
    let query: Vec<_> = users.iter().map(|user| format!("userId={}", user.id)).collect();
    let call = world.client.get(api.url(&format!("/api/presence?{}", query.join("&"))));
    let shown = call.bearer(&reader.token).expect(200).await.json();
    let shown = shown.as_array().unwrap().clone();
    assert_eq!(shown.len(), users.len(), "{shown:?}");
    shown.iter().map(|shown| shown["online"].as_bool().unwrap()).collect()
}

/// What the stream says of this user, from now on: the next `presence`, within the bound.
async fn next_presence(stream: &mut Stream, user: &TestUser) -> Value {
    let next = async {
        loop {
            let event = stream.event().await.expect("the stream is open");
            if event.is("presence") && event.json()["userId"] == json!(user.id) {
                assert_eq!(event.id, None);
                return event.json();
            }
        }
    };
    timeout(BOUND, next).await.expect("presence is told in time")
}

async fn until_online(world: &World, api: &Service, reader: &TestUser, user: &TestUser, wanted: bool) {
    let begun = Instant::now();
    while online(world, api, reader, &[user]).await != [wanted] {
        assert!(begun.elapsed() < BOUND, "{} is not online={wanted} in time", user.name);
        sleep(Duration::from_millis(200)).await;
    }
}

fn told(browser: &EventSource, user: &TestUser) -> Vec<bool> {
    let record = browser.record();
    let of_user = record.named("presence").filter(|event| event.json()["userId"] == json!(user.id));
    of_user.map(|event| event.json()["online"].as_bool().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partners_are_told_who_comes_and_goes_and_nobody_else() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let mut users = Vec::new();
    for name in ["john", "jane", "stranger", "blocker", "blocked"] {
        users.push(world.user(&api, name).await);
    }
    let [john, jane, stranger, blocker, blocked] = &users[..] else { unreachable!() };
    for other in [jane, blocker, blocked] {
        partners(&world, &api, john, other).await;
    }
    // The stranger has not answered.
    let with_stranger = world.conversation(&api, john, stranger).await;
    world.say(&api, john, with_stranger).await;
    for (from, whom) in [(blocker, john), (john, blocked)] {
        let url = api.url(&format!("/api/blocks/{}", whom.id));
        world.client.call("PUT", url).bearer(&from.token).expect(204).await;
    }
    let mut janes = ready(gateway.stream(jane)).await;
    let others =
        [watch(&gateway, stranger).await, watch(&gateway, blocker).await, watch(&gateway, blocked).await];

    let begun = Instant::now();
    let johns = ready(gateway.stream(john)).await;
    let told_online = next_presence(&mut janes, john).await;
    assert_eq!(told_online, json!({ "userId": john.id, "online": true, "lastSeenAt": null }));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(online(&world, &api, jane, &[john]).await, [true]);

    // A page that is reloaded, also later than the next report.
    drop(johns);
    sleep(Duration::from_secs(3)).await;
    let johns = ready(gateway.stream(john)).await;
    sleep(Duration::from_secs(12)).await;
    drop(johns);
    let gone = Instant::now();
    let told_offline = next_presence(&mut janes, john).await;
    assert_eq!(told_offline["online"], false, "the reload was not told");
    assert!(told_offline["lastSeenAt"].is_string());
    assert!((9..30).contains(&gone.elapsed().as_secs()), "{:?}", gone.elapsed());
    let url = api.url(&format!("/api/presence?userId={}", john.id));
    let shown = world.client.get(&url).bearer(&jane.token).expect(200).await.json();
    assert_eq!(shown[0]["online"], false);
    assert!(shown[0]["lastSeenAt"].is_string());
    for other in &others {
        assert_eq!(told(other, john).len(), 0);
    }
    for reader in [stranger, blocker, blocked] {
        let shown = world.client.get(&url).bearer(&reader.token).expect(200).await.json();
        assert_eq!(shown, json!([]), "{}", reader.name);
    }

    // Who does not share it is never shown.
    let sharing = async |shares: bool| {
        let call = world.client.call("PATCH", api.url("/api/auth_user")).bearer(&john.token);
        call.json(&json!({ "sharesPresence": shares })).expect(200).await;
    };
    sharing(false).await;
    assert_eq!(next_presence(&mut janes, john).await["lastSeenAt"], json!(null));
    let _johns = ready(gateway.stream(john)).await;
    sleep(Duration::from_secs(3)).await;
    assert_eq!(world.client.get(&url).bearer(&jane.token).expect(200).await.json(), json!([]));
    sharing(true).await;
    assert_eq!(next_presence(&mut janes, john).await["online"], true, "and nothing before it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_of_a_killed_gateway_leave_unless_they_are_elsewhere() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let mut doomed = world.gateway(api.internal()).ready().await;
    let (jane, john, bob) =
        (world.user(&api, "jane").await, world.user(&api, "john").await, world.user(&api, "bob").await);
    partners(&world, &api, &jane, &john).await;
    partners(&world, &api, &jane, &bob).await;
    let browser = watch(&gateway, &jane).await;
    let mut janes = ready(gateway.stream(&jane)).await;
    let _johns = ready(doomed.stream(&john)).await;
    let _bobs = (ready(doomed.stream(&bob)).await, ready(gateway.stream(&bob)).await);
    assert_eq!(next_presence(&mut janes, &john).await["online"], true);
    until_online(&world, &api, &jane, &bob, true).await;
    sleep(Duration::from_secs(2)).await;
    doomed.kill();
    assert_eq!(next_presence(&mut janes, &john).await["online"], false);
    assert_eq!(online(&world, &api, &jane, &[&john, &bob]).await, [false, true]);
    sleep(Duration::from_secs(3)).await;
    assert!(told(&browser, &bob).iter().all(|online| *online), "bob has never left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leaves_while_redis_is_away_is_told_afterwards() {
    let mut redis = Redis::start();
    let world = World::with_redis(redis.url()).await;
    let (api, gateway) = world.pair().await;
    let (jane, john, bob) =
        (world.user(&api, "jane").await, world.user(&api, "john").await, world.user(&api, "bob").await);
    partners(&world, &api, &jane, &john).await;
    partners(&world, &api, &jane, &bob).await;
    let browser = watch(&gateway, &jane).await;
    let johns = ready(gateway.stream(&john)).await;
    let _bobs = ready(gateway.stream(&bob)).await;
    until_online(&world, &api, &jane, &john, true).await;
    until_online(&world, &api, &jane, &bob, true).await;
    redis.kill();
    drop(johns);
    let url = api.url(&format!("/api/presence?userId={}", john.id));
    world.client.get(&url).bearer(&jane.token).expect(503).await;
    sleep(Duration::from_secs(13)).await;
    // It returns empty.
    redis.restart();
    let begun = Instant::now();
    while told(&browser, &john).last() != Some(&false) {
        assert!(begun.elapsed() < BOUND, "jane is not told in time");
        sleep(Duration::from_millis(200)).await;
    }
    until_online(&world, &api, &jane, &bob, true).await;
    assert_eq!(online(&world, &api, &jane, &[&john]).await, [false]);
    assert!(told(&browser, &bob).iter().all(|online| *online), "bob has never left");
}

/// Two new partners see each other come and go, on these services.
pub(crate) async fn assert_presence_works(world: &World, api: &Service, gateway: &Service, name: &str) {
    let jane = world.user(api, &format!("{name}jane")).await;
    let john = world.user(api, &format!("{name}john")).await;
    partners(world, api, &jane, &john).await;
    let mut janes = ready(gateway.stream(&jane)).await;
    let johns = ready(gateway.stream(&john)).await;
    assert_eq!(next_presence(&mut janes, &john).await["online"], true);
    assert_eq!(online(world, api, &jane, &[&john]).await, [true]);
    drop(johns);
    assert_eq!(next_presence(&mut janes, &john).await["online"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presence_works_on_a_cluster_and_follows_its_slots() {
    let cluster = Cluster::start();
    let settings = [("REDIS_TOPOLOGY", "cluster".to_owned()), ("REDIS_URL", cluster.urls())];
    let world = World::with_redis_settings(settings).await;
    let (api, gateway) = world.pair().await;
    assert_presence_works(&world, &api, &gateway, "first").await;
    let key = format!("{}presence:gateways", world.prefix());
    cluster.move_slot_of(&key, (cluster.owner(&key) + 1) % cluster.nodes.len());
    assert_presence_works(&world, &api, &gateway, "second").await;

    let (jane, john) = (world.user(&api, "jane").await, world.user(&api, "john").await);
    partners(&world, &api, &jane, &john).await;
    let mut doomed = world.gateway(api.internal()).ready().await;
    let mut janes = ready(gateway.stream(&jane)).await;
    let _johns = ready(doomed.stream(&john)).await;
    assert_eq!(next_presence(&mut janes, &john).await["online"], true);
    doomed.kill();
    assert_eq!(next_presence(&mut janes, &john).await["online"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_reports_nothing_while_presence_is_off() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let off = world.gateway(api.internal()).env("PRESENCE", "false").ready().await;
    let on = world.gateway(api.internal()).ready().await;
    let (jane, john) = (world.user(&api, "jane").await, world.user(&api, "john").await);
    partners(&world, &api, &jane, &john).await;
    let _johns = ready(off.stream(&john)).await;
    let _janes = ready(on.stream(&jane)).await;
    until_online(&world, &api, &john, &jane, true).await;
    assert_eq!(online(&world, &api, &jane, &[&john]).await, [false]);
    assert_eq!(off.metric("messenger_gateway_presence_reports_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presence_is_right_again_after_a_wiped_redis_and_a_restarted_api() {
    let redis = Redis::start();
    let world = World::with_redis(redis.url()).await;
    let (mut api, gateway) = world.pair().await;
    let (jane, john, bob) =
        (world.user(&api, "jane").await, world.user(&api, "john").await, world.user(&api, "bob").await);
    partners(&world, &api, &jane, &john).await;
    partners(&world, &api, &jane, &bob).await;
    let mut janes = ready(gateway.stream(&jane)).await;
    let johns = ready(gateway.stream(&john)).await;
    let bobs = ready(gateway.stream(&bob)).await;
    until_online(&world, &api, &jane, &john, true).await;
    until_online(&world, &api, &jane, &bob, true).await;

    redis.command(&["FLUSHALL"]).unwrap();
    assert_eq!(online(&world, &api, &jane, &[&john, &bob]).await, [false, false], "it is lost");
    until_online(&world, &api, &jane, &john, true).await;
    until_online(&world, &api, &jane, &bob, true).await;

    api.restart().await;
    api.until_ready().await;
    assert_eq!(online(&world, &api, &jane, &[&john, &bob]).await, [true, true], "nothing is lost");
    // Who leaves while api is away, longer than the lease, is told afterwards, and nobody else.
    let browser = watch(&gateway, &jane).await;
    api.kill();
    drop(johns);
    sleep(Duration::from_secs(25)).await;
    api.restart().await;
    api.until_ready().await;
    loop {
        if next_presence(&mut janes, &john).await["online"] == false {
            break;
        }
    }
    assert_eq!(online(&world, &api, &jane, &[&john, &bob]).await, [false, true]);
    sleep(Duration::from_secs(3)).await;
    assert_eq!(told(&browser, &bob).iter().find(|online| !**online), None, "bob has never left");
    drop(bobs);
}
