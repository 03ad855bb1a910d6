//! `POST /api/events`: the rules of the contract, each with a case; and that it is one way with SQL `publish`.

use std::time::Duration;

use api::config::RateLimits;
use protocol::{event::LARGEST_EPHEMERAL, feed::RangeAfter, ids::UserId};
use serde_json::{Value, json};
use service_kit::limiter::Limit;
use sqlx::PgPool;
use testkit::{PATIENCE, http::Answer, until};

use crate::{
    failures::{Listener, with_redis},
    publish::until_in_feed,
    raw,
    services::create,
    support::{
        App, ORIGIN, ORIGIN_NOT_ALLOWED, add_users, assert_problem, assert_unacceptable, execute, number,
        redis_url,
    },
};

const OWN: &str = "application/json";
const ONE: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";
const ISSUER: &str = "https://login.example";

struct Host {
    app: App,
    bearer: String,
}

impl Host {
    /// Users john (1, subject auth0|1), jane (2) and Bob (3).
    async fn start(pool: &PgPool) -> Self {
        add_users(pool, ["john", "jane", "Bob"]).await;
        let identity = "INSERT INTO messenger.identities (issuer, subject, user_id)";
        execute(
            pool,
            format!("{identity} VALUES ('{ISSUER}', 'auth0|1', 1), ('https://other.example', 'auth0|2', 2)"),
        )
        .await;
        let app = App::with(pool, |config| config.external_issuer = Some(ISSUER.into())).await;
        let bearer = format!("Bearer {}", create(pool, "shop", "publish"));
        Self { app, bearer }
    }

    async fn post(&self, content_type: &str, body: impl AsRef<[u8]>) -> Answer {
        let headers = [("content-type", content_type), ("authorization", &self.bearer)];
        raw::post(&self.app, "/api/events", &headers, body).await
    }

    async fn publish(&self, events: Value) -> Answer {
        let call = self.app.post("/api/events").header("authorization", &self.bearer);
        call.json(&json!({ "events": events })).send().await.unwrap()
    }

    async fn published(&self, events: Value) -> Value {
        let answer = self.publish(events).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["results"].clone()
    }
}

