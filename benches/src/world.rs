//! What one scenario runs in: fresh servers, a migrated database, keys and a secret of its own, services as asked for.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::Context as _;
use ed25519_dalek::pkcs8::{EncodePrivateKey as _, KeypairBytes, spki::der::pem::LineEnding};
use protocol::{
    channels::Channels,
    claims::{Audience, Claims, SigningKeys},
    ids::{SessionId, UserId},
};
use sqlx::{PgPool, postgres::PgPoolOptions};
use tempfile::TempDir;

use crate::{
    servers::{self, Server},
    service::{Plan, Service},
    settings,
    usage::Cpu,
};

const ORIGIN: &str = "http://localhost:8080";
const PREFIX: &str = "bench:";

pub struct World {
    pub sql: PgPool,
    pub folder: TempDir,
    pub channels: Channels,
    postgres: Server,
    redis: Server,
    keys: SigningKeys,
    internal_secret: String,
}

impl World {
    pub async fn new() -> anyhow::Result<Self> {
        let (postgres, redis) = (servers::start_postgres()?, servers::start_redis()?);
        let folder = tempfile::Builder::new().prefix("bench-").tempdir()?;
        let key = KeypairBytes { secret_key: rand::random(), public_key: None };
        let pem = key.to_pkcs8_pem(LineEnding::LF)?;
        std::fs::write(folder.path().join("signing.pem"), pem.as_bytes())?;
        let sql = PgPoolOptions::new().max_connections(2).connect_lazy(&postgres.url)?;
        let world = Self {
            sql,
            folder,
            channels: Channels::new(PREFIX),
            postgres,
            redis,
            keys: SigningKeys::from_pems(ORIGIN, pem.as_bytes(), &[])?,
            internal_secret: format!("{:032x}", rand::random::<u128>()),
        };
        world.api()?.run("migrate")?;
        Ok(world)
    }

    /// An api as shipped: every setting that is not an address, a secret or a limit has its default.
    pub fn api(&self) -> anyhow::Result<Plan> {
        let key = self.folder.path().join("signing.pem");
        Ok(self
            .plan("api")?
            .env("INTERNAL_LISTEN", "127.0.0.1:0")
            .env("DATABASE_URL", &self.postgres.url)
            .env("SIGNING_KEY_FILES", key.display()))
    }

    /// A gateway as shipped.
    pub fn gateway(&self, api: &Service) -> anyhow::Result<Plan> {
        self.gateway_asking(api.internal()?)
    }

    /// A gateway as shipped, whose questions to api go to this address.
    pub fn gateway_asking(&self, internal: SocketAddr) -> anyhow::Result<Plan> {
        Ok(self.plan("stream-gateway")?.env("API_INTERNAL_URL", format!("http://{internal}")))
    }

    fn plan(&self, name: &'static str) -> anyhow::Result<Plan> {
        let plan = Plan { name, binary: settings::service(name)?, env: BTreeMap::new() };
        Ok(plan
            .env("LISTEN", "127.0.0.1:0")
            .env("OPS_LISTEN", "127.0.0.1:0")
            .env("ORIGIN", ORIGIN)
            .env("REDIS_URL", &self.redis.url)
            .env("CHANNEL_PREFIX", PREFIX)
            .env("INTERNAL_SECRET", &self.internal_secret)
            // One address and few users do what a whole installation does.
            .env("RATE_LIMITS", false)
            .env("CONNECTIONS_PER_ADDRESS", 0)
            .env("LOG_FORMAT", "json"))
    }

    /// A token as `api` gives it out at a login.
    pub fn token(&self, user: UserId, session: SessionId) -> String {
        let now = chrono::Utc::now().timestamp();
        self.keys.sign(&Claims {
            sub: user,
            sid: Some(session),
            iat: now,
            exp: now + 86_400,
            aud: Audience::Api,
            iss: ORIGIN.into(),
            session_exp: None,
        })
    }

    pub fn redis_address(&self) -> anyhow::Result<SocketAddr> {
        let address = self.redis.url.trim_start_matches("redis://").trim_end_matches('/');
        address.parse().context("the server was started at an address")
    }

    pub fn postgres_cpu(&self) -> anyhow::Result<Cpu> {
        Cpu::of_family(self.postgres.process.id())
    }

    pub fn redis_cpu(&self) -> anyhow::Result<Cpu> {
        Cpu::of(self.redis.process.id())
    }
}
