//! Processes die and links fail at the worst moment: messages may be late, none is lost.

use std::{sync::Arc, time::Duration};

use e2e::{
    Service, World,
    ledger::{StoredFeed, assert_exact},
};
use futures_util::future::join_all;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use testkit::{
    proxy::Proxy,
    servers::{Postgres, Redis},
    sse::Block,
    until,
};

use crate::support::{
    Busy, Crowd, Traffic, Two, assert_all_exact, assert_stored, assert_stored_once, browser, start_in,
    until_metric, until_redis_is_healthy, watch,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn message_arrives_if_api_dies_before_publishing() {
    let redis = Redis::start();
    let dead_link = Proxy::start(redis.address()).await;
    let world = World::with_redis(redis.url()).await;
    let behind = format!("redis://{}/", dead_link.address());
    let (well, mut doomed) = tokio::join!(world.api().ready(), world.api().env("REDIS_URL", behind).ready());
    let gateway = world.gateway(well.internal()).env("RECONCILE_SECONDS", 1).ready().await;
    let two = Two::meet(&world, &well).await;
    let jane = watch(&gateway, &two.jane).await;

    dead_link.silence();
    let posted = world.say(&doomed, &two.john, two.conversation).await;
    doomed.kill();

    assert_exact(&world.sql, two.jane.id, "jane", &jane).await;
    assert_eq!(jane.record().ledger().next_back().unwrap().json()["id"], posted["id"]);
    assert!(
        gateway.metric("messenger_gateway_reconcile_recovered_feeds_total").await >= 1.0,
        "Redis did not bring it"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unpublished_event_arrives_alone_or_before_the_next() {
    let (world, api, gateway, two) =
        start_in(World::new().await, |gateway| gateway.env("RECONCILE_SECONDS", 1)).await;
    let jane = watch(&gateway, &two.jane).await;
    let session = world.claims(&two.john).sid;
    let commit = || async {
        let post = sqlx::query("SELECT messenger.post_message($1, $2, $3, $4, NULL, NULL, NULL, NULL)");
        let post =
            post.bind(session.unwrap().0).bind(two.john.id.0).bind(two.conversation.0).bind(world.text());
        post.execute(&world.sql).await.unwrap();
    };
    commit().await;
    assert_exact(&world.sql, two.jane.id, "jane", &jane).await;
    // A published event after unpublished ones shows the gap.
    for _ in 0..5 {
        commit().await;
        commit().await;
        two.say(&world, &api, 1).await;
    }
    assert_exact(&world.sql, two.jane.id, "jane", &jane).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_killed_gateway_resume_elsewhere_exactly() {
    let world = Arc::new(World::new().await);
    let api = world.api().ready().await;
    let gateway = || world.gateway(api.internal()).ready();
    let (mut a, b, mut c) = tokio::join!(gateway(), gateway(), gateway());
    let crowd = Crowd::gather(&world, &api, 6).await;
    let watching = crowd.watch(&[&a, &b, &c]).await;
    let traffic = Traffic::start(&world, &[&api], &crowd.lines, Duration::from_millis(20));
    traffic.more(60).await;
    a.kill();
    traffic.more(60).await;
    c.kill();
    traffic.more(60).await;
    c.restart().await;
    traffic.more(60).await;
    traffic.stop().await;
    assert_all_exact(&world, &api, &crowd.lines, &watching).await;
    let moved = watching.iter().filter(|(_, browser)| browser.record().opened > 1).count();
    assert!(moved >= 4, "only {moved} of 6 clients had to move");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_reconnects_is_answered_exactly() {
    let world = Arc::new(World::new().await);
    let api = world.api().ready().await;
    let (mut doomed, other) = tokio::join!(
        world.gateway(api.internal()).ready(),
        world.gateway(api.internal()).env("MAX_STREAMS_PER_USER", 100).ready()
    );
    let crowd = Crowd::gather(&world, &api, 10).await;
    let watching = crowd.watch_first(&[&doomed, &other], 30).await;
    let traffic = Traffic::start(&world, &[&api], &crowd.lines, Duration::from_millis(100));
    traffic.more(50).await;
    doomed.kill();
    traffic.more(100).await;
    traffic.stop().await;
    assert_all_exact(&world, &api, &crowd.lines, &watching).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_users_than_one_batch_are_subscribed_and_resumed() {
    const USERS: i64 = 1_100; // Batches are 512 and 1,000.
    let most = getrlimit(Resource::RLIMIT_NOFILE).unwrap().1;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let redis = Redis::start();
    let world = World::with_redis(redis.url()).await;
    let api = world.api().ready().await;
    let plan = world.gateway(api.internal()).env("RECONCILE_SECONDS", 1);
    // Limits on new streams as shipped: all may reconnect together from one address.
    let plan = plan.without("LIMIT_OPEN_PER_USER").without("LIMIT_OPEN_PER_ADDRESS");
    let mut gateway = plan.ready().await;
    let users = world.many(USERS).await;
    let watching: Vec<_> = users.iter().map(|user| (user, browser(gateway.stream(user)))).collect();
    join_all(watching.iter().map(|(_, browser)| browser.ready())).await;
    let delivered = async || {
        let append = "WITH message AS (
                INSERT INTO messenger.messages (conversation_id, number, sender_id, content)
                SELECT 0, count(*) + 1, 0, 'to all' FROM messenger.messages WHERE conversation_id = 0 RETURNING id
            )
            SELECT messenger.append_to_feed(users.id, message.id, 1) FROM messenger.users, message";
        sqlx::query(append).execute(&world.sql).await.unwrap();
        for (user, browser) in &watching {
            assert_exact(&world.sql, user.id, &user.name, browser).await;
        }
    };
    let subscribed = async |gateway: &Service| {
        until_metric(gateway, "messenger_gateway_users", USERS as f64).await;
        until_redis_is_healthy(gateway).await;
    };
    subscribed(&gateway).await;
    delivered().await;
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).unwrap();
    delivered().await;
    subscribed(&gateway).await;
    gateway.restart().await;
    delivered().await;
    subscribed(&gateway).await;
    delivered().await;
    let opened: Vec<_> = watching.iter().map(|(_, browser)| browser.record().opened).collect();
    assert!(opened.iter().all(|opened| *opened == 2), "each came back once: {:?}", opened.iter().max());
    assert_eq!(gateway.metric("messenger_gateway_streams_rejected_total").await, 0.0);
}

async fn until_a_backfill_fails(gateway: &Service) {
    let failed = || gateway.metric("messenger_gateway_backfill_requests_failed_total");
    let before = failed().await;
    until("a backfill request fails", || async { failed().await > before }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn live_events_continue_while_the_internal_listener_is_down() {
    let redis = Redis::start();
    let world = World::with_redis(redis.url()).await;
    let lossy = Proxy::start(redis.address()).await;
    let lossy_url = format!("redis://{}/", lossy.address());
    let (api, unheard) = tokio::join!(world.api().ready(), world.api().env("REDIS_URL", lossy_url).ready());
    let link = Proxy::start(api.internal()).await;
    let gateway = world.gateway(link.address()).env("RECONCILE_SECONDS", 1).ready().await;
    let two = Two::meet(&world, &api).await;
    let jane = watch(&gateway, &two.jane).await;

    for silent in [false, true] {
        if silent {
            link.silence();
        } else {
            link.refuse();
        }
        // Contiguous events need no answer.
        two.say(&world, &api, 5).await;
        assert_exact(&world.sql, two.jane.id, "jane, the link away", &jane).await;
        // A new stream gets its head immediately and its position later.
        let mut new = gateway.stream(&two.jane).stream().await;
        assert!(matches!(new.block().await, Ok(Block::Retry(_))));
        // An event that is not published, and one after it: there is a gap, and the rest waits.
        lossy.silence();
        world.say(&unheard, &two.john, two.conversation).await;
        two.say(&world, &api, 3).await;
        until_a_backfill_fails(&gateway).await;
        assert_eq!(jane.record().opened, 1, "the stream stays open");

        link.resume();
        lossy.resume();
        assert_exact(&world.sql, two.jane.id, "jane, the link back", &jane).await;
        new.named("ready").await;
    }
    assert_eq!(jane.record().opened, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_opened_while_api_is_away_is_whole_once_it_is_back() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let link = Proxy::start(api.internal()).await;
    let gateway = world.gateway(link.address()).ready().await;
    let two = Two::meet(&world, &api).await;
    two.say(&world, &api, 3).await;
    let cursor = StoredFeed::read(&world.sql, two.jane.id).await.head_cursor();
    let desk = watch(&gateway, &two.jane).await;
    link.silence();
    let back = browser(gateway.stream(&two.jane).last_event_id(&cursor));
    back.until("the stream is open", |record| record.open).await;
    // The next event follows the cursor, but the session is not confirmed.
    two.say(&world, &api, 3).await;
    assert_exact(&world.sql, two.jane.id, "jane", &desk).await;
    assert_eq!(back.record().events.len(), 0);
    link.resume();
    assert_exact(&world.sql, two.jane.id, "jane", &back).await;
    two.say(&world, &api, 3).await;
    assert_exact(&world.sql, two.jane.id, "jane", &back).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_link_to_api_delivers_no_partial_event() {
    let world = World::with_redis("redis://127.0.0.1:1/".into()).await;
    let api = world.api().ready().await;
    let link = Proxy::start(api.internal()).await;
    // Everything comes by backfill, and its answers break off.
    let gateway = world.gateway(link.address()).ready().await;
    let busy = Busy::of(world, vec![api], vec![gateway]).await;
    let traffic = busy.traffic();
    for bytes in [100, 900, 5_000, 20_000] {
        link.cut_after(bytes);
        link.cut();
        traffic.more(25).await;
    }
    link.resume();
    traffic.stop().await;
    busy.assert_exact().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_crash_under_traffic_loses_no_accepted_message() {
    let mut postgres = Postgres::start();
    let world = World::with_postgres(postgres.url()).await;
    let (api, gateway) = world.pair().await;
    let busy = Busy::of(world, vec![api], vec![gateway]).await;
    let traffic = busy.traffic();
    for _ in 0..2 {
        traffic.more(60).await;
        postgres.kill();
        postgres.restart();
    }
    traffic.more(60).await;
    let accepted = traffic.stop().await;
    busy.assert_exact().await;
    assert_stored(&busy.world, &accepted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broken_link_to_postgres_keeps_streams_open_and_exact() {
    let postgres = Postgres::start();
    let link = Proxy::start(postgres.address()).await;
    let world = World::with_postgres(postgres.url()).await;
    let behind = world.database_url().replace(&postgres.address().to_string(), &link.address().to_string());
    let api = world.api().env("DATABASE_URL", behind).ready().await;
    let gateway = world.gateway(api.internal()).env("RECONCILE_SECONDS", 1).ready().await;
    let busy = Busy::of(world, vec![api], vec![gateway]).await;
    let traffic = busy.traffic();
    traffic.more(60).await;

    link.silence();
    let mut new = busy.gateways[0].stream(&busy.crowd.users[0]).stream().await;
    assert!(matches!(new.block().await, Ok(Block::Retry(_))), "the head needs no database");
    until_a_backfill_fails(&busy.gateways[0]).await;
    link.resume();
    new.named("ready").await;
    traffic.more(60).await;

    // Whether a commit happened is unknown when the link breaks; the idempotency key decides.
    for _ in 0..15 {
        link.cut();
        traffic.more(10).await;
    }
    let accepted = traffic.stop().await;
    busy.assert_exact().await;
    assert_stored_once(&busy.world, &accepted, busy.crowd.lines.len()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_was_frozen_goes_on_exactly() {
    let (world, api, mut gateway, two) =
        start_in(World::new().await, |gateway| gateway.env("RECONCILE_SECONDS", 1)).await;
    let world = Arc::new(world);
    let watching = [(two.jane.clone(), watch(&gateway, &two.jane).await)];
    let line = [(two.john.clone(), two.conversation)];
    let traffic = Traffic::start(&world, &[&api], &line, Duration::from_millis(2));
    traffic.more(20).await;
    gateway.freeze();
    traffic.more(200).await;
    gateway.thaw();
    traffic.more(20).await;
    traffic.stop().await;
    assert_all_exact(&world, &api, &line, &watching).await;
    let feed = StoredFeed::read(&world.sql, two.jane.id).await;
    feed.assert_without_gaps();
}
