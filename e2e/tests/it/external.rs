//! An external issuer: both services accept its tokens.

use chrono::Utc;
use e2e::World;
use serde_json::json;
use testkit::{
    issuer::{IssuerKey, TestIssuer},
    sse::StreamRequest,
    until,
};

use crate::revocation::stream_token;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn external_token_works_for_rest_and_stream() {
    let world = World::new().await;
    let key = IssuerKey::number(0);
    let issuer = TestIssuer::start(Some(&key));
    let mut api = world.api_with_issuer(&issuer.url()).ready().await;
    let gateway = world.gateway(api.internal()).ready().await;
    let token = |subject: &str| {
        let token = key.token(subject, Utc::now().timestamp() + 3_600);
        world.remember(&token);
        token
    };
    let john = world.user(&api, "john").await;
    // The gateway may be the first that sees a user, and makes them known.
    let jane = token("jane");
    let open = |token: &str| StreamRequest::new(gateway.url("/api/messages")).bearer(token);
    let mut stream = open(&jane).stream().await;
    let first = stream.named("ready").await;

    let start = world.client.post(api.url("/api/conversations")).bearer(&john.token);
    let conversation = start.json(&json!({ "username": "jane" })).expect(201).await.json();
    let created = stream.named("conversation.created").await;
    assert_eq!(created.json()["otherParticipant"]["username"], "john");
    let messages = api.url(&format!("/api/conversations/{}/messages", conversation["id"].as_str().unwrap()));
    let post =
        |text: String| world.client.post(messages.clone()).bearer(&jane).json(&json!({ "content": text }));
    post(world.text()).expect(201).await;
    let sent = stream.named("message.sent").await;
    assert_eq!(sent.json()["mine"], true);

    let other = world.gateway(api.internal()).ready().await;
    let stream_token = stream_token(&world, &api, &jane).await;
    let cursor = first.id.unwrap();
    let url = format!("/api/messages?token={stream_token}&lastEventId={cursor}");
    let mut resumed = StreamRequest::new(other.url(&url)).stream().await;
    for name in ["ready", "conversation.created", "message.sent"] {
        resumed.named(name).await;
    }

    // Without the issuer and api, known keys still admit known users; new users must retry.
    drop(issuer);
    api.kill();
    let mut again = open(&jane).stream().await;
    let mut stranger = open(&token("mary")).stream().await;
    assert_eq!(stranger.named("goodbye").await.json()["reason"], "busy");
    api.restart().await;
    until("api is ready again", || api.is_ready()).await;
    again.named("ready").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hosts_user_streams_without_any_key_of_the_host() {
    let world = World::new().await;
    let api = world.api().env("EXTERNAL_ISSUER", "shop").ready().await;
    let gateway = world.gateway(api.internal()).ready().await;
    let john = world.user(&api, "john").await;
    let service = world.service_token("shop", "users").await;
    let path = api.url("/api/users/by_subject/customer%2F17");
    let put = |name: &str| {
        world.client.call("PUT", path.clone()).bearer(&service).json(&json!({ "username": name }))
    };
    let jane = put("jane").expect(201).await.json();
    let token = world.client.post(format!("{path}/stream_token")).bearer(&service).expect(200).await.json();
    let token = token["token"].as_str().unwrap();
    world.remember(token);
    let mut stream = StreamRequest::new(gateway.url(&format!("/api/messages?token={token}"))).stream().await;
    stream.named("ready").await;
    let start = world.client.post(api.url("/api/conversations")).bearer(&john.token);
    start.json(&json!({ "usernames": ["jane"], "title": "Team" })).expect(201).await;
    assert_eq!(stream.named("conversation.created").await.json()["participantCount"], 2);
    put("Jane Doe").expect(200).await;
    let updated = stream.named("user.updated").await.json();
    assert_eq!((&updated["id"], &updated["username"]), (&jane["id"], &json!("Jane Doe")));
    // A service token opens no stream.
    let refused = StreamRequest::new(gateway.url("/api/messages")).bearer(&service).open().await.unwrap();
    assert_eq!(refused.status, 401);
}
