//! The environment of one test: its own database, channel prefix, keys and secrets. At its end it checks the services' logs: no
//! panic, no token, no message text.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use chrono::Utc;
use protocol::{
    channels::Channels,
    claims::{Audience, Claims, SigningKeys},
    ids::{ConversationId, SessionId, UserId},
};
use serde_json::{Value, json};
use service_kit::cookies::Cookies;
use sqlx::{
    AssertSqlSafe, Connection, Executor, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tempfile::TempDir;

use crate::{
    http::{Answer, Client},
    issuer, panics,
    programs::{self, server},
    secrets::{random, signing_key},
    service::{Log, Plan, Service},
    soon,
    user::TestUser,
};

/// Part of every message that a test sends; must be in no log.
const WHISPER: &str = "whispered";

const GENEROUS: &str = "1000000/60";

pub const ORIGIN: &str = "http://localhost:8080";

static WORLDS: AtomicU32 = AtomicU32::new(0);

pub struct World {
    pub sql: PgPool,
    pub client: Client,
    options: WorldOptions,
    database: WorldDatabase,
    prefix: String,
    keys: TempDir,
    signing: SigningKeys,
    internal_secret: String,
    logs: Mutex<Vec<Arc<Log>>>,
    tokens: Mutex<Vec<String>>,
    texts: AtomicU32,
}

pub struct WorldOptions {
    pub origin: String,
    pub trusted_proxies: &'static str,
    /// The Postgres in which the world makes its own database; `None`: the one that all tests share.
    pub database_url: Option<String>,
    /// `REDIS_URL` and related settings; empty: the Redis that all tests share.
    pub redis: Vec<(&'static str, String)>,
    /// Services run with their defaults, without rate limits: for a bench.
    pub as_shipped: bool,
}

impl Default for WorldOptions {
    fn default() -> Self {
        let (trusted_proxies, as_shipped) = ("", false);
        Self { origin: ORIGIN.into(), trusted_proxies, database_url: None, redis: Vec::new(), as_shipped }
    }
}

struct WorldDatabase {
    admin_url: String,
    name: String,
}

impl World {
    pub async fn new() -> Self {
        Self::with(WorldOptions::default()).await
    }

    /// With a Redis that the test may break.
    pub async fn with_redis(redis_url: String) -> Self {
        Self::with_redis_settings([("REDIS_URL", redis_url)]).await
    }

    /// With a Redis of several servers.
    pub async fn with_redis_settings(redis: impl Into<Vec<(&'static str, String)>>) -> Self {
        Self::with(WorldOptions { redis: redis.into(), ..WorldOptions::default() }).await
    }

    /// With a Postgres that the test may break.
    pub async fn with_postgres(database_url: String) -> Self {
        Self::with(WorldOptions { database_url: Some(database_url), ..WorldOptions::default() }).await
    }

    /// Browsers reach its services at this origin, through a proxy on this machine.
    pub async fn at(origin: &str) -> Self {
        let origin = origin.to_owned();
        Self::with(WorldOptions { origin, trusted_proxies: "127.0.0.1", ..WorldOptions::default() }).await
    }

    pub async fn with(mut options: WorldOptions) -> Self {
        if options.redis.is_empty() {
            options.redis.push(("REDIS_URL", server("REDIS_URL")));
        }
        let admin_url = options.database_url.take().unwrap_or_else(|| server("DATABASE_URL"));
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let [random, secret] = [(); 2].map(|()| u128::from_ne_bytes(random().expect("random bytes")));
        let name = format!("world_{}_{number}_{:08x}", std::process::id(), random as u32);
        let database = WorldDatabase { admin_url, name };
        database.create().await;
        let connect = database.options();
        let sql = PgPoolOptions::new().max_connections(4).acquire_timeout(Duration::from_secs(30));
        let keys = tempfile::tempdir().expect("a temporary folder");
        let [pem, another] = [(); 2].map(|()| signing_key().expect("random bytes"));
        for (name, pem) in [("signing.pem", &pem), ("another.pem", &another)] {
            std::fs::write(keys.path().join(name), pem).expect("a file in our own folder");
        }
        let world = Self {
            sql: sql.connect_lazy_with(connect),
            client: Client::default(),
            prefix: format!("{}:", database.name),
            database,
            keys,
            signing: SigningKeys::from_pems(&options.origin, pem.as_bytes(), &[])
                .expect("a key that was just made"),
            options,
            internal_secret: format!("{secret:032x}"),
            logs: Mutex::default(),
            tokens: Mutex::default(),
            texts: AtomicU32::new(0),
        };
        world.api().run(&["migrate"]).await;
        world
    }

    pub fn api(&self) -> Plan {
        let plan = self
            .plan("api", "api")
            .env("INTERNAL_LISTEN", "127.0.0.1:0")
            .env("DATABASE_URL", self.database_url())
            .env("SIGNING_KEY_FILES", self.key_file("signing.pem"));
        if self.options.as_shipped {
            return plan;
        }
        plan.env("DATABASE_POOL_SIZE", 5)
            .env("DEV_LOGIN", true)
            .env("STATE_SECRET", &self.internal_secret)
            // Limits are checked, as in production, and never reached: all clients have one address.
            .env("LIMIT_LOGIN_PER_ADDRESS", GENEROUS)
            .env("LIMIT_LOGIN_PER_NAME", GENEROUS)
            .env("LIMIT_SEARCH_PER_USER", GENEROUS)
            .env("LIMIT_SEARCH_PER_ADDRESS", GENEROUS)
            .env("LIMIT_START_PER_USER", GENEROUS)
            .env("LIMIT_START_PER_ADDRESS", GENEROUS)
            .env("LIMIT_SEND_PER_USER", GENEROUS)
            .env("LIMIT_SEND_PER_ADDRESS", GENEROUS)
            .env("LIMIT_TYPING_PER_USER", GENEROUS)
            .env("LIMIT_TYPING_PER_ADDRESS", GENEROUS)
            .env("LIMIT_CHANGE_PER_USER", GENEROUS)
            .env("LIMIT_CHANGE_PER_ADDRESS", GENEROUS)
            .env("LIMIT_REQUESTS_PER_SERVICE", GENEROUS)
    }

    /// For `SIGNING_KEY_FILES`: the first of `signing.pem` and `another.pem` signs.
    pub fn key_files(&self, names: &[&str]) -> String {
        names.iter().map(|name| self.key_file(name)).collect::<Vec<_>>().join(",")
    }

    /// An api that trusts the external issuer of the tests.
    pub fn api_with_issuer(&self, jwks_url: &str) -> Plan {
        self.api()
            .env("EXTERNAL_ISSUER", issuer::ISSUER)
            .env("EXTERNAL_AUDIENCE", issuer::AUDIENCE)
            .env("EXTERNAL_ALGORITHM", "ES256")
            .env("EXTERNAL_JWKS_URL", jwks_url)
    }

    fn key_file(&self, name: &str) -> String {
        self.keys.path().join(name).display().to_string()
    }

    pub fn internal_secret(&self) -> &str {
        &self.internal_secret
    }

    pub fn gateway(&self, internal: std::net::SocketAddr) -> Plan {
        let plan =
            self.plan("gateway", "stream-gateway").env("API_INTERNAL_URL", format!("http://{internal}"));
        if self.options.as_shipped {
            return plan;
        }
        plan.env("DEGRADED_RECONCILE_MILLIS", 200)
            .env("LIMIT_OPEN_PER_USER", GENEROUS)
            .env("LIMIT_OPEN_PER_ADDRESS", GENEROUS)
    }

    pub async fn pair(&self) -> (Service, Service) {
        let api = self.api().ready().await;
        let gateway = self.gateway(api.internal()).ready().await;
        (api, gateway)
    }

    fn plan(&self, name: &str, binary: &str) -> Plan {
        let mut logs = self.logs.lock().expect("no holder panics");
        let log = Arc::new(Log::of(format!("{name}-{}", logs.len())));
        logs.push(log.clone());
        drop(logs);
        let env =
            self.options.redis.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let plan = Plan { binary: programs::service(binary), env, log }
            .env("LISTEN", "127.0.0.1:0")
            .env("OPS_LISTEN", "127.0.0.1:0")
            .env("ORIGIN", &self.options.origin)
            .env("TRUSTED_PROXIES", self.options.trusted_proxies)
            .env("CONNECTIONS_PER_ADDRESS", 0)
            .env("CHANNEL_PREFIX", &self.prefix)
            .env("INTERNAL_SECRET", &self.internal_secret)
            .env("LOG_FORMAT", "json");
        if self.options.as_shipped {
            return plan.env("RATE_LIMITS", false);
        }
        plan.env("LOG", "info,api=debug,stream_gateway=debug,protocol=debug,service_kit=debug")
            .env("RUST_BACKTRACE", 1)
    }

    pub async fn person(&self, name: &str) -> UserId {
        let id =
            sqlx::query_scalar("INSERT INTO messenger.users (username) VALUES ($1) RETURNING id").bind(name);
        UserId(id.fetch_one(&self.sql).await.expect("a new user"))
    }

    pub async fn user(&self, api: &Service, name: &str) -> TestUser {
        let id = self.person(name).await;
        let user = self.login(api, name).await;
        assert_eq!(user.id, id);
        user
    }

    /// Many users with a session each, made by SQL and signed for here.
    pub async fn many(&self, count: i64) -> Vec<TestUser> {
        let insert = "WITH new AS (INSERT INTO messenger.users (username) SELECT 'many' || n FROM generate_series(1, $1) n RETURNING id, username)
                      INSERT INTO messenger.sessions (user_id, expires_at) SELECT id, now() + interval '1 day' FROM new
                      RETURNING user_id, id, (SELECT username FROM new WHERE new.id = user_id)";
        let rows: Vec<(i64, i64, String)> =
            sqlx::query_as(insert).bind(count).fetch_all(&self.sql).await.expect("new users");
        let sign = |(user, session, name): (i64, i64, String)| {
            let token = self.token(user.into(), session.into());
            TestUser { id: user.into(), name, cookie: self.cookie(&token), token }
        };
        rows.into_iter().map(sign).collect()
    }

    pub fn token(&self, user: UserId, session: SessionId) -> String {
        let now = Utc::now().timestamp();
        self.signing.sign(&Claims {
            sub: user,
            sid: Some(session),
            iat: now,
            exp: now + 86_400,
            aud: Audience::Api,
            iss: self.options.origin.clone(),
            session_exp: None,
        })
    }

    pub fn cookie(&self, token: &str) -> String {
        let origin = self.options.origin.parse().expect("the world's own origin");
        format!("{}={token}", Cookies::new(&origin).session())
    }

    pub async fn login(&self, api: &Service, name: &str) -> TestUser {
        let call = self.client.post(api.url("/api/login")).json(&json!({ "username": name }));
        let answer = call.expect(200).await;
        let body = answer.json();
        let token = text(&body["token"]);
        self.remember(&token);
        let id = text(&body["authUser"]["id"]).parse().expect("an id");
        TestUser { id, name: name.into(), token, cookie: answer.cookie() }
    }

    /// Another back end's, as `api service-token create` makes it.
    pub async fn service_token(&self, name: &str, scope: &str) -> String {
        let token = format!("msk_{name:A>43}");
        let insert = "INSERT INTO messenger.service_tokens (name, token_hash, scopes)
                      VALUES ($1, sha256(convert_to($2, 'UTF8')), ARRAY[$3])";
        let insert = sqlx::query(insert).bind(name).bind(&token).bind(scope);
        insert.execute(&self.sql).await.expect("a new token");
        self.remember(&token);
        token
    }

    pub fn remember(&self, token: &str) {
        self.tokens.lock().expect("no holder panics").push(token.to_owned());
    }

    pub fn assert_discreet(&self, whom: &str, text: &str) {
        assert!(!text.contains(WHISPER), "a message's text in {whom}: {text}");
        assert!(!text.contains(&self.internal_secret), "the internal secret in {whom}");
        // The beginning of every JWT, and of a cookie.
        let begins = ["eyJ", "session="].iter().any(|begin| text.contains(begin));
        assert!(!begins, "a token or a cookie in {whom}: {text}");
        let tokens = self.tokens.lock().expect("no holder panics");
        assert!(!tokens.iter().any(|token| text.contains(token)), "a token in {whom}: {text}");
    }

    pub fn claims(&self, user: &TestUser) -> Claims {
        self.signing
            .verifier()
            .verify(&user.token, &[Audience::Api, Audience::Stream])
            .expect("the world's own key signed it")
    }

    pub fn sign(&self, claims: &Claims) -> String {
        let token = self.signing.sign(claims);
        self.remember(&token);
        token
    }

    pub fn channels(&self) -> Channels {
        Channels::new(&*self.prefix)
    }

    pub fn channel(&self, user: UserId) -> String {
        self.channels().user(user)
    }

    pub fn probes(&self) -> String {
        self.channels().probe("")
    }

    pub fn folder(&self) -> &Path {
        self.keys.path()
    }

    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    pub fn database_url(&self) -> String {
        self.database.url()
    }

    pub fn text(&self) -> String {
        format!("{WHISPER} {}", self.texts.fetch_add(1, Ordering::Relaxed))
    }

    /// The conversation of two users, made if they have none.
    pub async fn conversation(&self, api: &Service, from: &TestUser, with: &TestUser) -> ConversationId {
        let call = self.client.post(api.url("/api/conversations")).bearer(&from.token);
        let answer = call.json(&json!({ "username": with.name })).send().await.expect("an answer");
        match answer.status {
            201 => text(&answer.json()["id"]).parse().expect("an id"),
            302 => {
                let location = answer.header("location").expect("a redirect says where to");
                location.rsplit('/').next().and_then(|id| id.parse().ok()).expect("an id at the end")
            }
            other => panic!("{other}: {}", answer.text()),
        }
    }

    pub async fn say(&self, api: &Service, from: &TestUser, conversation: ConversationId) -> Value {
        let url = api.url(&format!("/api/conversations/{conversation}/messages"));
        let call = self.client.post(url).bearer(&from.token).json(&json!({ "content": self.text() }));
        call.expect(201).await.json()
    }

    /// Posts one message as a careful client does: with a key, repeatedly, to these replicas in turn, until one accepts it.
    pub async fn say_until_accepted(
        &self,
        apis: &[String],
        from: &TestUser,
        conversation: ConversationId,
        key: &str,
    ) -> Value {
        let body = json!({ "content": self.text() });
        let accepted = async {
            let start = usize::from(key.bytes().next_back().unwrap_or_default());
            for turn in start.. {
                let url = format!("{}/api/conversations/{conversation}/messages", apis[turn % apis.len()]);
                let call =
                    self.client.post(url).bearer(&from.token).header("idempotency-key", key).json(&body);
                match call.send().await {
                    Ok(answer) if answer.status == 201 => return answer.json(),
                    Ok(Answer { status: 429 | 500 | 502 | 503, .. }) | Err(_) => {
                        tokio::time::sleep(Duration::from_millis(30)).await;
                    }
                    Ok(answer) => panic!("{}: {}", answer.status, answer.text()),
                }
            }
            unreachable!("the turns do not end")
        };
        soon("the message is accepted", accepted).await
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not a string")).to_owned()
}

impl WorldDatabase {
    fn options(&self) -> PgConnectOptions {
        let options: PgConnectOptions = self.admin_url.parse().expect("DATABASE_URL is a Postgres URL");
        options.database(&self.name)
    }

    /// The same server and options, with our own database's name as the path.
    fn url(&self) -> String {
        let (address, options) = self.admin_url.split_once('?').unwrap_or((&self.admin_url, ""));
        let (scheme, rest) = address.split_once("://").expect("DATABASE_URL is a URL");
        let authority = rest.split('/').next().unwrap_or_default();
        format!("{scheme}://{authority}/{}?{options}", self.name)
    }

    async fn create(&self) {
        let mut admin =
            PgConnection::connect(&self.admin_url).await.expect("the Postgres of DATABASE_URL answers");
        let create = AssertSqlSafe(format!("CREATE DATABASE {}", self.name));
        admin.execute(create).await.expect("DATABASE_URL may create databases");
    }

    async fn drop(&self) -> Result<(), sqlx::Error> {
        let mut admin = PgConnection::connect(&self.admin_url).await?;
        admin.execute(AssertSqlSafe(format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name))).await?;
        Ok(())
    }

    /// On a thread of its own, because `drop` cannot await.
    fn drop_now(&self) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.expect("a runtime");
                // The test may have killed the server.
                let tidied = async { tokio::time::timeout(Duration::from_secs(20), self.drop()).await };
                let _ = runtime.block_on(tidied);
            });
        });
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.database.drop_now();
        let logs = std::mem::take(&mut *self.logs.lock().expect("no holder panics"));
        if std::thread::panicking() {
            #[expect(clippy::print_stdout, reason = "the test runner shows it under the failed test's name")]
            for log in &logs {
                let lines = log.lines();
                let from = lines.len().saturating_sub(100);
                println!("--- {}: the last of {} lines", log.name, lines.len());
                lines[from..].iter().for_each(|line| println!("{line}"));
            }
            return;
        }
        for log in &logs {
            for line in log.lines().iter() {
                assert!(!panics::is_said_by_one(line), "{}: {line}", log.name);
                self.assert_discreet(&format!("the log of {}", log.name), line);
            }
        }
    }
}
