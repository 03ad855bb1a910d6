//! Redis: listens to the channels of the users who have a stream here.
//!
//! One supervised connection of its own, rebuilt for ever with capped, jittered back-off. Which channels are wanted is
//! shared state, changed by the hub at any time; which are confirmed is known only here, and only after Redis has said so.
//! Every queue is bounded: a message that finds the queue full is dropped and reported as a doubt, which a reconcile heals.
//! A beat through Redis and back, published over a connection made anew, finds a server that is silently dead, demoted, or no
//! longer where the address points.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use rand::RngExt;
use redis::{AsyncConnectionConfig, PushInfo, PushKind, Value, aio::MultiplexedConnection};
use shared::{
    channels::Channels,
    event::{Notice, Revoked},
    ids::{SessionId, UserId},
};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    frame::{Event, MAX_ENVELOPE},
    metrics::Metrics,
};

/// Messages from Redis that the engine has not taken yet.
pub const QUEUE: usize = 16_384;
/// Channels in one command: it keeps one command's work in Redis, and its answer, small.
const BATCH: usize = 512;
/// An overload lasts; its log line does not say so hundreds of times.
const OVERFLOWS_TOLD_EVERY: Duration = Duration::from_secs(1);
const BEAT_EVERY: Duration = Duration::from_secs(2);
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
const BACKOFF: std::ops::Range<f64> = 0.05..2.0;

/// What the engine hears from Redis, and about it.
#[derive(Debug)]
pub enum News {
    Event(UserId, Event),
    /// A session of this user has ended.
    Revoked(UserId, SessionId),
    /// Something was said about this user that cannot be read.
    Doubted(UserId),
    /// From here on, what is published for these users arrives.
    Confirmed(Vec<UserId>),
    /// The connection is gone: nothing is confirmed any more.
    Lost,
    /// Whether Redis is trusted to bring what is published.
    Trusted(bool),
    /// Something may have been missed.
    Missed,
}

/// The channels that should be subscribed to. Held by the hub.
#[derive(Clone, Default)]
pub struct Wishes {
    state: Arc<Mutex<WishState>>,
    changed: Arc<Notify>,
}

#[derive(Default)]
struct WishState {
    wanted: HashSet<UserId>,
    /// Whose wish may differ from what Redis was told. Empty while there is no connection: a new one starts from `wanted`.
    changed: HashSet<UserId>,
    connected: bool,
}

impl Wishes {
    pub fn want(&self, user: UserId) {
        self.change(user, |state| state.wanted.insert(user));
    }

    pub fn unwant(&self, user: UserId) {
        self.change(user, |state| state.wanted.remove(&user));
    }

    fn change(&self, user: UserId, change: impl FnOnce(&mut WishState) -> bool) {
        let mut state = self.lock();
        if change(&mut state) && state.connected {
            state.changed.insert(user);
            self.changed.notify_one();
        }
    }

    fn count(&self) -> usize {
        self.lock().wanted.len()
    }

    /// A connection without any subscription begins or ends.
    fn start_over(&self, connected: bool) {
        let mut state = self.lock();
        state.connected = connected;
        state.changed = if connected { state.wanted.clone() } else { HashSet::new() };
        if connected {
            self.changed.notify_one();
        }
    }

    /// Some of the users whose wish has changed, by what is to be done about it.
    fn take(&self, actual: &HashSet<UserId>) -> Batch {
        let mut state = self.lock();
        let mut batch = Batch::default();
        let some: Vec<_> = state.changed.iter().copied().take(BATCH).collect();
        for user in some {
            state.changed.remove(&user);
            match (state.wanted.contains(&user), actual.contains(&user)) {
                (true, false) => batch.join.push(user),
                (false, true) => batch.leave.push(user),
                (true, true) => batch.back.push(user),
                (false, false) => {}
            }
        }
        if !state.changed.is_empty() {
            self.changed.notify_one();
        }
        batch
    }

    fn lock(&self) -> MutexGuard<'_, WishState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Batch {
    join: Vec<UserId>,
    leave: Vec<UserId>,
    /// Left and came back before Redis was told: the subscription was there all the time, and the hub does not know it.
    back: Vec<UserId>,
}

