//! The bench in small, over the binaries of this build: nothing is timed, but nothing may be lost.

use std::process::Command;

#[test]
fn every_scenario_runs_to_its_end_and_loses_nothing() {
    let output = Command::new(env!("CARGO_BIN_EXE_benches"))
        .args(["--quick", "--no-build", "--streams", "200"])
        .output()
        .unwrap();
    let figures = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{figures}\n{said}");
    let last = [
        "PSS after a round of heartbeats",
        "per 100k deliveries",
        "the other's screen",
        "size after them",
        "received what they missed",
        "every ledger is its feed",
        "the same tokens again",
        "one to one at most, msg/s",
        "streams that resumed at another gateway",
    ];
    for figure in last {
        assert!(figures.contains(figure), "no {figure:?} in\n{figures}");
    }
}
