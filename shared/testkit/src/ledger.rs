//! The comparison that the whole suite is about: what a browser saw is exactly its user's feed.
//!
//! The feed stores what an event is about, not its JSON. So the tables say which events a user has, and of each its name and the members
//! that identify it; what else is in an event (counts, names, times) is tested where it is made.

use protocol::{
    event::kind,
    ids::UserId,
    position::{Epoch, Position, Seq},
};
use serde_json::Value;
use sqlx::PgPool;

use crate::sse::{Event, EventSource};

#[derive(Debug)]
pub struct StoredFeed {
    pub epoch: Epoch,
    pub head: Seq,
    pub events: Vec<StoredEvent>,
}

#[derive(Debug)]
pub struct StoredEvent {
    pub id: String,
    pub name: Option<String>,
    /// Members of the event's data.
    pub data: Value,
}

/// Every row of one feed with the members that identify its event. A text is compared if it is now what it was when it was sent, and
/// the user has seen it in the stay in the conversation that still lasts: live they saw the text of then.
const STORED: &str = "
    SELECT f.seq, coalesce(e.kind, CASE WHEN m.sender_id = f.user_id THEN 'message.sent' ELSE 'message' END),
           CASE WHEN e.data IS NOT NULL THEN e.data::jsonb ELSE CASE coalesce(e.kind, 'message')
               WHEN 'message' THEN jsonb_build_object(
                   'id', m.id::text, 'conversationId', m.conversation_id::text,
                   'mine', m.sender_id = f.user_id, 'sender', jsonb_build_object('id', m.sender_id::text,
                   'username', coalesce(u.username, 'deleted-' || m.sender_id), 'avatarURL', u.avatar_url))
                   || CASE WHEN p.joined_number < m.number AND m.edited_at IS NULL AND m.deleted_at IS NULL
                           THEN jsonb_build_object('content', m.content) ELSE '{}' END
               WHEN 'message.updated' THEN jsonb_build_object('id', e.message_id::text, 'conversationId', e.conversation_id::text)
               WHEN 'message.deleted' THEN jsonb_build_object('id', e.message_id::text, 'conversationId', e.conversation_id::text)
               WHEN 'user.updated' THEN jsonb_build_object('id', e.user_id::text)
               WHEN 'conversation.created' THEN jsonb_build_object('id', e.conversation_id::text)
               WHEN 'conversation.updated' THEN jsonb_build_object('id', e.conversation_id::text)
               WHEN 'conversation.read' THEN jsonb_build_object(
                   'conversationId', e.conversation_id::text, 'lastReadMessageId', e.message_id::text, 'unreadCount', e.count)
               WHEN 'receipt.read' THEN jsonb_build_object(
                   'conversationId', e.conversation_id::text, 'lastReadMessageId', e.message_id::text, 'userId', e.user_id::text)
               WHEN 'participant.joined' THEN jsonb_build_object(
                   'conversationId', e.conversation_id::text, 'role', CASE WHEN e.is_owner THEN 'owner' ELSE 'member' END)
               WHEN 'participant.left' THEN jsonb_build_object(
                   'conversationId', e.conversation_id::text, 'userId', e.user_id::text)
               WHEN 'participant.updated' THEN jsonb_build_object(
                   'conversationId', e.conversation_id::text, 'userId', e.user_id::text,
                   'role', CASE WHEN e.is_owner THEN 'owner' ELSE 'member' END)
               WHEN 'user.updated' THEN jsonb_build_object('id', e.user_id::text)
           END END::text
    FROM messenger.feed AS f
    LEFT JOIN messenger.events AS e ON e.id = -f.event_id
    LEFT JOIN messenger.messages AS m ON m.id = f.event_id
    LEFT JOIN messenger.users AS u ON u.id = m.sender_id
    LEFT JOIN messenger.participants AS p ON p.conversation_id = m.conversation_id AND p.user_id = f.user_id
    WHERE f.user_id = $1 ORDER BY f.seq";

