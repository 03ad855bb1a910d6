//! Documents of the wire: the stream as `AsyncAPI`, and a page for each problem.

use std::collections::BTreeSet;

use protocol::{problem::Problem, problem_types};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{App, assert_problem};

const OPENAPI: &str = include_str!("../../openapi.json");

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn asyncapi_has_every_event_with_the_schemas_of_openapi(pool: PgPool) {
    let app = App::start(&pool).await;
    // Anybody may read it.
    let answer = app.get("/api/asyncapi.json").expect(200).await;
    let (document, openapi): (Value, Value) = (answer.json(), serde_json::from_str(OPENAPI).unwrap());
    assert_eq!(document["asyncapi"], "3.0.0");
    let events = openapi["paths"]["/api/messages"]["get"]["x-events"].as_object().unwrap();
    let messages = document["components"]["messages"].as_object().unwrap();
    assert_eq!(messages.len(), events.len());
    for (event, schema) in events {
        let key = event.trim_matches(['(', ')']);
        assert_eq!(&messages[key]["payload"], schema, "{event}");
        let named = &messages[key]["headers"]["properties"]["event"]["const"];
        assert_eq!(named, &if event.starts_with('(') { json!(null) } else { json!(event) });
        let reference = json!({ "$ref": format!("#/components/messages/{key}") });
        assert_eq!(document["channels"]["stream"]["messages"][key], reference);
    }
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        assert_eq!(schema, &openapi["components"]["schemas"][name], "{name}");
    }
    // Every reference leads somewhere.
    let mut references = BTreeSet::new();
    collect(&document, &mut references);
    assert!(references.len() > 20);
    for reference in references {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
    // `.ci/run asyncapi` validates it.
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/asyncapi.json");
    std::fs::write(target, answer.text()).unwrap();
    app.stop().await;
}

fn collect(value: &Value, references: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => {
            references.extend(members.get("$ref").and_then(Value::as_str).map(str::to_owned));
            members.values().for_each(|member| collect(member, references));
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, references)),
        _ => {}
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn type_of_every_problem_is_a_page_that_says_what_to_do(pool: PgPool) {
    let app = App::start(&pool).await;
    let list = app.get("/problems").expect(200).await.text();
    for kind in problem_types::ALL {
        let problem = Problem::new(http::StatusCode::BAD_REQUEST, kind.code, "x", "x");
        assert_eq!(
            (problem.kind.as_str(), problem.title.as_str()),
            (format!("/problems/{}", kind.code).as_str(), kind.title)
        );
        let page = app.get(&problem.kind).expect(200).await;
        assert_eq!(page.header("content-type"), Some("text/html; charset=utf-8"));
        assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'"));
        assert_eq!(page.header("x-content-type-options"), Some("nosniff"));
        let escaped = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        for part in [kind.title, kind.happened, kind.to_do, kind.code] {
            assert!(page.text().contains(&escaped(part)), "{}: {part}", kind.code);
        }
        assert!(list.contains(&format!("href=\"{}\"", problem.kind)), "{}", kind.code);
    }
    // Other paths are the web client's.
    assert!(app.get("/problems/nothing").expect(200).await.text().contains("<title>Messenger</title>"));
    let answer = app.post("/problems/internal").send().await.unwrap();
    assert_problem(&answer, 405, "Method not allowed");
    app.stop().await;
}

/// The codes that the sources name, each in one of these forms.
#[test]
fn every_code_in_the_sources_has_a_page() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/http");
    let mut found = BTreeSet::new();
    for file in std::fs::read_dir(folder).unwrap() {
        let source = std::fs::read_to_string(file.unwrap().path()).unwrap();
        for form in ["NotFound(", "Forbidden(", "NotNow("] {
            let arguments = source.split(form).skip(1).filter_map(|rest| rest.trim_start().strip_prefix('"'));
            found.extend(arguments.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
        }
    }
    assert!(found.len() > 12, "{found:?}");
    found.retain(|code| problem_types::find(code).is_none());
    assert_eq!(found, BTreeSet::new());
}
