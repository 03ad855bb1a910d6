//! A property-based fuzzer, driven by the OpenAPI document that api serves: no 500, and no undocumented status, header or body. The
//! document also covers the events of a real stream.

use std::process::{Command, Stdio};

use e2e::program;
use testkit::documented::OpenApiDocument;

use crate::support::{ready, start};

/// Checks that are disabled are the fuzzer's opinions on what must be refused: docs/api.md has its own rules.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,\
                      response_schema_conformance,allow_header_conformance,unsupported_method,ignored_auth";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fuzzer_finds_no_answer_outside_the_openapi_document() {
    let (world, api, gateway, two) = start().await;
    for _ in 0..3 {
        world.say(&api, &two.jane, two.conversation).await;
    }
    let python = program("DEV_PYTHON", "Python 3.10 or later with pip", "Debian: apt install python3-pip");
    let folder = program("DEV_SCHEMATHESIS", "schemathesis", "pip install --target");
    let scratch = tempfile::tempdir().unwrap();
    let run = async |base: String, only: &[&str]| {
        let mut command = Command::new(&python);
        command
            .env("PYTHONPATH", &folder)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .current_dir(scratch.path())
            .args(["-m", "schemathesis.cli", "run", &api.url("/api/openapi.json"), "--url", &base])
            .args(["--header", &format!("Authorization: Bearer {}", two.john.token)])
            .args(["--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", "30"])
            .args(
                "--continue-on-failure --no-color --warnings off --request-timeout 10 --max-redirects 0"
                    .split(' '),
            )
            .args(only)
            .stdin(Stdio::null());
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        println!("{said}");
    };
    // The calls that end the fuzzer's own session come last.
    let ending = "^/api/(logout|sessions|messages$)";
    run(api.url("/"), &["--exclude-path-regex", ending]).await;
    run(api.url("/"), &["--include-path-regex", "^/api/(logout|sessions)"]).await;
    run(gateway.url("/"), &["--include-path", "/api/messages", "--mode", "negative"]).await;
    for service in [&api, &gateway] {
        assert!(service.is_ready().await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_on_the_wire_are_as_documented() {
    let (world, api, gateway, two) = start().await;
    let document = world.client.get(api.url("/api/openapi.json")).expect(200).await;
    let document = OpenApiDocument::new(&document.text());
    let mut streams = [
        ready(gateway.stream(&two.john).last_event_id("invalid")).await,
        ready(gateway.stream(&two.jane)).await,
    ];
    world.say(&api, &two.john, two.conversation).await;
    let read = format!("/api/conversations/{}/read_messages", two.conversation);
    world.client.post(api.url(&read)).bearer(&two.jane.token).expect(204).await;
    let logout = world.client.post(api.url("/api/logout")).bearer(&two.jane.token);
    logout.expect(204).await;
    let mut seen = Vec::new();
    for stream in &mut streams {
        loop {
            let event = stream.event().await.unwrap();
            document.check_event(event.name.as_deref(), &event.json());
            seen.push(event.name.clone().unwrap_or_default());
            if ["goodbye", "receipt.read"].contains(&event.name.as_deref().unwrap_or_default()) {
                break;
            }
        }
    }
    for name in ["", "message.sent", "conversation.read", "receipt.read", "goodbye"] {
        assert!(seen.iter().any(|seen| seen == name), "{name:?} was not seen in {seen:?}");
    }
}
