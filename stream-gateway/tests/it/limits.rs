//! Admission, rate limits, replaced streams; and permits that are released however a stream ends.

use std::time::{Duration, Instant};

use protocol::channels::Channels;
use service_kit::limiter::{self, Limit};
use stream_gateway::config::Opening;
use testkit::{
    PATIENCE, soon,
    sse::{self, Stream},
};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::support::{
    EPOCH, GatewayWorld, RETRY_LATER, Raw, Setup, all_receive, assert_retry, distinct, goodbye, open_all,
    ready, receives_only_a_goodbye,
};

/// 200, a long `retry` and `goodbye {busy}`, and nothing else.
async fn assert_busy(stream: &mut Stream) {
    assert_eq!(receives_only_a_goodbye(stream, "busy").await["reconnect"], true);
    assert_retry(stream, RETRY_LATER);
}

/// The permit is released a moment after its stream has ended.
async fn until_admitted(opening: &sse::StreamRequest) -> Stream {
    soon("a permit is free", async {
        loop {
            let mut stream = opening.stream().await;
            if stream.next().await.is("ready") {
                return stream;
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_with_too_many_streams_loses_the_oldest() {
    let world = Setup::config(|config| config.delivery.streams_per_user = 2).start().await;
    let (user, other) = (world.user(3), world.user(3));
    let phone = world.another_session(user.id);
    let mut others = world.joined(&other).await;
    let mut first = world.joined(&user).await;
    let mut second = world.joined(&phone).await;
    let mut third = world.joined(&user).await;
    assert_eq!(goodbye(&mut first, "replaced").await["reconnect"], true);
    assert_retry(&first, RETRY_LATER);
    let mut fourth = world.joined(&user).await;
    goodbye(&mut second, "replaced").await;
    world.say(&user, 1).await;
    world.say(&other, 1).await;
    all_receive([&mut third, &mut fourth, &mut others], 4..=4).await;
    world.until_ended("replaced", 2).await;
    world.leaves_nothing((first, second, third, fourth, others)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_process_is_busy_until_a_permit_is_released() {
    let world = Setup::config(|config| config.admission.streams = 3).start().await;
    let user = world.user(3);
    let mut streams = vec![world.joined(&user).await, world.joined(&user).await, world.joined(&user).await];
    let mut retries = Vec::new();
    for _ in 0..10 {
        let mut refused = world.stream(&user).stream().await;
        assert_busy(&mut refused).await;
        retries.push(refused.retry);
    }
    assert!(distinct(retries) > 5, "those who were refused together do not come back together");
    assert_eq!(world.rejected("streams").await, 10);
    for _ in 0..3 {
        drop(streams.remove(0));
        streams.push(until_admitted(&world.stream(&user)).await);
    }
    world.say(&user, 1).await;
    all_receive(&mut streams, 4..=4).await;
    world.ends(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_behind_a_trusted_proxy_are_distinguished() {
    let world = Setup::config(|config| {
        config.admission.streams_per_address = 1;
        config.trusted_proxies = "127.0.0.0/8".parse().unwrap();
    })
    .start()
    .await;
    let user = world.user(3);
    let from = |forwarded_for: &str| world.stream(&user).header("x-forwarded-for", forwarded_for);
    let mut streams = Vec::new();
    for client in ["198.51.100.1", "198.51.100.2, 127.0.0.9", "2001:db8::1", "2001:db8:0:1::1"] {
        streams.push(until_admitted(&from(client)).await);
    }
    // The same addresses spelled differently, behind an entry that a client invented.
    for client in ["198.51.100.1:4711", "203.0.113.7, 198.51.100.2", "[2001:db8::2]:80"] {
        assert_busy(&mut from(client).stream().await).await;
    }
    assert_eq!(world.rejected("address").await, 3);
    world.ends(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_untrusted_peers_forwarded_address_is_ignored() {
    let world = Setup::config(|config| config.admission.streams_per_address = 2).start().await;
    let users = [world.user(3), world.user(3), world.user(3)];
    let from = |user, client: &str| world.stream(user).header("x-forwarded-for", client);
    let streams = [
        until_admitted(&from(&users[0], "198.51.100.1")).await,
        until_admitted(&from(&users[1], "198.51.100.2")).await,
    ];
    assert_busy(&mut from(&users[2], "198.51.100.3").stream().await).await;
    assert_eq!(world.rejected("address").await, 1);
    drop(streams);
    let stream = until_admitted(&world.stream(&users[2])).await;
    world.ends(stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_streams_above_the_rate_are_rejected() {
    const RATE: u32 = 5;
    let world = Setup::config(|config| config.admission.rate = RATE).start().await;
    let user = world.user(3);
    let began = Instant::now();
    let mut streams = open_all(vec![world.stream(&user); 30]).await;
    let most = f64::from(RATE) * (1.0 + began.elapsed().as_secs_f64());
    let mut admitted = 0;
    for stream in &mut streams {
        admitted += usize::from(stream.next().await.is("ready"));
    }
    assert!(admitted >= RATE as usize && admitted as f64 <= most, "{admitted} of at most {most}");
    let refused = world.rejected("rate").await;
    assert_eq!(refused as usize, streams.len() - admitted);
    let stream = until_admitted(&world.stream(&user)).await;
    world.ends((streams, stream)).await;
}

fn once(burst: u32) -> Limit {
    Limit::new(burst, Duration::from_hours(1))
}

/// Limits new streams, shared over these channels. Redis has no deadline.
fn opens(per_user: Limit, per_address: Limit, channels: &Channels) -> Setup {
    let channels = channels.clone();
    Setup::config(move |config| {
        config.opening = Opening { per_user, per_address, patience: PATIENCE };
        config.trusted_proxies = "127.0.0.0/8".parse().unwrap();
        config.channels = channels;
    })
}

fn channels() -> Channels {
    Channels::new(format!("gateway-it:limits:{:032x}:", rand::random::<u128>()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_share_a_users_limit_on_new_streams() {
    let channels = channels();
    let one = opens(once(4), Limit::Off, &channels).start().await;
    let two = opens(once(4), Limit::Off, &channels).start().await;
    for world in [&one, &two] {
        world.until_metric("messenger_gateway_rate_limits_shared", 1).await;
    }
    let (user, other) = (one.user(3), one.user(3));
    let phone = one.another_session(user.id);
    for user in [&user, &other] {
        two.api.add(user.id, EPOCH, 3);
    }
    for user in [&user, &other, &phone] {
        two.api.add_session(user.id, user.session);
    }
    for world in [&one, &two, &two, &one] {
        assert!(world.stream(&user).stream().await.next().await.is("ready"));
    }
    assert_busy(&mut one.stream(&user).stream().await).await;
    assert_busy(&mut two.stream(&phone).stream().await).await;
    assert!(two.stream(&other).stream().await.next().await.is("ready"));
    for world in [one, two] {
        assert_eq!(world.rejected("user_rate").await, 1);
        assert_eq!(world.metric("messenger_gateway_rate_limited_total{rule=\"open\",by=\"user\"}").await, 1);
        world.ends(()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ended_sessions_token_uses_no_stream_limit_of_its_user() {
    let world = Setup::config(|config| {
        config.delivery.streams_per_user = 2;
        config.opening = Opening { per_user: once(5), per_address: Limit::Off, patience: PATIENCE };
    })
    .start()
    .await;
    let stolen = world.user(3);
    let phone = world.another_session(stolen.id);
    world.api.end_session(stolen.session);
    // The first use must request the session.
    goodbye(&mut world.stream(&stolen).stream().await, "revoked").await;
    let mut streams = [world.joined(&phone).await, world.joined(&phone).await];
    for _ in 0..10 {
        receives_only_a_goodbye(&mut world.stream_after(&stolen, 1).stream().await, "revoked").await;
    }
    world.say(&phone, 1).await;
    all_receive(&mut streams, 4..=4).await;
    let third = world.joined(&phone).await;
    world.ends((streams, third)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_opens_too_often_is_rejected() {
    let world = opens(Limit::Off, once(2), &channels()).start().await;
    let users = [world.user(3), world.user(3), world.user(3)];
    let from = |user, client: &str| world.stream(user).header("x-forwarded-for", client);
    for user in &users[..2] {
        assert!(from(user, "198.51.100.1").stream().await.next().await.is("ready"));
    }
    assert_busy(&mut from(&users[2], "203.0.113.7, 198.51.100.1").stream().await).await;
    assert!(from(&users[2], "198.51.100.2").stream().await.next().await.is("ready"));
    assert_eq!(world.rejected("address_rate").await, 1);
    world.ends(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_redis_delays_no_head_and_lifts_no_limit() {
    const MANY: u64 = 30;
    let setup = Setup::config(|config| {
        config.opening = Opening {
            per_user: once(MANY as u32),
            per_address: Limit::Off,
            patience: limiter::SHARED_CHECK_TIMEOUT,
        }
    });
    let world = setup.start().await;
    world.until_metric("messenger_gateway_rate_limits_shared", 1).await;
    let user = world.user(3);
    world.network.silence();
    let mut streams = Vec::new();
    for _ in 0..2 * MANY {
        streams.push(world.stream(&user).stream().await);
    }
    // Only the first one waits for Redis, and for no longer than its deadline.
    let alone = async |reason: &str| {
        world
            .metric(&format!("messenger_gateway_rate_limit_local_decisions_total{{reason=\"{reason}\"}}"))
            .await
    };
    assert_eq!((alone("slow").await, alone("away").await), (1, MANY - 1));
    world.until_metric("messenger_gateway_streams_opened_total", MANY).await;
    assert_eq!(world.rejected("user_rate").await, MANY);
    world.network.resume();
    world.until_metric("messenger_gateway_rate_limits_shared", 1).await;
    assert_busy(&mut world.stream(&user).stream().await).await;
    world.ends(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vanishing_clients_keep_no_permit() {
    let world = Setup::config(|config| config.admission.streams = 3).start().await;
    let user = world.user(3);
    let head = Raw::head(&user, "1.1");
    for round in 0..60 {
        let mut socket = TcpStream::connect(world.public).await.unwrap();
        let sent = head.len() * (round % 3 + 1) / 3;
        socket.write_all(&head.as_bytes()[..sent]).await.unwrap();
        if round % 2 == 0 {
            socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
        }
        drop(socket);
    }
    world.until_metric("messenger_gateway_streams", 0).await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(until_admitted(&world.stream(&user)).await);
    }
    assert_busy(&mut world.stream(&user).stream().await).await;
    world.leaves_nothing(streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_come_and_go_leave_nothing() {
    let world = GatewayWorld::new().await;
    let users: Vec<_> = (0..20).map(|_| world.user(3)).collect();
    for round in 0..10_u64 {
        let mut streams = open_all(users.iter().map(|user| world.stream_after(user, 1))).await;
        if round % 2 == 0 {
            for (user, stream) in users.iter().zip(&mut streams) {
                ready(stream, &world.api.cursor(user.id, 1), true).await;
            }
        }
    }
    world.until_metric("messenger_gateway_streams_opened_total", 200).await;
    world.until_ended("client", 200).await;
    world.leaves_nothing(()).await;
}
