//! One connection to Redis. What is confirmed on it is known only here, and only after Redis has said so.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use redis::{AsyncConnectionConfig, PushInfo, PushKind, Value, aio::MultiplexedConnection};
use shared::{
    event::{Notice, Revoked},
    ids::UserId,
};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

use super::{News, Subscriber, wishes::Batch};
use crate::frame::{Event, MAX_ENVELOPE};

/// An overload lasts; its log line does not say so hundreds of times.
const OVERFLOWS_TOLD_EVERY: Duration = Duration::from_secs(1);
const BEAT_EVERY: Duration = Duration::from_secs(2);
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// What the connection's driver notes for the supervisor. The driver must not wait, so it only leaves marks.
#[derive(Default)]
struct Marks {
    noticed: Notify,
    gone: AtomicU64,
    overflows: AtomicU64,
    /// The newest beat that came back.
    beat: AtomicU64,
    beat_noticed: Notify,
}

impl Subscriber {
    /// One connection, until something is wrong with it.
    pub(super) async fn listen(&self) -> anyhow::Result<std::convert::Infallible> {
        let marks = Arc::new(Marks::default());
        let beat_channel = self.channels.beat(&uuid::Uuid::new_v4().to_string());
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(ANSWER_WITHIN))
            .set_response_timeout(Some(ANSWER_WITHIN))
            .set_push_sender(self.listener(&beat_channel, marks.clone()));
        let connect = self.redis.get_multiplexed_async_connection_with_config(&config);
        let mut connection = connect.await.context("cannot connect")?;
        connection.subscribe(&beat_channel).await.context("cannot subscribe")?;
        self.metrics.redis_connects.inc();
        self.metrics.redis_up.set(1);
        self.wishes.start_over(true);
        tracing::info!(channels = self.wishes.count(), "listening to Redis");

