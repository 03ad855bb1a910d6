//! A running service for one test, and its clients: one method per endpoint.

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use api::{
    app::{self, Listeners},
    config::{Addresses, Config, Keep, Lifetimes, ProviderSettings, RateLimits},
    store::Database,
};
use prometheus_client::metrics::counter::Counter;
use protocol::{
    channels::Channels,
    claims::{Audience, Claims, SigningKeys},
    event::kind,
    feed::{
        HEADS_PATH, HeadsAnswer, HeadsRequest, RANGES_PATH, RangeAfter, RangesAnswer, RangesRequest,
        authorization,
    },
    ids::{SessionId, UserId},
};
use serde_json::{Value, json};
use service_kit::{client_address::TrustedProxies, redis_topology::RedisTopology, secrets::Secrets};
use sqlx::{AssertSqlSafe, PgPool, postgres::PgConnectOptions};
use testkit::{
    documented::OpenApiDocument,
    http::{Answer, Call, Client},
    panics, programs,
    secrets::signing_key_of,
    soon, until,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const ORIGIN: &str = "http://localhost:8080";
/// Another origin whose pages may use us.
pub(crate) const LISTED: &str = "https://shop.example:8443";
/// The error for a page of `http://evil.example` that uses the cookie.
pub(crate) const ORIGIN_NOT_ALLOWED: &str =
    "Origin http://evil.example is not allowed; add it to ALLOWED_ORIGINS";
pub(crate) const SECRET: &str = "the-internal-secret-of-these-tests";
pub(crate) static PEM: LazyLock<String> =
    LazyLock::new(|| signing_key_of(std::array::from_fn(|index| index as u8)));

pub(crate) struct App {
    pub(crate) public: String,
    pub(crate) internal: String,
    pub(crate) ops: String,
    pub(crate) client: Client,
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

pub(crate) fn redis_url() -> String {
    programs::server("REDIS_URL")
}

/// A prefix that no other test has, on a Redis that all share.
pub(crate) fn channel_prefix() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("api-it:{}:{}:", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn keys() -> SigningKeys {
    SigningKeys::from_pems(ORIGIN, PEM.as_bytes(), &[]).unwrap()
}

pub(crate) fn options(pool: &PgPool) -> PgConnectOptions {
    (*pool.connect_options()).clone()
}

pub(crate) fn database(pool: &PgPool, connections: usize) -> Database {
    Database::new(options(pool), connections, Counter::default())
}

/// Runs SQL without parameters.
pub(crate) async fn execute(pool: &PgPool, statements: impl Into<String>) {
    sqlx::raw_sql(AssertSqlSafe(statements.into())).execute(pool).await.unwrap();
}

pub(crate) async fn number(pool: &PgPool, query: impl Into<String>) -> i64 {
    sqlx::query_scalar(AssertSqlSafe(query.into())).fetch_one(pool).await.unwrap()
}

/// What the tables repeat is what can be counted.
pub(crate) async fn assert_counts_agree(pool: &PgPool) {
    for (what, wrong) in [
        (
            "unread counts",
            "SELECT count(*) FROM messenger.participants AS p
             WHERE p.unread_count <> (SELECT count(*) FROM messenger.messages AS m
                WHERE m.conversation_id = p.conversation_id AND m.number > greatest(p.last_read_number, p.joined_number)
                  AND m.sender_id <> p.user_id AND m.hidden_from IS DISTINCT FROM p.user_id AND m.deleted_at IS NULL)",
        ),
        (
            "unread totals",
            "SELECT count(*) FROM messenger.feed_heads AS h
             WHERE h.unread_total <> (SELECT coalesce(sum(p.unread_count), 0)
                FROM messenger.participants AS p WHERE p.user_id = h.user_id)",
        ),
        (
            "members",
            "SELECT count(*) FROM messenger.conversations AS c
             WHERE c.participant_count <> (SELECT count(*) FROM messenger.participants AS p WHERE p.conversation_id = c.id)",
        ),
        (
            "owners",
            "SELECT count(*) FROM messenger.conversations AS c
             WHERE c.participant_count > 0 AND (c.user_a IS NULL) <> EXISTS (
                SELECT FROM messenger.participants AS p WHERE p.conversation_id = c.id AND p.is_owner)",
        ),
        (
            "last messages",
            "SELECT count(*) FROM messenger.participants AS p
             WHERE p.last_number IS DISTINCT FROM (SELECT max(m.number) FROM messenger.messages AS m
                WHERE m.conversation_id = p.conversation_id AND m.number > p.joined_number
                  AND m.hidden_from IS DISTINCT FROM p.user_id)",
        ),
        (
            "numbers of messages",
            "SELECT count(*) FROM messenger.conversations AS c
             WHERE c.last_number <> (SELECT count(*) FROM messenger.messages AS m WHERE m.conversation_id = c.id)
                OR c.last_number <> (SELECT coalesce(max(m.number), 0) FROM messenger.messages AS m WHERE m.conversation_id = c.id)",
        ),
        (
            "places in lists",
            "SELECT count(*) FROM messenger.participants AS p
             WHERE p.last_message_id IS NOT NULL AND p.list_seq IS DISTINCT FROM (SELECT f.seq FROM messenger.feed AS f
                WHERE f.user_id = p.user_id AND f.event_id = p.last_message_id)",
        ),
    ] {
        assert_eq!(number(pool, wrong).await, 0, "{what}");
    }
}

pub(crate) async fn until_waiting_for_locks(pool: &PgPool, sessions: i64) {
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    until("they wait for the lock", || async { number(pool, waiting).await >= sessions }).await;
}

pub(crate) fn config(pool: &PgPool) -> Config {
    Config {
        origin: ORIGIN.parse().unwrap(),
        allowed_origins: vec![LISTED.parse().unwrap()],
        trusted_proxies: TrustedProxies::default(),
        connections_per_address: 0,
        database: options(pool),
        database_pool_size: 8,
        redis: RedisTopology::single(redis_url()).unwrap(),
        channels: Channels::new(channel_prefix()),
        keys: keys(),
        internal_secrets: Secrets::parse(SECRET).unwrap(),
        state_secrets: Secrets::parse(SECRET).unwrap(),
        dev_login: true,
        usernames_change: true,
        presence: true,
        providers: Vec::new(),
        provider_time_limit: Duration::from_secs(10),
        callback_token_in_query: false,
        external_issuer: None,
        external: None,
        lifetimes: Lifetimes { session: Duration::from_hours(1), stream_token: Duration::from_mins(1) },
        longest_message: 4_000,
        largest_group: 1_000,
        keep: Keep {
            age: Duration::from_hours(1),
            events: 1_000_000,
            idempotency_keys: Duration::from_hours(1),
            messages: None,
            edit_window: Duration::from_hours(24),
        },
        limits: RateLimits::OFF,
        shutdown_wait: Duration::ZERO,
        shutdown_grace: Duration::from_secs(5),
        traces: None,
    }
}

static DOCUMENT: LazyLock<OpenApiDocument> =
    LazyLock::new(|| OpenApiDocument::new(include_str!("../../openapi.json")));

/// An event's data must be as documented.
pub(crate) fn check_event(name: Option<&str>, data: &Value) {
    DOCUMENT.check_event(name, data);
}

/// A client that holds every answer of the public listener against the document, but for the web client's files.
fn documented(public: String) -> Client {
    Client::default().witnessed(Arc::new(move |method, address, answer| {
        let is_ours = ["/api/", "/.well-known/"].iter().any(|prefix| address.path().starts_with(prefix));
        if address.to_string().starts_with(&public) && is_ours {
            DOCUMENT.check(method, address.path(), answer);
        }
    }))
}

pub(crate) fn anywhere() -> Addresses {
    let address = "127.0.0.1:0".parse().unwrap();
    Addresses { public: address, internal: address, ops: address }
}

impl AsRef<str> for App {
    fn as_ref(&self) -> &str {
        &self.public
    }
}

impl App {
    pub(crate) async fn start(pool: &PgPool) -> Self {
        Self::start_with(config(pool)).await
    }

    /// Started with changed settings.
    pub(crate) async fn with(pool: &PgPool, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = config(pool);
        change(&mut config);
        Self::start_with(config).await
    }

    pub(crate) async fn with_providers<const N: usize>(
        pool: &PgPool,
        providers: [ProviderSettings; N],
    ) -> Self {
        Self::with(pool, |config| config.providers = providers.into()).await
    }

    /// Started as `main` does.
    pub(crate) async fn start_with(config: Config) -> Self {
        panics::watch();
        let listeners = Listeners::bind(anywhere()).unwrap();
        let Addresses { public, internal, ops } = listeners.addresses().unwrap();
        let [public, internal, ops] = [public, internal, ops].map(|address| format!("http://{address}"));
        let client = documented(public.clone());
        let stop = CancellationToken::new();
        let task = tokio::spawn(app::run(config, listeners, stop.clone()));
        let app = Self { public, internal, ops, client, stop, task };
        until("the service is ready", || async {
            assert!(!app.task.is_finished(), "the service ended instead of starting");
            app.client
                .get(format!("{}/readyz", app.ops))
                .send()
                .await
                .is_ok_and(|answer| answer.status == 200)
        })
        .await;
        app
    }

    /// Each test ends with this, so that nothing holds its database.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        drop(self.client);
        self.task.await.unwrap().unwrap();
        panics::assert_none();
    }

    pub(crate) fn get(&self, path: &str) -> Call {
        self.client.get(format!("{}{path}", self.public))
    }

    pub(crate) fn post(&self, path: &str) -> Call {
        self.client.post(format!("{}{path}", self.public))
    }

    pub(crate) fn call(&self, method: &str, path: &str) -> Call {
        self.client.call(method, format!("{}{path}", self.public))
    }

    /// A user who is logged in; created if the name is new.
    pub(crate) async fn user(&self, pool: &PgPool, username: &str) -> ApiUser {
        add_users(pool, [username]).await;
        self.login(username).await
    }

    pub(crate) async fn login(&self, username: &str) -> ApiUser {
        let answer = self.post("/api/login").json(&json!({ "username": username })).expect(200).await;
        let body = answer.json();
        ApiUser {
            id: text(&body["authUser"]["id"]).parse().unwrap(),
            name: username.into(),
            token: text(&body["token"]),
            cookie: answer.cookie(),
            base: self.public.clone(),
            client: self.client.clone(),
        }
    }

    pub(crate) async fn heads(&self, body: &HeadsRequest) -> HeadsAnswer {
        serde_json::from_value(self.internal(HEADS_PATH, body).expect(200).await.json()).unwrap()
    }

    pub(crate) async fn ranges(&self, ranges: Vec<RangeAfter>) -> RangesAnswer {
        // Not by way of a value, which would write numbers and escapes in another way.
        let answer = self.internal(RANGES_PATH, &RangesRequest { ranges }).expect(200).await;
        serde_json::from_slice(&answer.body).unwrap()
    }

    pub(crate) fn internal(&self, path: &str, body: &impl serde::Serialize) -> Call {
        let call = self.client.post(format!("{}{path}", self.internal));
        call.header("authorization", &authorization(SECRET)).json(body)
    }

    /// A whole feed, as a gateway reads it: event name and data, numbered from 1 without a gap.
    pub(crate) async fn feed(&self, user: UserId) -> Vec<(String, Value)> {
        let mut events = Vec::new();
        loop {
            let after = events.len() as u64;
            let mut answer = self.ranges(vec![RangeAfter { user, after }]).await;
            let range = answer.ranges.remove(0);
            for event in range.events {
                assert_eq!(event.seq, events.len() as u64 + 1, "feeds have no gaps");
                let data = serde_json::from_str(event.data.get()).unwrap();
                let name = Some(event.event.as_str()).filter(|name| *name != kind::MESSAGE);
                DOCUMENT.check_event(name, &data);
                events.push((event.event, data));
            }
            if !range.more {
                assert_eq!(range.head.unwrap().seq, events.len() as u64, "the head is the last event");
                return events;
            }
        }
    }

    /// Two users with a conversation.
    pub(crate) async fn pair(&self, pool: &PgPool) -> (ApiUser, ApiUser, String) {
        let (john, jane) = (self.user(pool, "john").await, self.user(pool, "jane").await);
        let conversation = john.start("jane").await;
        (john, jane, conversation)
    }
}

pub(crate) async fn add_users<const N: usize>(pool: &PgPool, names: [&str; N]) {
    sqlx::query("INSERT INTO messenger.users (username) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING")
        .bind(&names[..])
        .execute(pool)
        .await
        .unwrap();
}

/// Every route that needs a session, but for those that send or edit a message.
pub(crate) const ROUTES: [&str; 28] = [
    "GET /api/auth_user",
    "PATCH /api/auth_user",
    "GET /api/blocks",
    "GET /api/presence?userId=1",
    "GET /api/usernames?search=j",
    "GET /api/sessions",
    "DELETE /api/sessions",
    "DELETE /api/sessions/{session}",
    "DELETE /api/sessions/no-id",
    "POST /api/logout",
    "POST /api/refresh_token",
    "POST /api/stream_token",
    "PUT /api/blocks/{user}",
    "DELETE /api/blocks/{user}",
    "GET /api/conversations",
    "POST /api/conversations",
    "GET /api/conversations/{id}",
    "PATCH /api/conversations/{id}",
    "GET /api/conversations/{id}/other_participant",
    "GET /api/conversations/{id}/participants",
    "POST /api/conversations/{id}/participants",
    "PATCH /api/conversations/{id}/participants/{user}",
    "DELETE /api/conversations/{id}/participants/{user}",
    "GET /api/conversations/{id}/messages",
    "HEAD /api/conversations/{id}/messages",
    "DELETE /api/conversations/{id}/messages/1",
    "POST /api/conversations/{id}/read_messages",
    "POST /api/conversations/{id}/typing",
];

#[derive(Clone)]
pub(crate) struct ApiUser {
    pub(crate) id: UserId,
    pub(crate) name: String,
    pub(crate) token: String,
    pub(crate) cookie: String,
    base: String,
    client: Client,
}

impl ApiUser {
    /// The same person, at another replica.
    pub(crate) fn at(&self, app: &App) -> Self {
        Self { base: app.public.clone(), client: app.client.clone(), ..self.clone() }
    }

    pub(crate) fn bearing(&self, token: String) -> Self {
        Self { token, ..self.clone() }
    }

    /// One of [`ROUTES`], about this conversation and this user.
    pub(crate) fn call_route(&self, route: &str, conversation: &str, other: &Self) -> Call {
        let (method, path) = route.split_once(' ').unwrap();
        let path = path.replace("{id}", conversation).replace("{user}", &other.id.to_string());
        let call = self.call(method, &path.replace("{session}", &other.session().to_string()));
        match method {
            "POST" => call.json(&json!({ "username": other.name })),
            "PATCH" => call.json(&json!({ "title": "Team", "role": "owner" })),
            _ => call,
        }
    }

    /// Changes the row of this session.
    pub(crate) async fn set_session(&self, pool: &PgPool, change: &str) {
        execute(pool, format!("UPDATE messenger.sessions SET {change} WHERE id = {}", self.session())).await;
    }

    pub(crate) fn call(&self, method: &str, path: &str) -> Call {
        self.client.call(method, format!("{}{path}", self.base)).bearer(&self.token)
    }

    pub(crate) fn auth_user(&self) -> Call {
        self.call("GET", "/api/auth_user")
    }

    pub(crate) fn refresh_token(&self) -> Call {
        self.call("POST", "/api/refresh_token")
    }

    /// `search` as it stands in the URL.
    pub(crate) fn usernames(&self, search: &str) -> Call {
        self.call("GET", &format!("/api/usernames?search={search}"))
    }

    pub(crate) fn start_conversation(&self, username: &str) -> Call {
        self.call("POST", "/api/conversations").json(&json!({ "username": username }))
    }

    /// A group of this user and others.
    pub(crate) fn create_group(&self, title: &str, usernames: &[&str]) -> Call {
        self.call("POST", "/api/conversations").json(&json!({ "title": title, "usernames": usernames }))
    }

    /// Makes a group; its id.
    pub(crate) async fn group(&self, title: &str, usernames: &[&str]) -> String {
        text(&self.create_group(title, usernames).expect(201).await.json()["id"])
    }

    pub(crate) fn rename(&self, group: &str, title: &str) -> Call {
        self.call("PATCH", &format!("/api/conversations/{group}")).json(&json!({ "title": title }))
    }

    pub(crate) fn participants(&self, id: &str, query: &str) -> Call {
        self.call("GET", &format!("/api/conversations/{id}/participants{query}"))
    }

    pub(crate) fn add(&self, group: &str, username: &str) -> Call {
        let path = format!("/api/conversations/{group}/participants");
        self.call("POST", &path).json(&json!({ "username": username }))
    }

    pub(crate) fn set_role(&self, group: &str, who: &Self, role: &str) -> Call {
        let path = format!("/api/conversations/{group}/participants/{}", who.id);
        self.call("PATCH", &path).json(&json!({ "role": role }))
    }

    /// Oneself: leaves.
    pub(crate) fn remove(&self, group: &str, who: &Self) -> Call {
        self.call("DELETE", &format!("/api/conversations/{group}/participants/{}", who.id))
    }

    pub(crate) fn conversations(&self, query: &str) -> Call {
        self.call("GET", &format!("/api/conversations{query}"))
    }

    pub(crate) fn conversation(&self, id: &str) -> Call {
        self.call("GET", &format!("/api/conversations/{id}"))
    }

    pub(crate) fn other_participant(&self, id: &str) -> Call {
        self.call("GET", &format!("/api/conversations/{id}/other_participant"))
    }

    pub(crate) fn post_message(&self, id: &str, content: &str) -> Call {
        self.call("POST", &format!("/api/conversations/{id}/messages")).json(&json!({ "content": content }))
    }

    pub(crate) fn edit_message(&self, conversation: &str, id: &str, content: &str) -> Call {
        let path = format!("/api/conversations/{conversation}/messages/{id}");
        self.call("PATCH", &path).json(&json!({ "content": content }))
    }

    pub(crate) fn delete_message(&self, conversation: &str, id: &str) -> Call {
        self.call("DELETE", &format!("/api/conversations/{conversation}/messages/{id}"))
    }

    pub(crate) fn messages(&self, id: &str, query: &str) -> Call {
        self.call("GET", &format!("/api/conversations/{id}/messages{query}"))
    }

    pub(crate) fn read_messages(&self, id: &str) -> Call {
        self.call("POST", &format!("/api/conversations/{id}/read_messages"))
    }

    /// Starts a conversation; its id.
    pub(crate) async fn start(&self, username: &str) -> String {
        text(&self.start_conversation(username).expect(201).await.json()["id"])
    }

    /// Posts; the message's id.
    pub(crate) async fn say(&self, conversation: &str, content: &str) -> String {
        text(&self.post_message(conversation, content).expect(201).await.json()["id"])
    }

    fn claims(&self) -> Claims {
        keys().verifier().verify(&self.token, &[Audience::Api]).unwrap()
    }

    pub(crate) fn session(&self) -> SessionId {
        self.claims().sid.unwrap()
    }

    /// A token for this user's session that says something else.
    pub(crate) fn forge(&self, change: impl FnOnce(&mut Claims)) -> String {
        let mut claims = self.claims();
        change(&mut claims);
        keys().sign(&claims)
    }
}

/// Repeats a call whose answer is "try again soon": many concurrent requests can wait too long for Postgres on a slow machine.
pub(crate) async fn once_not_busy(call: impl Fn() -> Call) -> Answer {
    soon("the service has time for the request", async {
        loop {
            let answer = call().send().await.unwrap();
            if answer.status != 503 {
                return answer;
            }
        }
    })
    .await
}

pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no string")).to_owned()
}

/// Every answer has these, whatever it says.
#[track_caller]
pub(crate) fn assert_common_headers(answer: &Answer) {
    assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(answer.header("referrer-policy"), Some("no-referrer"));
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert!(answer.header("x-request-id").is_some_and(|id| !id.is_empty()));
}

#[track_caller]
pub(crate) fn assert_problem(answer: &Answer, status: u16, message: &str) {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_common_headers(answer);
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    let body = answer.json();
    assert_eq!(body["message"], message, "{body}");
    assert_eq!(body["status"], status);
    assert_eq!(body["type"], format!("/problems/{}", body["code"].as_str().unwrap()));
    assert_eq!(body["requestId"], answer.header("x-request-id").unwrap());
    assert!(
        body["title"].is_string()
            && body["code"].as_str().unwrap().bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
    );
    assert_eq!(body.get("errors").is_some(), status == 422, "{body}");
}

/// A 422 by the state of things: it has a code and no `errors`.
#[track_caller]
pub(crate) fn assert_not_now(answer: &Answer, code: &str) {
    let body = answer.json();
    assert_eq!((answer.status, &body["code"], body.get("errors")), (422, &json!(code), None), "{body}");
    assert_common_headers(answer);
}

#[track_caller]
pub(crate) fn assert_unacceptable(answer: &Answer, field: &str, sentence: &str) {
    assert_problem(answer, 422, sentence);
    assert_eq!(answer.json()["errors"], json!({ field: sentence }));
}