pub struct Subscriber {
    pub redis: redis::Client,
    pub channels: Channels,
    pub wishes: Wishes,
    pub news: mpsc::Sender<News>,
    pub metrics: Arc<Metrics>,
}

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
    /// Listens until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = self.supervise() => {}
            () = stop.cancelled() => {}
        }
    }

    async fn supervise(&self) {
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let error = match self.listen().await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            self.wishes.start_over(false);
            self.metrics.redis_up.set(0);
            self.metrics.subscriptions.set(0);
            self.trust(false).await;
            if self.news.send(News::Lost).await.is_err() {
                return;
            }
            failures = if began.elapsed() > Duration::from_secs(10) { 0 } else { failures + 1 };
            let longest = (BACKOFF.start * f64::from(1 << failures.min(10))).min(BACKOFF.end);
            let wait = Duration::from_secs_f64(rand::rng().random_range(longest / 2.0..longest));
            tracing::warn!(
                error = format!("{error:#}"),
                failures,
                ?wait,
                "Redis is away; events arrive by reconcile, a little later"
            );
            sleep(wait).await;
        }
    }

    async fn trust(&self, trusted: bool) {
        let _ = self.news.send(News::Trusted(trusted)).await;
    }

    /// One connection, until something is wrong with it.
    async fn listen(&self) -> anyhow::Result<std::convert::Infallible> {
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
    use super::*;

    fn users(ids: impl IntoIterator<Item = i64>) -> HashSet<UserId> {
        ids.into_iter().map(UserId).collect()
    }

    fn sorted(mut batch: Batch) -> [Vec<i64>; 3] {
        batch.join.sort();
        let ids = |users: Vec<UserId>| users.into_iter().map(|user| user.0).collect();
        [ids(batch.join), ids(batch.leave), ids(batch.back)]
    }

    #[test]
    fn wishes_are_told_once_connected_and_only_where_they_differ() {
        let wishes = Wishes::default();
        wishes.want(UserId(1));
        wishes.want(UserId(2));
        assert_eq!(wishes.take(&users([])), Batch::default());
        wishes.start_over(true);
        assert_eq!(sorted(wishes.take(&users([]))), [vec![1, 2], vec![], vec![]]);
        wishes.unwant(UserId(1));
        wishes.want(UserId(3));
        wishes.unwant(UserId(3));
        assert_eq!(sorted(wishes.take(&users([1, 2]))), [vec![], vec![1], vec![]]);
    }

    #[test]
    fn one_who_left_and_came_back_at_once_is_confirmed_again() {
        let wishes = Wishes::default();
        wishes.want(UserId(2));
        wishes.start_over(true);
        assert_eq!(sorted(wishes.take(&users([]))), [vec![2], vec![], vec![]]);
        wishes.unwant(UserId(2));
        wishes.want(UserId(2));
        assert_eq!(sorted(wishes.take(&users([2]))), [vec![], vec![], vec![2]]);
    }

    #[test]
    fn many_wishes_go_out_in_batches() {
        let wishes = Wishes::default();
        (1..=1_300).for_each(|id| wishes.want(UserId(id)));
        wishes.start_over(true);
        let mut actual = users([]);
        let mut batches = Vec::new();
        loop {
            let batch = wishes.take(&actual);
            if batch.join.is_empty() {
                break;
            }
            batches.push(batch.join.len());
            actual.extend(batch.join);
        }
        assert_eq!(batches, [BATCH, BATCH, 1_300 - 2 * BATCH]);
    }

    #[test]
    fn nothing_is_remembered_of_users_who_came_and_went_while_redis_was_away() {
        let wishes = Wishes::default();
        for id in 1..1_000 {
            wishes.want(UserId(id));
            wishes.unwant(UserId(id));
        }
        assert!(wishes.lock().changed.is_empty() && wishes.lock().wanted.is_empty());
    }

    #[test]
    fn a_payload_of_another_form_is_none_of_ours() {
        for payload in [&b""[..], b"{}", b"[]", b"null", b"\xff", &vec![b' '; MAX_ENVELOPE + 1]] {
            assert!(read(UserId(1), payload).is_none());
        }
        let revoked = read(UserId(1), br#"{"revoked":"5"}"#);
        assert!(matches!(revoked, Some(News::Revoked(UserId(1), SessionId(5)))));
    }
}
