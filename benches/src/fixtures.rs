//! The start of each scenario: its own servers with the settings of production, and users with sessions and
//! conversations, made in bulk by SQL.

use std::{fmt::Write as _, io, ops::Deref, path::PathBuf};

use protocol::{
    ids::{ConversationId, UserId},
    position::{Epoch, Position},
};
use sqlx::AssertSqlSafe;
use testkit::{
    servers::{Postgres, Redis},
    usage::Cpu,
    user::TestUser,
    world::{World, WorldOptions},
};

use crate::load::{Sender, Viewer};

pub struct Bench {
    world: World,
    pub postgres: Postgres,
    pub redis: Redis,
}

impl Deref for Bench {
    type Target = World;

    fn deref(&self) -> &World {
        &self.world
    }
}

impl Bench {
    pub async fn new() -> Self {
        // The defaults, stated because figures mean nothing without them.
        let durable = ["fsync=on", "synchronous_commit=on", "full_page_writes=on"];
        let large = ["max_connections=100", "shared_buffers=512MB", "max_wal_size=4GB"];
        let (postgres, redis) = (Postgres::start_with(&[durable, large].concat()), Redis::start());
        let options = WorldOptions {
            database_url: Some(postgres.url()),
            redis: vec![("REDIS_URL", redis.url())],
            as_shipped: true,
            ..WorldOptions::default()
        };
        Self { world: World::with(options).await, postgres, redis }
    }

    pub fn postgres_cpu(&self) -> io::Result<Cpu> {
        Cpu::of_family(self.postgres.id())
    }

    pub fn redis_cpu(&self) -> io::Result<Cpu> {
        Cpu::of(self.redis.id())
    }
}

pub async fn make_users(world: &Bench, count: usize) -> anyhow::Result<Vec<TestUser>> {
    let mut users = world.many(i64::try_from(count)?).await;
    users.sort_by_key(|user| user.id.0);
    settle(world, "messenger.users, messenger.sessions, messenger.feed_heads").await?;
    Ok(users)
}

/// A conversation for each pair of users: the first with the second, the third with the fourth, and so on.
pub async fn start_conversations(world: &Bench, users: &[TestUser]) -> anyhow::Result<Vec<Sender>> {
    let firsts: Vec<i64> = users.chunks_exact(2).map(|pair| pair[0].id.0).collect();
    let seconds: Vec<i64> = users.chunks_exact(2).map(|pair| pair[1].id.0).collect();
    let rows: Vec<(i64, i64)> = sqlx::query_as(
        "WITH made AS (
             INSERT INTO messenger.conversations (user_a, user_b) SELECT a, b FROM unnest($1::bigint[], $2::bigint[]) AS pair (a, b)
             RETURNING id, user_a, user_b
         )
         INSERT INTO messenger.participants (conversation_id, user_id, other_user_id)
         SELECT id, user_a, user_b FROM made UNION ALL SELECT id, user_b, user_a FROM made
         RETURNING user_id, conversation_id",
    )
    .bind(&firsts)
    .bind(&seconds)
    .fetch_all(&world.sql)
    .await?;
    settle(world, "messenger.conversations, messenger.participants").await?;
    let conversations: std::collections::HashMap<_, _> = rows.into_iter().collect();
    let sender = |user: &TestUser| {
        let conversation = ConversationId(*conversations.get(&user.id.0)?);
        Some(Sender { conversation, token: user.token.clone() })
    };
    Ok(users.iter().filter_map(sender).collect())
}

/// As autovacuum leaves tables that were filled a while ago.
async fn settle(world: &Bench, tables: &'static str) -> anyhow::Result<()> {
    sqlx::query(AssertSqlSafe(format!("VACUUM ANALYZE {tables}"))).execute(&world.sql).await?;
    Ok(())
}

pub async fn heads(world: &Bench, users: &[TestUser]) -> anyhow::Result<Vec<(UserId, Position)>> {
    let ids: Vec<i64> = users.iter().map(|user| user.id.0).collect();
    let rows: Vec<(i64, i64, i64)> = sqlx::query_as(
        "SELECT user_id, epoch, head_seq FROM messenger.feed_heads WHERE user_id = ANY ($1) ORDER BY user_id",
    )
    .bind(&ids)
    .fetch_all(&world.sql)
    .await?;
    let head = |(user, epoch, seq): (i64, i64, i64)| {
        (UserId(user), Position { epoch: Epoch::from_sql(epoch), seq: seq.cast_unsigned() })
    };
    Ok(rows.into_iter().map(head).collect())
}

pub fn viewers_file(world: &Bench, users: &[TestUser]) -> anyhow::Result<PathBuf> {
    let viewer = |user: &TestUser| Viewer { user: user.id, token: user.token.clone() };
    write_lines(world, "viewers", users.iter().map(viewer))
}

pub fn senders_file(world: &Bench, senders: &[Sender]) -> anyhow::Result<PathBuf> {
    write_lines(world, "senders", senders.iter())
}

fn write_lines<T: serde::Serialize>(
    world: &Bench,
    name: &str,
    items: impl Iterator<Item = T>,
) -> anyhow::Result<PathBuf> {
    let mut text = String::new();
    for item in items {
        let _ = writeln!(text, "{}", serde_json::to_string(&item)?);
    }
    let path = world.folder().join(name);
    std::fs::write(&path, text)?;
    Ok(path)
}