fn event(to: &Value, name: &str) -> Value {
    json!({ "to": to, "event": name })
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn events_are_published_to_all_their_receivers(pool: PgPool) {
    let host = Host::start(&pool).await;
    let results = host
        .published(json!([
            { "to": [{ "userId": "1" }, { "username": "bob" }], "event": "order.paid", "data": { "b": 1, "a": [null] } },
            { "to": [{ "subject": "auth0|1" }], "event": "order.sent" },
            { "to": [], "event": "nobody.listens", "data": 1 },
            // Doubles count once, under whatever name; unknown ones are told once, as they were named.
            { "to": [{ "userId": "1" }, { "userId": "1" }, { "username": "john" }, { "subject": "auth0|1" }, { "userId": "9" },
                     { "userId": "9" }, { "userId": "no-id" }, { "subject": "auth0|2" }, { "username": "no\u{0}body" },
                     { "username": "nobody" }, { "subject": "" }, { "userId": null }, { "userId": "2", "more": 1 }],
              "event": "a", "data": "x", "more": true },
        ]))
        .await;
    let unknown = json!([
        { "userId": "9" }, { "userId": "no-id" }, { "subject": "auth0|2" }, { "username": "no\u{0}body" }, { "username": "nobody" },
        { "subject": "" }, { "userId": "" },
    ]);
    assert_eq!(
        results,
        json!([
            { "published": 2, "unknown": [] }, { "published": 1, "unknown": [] }, { "published": 0, "unknown": [] },
            { "published": 2, "unknown": unknown },
        ])
    );
    let johns = until_in_feed(&host.app, UserId(1), &["order.paid", "order.sent", "a"]).await;
    assert_eq!(johns, [json!({ "b": 1, "a": [null] }), Value::Null, json!("x")]);
    until_in_feed(&host.app, UserId(2), &["a"]).await;
    until_in_feed(&host.app, UserId(3), &["order.paid"]).await;
    assert_eq!(host.published(json!([])).await, json!([]));
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn data_passes_through_token_for_token(pool: PgPool) {
    let host = Host::start(&pool).await;
    for (data, stored) in [
        (
            r#" { "z" : 1.50 , "a":	[ 1e400, -0, "\u00e9 \/ é" ], "z": " \" " } "#,
            r#"{"z":1.50,"a":[1e400,-0,"\u00e9 \/ é"],"z":" \" "}"#,
        ),
        ("12345678901234567890.10", "12345678901234567890.10"),
        (r#""\ud83d\ude00""#, r#""\ud83d\ude00""#),
        ("null", "null"),
    ] {
        let body = format!(r#"{{"events":[{{"to":[{{"userId":"1"}}],"event":"a","data":{data}}}]}}"#);
        assert_eq!(host.post(OWN, body).await.status, 200);
        let cloud = format!(
            r#"{{"specversion":"1.0","id":"{}","source":"/s","type":"a","subject":"auth0|1","data":{data}}}"#,
            stored.len()
        );
        assert_eq!(host.post(ONE, cloud).await.status, 200);
        let head = "SELECT head_seq FROM messenger.feed_heads WHERE user_id = 1";
        until("both are in the feed", || async {
            number(&pool, head).await % 2 == 0
                && number(&pool, "SELECT count(*) FROM messenger.staged_events").await == 0
        })
        .await;
        let after = number(&pool, head).await as u64 - 2;
        let range = host.app.ranges(vec![RangeAfter { user: UserId(1), after }]).await.ranges.remove(0);
        assert_eq!(range.events.iter().map(|event| event.data.get()).collect::<Vec<_>>(), [stored; 2]);
    }
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn repeats_count_per_receiver_over_all_ways_in(pool: PgPool) {
    let host = Host::start(&pool).await;
    let (john, jane) = (json!({ "userId": "1" }), json!({ "userId": "2" }));
    let send = async |to: Value, data: u32, key: &str| {
        host.published(json!([{ "to": to, "event": "a", "data": data, "key": key }])).await
    };
    assert_eq!(send(json!([john]), 1, "k").await[0]["published"], 1);
    until_in_feed(&host.app, UserId(1), &["a"]).await;
    // A repeat tells the same, and a receiver who has not had it gets it.
    assert_eq!(send(json!([john]), 2, "k").await[0]["published"], 1);
    assert_eq!(send(json!([john, jane]), 3, "k").await[0]["published"], 2);
    execute(&pool, "SELECT messenger.publish(1, 'a', '4', 'k'), messenger.publish(2, 'a', '5', 'k')").await;
    execute(&pool, "SELECT messenger.publish(1, 'a', '6', 'sql')").await;
    send(json!([john]), 7, "sql").await;
    let cloud = |id: &str, data: u32| {
        json!({ "specversion": "1.0", "id": id, "source": "/s", "type": "a", "subject": "auth0|1", "data": data }).to_string()
    };
    for (id, data) in [("1", 8), ("1", 9), ("2", 10)] {
        assert_eq!(host.post(ONE, cloud(id, data)).await.json()["results"][0]["published"], 1);
    }
    assert_eq!(until_in_feed(&host.app, UserId(1), &["a"; 4]).await, [1, 6, 8, 10]);
    assert_eq!(until_in_feed(&host.app, UserId(2), &["a"]).await, [3]);
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn unacceptable_events_are_422_and_publish_nothing(pool: PgPool) {
    let host = Host::start(&pool).await;
    let john = json!([{ "userId": "1" }]);
    let long = |length| "x".repeat(length);
    let many = |count: usize| (0..count).map(|n| json!({ "userId": n.to_string() })).collect::<Vec<_>>();
    let with = |member: &str, value: Value| {
        let mut event = event(&john, "a");
        event[member] = value;
        event
    };
    let form = "An event needs a name of letters and digits, in segments divided by one of . _ : -, of at most 128 bytes";
    let reserved = "The first segment of this name is reserved for our own events";
    let key = "A key is 1 to 128 visible ASCII characters";
    let data = "The data is too long. 49152 bytes max";
    let subject = "A subject has at most 255 bytes, and no U+0000";
    for (event, field, sentence) in [
        (json!({ "to": john }), "event", form),
        (event(&john, ""), "event", form),
        (with("event", Value::Null), "event", form),
        (event(&john, "a..b"), "event", form),
        (event(&john, "é"), "event", form),
        (event(&john, "a\u{0}"), "event", form),
        (event(&john, &long(129)), "event", form),
        (event(&john, "message"), "event", reserved),
        (event(&john, "Conversation.x"), "event", reserved),
        (event(&john, "open-x"), "event", reserved),
        (with("data", json!(long(48 * 1024 - 1))), "data", data),
        (with("data", json!({ "a": "\u{0}" })), "data", "The data has U+0000"),
        (with("data", json!({ "\u{0}": 1 })), "data", "The data has U+0000"),
        (with("key", json!("")), "key", key),
        (with("key", json!("a b")), "key", key),
        (with("key", json!(long(129))), "key", key),
        (with("to", json!([{ "subject": long(256) }])), "to", subject),
        (with("to", json!([{ "subject": "a\u{0}" }])), "to", subject),
        (with("to", json!(many(1_001))), "events", "Too many receivers in one request. 1000 max"),
        (
            json!({ "to": john, "event": "a", "key": "k", "ephemeral": true }),
            "key",
            "An ephemeral event has no key",
        ),
    ] {
        assert_unacceptable(&host.publish(json!([event])).await, field, sentence);
        if field != "events" {
            let answer = host.publish(json!([self::event(&john, "good"), event])).await;
            assert_unacceptable(&answer, field, &format!("Event 2 of 2: {sentence}"));
        }
    }
    // In all events together.
    let answer = host.publish(json!([event(&json!(many(600)), "a"), event(&json!(many(401)), "a")])).await;
    assert_unacceptable(&answer, "events", "Too many receivers in one request. 1000 max");
    assert_eq!(number(&pool, "SELECT nextval('messenger.events_id_seq')").await, 1, "nothing was staged");
    // The largest that is accepted, and doubles do not count.
    host.published(json!([
        { "to": many(999), "event": long(128), "data": long(48 * 1024 - 2), "key": long(128) },
        { "to": [{ "userId": "1" }, { "userId": "1" }], "event": "a" },
    ]))
    .await;
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn bodies_of_another_shape_are_400_or_413(pool: PgPool) {
    let host = Host::start(&pool).await;
    let shape = "does not have the right shape";
    let john = r#"{"userId":"1"}"#;
    for (body, part) in [
        (String::new(), "is not JSON"),
        ("[]".to_owned(), shape),
        ("{}".to_owned(), shape),
        (r#"{"events":null}"#.to_owned(), shape),
        (r#"{"events":{}}"#.to_owned(), shape),
        (r#"{"events":[[]]}"#.to_owned(), shape),
        (r#"{"events":[{"event":"a"}]}"#.to_owned(), shape),
        (r#"{"events":[{"to":null,"event":"a"}]}"#.to_owned(), shape),
        (r#"{"events":[{"to":["1"],"event":"a"}]}"#.to_owned(), shape),
        (r#"{"events":[{"to":[{}],"event":"a"}]}"#.to_owned(), shape),
        (r#"{"events":[{"to":[{"email":"x"}],"event":"a"}]}"#.to_owned(), shape),
        (r#"{"events":[{"to":[{"userId":1}],"event":"a"}]}"#.to_owned(), shape),
        (r#"{"events":[{"to":[{"userId":"1","username":"john"}],"event":"a"}]}"#.to_owned(), shape),
        (format!(r#"{{"events":[{{"to":[{john}],"event":1}}]}}"#), shape),
        (format!(r#"{{"events":[{{"to":[{john}],"event":"a","key":1}}]}}"#), shape),
        (format!(r#"{{"events":[{{"to":[{john}],"event":"a","ephemeral":"yes"}}]}}"#), shape),
        (format!(r#"{{"events":[{{"to":[{john}],"event":"a","data":[1,]}}]}}"#), "is not JSON"),
        (format!(r#"{{"events":[{{"to":[{john}],"event":"a","data":"\ud800"}}]}}"#), "lone surrogate"),
        (
            format!(r#"{{"events":[{{"to":[{john}],"event":"a","data":["\ud83d\ud83d"]}}]}}"#),
            "lone surrogate",
        ),
        (format!(r#"{{"events":[{{"to":[{john}],"event":"\ud800"}}]}}"#), "is not JSON"),
    ] {
        let answer = host.post(OWN, &body).await;
        assert_eq!(
            (answer.status, &answer.json()["code"]),
            (400, &json!("bad_body")),
            "{body}: {}",
            answer.text()
        );
        assert!(answer.json()["message"].as_str().unwrap().contains(part), "{body}: {}", answer.text());
    }
    assert_eq!(
        host.post(OWN, b"{\"events\":[{\"to\":[],\"event\":\"a\",\"data\":\"\xff\"}]}").await.status,
        400
    );
    let filled = |length: usize| {
        let body = r#"{"events":[],"more":""}"#;
        body.replace("\"\"}", &format!("\"{}\"}}", "x".repeat(length - body.len())))
    };
    assert_eq!(host.post(OWN, filled(1024 * 1024)).await.status, 200);
    for content_type in [OWN, ONE, BATCH] {
        assert_problem(&host.post(content_type, filled(1024 * 1024 + 1)).await, 413, "Body too large");
    }
    assert_eq!(number(&pool, "SELECT nextval('messenger.events_id_seq')").await, 1, "nothing was staged");
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn cloud_events_are_accepted_in_structured_mode(pool: PgPool) {
    let host = Host::start(&pool).await;
    let good = |id: &str, kind: &str| {
        json!({ "specversion": "1.0", "id": id, "source": "/shop", "type": kind, "subject": "auth0|1", "data": { "n": id },
                "datacontenttype": "application/json", "time": "2026-01-02T03:04:05Z", "extension": 1 })
    };
    let parameters = format!("{}; charset=utf-8", ONE.to_uppercase());
    for content_type in [ONE, &parameters] {
        let answer = host.post(content_type, good("1", "com.example.paid").to_string()).await;
        assert_eq!(
            (answer.status, answer.json()),
            (200, json!({ "results": [{ "published": 1, "unknown": [] }] }))
        );
    }
    let mut stranger = good("2", "com.example.paid");
    stranger["subject"] = json!("nobody");
    let mut no_data = good("3", "com.example.sent");
    no_data["specversion"] = json!("1.12");
    no_data.as_object_mut().unwrap().remove("data");
    let batch = json!([no_data, stranger, good("4", "com.example.paid")]).to_string();
    let results = json!({ "results": [
        { "published": 1, "unknown": [] }, { "published": 0, "unknown": [{ "subject": "nobody" }] }, { "published": 1, "unknown": [] },
    ] });
    assert_eq!(host.post(BATCH, batch).await.json(), results);
    assert_eq!(host.post(BATCH, "[]").await.json(), json!({ "results": [] }));
    let seen =
        until_in_feed(&host.app, UserId(1), &["com.example.paid", "com.example.sent", "com.example.paid"])
            .await;
    assert_eq!(seen, [json!({ "n": "1" }), Value::Null, json!({ "n": "4" })]);

    let long = "x".repeat(1_025);
    let (id, source) =
        ("A CloudEvent needs an id of", "A CloudEvent needs a source without white space, of at most");
    let version = "The specversion of a CloudEvent must be 1.x";
    for (member, value, sentence) in [
        ("specversion", Value::Null, version),
        ("specversion", json!("0.3"), version),
        ("specversion", json!("1"), version),
        ("specversion", json!("2.0"), version),
        ("id", Value::Null, id),
        ("id", json!(""), id),
        ("id", json!(long), id),
        ("source", Value::Null, source),
        ("source", json!("/a b"), source),
        ("type", Value::Null, "An event needs a name of letters and digits"),
        ("type", json!("com.example/paid"), "An event needs a name of letters and digits"),
        ("type", json!("user.paid"), "The first segment of this name is reserved"),
        ("subject", Value::Null, "Subject required"),
        ("subject", json!("x".repeat(256)), "A subject has at most 255 bytes"),
        ("data_base64", json!("AA=="), "Data in base64 is not accepted"),
        ("data", json!("\u{0}"), "The data has U+0000"),
        ("data", json!("x".repeat(49_152)), "The data is too long"),
    ] {
        let mut bad = good("5", "a");
        bad[member] = value;
        let answer = host.post(ONE, bad.to_string()).await;
        let body = answer.json();
        assert_eq!(answer.status, 422, "{member}: {body}");
        assert!(
            body["errors"][member].as_str().is_some_and(|said| said.starts_with(sentence)),
            "{member}: {body}"
        );
        let batch = json!([good("6", "a"), bad]).to_string();
        let body = host.post(BATCH, batch).await.json();
        assert!(
            body["errors"][member].as_str().is_some_and(|said| said.starts_with("Event 2 of 2: ")),
            "{body}"
        );
    }
    for (content_type, body) in
        [(ONE, "[]"), (ONE, "1"), (BATCH, "{}"), (BATCH, "[1]"), (ONE, r#"{"id":1}"#), (OWN, "{}")]
    {
        assert_eq!(host.post(content_type, body).await.status, 400, "{content_type} {body}");
    }
    // Binary mode: attributes in headers, the data alone in the body.
    for content_type in [OWN, "text/plain"] {
        let headers = [
            ("content-type", content_type),
            ("authorization", &*host.bearer),
            ("ce-specversion", "1.0"),
            ("ce-id", "7"),
            ("ce-source", "/shop"),
            ("ce-type", "a"),
            ("ce-subject", "auth0|1"),
        ];
        let answer = raw::post(&host.app, "/api/events", &headers, r#"{"events":[]}"#).await;
        let sentence = "CloudEvents are accepted in structured mode only: application/cloudevents+json";
        assert_problem(&answer, 400, sentence);
    }
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn events_need_a_service_token_with_the_scope(pool: PgPool) {
    let host = Host::start(&pool).await;
    let john = host.app.login("john").await;
    let gone = host.app.login("jane").await;
    gone.set_session(&pool, "revoked_at = now()").await;
    let bearer = |token: &str| format!("Bearer {token}");
    let other = bearer(&create(&pool, "users-only", "users,admin"));
    let unknown = bearer(&format!("msk_{}", "A".repeat(43)));
    let (johns, gones) = (bearer(&john.token), bearer(&gone.token));
    let cookie = host.bearer.replace("Bearer ", "messenger_session=");
    for body in ["{", r#"{"events":[]}"#] {
        let post = async |headers: &[(&str, &str)]| {
            let answer =
                raw::post(&host.app, "/api/events", &[&[("content-type", OWN)], headers].concat(), body)
                    .await;
            (answer.status, answer.json()["code"].as_str().unwrap_or_default().to_owned(), answer)
        };
        for (headers, status, code) in [
            (&[][..], 401, "unauthorized"),
            (&[("authorization", "Bearer bad")], 401, "unauthorized"),
            (&[("authorization", &unknown)], 401, "unauthorized"),
            (&[("authorization", &gones)], 401, "unauthorized"),
            (&[("cookie", &cookie)], 401, "unauthorized"),
            (&[("authorization", &johns)], 403, "service_token_required"),
            (&[("cookie", &john.cookie), ("origin", ORIGIN)], 403, "service_token_required"),
            (&[("cookie", &john.cookie), ("origin", "http://evil.example")], 403, "origin_not_allowed"),
            (&[("authorization", &other)], 403, "scope_required"),
        ] {
            let (got, said, answer) = post(headers).await;
            assert_eq!((got, said.as_str()), (status, code), "{headers:?}");
            if code == "origin_not_allowed" {
                assert_problem(&answer, 403, ORIGIN_NOT_ALLOWED);
            }
        }
        // 415 comes before all of them.
        for content_type in ["text/plain", "application/cloudevents", "application/cloudevents+xml", ""] {
            let headers = [("content-type", content_type), ("authorization", "Bearer bad")];
            let answer = raw::post(&host.app, "/api/events", &headers, body).await;
            assert_problem(&answer, 415, "Content type of application/json required");
        }
    }
    // A browser's page cannot use it by a preflight of another origin either; and the answer names no user.
    assert_eq!(host.publish(json!([])).await.status, 200);
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn each_service_token_has_a_limit_of_its_own(pool: PgPool) {
    add_users(&pool, ["john"]).await;
    let requests_per_service = Limit::new(3, Duration::from_hours(1));
    let limits = RateLimits { patience: PATIENCE, requests_per_service, ..RateLimits::OFF };
    let app = App::with(&pool, |config| config.limits = limits).await;
    let tokens =
        [create(&pool, "one", "publish"), create(&pool, "two", "publish"), create(&pool, "three", "users")];
    for (token, last) in [(&tokens[0], 429), (&tokens[1], 429), (&tokens[2], 403)] {
        let post = async |body: &str| {
            let headers = [("content-type", OWN), ("authorization", &*format!("Bearer {token}"))];
            raw::post(&app, "/api/events", &headers, body).await
        };
        let first = if last == 429 { 400 } else { 403 };
        for _ in 0..3 {
            assert_eq!(post("{").await.status, first);
        }
        // Before the body, after the scope.
        let answer = post("{").await;
        assert_eq!(answer.status, last);
        assert_eq!(answer.header("retry-after").is_some(), last == 429);
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn http_and_sql_have_one_order(pool: PgPool) {
    let host = Host::start(&pool).await;
    let mut names = Vec::new();
    for n in 0..40 {
        let name = format!("n{n}");
        if n % 2 == 0 {
            host.published(json!([event(&json!([{ "userId": "1" }]), &name)])).await;
        } else {
            execute(&pool, format!("SELECT messenger.publish(1, '{name}', '1')")).await;
        }
        names.push(name);
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    until_in_feed(&host.app, UserId(1), &names).await;
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn ephemeral_event_is_only_published(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let john = app.user(&pool, "john").await;
    let mut johns = Listener::start(&redis_url(), &channels.user(john.id)).await;
    let bearer = format!("Bearer {}", create(&pool, "shop", "publish"));
    let largest = "x".repeat(48 * 1024 - 2);
    let events = json!([
        { "to": [{ "userId": john.id.to_string() }, { "userId": "9" }], "event": "agent.step", "data": { "n": 1 }, "ephemeral": true },
        { "to": [{ "userId": john.id.to_string() }], "event": "x".repeat(128), "data": largest, "ephemeral": true },
        { "to": [{ "userId": john.id.to_string() }], "event": "agent.done", "ephemeral": false },
    ]);
    let call = app.post("/api/events").header("authorization", &bearer).json(&json!({ "events": events }));
    let results = call.expect(200).await.json()["results"].clone();
    assert_eq!(results[0], json!({ "published": 1, "unknown": [{ "userId": "9" }] }));
    let mut seen = Vec::new();
    for _ in 0..3 {
        let message: Value = johns.next_as().await;
        assert!(message.to_string().len() <= LARGEST_EPHEMERAL, "gateways drop longer ones");
        seen.push(message);
    }
    // The one of the feed takes the way through the relay.
    seen.sort_by_key(|message| message.get("seq").is_some());
    assert_eq!(seen[0], json!({ "ephemeral": "agent.step", "v": 1, "data": { "n": 1 } }));
    assert_eq!(seen[1]["data"].as_str().unwrap().len(), largest.len());
    assert_eq!((&seen[2]["event"], &seen[2]["seq"]), (&json!("agent.done"), &json!(1)));
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.events").await, 1);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn published_event_is_explained_and_carries_its_request(pool: PgPool) {
    let host = Host::start(&pool).await;
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let call =
        host.app.post("/api/events").header("authorization", &host.bearer).header("traceparent", traceparent);
    let events = json!({ "events": [event(&json!([{ "userId": "1" }]), "order.paid")] });
    let answer = call.json(&events).expect(200).await;
    until_in_feed(&host.app, UserId(1), &["order.paid"]).await;
    let url = format!("{}/admin/explain?user=1&seq=1", host.app.ops);
    let explained = host.app.client.get(url).expect(200).await.json();
    assert_eq!(explained["event"]["name"], "order.paid");
    assert_eq!(explained["event"]["requestId"], answer.header("x-request-id").unwrap());
    assert_eq!(explained["event"]["traceparent"], traceparent);
    let range = host.app.ranges(vec![RangeAfter { user: UserId(1), after: 0 }]).await.ranges.remove(0);
    assert_eq!(range.events[0].request_id.as_deref(), answer.header("x-request-id"));
    assert_eq!(range.events[0].traceparent.as_deref(), Some(traceparent));
    host.app.stop().await;
}

/// A thousand of the largest events in one answer fit into what a gateway reads.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn answer_to_gateways_is_bounded_with_the_largest_data(pool: PgPool) {
    let app = App::start(&pool).await;
    execute(
        &pool,
        "INSERT INTO messenger.users (username) SELECT 'user' || n FROM generate_series(1, 120) AS n;
         INSERT INTO messenger.staged_events (receivers, name, data)
         SELECT (SELECT array_agg(id) FROM messenger.users), 'a', to_jsonb(repeat('x', 49150)) FROM generate_series(1, 3)",
    )
    .await;
    let left = "SELECT count(*) FROM messenger.feed_heads WHERE head_seq < 3";
    until("all are relayed", || async { number(&pool, left).await == 0 }).await;
    let ranges: Vec<_> = (1..=120).map(|user| RangeAfter { user: UserId(user), after: 0 }).collect();
    let answer = app.ranges(ranges).await;
    for range in &answer.ranges {
        assert_eq!(
            (range.events.len(), range.more),
            (1, true),
            "the first one whatever its size, and no more"
        );
    }
    app.stop().await;
}
