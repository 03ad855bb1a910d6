//! Receivers of ephemeral events.

use protocol::ids::{ConversationId, SessionId, UserId};
use sqlx::PgConnection;

/// In a larger group nobody is told who types.
const LARGEST_TYPING_GROUP: i64 = 100;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TypingOutcome {
    /// To be told to these.
    Allowed(Vec<UserId>),
    NoConversation,
    NoSession,
}

/// The others in the conversation. In a direct one, a user who blocks the one who types is not told.
pub async fn of_typing(
    connection: &mut PgConnection,
    session: Option<SessionId>,
    user: UserId,
    conversation: ConversationId,
) -> sqlx::Result<TypingOutcome> {
    let row = sqlx::query!(
        r#"SELECT messenger.session_is_live($1, $2) AS "is_live!", p.user_id IS NOT NULL AS "takes_part!",
                  ARRAY(SELECT o.user_id FROM messenger.participants AS o
                        WHERE o.conversation_id = c.id AND o.user_id <> p.user_id AND c.participant_count <= $4
                          AND NOT (c.user_a IS NOT NULL AND EXISTS (
                              SELECT FROM messenger.blocks AS b WHERE b.blocker_id = o.user_id AND b.blocked_id = p.user_id))
                  ) AS "others!"
           FROM (VALUES (0)) AS one
           LEFT JOIN messenger.participants AS p ON p.conversation_id = $3 AND p.user_id = $2
           LEFT JOIN messenger.conversations AS c ON c.id = p.conversation_id"#,
        session.map(|session| session.0),
        user.0,
        conversation.0,
        LARGEST_TYPING_GROUP,
    )
    .fetch_one(connection)
    .await?;
    Ok(match (row.is_live, row.takes_part) {
        (false, _) => TypingOutcome::NoSession,
        (true, false) => TypingOutcome::NoConversation,
        (true, true) => TypingOutcome::Allowed(row.others.into_iter().map(UserId).collect()),
    })
}
