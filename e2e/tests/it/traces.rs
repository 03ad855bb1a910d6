//! One message is one trace, from its POST to the flush at every socket, whatever its delivery path; seen in a real
//! collector.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Instant, SystemTime},
};

use e2e::{
    Collector, Service, World,
    collector::ReceivedSpan,
    ledger::{StoredFeed, assert_exact},
};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::json;
use testkit::{ports::free_port, servers::Redis, soon, until};

use crate::support::{Busy, Two, browser, ready, watch};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const POST: &str = "POST /api/conversations/{id}/messages";
const CLIENT_SPAN: &str = "b7ad6b7169203331";

/// Traces only what clients request.
fn traced(plan: e2e::service::Plan, collector: &Collector) -> e2e::service::Plan {
    plan.env(ENDPOINT, collector.endpoint())
        .env("OTEL_TRACES_SAMPLER_ARG", 0)
        .env("TRACES_PER_SECOND", 10_000)
}

async fn start_traced(world: World) -> (World, Collector, Service, Service, Two) {
    let collector = Collector::start().await;
    let api = traced(world.api(), &collector).ready().await;
    let gateway = traced(world.gateway(api.internal()), &collector).ready().await;
    let two = Two::meet(&world, &api).await;
    (world, collector, api, gateway, two)
}

fn new_trace() -> String {
    format!("{:032x}", rand::random_range(1..=u128::MAX))
}

async fn say(world: &World, api: &Service, two: &Two, trace: &str) -> String {
    say_text(world, api, two, trace, &world.text()).await
}

async fn say_text(world: &World, api: &Service, two: &Two, trace: &str, text: &str) -> String {
    let url = api.url(&format!("/api/conversations/{}/messages", two.conversation));
    let call = world.client.post(url).bearer(&two.john.token).json(&json!({ "content": text }));
    let answer = call.header("traceparent", &format!("00-{trace}-{CLIENT_SPAN}-01")).expect(201).await;
    answer.header("x-request-id").unwrap().to_owned()
}

fn named<'a>(spans: &'a [ReceivedSpan], name: &str) -> Vec<&'a ReceivedSpan> {
    spans.iter().filter(|span| span.name == name).collect()
}

fn one<'a>(spans: &'a [ReceivedSpan], name: &str) -> &'a ReceivedSpan {
    let [span] = named(spans, name)[..] else { panic!("not one {name}: {spans:#?}") };
    span
}

fn of_user<'a>(spans: &'a [ReceivedSpan], name: &str, user: impl ToString) -> &'a ReceivedSpan {
    let user = user.to_string();
    let of_user = spans.iter().find(|span| span.name == name && span.attribute("user.id") == user);
    of_user.unwrap_or_else(|| panic!("no {name} for {user}: {spans:#?}"))
}

/// Whether every delivery has been exported, with its flushes.
fn delivered(spans: &[ReceivedSpan], deliveries: usize) -> bool {
    let deliver = named(spans, "deliver");
    deliver.len() == deliveries && deliver.iter().all(|span| span.attribute("flushes") != "0")
}

