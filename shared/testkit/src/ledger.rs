//! The comparison that the whole suite is about: what a browser saw is exactly its user's feed.

use protocol::{
    event::kind,
    ids::UserId,
    position::{Epoch, Position, Seq},
};
use sqlx::PgPool;

use crate::sse::{Event, EventSource};

#[derive(Debug)]
pub struct StoredFeed {
    pub epoch: Epoch,
    pub head: Seq,
    pub events: Vec<Event>,
}

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
            sqlx::query_as("SELECT seq, kind, payload FROM messenger.feed WHERE user_id = $1 ORDER BY seq")
                .bind(user.0)
                .fetch_all(sql)
                .await
                .expect("the feed can be read");
        let event = |(seq, name, data): (i64, String, String)| Event {
            id: Some(Position { epoch, seq: seq.cast_unsigned() }.to_string()),
            name: (name != kind::MESSAGE).then_some(name),
            data,
        };
        Self { epoch, head: head.cast_unsigned(), events: rows.into_iter().map(event).collect() }
    }

    pub fn assert_without_gaps(&self) {
        let numbers: Vec<_> = self.events.iter().map(number).collect();
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

    /// The difference between `seen` and the events after `after`: each once, in order, byte for byte. `None`: there is none.
    pub fn difference(&self, seen: &[Event], after: Seq) -> Option<String> {
        let wanted: Vec<&Event> = self.events.iter().filter(|event| number(event) > after).collect();
        let seen: Vec<&Event> = seen.iter().collect();
        if wanted == seen {
            return None;
        }
        let at = wanted.iter().zip(&seen).take_while(|(wanted, seen)| wanted == seen).count();
        Some(format!(
            "saw {} events, the feed has {} after {after}; they differ from event {at} on\n wanted {:#?}\n saw {:#?}",
            seen.len(),
            wanted.len(),
            wanted.get(at..wanted.len().min(at + 3)),
            seen.get(at..seen.len().min(at + 3)),
        ))
    }
}

fn number(event: &Event) -> Seq {
    let id = event.id.as_deref().expect("an event of the feed has an id");
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
    feed.assert_is(who, &seen, number(first));
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