impl StoredFeed {
    pub async fn read(sql: &PgPool, user: UserId) -> Self {
        let (epoch, head): (i64, i64) =
            sqlx::query_as("SELECT epoch, head_seq FROM messenger.feed_heads WHERE user_id = $1")
                .bind(user.0)
                .fetch_one(sql)
                .await
                .expect("every user has a head");
        let epoch = Epoch::from_sql(epoch);
        let rows: Vec<(i64, String, String)> =
            sqlx::query_as(STORED).bind(user.0).fetch_all(sql).await.expect("the feed can be read");
        let event = |(seq, name, data): (i64, String, String)| StoredEvent {
            id: Position { epoch, seq: seq.cast_unsigned() }.to_string(),
            name: (name != kind::MESSAGE).then_some(name),
            data: serde_json::from_str(&data).expect("Postgres writes JSON"),
        };
        Self { epoch, head: head.cast_unsigned(), events: rows.into_iter().map(event).collect() }
    }

    pub fn assert_without_gaps(&self) {
        let numbers: Vec<_> = self.events.iter().map(|event| number(&event.id)).collect();
        let wanted: Vec<_> = (1..=self.head).collect();
        assert_eq!(numbers, wanted, "the feed's numbers");
    }

    pub fn head_cursor(&self) -> String {
        self.cursor(self.head)
    }

    pub fn cursor(&self, seq: Seq) -> String {
        Position { epoch: self.epoch, seq }.to_string()
    }

    pub fn assert_is(&self, who: &str, seen: &[Event], after: Seq) {
        if let Some(difference) = self.difference(seen, after) {
            panic!("{who}: {difference}");
        }
    }

    /// The difference between `seen` and the events after `after`: each once, in order, about the same thing. `None`: there is none.
    pub fn difference(&self, seen: &[Event], after: Seq) -> Option<String> {
        let wanted: Vec<&StoredEvent> =
            self.events.iter().filter(|event| number(&event.id) > after).collect();
        let at = wanted.iter().zip(seen).take_while(|(wanted, seen)| wanted.is(seen)).count();
        if at == wanted.len() && at == seen.len() {
            return None;
        }
        Some(format!(
            "saw {} events, the feed has {} after {after}; they differ from event {at} on\n wanted {:#?}\n saw {:#?}",
            seen.len(),
            wanted.len(),
            wanted.get(at..wanted.len().min(at + 3)),
            seen.get(at..seen.len().min(at + 3)),
        ))
    }
}

impl StoredEvent {
    fn is(&self, seen: &Event) -> bool {
        let data = seen.json();
        let has = |(member, value): (&String, &Value)| data.get(member) == Some(value);
        seen.id.as_ref() == Some(&self.id)
            && seen.name == self.name
            && self.data.as_object().is_some_and(|members| members.iter().all(has))
    }
}

fn number(id: &str) -> Seq {
    id.parse::<Position>().expect("ids are cursors").seq
}

/// Waits until a client has everything up to the head, then compares all it received with the feed after the position of its
/// first `ready`. Each connection must have resumed exactly where the one before it ended.
pub async fn assert_exact(sql: &PgPool, user: UserId, who: &str, browser: &EventSource) {
    let feed = StoredFeed::read(sql, user).await;
    let head = feed.head_cursor();
    browser
        .until(&format!("{who} sees {head}"), |record| {
            let durable = record.events.iter().rev().find(|event| event.id.is_some());
            durable.is_some_and(|event| event.id.as_ref() == Some(&head))
        })
        .await;
    let record = browser.record();
    let first = record.named("ready").next().expect("a stream begins with `ready`");
    let seen: Vec<Event> = record.ledger().cloned().collect();
    feed.assert_is(who, &seen, number(first.id.as_deref().expect("it has a position")));
    let mut last: Option<&str> = None;
    for event in &record.events {
        assert!(!event.is("resync"), "{who} got a resync: {event:?}");
        if event.is("ready") {
            let data = event.json();
            assert_eq!(data["cursor"].as_str(), event.id.as_deref(), "{who}: {event:?}");
            if last.is_some() {
                assert_eq!(event.id.as_deref(), last, "{who} resumes where it was");
                assert_eq!(data["resumed"], true, "{who}: {event:?}");
            }
        }
        last = event.id.as_deref().or(last);
    }
}
