//! The secret between gateways and `api` rotates by the steps of docs/runbook.md under traffic. A gateway that `api` refuses is not
//! ready.

use std::path::Path;

use e2e::World;
use testkit::until;

use crate::support::{Busy, Two, watch};

const NEW: &str = "a-new-secret-between-the-services";

/// The values of `INTERNAL_SECRET` in docs/runbook.md, in order.
fn steps(old: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/runbook.md");
    let text = std::fs::read_to_string(path).unwrap();
    let values = text.lines().filter_map(|line| line.strip_prefix("INTERNAL_SECRET="));
    let secret = |name| match name {
        "old" => old.to_owned(),
        "new" => NEW.to_owned(),
        other => panic!("{other} is neither the old secret nor the new one"),
    };
    values.map(|value| value.split(',').map(secret).collect::<Vec<_>>().join(",")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn internal_secret_is_rotated_under_traffic_without_a_refusal() {
    let world = World::new().await;
    let api = || world.api().env("SHUTDOWN_WAIT_SECONDS", 0).ready();
    let (one, two) = tokio::join!(api(), api());
    let gateway = |internal| {
        world.gateway(internal).env("DRAIN_WAIT_SECONDS", 0).env("DRAIN_WINDOW_SECONDS", 1).ready()
    };
    let (a, b) = tokio::join!(gateway(one.internal()), gateway(two.internal()));
    let mut busy = Busy::of(world, vec![one, two], vec![a, b]).await;
    let steps = steps(busy.world.internal_secret());
    assert_eq!(steps.last().map(String::as_str), Some(NEW), "the old secret is gone in the end");
    let traffic = busy.traffic();
    traffic.more(40).await;
    for step in &steps {
        for nth in 0..4 {
            let mut services = busy.apis.iter_mut().chain(&mut busy.gateways);
            services.nth(nth).unwrap().redeploy("INTERNAL_SECRET", step).await;
            traffic.more(20).await;
            busy.until_all_is_seen().await;
            for gateway in &busy.gateways {
                assert_eq!(gateway.metric("messenger_gateway_api_unauthorized_total").await, 0.0);
            }
        }
    }
    traffic.stop().await;
    busy.assert_ledgers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_refused_by_api_says_so_and_recovers() {
    let world = World::new().await;
    let mut api = world.api().env("SHUTDOWN_WAIT_SECONDS", 0).ready().await;
    let old = world.internal_secret().to_owned();

    // Steps in the wrong order: the first secret is not accepted, the second is.
    let gateway = world.gateway(api.internal()).env("INTERNAL_SECRET", format!("{NEW},{old}")).ready().await;
    assert!(gateway.metric("messenger_gateway_api_unauthorized_total").await > 0.0);
    let two = Two::meet(&world, &api).await;
    let jane = watch(&gateway, &two.jane).await;

    // None is accepted from the start: alive, not ready, and the reason is given.
    let stranger = world.gateway(api.internal()).env("INTERNAL_SECRET", NEW).start().await;
    until("it says that it is refused", || async {
        let readiness = stranger.readiness().await;
        readiness.is_some_and(|(status, note)| status == 503 && note.contains("INTERNAL_SECRET"))
    })
    .await;
    assert!(!stranger.log().lines().iter().any(|line| line.contains(NEW)));

    // api accepts it again: both become ready without a restart.
    api.redeploy("INTERNAL_SECRET", NEW).await;
    stranger.until_ready().await;
    two.say(&world, &api, 3).await;
    e2e::ledger::assert_exact(&world.sql, two.jane.id, "jane", &jane).await;
}
