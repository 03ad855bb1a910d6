//! Users with sessions and conversations, made in bulk by SQL: what they do is measured, how they came is not.

use std::{fmt::Write as _, path::PathBuf};

use protocol::{
    ids::{ConversationId, SessionId, UserId},
    position::{Epoch, Position},
};

use sqlx::AssertSqlSafe;

use crate::{
    load::{Sender, Viewer},
    world::World,
};

#[derive(Debug, Clone)]
pub struct Person {
    pub id: UserId,
    pub epoch: Epoch,
    pub token: String,
}

/// New users, each with a session that lives on.
pub async fn make(world: &World, count: usize) -> anyhow::Result<Vec<Person>> {
    let mut transaction = world.sql.begin().await?;
    let ids: Vec<i64> = sqlx::query_scalar(
        "INSERT INTO users (username) SELECT 'person-' || n FROM generate_series(1, $1) AS n RETURNING id",
    )
    .bind(i64::try_from(count)?)
    .fetch_all(&mut *transaction)
    .await?;
    sqlx::query(
        "INSERT INTO sessions (user_id, expires_at) SELECT id, now() + interval '14 days' FROM unnest($1) AS id",
    )
    .bind(&ids)
    .execute(&mut *transaction)
    .await?;
    transaction.commit().await?;
    let rows: Vec<(i64, i64, i64)> = sqlx::query_as(
        "SELECT h.user_id, h.epoch, s.id FROM feed_heads AS h JOIN sessions AS s ON s.user_id = h.user_id
         WHERE h.user_id = ANY ($1) ORDER BY h.user_id",
    )
    .bind(&ids)
    .fetch_all(&world.sql)
    .await?;
    settle(world, "users, sessions, feed_heads").await?;
    let person = |(user, epoch, session): (i64, i64, i64)| Person {
        id: UserId(user),
        epoch: Epoch::from_sql(epoch),
        token: world.token(UserId(user), SessionId(session)),
    };
    Ok(rows.into_iter().map(person).collect())
}

/// The first with the second, the third with the fourth, …: a conversation each, and both may write in it.
pub async fn introduce(world: &World, people: &[Person]) -> anyhow::Result<Vec<Sender>> {
    let firsts: Vec<i64> = people.chunks_exact(2).map(|pair| pair[0].id.0).collect();
    let seconds: Vec<i64> = people.chunks_exact(2).map(|pair| pair[1].id.0).collect();
    let rows: Vec<(i64, i64)> = sqlx::query_as(
        "WITH made AS (
             INSERT INTO conversations (user_a, user_b) SELECT a, b FROM unnest($1::bigint[], $2::bigint[]) AS pair (a, b)
             RETURNING id, user_a, user_b
         )
         INSERT INTO participants (conversation_id, user_id, other_user_id)
         SELECT id, user_a, user_b FROM made UNION ALL SELECT id, user_b, user_a FROM made
         RETURNING user_id, conversation_id",
    )
    .bind(&firsts)
    .bind(&seconds)
    .fetch_all(&world.sql)
    .await?;
    settle(world, "conversations, participants").await?;
    let conversations: std::collections::HashMap<_, _> = rows.into_iter().collect();
    let sender = |person: &Person| {
        let conversation = ConversationId(*conversations.get(&person.id.0)?);
        Some(Sender { conversation, token: person.token.clone() })
    };
    Ok(people.iter().filter_map(sender).collect())
}

/// As autovacuum leaves tables that were filled a while ago. Empty ones it never touches.
async fn settle(world: &World, tables: &'static str) -> anyhow::Result<()> {
    sqlx::query(AssertSqlSafe(format!("VACUUM ANALYZE {tables}"))).execute(&world.sql).await?;
    Ok(())
}

/// Where all these feeds end, by what Postgres says.
pub async fn heads(world: &World, people: &[Person]) -> anyhow::Result<Vec<(UserId, Position)>> {
    let ids: Vec<i64> = people.iter().map(|person| person.id.0).collect();
    let rows: Vec<(i64, i64, i64)> = sqlx::query_as(
        "SELECT user_id, epoch, head_seq FROM feed_heads WHERE user_id = ANY ($1) ORDER BY user_id",
    )
    .bind(&ids)
    .fetch_all(&world.sql)
    .await?;
    let head = |(user, epoch, seq): (i64, i64, i64)| {
        (UserId(user), Position { epoch: Epoch::from_sql(epoch), seq: seq.cast_unsigned() })
    };
    Ok(rows.into_iter().map(head).collect())
}

/// A file that tells a load process whose streams to open.
pub fn viewers_file(world: &World, people: &[Person]) -> anyhow::Result<PathBuf> {
    let viewer = |person: &Person| Viewer { user: person.id, token: person.token.clone() };
    write_lines(world, "viewers", people.iter().map(viewer))
}

/// A file that tells a load process who writes where.
pub fn senders_file(world: &World, senders: &[Sender]) -> anyhow::Result<PathBuf> {
    write_lines(world, "senders", senders.iter())
}

fn write_lines<T: serde::Serialize>(
    world: &World,
    name: &str,
    items: impl Iterator<Item = T>,
) -> anyhow::Result<PathBuf> {
    let mut text = String::new();
    for item in items {
        let _ = writeln!(text, "{}", serde_json::to_string(&item)?);
    }
    let path = world.folder.path().join(name);
    std::fs::write(&path, text)?;
    Ok(path)
}