        let mut actual = HashSet::new();
        let mut beats = 0;
        let mut next_beat = Instant::now();
        let mut trusted = false;
        let (mut told, mut untold) = (None::<Instant>, 0);
        loop {
            tokio::select! {
                () = self.wishes.changed.notified() => self.follow_wishes(&mut connection, &mut actual).await?,
                () = marks.noticed.notified() => {
                    anyhow::ensure!(marks.gone.load(Ordering::Acquire) == 0, "the connection broke");
                    let missed = marks.overflows.swap(0, Ordering::AcqRel);
                    if missed > 0 {
                        self.news.send(News::Missed).await?;
                        untold += missed;
                        if told.is_none_or(|told| told.elapsed() > OVERFLOWS_TOLD_EVERY) {
                            tracing::warn!(missed = untold, "messages from Redis found the queue full; reconciling");
                            (told, untold) = (Some(Instant::now()), 0);
                        }
                    }
                }
                () = tokio::time::sleep_until(next_beat) => {
                    let heard = self.beat(&mut connection, &beat_channel, &marks, &mut beats).await?;
                    if heard != trusted {
                        trusted = heard;
                        self.trust(trusted).await;
                    }
                    next_beat = Instant::now() + BEAT_EVERY;
                }
            }
        }
    }

    /// Runs where the connection is read; must not wait.
    fn listener(&self, beat_channel: &str, marks: Arc<Marks>) -> impl Fn(PushInfo) -> Result<(), ()> + use<> {
        let channels = self.channels.clone();
        let beat_channel = beat_channel.as_bytes().to_vec();
        let news = self.news.clone();
        let metrics = self.metrics.clone();
        move |push| {
            match push.kind {
                PushKind::Message => {}
                PushKind::Disconnection => {
                    marks.gone.store(1, Ordering::Release);
                    marks.noticed.notify_one();
                    return Ok(());
                }
                // Confirmations are awaited as replies.
                _ => return Ok(()),
            }
            let [Value::BulkString(channel), Value::BulkString(payload)] = push.data.as_slice() else {
                metrics.redis_bad_messages.inc();
                return Ok(());
            };
            if *channel == beat_channel {
                if let Some(beat) = std::str::from_utf8(payload).ok().and_then(|text| text.parse().ok()) {
                    marks.beat.fetch_max(beat, Ordering::AcqRel);
                    marks.beat_noticed.notify_one();
                }
                return Ok(());
            }
            let Some(user) = channels.user_of(channel) else {
                metrics.redis_bad_messages.inc();
                return Ok(());
            };
            let message = read(user, payload).unwrap_or_else(|| {
                // Of a newer api, or a stranger's: the feed has it if it is an event.
                metrics.redis_bad_messages.inc();
                News::Doubted(user)
            });
            if news.try_send(message).is_err() {
                metrics.redis_overflows.inc();
                marks.overflows.fetch_add(1, Ordering::AcqRel);
                marks.noticed.notify_one();
            }
            Ok(())
        }
    }

    async fn follow_wishes(
        &self,
        connection: &mut MultiplexedConnection,
        actual: &mut HashSet<UserId>,
    ) -> anyhow::Result<()> {
        let Batch { join, leave, back } = self.wishes.take(actual);
        let names = |users: &[UserId]| users.iter().map(|user| self.channels.user(*user)).collect::<Vec<_>>();
        // One command after the other: a confirmation then always belongs to the newest command on its channel.
        if !leave.is_empty() {
            connection.unsubscribe(names(&leave)).await.context("cannot unsubscribe")?;
            leave.iter().for_each(|user| _ = actual.remove(user));
        }
        if !join.is_empty() {
            connection.subscribe(names(&join)).await.context("cannot subscribe")?;
            actual.extend(&join);
            self.news.send(News::Confirmed(join)).await?;
        }
        if !back.is_empty() {
            self.news.send(News::Confirmed(back)).await?;
        }
        self.metrics.subscriptions.set(i64::try_from(actual.len()).unwrap_or(i64::MAX));
        self.metrics.subscriptions_wanted.set(i64::try_from(self.wishes.count()).unwrap_or(i64::MAX));
        Ok(())
    }

    /// Whether a message published now, to wherever the address points now, comes back to us. Fails when this connection is
    /// to blame.
    async fn beat(
        &self,
        connection: &mut MultiplexedConnection,
        channel: &str,
        marks: &Marks,
        beats: &mut u64,
    ) -> anyhow::Result<bool> {
        let ping = redis::cmd("PING");
        ping.query_async::<()>(connection).await.context("Redis does not answer a ping")?;
        *beats += 1;
        let beat = *beats;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(ANSWER_WITHIN))
            .set_response_timeout(Some(ANSWER_WITHIN));
        let publish = async {
            let mut fresh = self.redis.get_multiplexed_async_connection_with_config(&config).await?;
            let mut command = redis::cmd("PUBLISH");
            command.arg(channel).arg(beat).query_async::<()>(&mut fresh).await
        };
        if let Err(error) = publish.await {
            tracing::warn!(%error, "no beat can be published to Redis");
            return Ok(false);
        }
        let heard = async {
            while marks.beat.load(Ordering::Acquire) < beat {
                marks.beat_noticed.notified().await;
            }
        };
        timeout(ANSWER_WITHIN, heard).await.context("a beat through Redis did not come back")?;
        Ok(true)
    }
}

fn read(user: UserId, payload: &[u8]) -> Option<News> {
    if payload.len() > MAX_ENVELOPE {
        return None;
    }
    match Notice::from_json(payload).ok()? {
        Notice::Event(envelope) => Event::encode(&envelope).ok().map(|event| News::Event(user, event)),
        Notice::Revoked(Revoked { revoked }) => Some(News::Revoked(user, revoked)),
    }
}

#[cfg(test)]
mod tests {
    use shared::ids::SessionId;

    use super::*;

    #[test]
    fn a_payload_of_another_form_is_none_of_ours() {
        for payload in [&b""[..], b"{}", b"[]", b"null", b"\xff", &vec![b' '; MAX_ENVELOPE + 1]] {
            assert!(read(UserId(1), payload).is_none());
        }
        let revoked = read(UserId(1), br#"{"revoked":"5"}"#);
        assert!(matches!(revoked, Some(News::Revoked(UserId(1), SessionId(5)))));
    }
}