fn assert_inside(inner: &ReceivedSpan, outer: &ReceivedSpan) {
    assert_eq!(inner.parent, outer.id, "{inner:#?} hangs below {outer:#?}");
    assert!(outer.begin <= inner.begin && inner.begin <= inner.end, "{inner:#?} begins after {outer:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_message_is_one_trace_from_post_to_each_flush() {
    let (world, collector) = tokio::join!(World::new(), Collector::start());
    let api = traced(world.api(), &collector).ready().await;
    let gateway = || traced(world.gateway(api.internal()), &collector).ready();
    let (a, b) = tokio::join!(gateway(), gateway());
    let two = Two::meet(&world, &api).await;
    let tabs = [&a, &a, &b].map(|gateway| browser(gateway.stream(&two.jane)));
    for tab in &tabs {
        tab.ready().await;
    }
    let trace = new_trace();
    let request = say(&world, &api, &two, &trace).await;
    for tab in &tabs {
        assert_exact(&world.sql, two.jane.id, "jane", tab).await;
    }
    let spans = collector.until("the whole trace", &trace, |spans| spans.len() == 9).await;

    let post = one(&spans, POST);
    assert_eq!((post.service.as_str(), post.kind), ("messenger-api", SpanKind::Server));
    assert_eq!(post.parent, CLIENT_SPAN);
    assert_eq!(post.attribute("request.id"), request);
    assert_eq!(post.attribute("user.id"), two.john.id.to_string());
    assert_eq!(post.attribute("http.response.status_code"), "201");
    let commit = one(&spans, "commit");
    assert_inside(commit, post);
    assert!(commit.end <= post.end);
    assert_eq!(commit.attribute("user.id"), two.john.id.to_string());
    assert_eq!(named(&spans, "publish").len(), 2);
    for user in [two.john.id, two.jane.id] {
        let publish = of_user(&spans, "publish", user);
        assert_inside(publish, commit);
        assert!(commit.end <= publish.begin, "what is published is committed");
    }

    // John has no stream, so no gateway subscribes for him.
    let deliver = named(&spans, "deliver");
    assert_eq!(deliver.len(), 2);
    assert_ne!(deliver[0].instance, deliver[1].instance);
    let publish = of_user(&spans, "publish", two.jane.id);
    let head = StoredFeed::read(&world.sql, two.jane.id).await.head;
    let mut flushes = Vec::new();
    for deliver in deliver {
        assert_inside(deliver, publish);
        assert_eq!((deliver.service.as_str(), deliver.kind), ("stream-gateway", SpanKind::Consumer));
        let about = ["user.id", "event.seq", "path"].map(|key| deliver.attribute(key).to_owned());
        assert_eq!(about, [two.jane.id.to_string(), head.to_string(), "redis".into()]);
        let below: Vec<_> = spans.iter().filter(|span| span.parent == deliver.id).collect();
        for flush in &below {
            assert_eq!((flush.name.as_str(), flush.attribute("path")), ("flush", "redis"));
            assert_inside(flush, deliver);
            assert!(flush.end <= deliver.end);
        }
        assert_eq!(deliver.attribute("flushes"), below.len().to_string());
        flushes.push(below.len());
    }
    flushes.sort_unstable();
    assert_eq!(flushes, [1, 2]);
    assert!(spans.iter().all(|span| span.failed.is_none()), "{spans:#?}");

    // The logs of both can be joined with it.
    for service in [&api, &a, &b] {
        until("the log names the trace", async || {
            let lines = service.log().lines();
            lines.iter().any(|line| line.contains(&trace) && line.contains(&request))
        })
        .await;
    }
    world.assert_discreet("the collector", &collector.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repaired_and_replayed_events_keep_their_trace() {
    let mut redis = Redis::start();
    let (world, collector, api, gateway, two) = start_traced(World::with_redis(redis.url()).await).await;
    let before = StoredFeed::read(&world.sql, two.jane.id).await.head_cursor();
    let tab = watch(&gateway, &two.jane).await;
    redis.kill();
    let lost = new_trace();
    say(&world, &api, &two, &lost).await;
    assert_exact(&world.sql, two.jane.id, "jane", &tab).await;
    let wanted = |spans: &[ReceivedSpan]| delivered(spans, 1) && named(spans, "publish").len() == 2;
    let spans = collector.until("the repaired event", &lost, wanted).await;
    assert!(named(&spans, "publish").iter().all(|publish| publish.failed.is_some()), "{spans:#?}");
    let (deliver, flush) = (one(&spans, "deliver"), one(&spans, "flush"));
    assert_inside(deliver, one(&spans, "commit"));
    assert_inside(flush, deliver);
    assert_eq!([deliver.attribute("path"), flush.attribute("path")], ["repair"; 2]);

    let mut late = ready(gateway.stream(&two.jane).last_event_id(before)).await;
    soon("what it missed", late.event()).await.unwrap();
    let spans = collector.until("the replayed event", &lost, |spans| delivered(spans, 2)).await;
    let replayed =
        spans.iter().filter(|span| span.attributes.get("path").is_some_and(|path| path == "replay"));
    let replayed: Vec<_> = replayed.cloned().collect();
    let (deliver, flush) = (one(&replayed, "deliver"), one(&replayed, "flush"));
    assert_inside(deliver, one(&spans, "commit"));
    assert_inside(flush, deliver);
    world.assert_discreet("the collector", &collector.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recorded_flushes_are_sampled_and_say_their_weight() {
    let (world, collector, api, gateway, two) = start_traced(World::new().await).await;
    let mut streams = Vec::new();
    for _ in 0..30 {
        streams.push(ready(gateway.stream(&two.jane)).await);
    }
    let trace = new_trace();
    say(&world, &api, &two, &trace).await;
    for stream in &mut streams {
        soon("the message", stream.event()).await.unwrap();
    }
    let spans = collector.until("the delivery", &trace, |spans| delivered(spans, 1)).await;
    assert_eq!(one(&spans, "deliver").attribute("flushes"), "30");
    let flushes = named(&spans, "flush");
    assert!((7..=8).contains(&flushes.len()), "{flushes:#?}");
    assert!(flushes.iter().all(|flush| flush.attribute("stands_for") == "4"), "{flushes:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_ends_when_the_socket_has_taken_the_last_byte() {
    let (world, collector, api, gateway, two) = start_traced(World::new().await).await;
    let mut slow = ready(gateway.stream(&two.jane).tiny_receive_buffer()).await;
    let mut traces = Vec::new();
    let long = format!("{} {}", world.text(), "😀".repeat(450));
    soon("the socket takes no more", async {
        while gateway.metric("messenger_gateway_slow_consumers").await == 0.0 {
            traces.push(new_trace());
            say_text(&world, &api, &two, traces.last().unwrap(), &long).await;
        }
    })
    .await;
    let blocked = u64::try_from(SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos()).unwrap();
    for _ in &traces {
        slow.next().await;
    }
    let mut held_up = 0;
    for trace in &traces {
        let spans = collector.until("the delivery", trace, |spans| delivered(spans, 1)).await;
        let flush = one(&spans, "flush");
        held_up += usize::from(flush.begin < blocked && blocked < flush.end);
        assert_inside(flush, one(&spans, "deliver"));
        assert!(flush.end <= one(&spans, "deliver").end, "{spans:#?}");
    }
    assert_eq!(held_up, 1, "one frame was half written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn api_without_a_collector_passes_the_trace_on() {
    let (world, collector) = tokio::join!(World::new(), Collector::start());
    let api = world.api().ready().await;
    let gateway = traced(world.gateway(api.internal()), &collector).ready().await;
    let two = Two::meet(&world, &api).await;
    let _tab = watch(&gateway, &two.jane).await;
    let trace = new_trace();
    say(&world, &api, &two, &trace).await;
    let spans = collector.until("the delivery", &trace, |spans| delivered(spans, 1)).await;
    assert_eq!(one(&spans, "deliver").parent, CLIENT_SPAN);
    assert!(spans.iter().all(|span| span.service == "stream-gateway"), "{spans:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_cannot_have_more_traced_than_the_bound() {
    let world = World::new().await;
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let plan = world.api().env(ENDPOINT, nowhere).env("TRACES_PER_SECOND", 2);
    let api = plan.env("OTEL_TRACES_SAMPLER_ARG", 0).ready().await;
    let two = Two::meet(&world, &api).await;
    let began = Instant::now();
    for _ in 0..60 {
        say(&world, &api, &two, &new_trace()).await;
    }
    let most = 2.0 + 2.0 * began.elapsed().as_secs_f64();
    let count = |what: &'static str| {
        let sql = "SELECT count(DISTINCT split_part(traceparent, '-', 2)) FROM messenger.messages WHERE traceparent LIKE $1";
        sqlx::query_scalar::<_, i64>(sql).bind(what).fetch_one(&world.sql)
    };
    let recorded = count("%-01").await.unwrap();
    assert!(recorded >= 2 && recorded as f64 <= most, "{recorded} traces, {most} at most");
    assert_eq!(recorded + count("%-00").await.unwrap(), 60, "an unsampled trace is still propagated");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unavailable_collector_costs_only_spans() {
    let world = World::new().await;
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let (silent, connections) = silent_collector().await;
    let plan = world.api().env(ENDPOINT, nowhere).env("OTEL_TRACES_SAMPLER_ARG", 1);
    let api = plan.env("TRACES_PER_SECOND", 10_000).env("SHUTDOWN_WAIT_SECONDS", 0).ready().await;
    let plan = world.gateway(api.internal()).env(ENDPOINT, silent);
    let gateway = plan.env("TRACES_PER_SECOND", 10_000).env("DRAIN_WAIT_SECONDS", 0).ready().await;
    let mut busy = Busy::of(world, vec![api], vec![gateway]).await;
    let traffic = busy.traffic();
    traffic.more(200).await;
    until("the hanging collector has a connection", async || connections.load(Ordering::Relaxed) > 0).await;
    until("spans were dropped", async || {
        busy.apis[0].metric_where("messenger_api_dropped_spans_total", "reason=\"failed\"").await > 0.0
    })
    .await;
    traffic.more(200).await;
    traffic.stop().await;
    busy.assert_exact().await;
    assert_eq!(busy.gateways[0].metric("messenger_gateway_exported_spans_total").await, 0.0);
    busy.close_streams();
    for service in busy.gateways.iter_mut().chain(&mut busy.apis) {
        service.terminate();
        assert!(service.wait().await.success(), "it ends in order");
    }
}

/// Accepts connections and never answers.
async fn silent_collector() -> (String, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let connections = Arc::new(AtomicUsize::new(0));
    let taken = connections.clone();
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            taken.fetch_add(1, Ordering::Relaxed);
            open.push(socket);
        }
    });
    (address, connections)
}
