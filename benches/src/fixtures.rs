//! The start of each scenario: its own servers with the settings of production, and users with sessions and
//! conversations, made in bulk by SQL.

use std::{
    borrow::Borrow,
    fmt::Write as _,
    io,
    ops::Deref,
    path::{Path, PathBuf},
};

use protocol::{
    ids::{ConversationId, SessionId, UserId},
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

const ROWS_AT_ONCE: usize = 50_000;

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

/// Users with a session each, by id; many more than could be kept as [`TestUser`]s.
pub async fn make_sessions(world: &Bench, count: usize) -> anyhow::Result<Vec<(UserId, SessionId)>> {
    let mut sessions = Vec::with_capacity(count);
    while sessions.len() < count {
        let (from, some) = (sessions.len() as i64, (count - sessions.len()).min(ROWS_AT_ONCE) as i64);
        let rows: Vec<(i64, i64)> = sqlx::query_as(
            "WITH new AS (
                 INSERT INTO messenger.users (username) SELECT 'viewer' || n FROM generate_series($1 + 1, $1 + $2) AS n RETURNING id
             )
             INSERT INTO messenger.sessions (user_id, expires_at) SELECT id, now() + interval '1 day' FROM new
             RETURNING user_id, id",
        )
        .bind(from)
        .bind(some)
        .fetch_all(&world.sql)
        .await?;
        sessions.extend(rows.into_iter().map(|(user, session)| (UserId(user), SessionId(session))));
    }
    sessions.sort_unstable_by_key(|(user, _)| user.0);
    settle(world, "messenger.users, messenger.sessions, messenger.feed_heads").await?;
    Ok(sessions)
}

pub fn ids_of(sessions: &[(UserId, SessionId)]) -> Vec<UserId> {
    sessions.iter().map(|(user, _)| *user).collect()
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

/// A group of all these users, who may all write.
pub async fn make_group(world: &Bench, users: &[TestUser]) -> anyhow::Result<Vec<Sender>> {
    let conversation: i64 = sqlx::query_scalar(
        "WITH made AS (
             INSERT INTO messenger.conversations (title, participant_count) VALUES ('Bench', cardinality($1::bigint[])) RETURNING id
         ), members AS (
             INSERT INTO messenger.participants (conversation_id, user_id, is_owner)
             SELECT made.id, member, member = ($1::bigint[])[1] FROM made, unnest($1::bigint[]) AS member
         )
         SELECT id FROM made",
    )
    .bind(users.iter().map(|user| user.id.0).collect::<Vec<_>>())
    .fetch_one(&world.sql)
    .await?;
    settle(world, "messenger.conversations, messenger.participants").await?;
    let sender =
        |user: &TestUser| Sender { conversation: ConversationId(conversation), token: user.token.clone() };
    Ok(users.iter().map(sender).collect())
}

/// As autovacuum leaves tables that were filled a while ago.
async fn settle(world: &Bench, tables: &'static str) -> anyhow::Result<()> {
    sqlx::query(AssertSqlSafe(format!("VACUUM ANALYZE {tables}"))).execute(&world.sql).await?;
    Ok(())
}

/// In the order of these users, who are sorted by id.
pub async fn heads(world: &Bench, users: &[UserId]) -> anyhow::Result<Vec<(UserId, Position)>> {
    let mut heads = Vec::with_capacity(users.len());
    for users in users.chunks(ROWS_AT_ONCE) {
        let ids: Vec<i64> = users.iter().map(|user| user.0).collect();
        let rows: Vec<(i64, i64, i64)> = sqlx::query_as(
            "SELECT user_id, epoch, head_seq FROM messenger.feed_heads WHERE user_id = ANY ($1) ORDER BY user_id",
        )
        .bind(&ids)
        .fetch_all(&world.sql)
        .await?;
        heads.extend(rows.into_iter().map(|(user, epoch, seq)| {
            (UserId(user), Position { epoch: Epoch::from_sql(epoch), seq: seq.cast_unsigned() })
        }));
    }
    Ok(heads)
}

pub fn ids(users: &[TestUser]) -> Vec<UserId> {
    users.iter().map(|user| user.id).collect()
}

pub fn viewers(users: &[TestUser]) -> impl Iterator<Item = Viewer> {
    users.iter().map(|user| Viewer { user: user.id, token: user.token.clone() })
}

pub fn viewers_file(
    folder: &Path,
    viewers: impl Iterator<Item = impl Borrow<Viewer>>,
) -> anyhow::Result<PathBuf> {
    write_lines(folder, "viewers", viewers.map(|viewer| serde_json::to_string(viewer.borrow())))
}

pub fn senders_file(world: &Bench, senders: &[Sender]) -> anyhow::Result<PathBuf> {
    write_lines(world.folder(), "senders", senders.iter().map(serde_json::to_string))
}

fn write_lines(
    folder: &Path,
    name: &str,
    lines: impl Iterator<Item = serde_json::Result<String>>,
) -> anyhow::Result<PathBuf> {
    let mut text = String::new();
    for line in lines {
        let _ = writeln!(text, "{}", line?);
    }
    let path = folder.join(name);
    std::fs::write(&path, text)?;
    Ok(path)
}
