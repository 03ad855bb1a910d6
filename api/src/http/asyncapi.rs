//! The stream as an `AsyncAPI` 3 document. Everything in it comes from the `OpenAPI` document, the one source of schemas: each event of
//! `x-events` becomes a message.

use std::{
    collections::BTreeSet,
    sync::{Arc, LazyLock},
};

use http::header;
use serde_json::{Map, Value, json};
use warp::reply::Response;

use super::{
    Api, HandlerResult, JSON,
    openapi::DOCUMENT,
    request::{Inbound, NoBody},
};

pub(super) const PATH: &str = "/api/asyncapi.json";

/// Events without a position: an `EventSource` keeps its last id.
const WITHOUT_ID: [&str; 4] = ["typing", "presence", "goodbye", "heartbeat"];

static ASYNC_DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let openapi = serde_json::from_str(DOCUMENT).expect("the document is JSON");
    asyncapi_of(&openapi).to_string()
});

pub(super) async fn document(_: Arc<Api>, _: Inbound, _: NoBody) -> HandlerResult {
    let mut response = Response::new(ASYNC_DOCUMENT.as_str().into());
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    Ok(response)
}

fn asyncapi_of(openapi: &Value) -> Value {
    let stream = &openapi["paths"]["/api/messages"]["get"];
    let (mut messages, mut in_channel) = (Map::new(), Map::new());
    let (mut schemas, mut needed) = (Map::new(), BTreeSet::from(["Cursor".to_owned()]));
    for (event, schema) in stream["x-events"].as_object().into_iter().flatten() {
        let key = key(event);
        messages.insert(key.clone(), message(event, schema));
        in_channel.insert(key.clone(), json!({ "$ref": format!("#/components/messages/{key}") }));
        references(schema, &mut needed);
    }
    while let Some(name) = needed.pop_first() {
        let schema = &openapi["components"]["schemas"][&name];
        schemas.insert(name, schema.clone());
        let mut found = BTreeSet::new();
        references(schema, &mut found);
        needed.extend(found.into_iter().filter(|name| !schemas.contains_key(name)));
    }
    let references: Vec<_> =
        in_channel.keys().map(|key| json!({ "$ref": format!("#/channels/stream/messages/{key}") })).collect();
    let security = &openapi["components"]["securitySchemes"];
    json!({
        "asyncapi": "3.0.0",
        "info": {
            "title": format!("{}: the stream", openapi["info"]["title"].as_str().unwrap_or_default()),
            "version": openapi["info"]["version"],
            "description": "Server-Sent Events at `/api/messages`, at the address of this document. REST is in `/api/openapi.json`.",
        },
        "defaultContentType": "application/json",
        "channels": {
            "stream": {
                "address": "/api/messages",
                "title": stream["summary"],
                "description": stream["responses"]["200"]["description"],
                "messages": in_channel,
            },
        },
        "operations": {
            "sendEvents": {
                "action": "send",
                "channel": { "$ref": "#/channels/stream" },
                "summary": stream["summary"],
                "messages": references,
                "security": [
                    { "$ref": "#/components/securitySchemes/bearer" },
                    { "$ref": "#/components/securitySchemes/cookie" },
                    { "$ref": "#/components/securitySchemes/token" },
                ],
                "bindings": { "http": { "method": "GET", "query": query(stream), "bindingVersion": "0.3.0" } },
            },
        },
        "components": {
            "messages": messages,
            "schemas": schemas,
            "securitySchemes": {
                "bearer": security["bearer"],
                "cookie": { "type": "httpApiKey", "in": "cookie", "name": security["cookie"]["name"] },
                "token": {
                    "type": "httpApiKey", "in": "query", "name": "token",
                    "description": "Of `POST /api/stream_token`.",
                },
            },
        },
    })
}

/// Keys of components have letters, digits, dots, dashes and underscores.
fn key(event: &str) -> String {
    event.trim_start_matches('(').trim_end_matches(')').to_owned()
}

fn message(event: &str, schema: &Value) -> Value {
    let is_named = !event.starts_with('(');
    let mut fields = Map::new();
    if is_named {
        fields.insert("event".into(), json!({ "const": event }));
    }
    if !WITHOUT_ID.contains(&event) {
        fields.insert("id".into(), json!({ "$ref": "#/components/schemas/Cursor" }));
    }
    json!({
        "name": key(event),
        "contentType": "application/json",
        "headers": { "type": "object", "description": "The fields of the block beside `data`.", "properties": fields },
        "payload": schema,
    })
}

/// The parameters of the stream as one object.
fn query(stream: &Value) -> Value {
    let in_query = stream["parameters"].as_array().into_iter().flatten().filter(|one| one["in"] == "query");
    let of = |one: &Value| {
        let name = one["name"].as_str().unwrap_or_default().to_owned();
        (name, json!({ "allOf": [one["schema"]], "description": one["description"] }))
    };
    json!({ "type": "object", "properties": in_query.map(of).collect::<Map<_, _>>() })
}

/// Adds the names of schemas to which this one refers.
fn references(schema: &Value, names: &mut BTreeSet<String>) {
    match schema {
        Value::Object(members) => {
            let name = members.get("$ref").and_then(Value::as_str);
            names.extend(name.and_then(|name| name.strip_prefix("#/components/schemas/")).map(str::to_owned));
            members.values().for_each(|member| references(member, names));
        }
        Value::Array(items) => items.iter().for_each(|item| references(item, names)),
        _ => {}
    }
}
