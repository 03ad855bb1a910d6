//! The real binary's commands.

use std::process::Command;

use testkit::until;

use crate::support::Setup;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_binary_checks_the_health_of_its_service() {
    let world = Setup::config(|config| config.drain.wait = std::time::Duration::from_secs(2)).start().await;
    let ops = world.ops.to_string();
    let healthcheck = |probe: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stream-gateway"));
        let output =
            command.args(["healthcheck", probe]).env_clear().env("OPS_LISTEN", &ops).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    until("it is ready", || async { healthcheck("readyz") == (Some(0), "stream-gateway: ready\n".into()) })
        .await;
    world.stop();
    until("it says that it goes", || async {
        healthcheck("readyz") == (Some(1), "stream-gateway: stopping\n".into())
    })
    .await;
    assert_eq!(healthcheck("livez"), (Some(0), "stream-gateway: alive\n".into()));
    world.stopped().await;
    let (code, said) = healthcheck("livez");
    assert!(code == Some(1) && said.contains(&format!("{ops} does not answer")), "{said}");
}
