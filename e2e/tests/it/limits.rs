//! Limits hold over processes and do not affect normal use.

use e2e::{Service, User, World};
use futures_util::future::join_all;
use protocol::ids::ConversationId;
use serde_json::json;
use testkit::{servers::Redis, until};

use crate::support::browser;

/// Sends messages to these replicas in turn; returns how many were accepted. The others were rate limited.
async fn send(
    world: &World,
    apis: &[&Service],
    from: &User,
    conversation: ConversationId,
    times: usize,
) -> usize {
    let mut taken = 0;
    for turn in 0..times {
        let url = apis[turn % apis.len()].url(&format!("/api/conversations/{conversation}/messages"));
        let call = world.client.post(url).bearer(&from.token).json(&json!({ "content": world.text() }));
        let answer = call.send().await.unwrap();
        match answer.status {
            201 => taken += 1,
            429 => assert!(answer.header("retry-after").is_some()),
            other => panic!("{other}: {}", answer.text()),
        }
    }
    taken
}

async fn alone(apis: &[&Service]) -> usize {
    let counts =
        join_all(apis.iter().map(|api| api.metric("messenger_api_rate_limit_local_decisions_total"))).await;
    counts.iter().sum::<f64>() as usize
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rate_limits_are_shared_while_redis_is_up() {
    const BUDGET: usize = 20;
    let mut redis = Redis::start();
    let world = World::with_redis(redis.url()).await;
    let plan = || world.api().env("LIMIT_SEND_PER_USER", format!("{BUDGET}/86400"));
    let (one, two) = tokio::join!(plan().ready(), plan().ready());
    let apis = [&one, &two];
    for api in apis {
        until("limits are shared", || async { api.metric("messenger_api_rate_limits_shared").await == 1.0 })
            .await;
    }
    let (john, jane) = (world.user(&one, "john").await, world.user(&one, "jane").await);
    let conversation = world.conversation(&one, &john, &jane).await;
    let before = alone(&apis).await;
    let taken = send(&world, &apis, &john, conversation, 3 * BUDGET).await;
    // On a slow machine, each local decision may let one more through.
    let late = alone(&apis).await - before;
    assert!((BUDGET..=BUDGET + late).contains(&taken), "{taken} taken, {late} decided alone");

    redis.kill();
    assert_eq!(send(&world, &apis, &jane, conversation, 4 * BUDGET).await, 2 * BUDGET);
    redis.restart();
    for api in apis {
        until("limits are shared again", || async {
            api.metric("messenger_api_rate_limits_shared").await == 1.0
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_streams_may_reconnect_together_from_one_address() {
    const USERS: i64 = 600;
    let world = World::new().await;
    let api = world.api().ready().await;
    let as_shipped = world.gateway(api.internal()).without("LIMIT_OPEN_PER_USER");
    let mut gateway = as_shipped.without("LIMIT_OPEN_PER_ADDRESS").ready().await;
    let users = world.many(USERS).await;
    let watching: Vec<_> = users.iter().map(|user| browser(gateway.stream(user))).collect();
    join_all(watching.iter().map(testkit::sse::EventSource::ready)).await;
    gateway.restart().await;
    until("all are back", || async { gateway.metric("messenger_gateway_streams").await == USERS as f64 })
        .await;
    assert_eq!(gateway.metric("messenger_gateway_streams_rejected_total").await, 0.0);
}
