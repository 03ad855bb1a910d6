//! Stages events of other back ends that came by HTTP.

use protocol::ids::UserId;
use sqlx::PgConnection;

use crate::{
    domain::published::{Published, Receiver},
    request_context::RequestContext,
};

/// What becomes of one event.
#[derive(Debug, Default)]
pub struct PublishedTo {
    /// Each once.
    pub receivers: Vec<UserId>,
    pub unknown: Vec<Receiver>,
}

/// One statement: finds the receivers of all events, and stages those that are not ephemeral. `issuer`: whose subjects are named.
pub async fn stage(
    connection: &mut PgConnection,
    events: &[Published],
    issuer: Option<&str>,
    request: &RequestContext,
) -> sqlx::Result<Vec<PublishedTo>> {
    let asked: Vec<(usize, &Receiver)> = events
        .iter()
        .enumerate()
        .flat_map(|(nth, event)| event.to.iter().map(move |receiver| (nth, receiver)))
        .collect();
    let nths: Vec<i32> = asked.iter().map(|(nth, _)| *nth as i32 + 1).collect();
    let of = |read: fn(&Receiver) -> Option<&str>| -> Vec<Option<String>> {
        asked.iter().map(|(_, receiver)| read(receiver).map(str::to_owned)).collect()
    };
    let ids: Vec<Option<i64>> = asked.iter().map(|(_, to)| to.user_id().map(|id| id.0)).collect();
    let (subjects, usernames) = (of(Receiver::subject), of(Receiver::username));
    let names: Vec<String> = events.iter().map(|event| event.name.as_str().to_owned()).collect();
    let data: Vec<String> = events.iter().map(|event| event.data.as_str().to_owned()).collect();
    let keys: Vec<Option<Vec<u8>>> =
        events.iter().map(|event| event.key.map(|key| key.hash().to_vec())).collect();
    let ephemeral: Vec<bool> = events.iter().map(|event| event.is_ephemeral).collect();
    let found = sqlx::query_scalar!(
        r#"WITH asked AS MATERIALIZED (
               SELECT a.event, a.nth, coalesce(u.id, i.user_id, n.id) AS user_id
               FROM unnest($1::integer[], $2::bigint[], $3::text[], $4::text[]) WITH ORDINALITY AS a (event, id, subject, username, nth)
               LEFT JOIN LATERAL (SELECT users.id FROM messenger.users WHERE users.id = a.id LIMIT 1) AS u ON true
               LEFT JOIN LATERAL (
                   SELECT identities.user_id FROM messenger.identities
                   WHERE identities.issuer = $5 AND identities.subject = a.subject LIMIT 1
               ) AS i ON true
               LEFT JOIN LATERAL (SELECT messenger.find_user(a.username) AS id WHERE a.username IS NOT NULL) AS n ON true
           ), staged AS (
               INSERT INTO messenger.staged_events (receivers, name, data, key_hash, request_id, traceparent)
               SELECT r.receivers, e.name, e.data, e.key_hash, $10, $11
               FROM unnest($6::text[], $7::text[], $8::bytea[], $9::boolean[])
                    WITH ORDINALITY AS e (name, data, key_hash, is_ephemeral, nth)
               JOIN (
                   SELECT a.event, array_agg(DISTINCT a.user_id) AS receivers
                   FROM asked AS a WHERE a.user_id IS NOT NULL GROUP BY a.event
               ) AS r ON r.event = e.nth
               WHERE NOT e.is_ephemeral
               ORDER BY e.nth
           )
           SELECT a.user_id FROM asked AS a ORDER BY a.nth"#,
        &nths,
        &ids as &[Option<i64>],
        &subjects as &[Option<String>],
        &usernames as &[Option<String>],
        issuer,
        &names,
        &data,
        &keys as &[Option<Vec<u8>>],
        &ephemeral,
        request.request_id,
        request.traceparent(),
    )
    .fetch_all(connection)
    .await?;
    let mut outcomes: Vec<PublishedTo> = events.iter().map(|_| PublishedTo::default()).collect();
    for ((nth, receiver), user) in asked.into_iter().zip(found) {
        let PublishedTo { receivers, unknown } = &mut outcomes[nth];
        match user.map(UserId) {
            // Several names of one user count once.
            Some(user) if receivers.contains(&user) => {}
            Some(user) => receivers.push(user),
            None => unknown.push(receiver.clone()),
        }
    }
    Ok(outcomes)
}
