//! The life of a connection: admission, joining, closing, removal.

use std::collections::VecDeque;

use bytes::Bytes;
use mio::{Interest, Token};
use protocol::{
    ids::UserId,
    position::{Epoch, Position},
};

use super::{
    EXPIRED_WITHIN, Engine, GOODBYE_WITHIN, LINGER, NewStream, REVOKED_WITHIN, SEND_BUFFER, bytes_of,
    connection::{Connection, Resume, State},
    jittered,
};
use crate::{
    backfill::{HeadReason, HeadRequest},
    frame::Goodbye,
    hub::ConnectionKey,
    keys::TrustedKeys,
    metrics::Reason,
    sequencer::{Millis, ResyncReason},
};

impl Engine {
    pub(super) fn admit(&mut self, stream: NewStream) {
        let NewStream {
            socket,
            user,
            session,
            key: signed_by,
            resume,
            heartbeat,
            framing,
            head,
            ends,
            ends_why,
            permit,
        } = stream;
        let options = socket2::SockRef::from(&socket);
        let prepared = socket.set_nonblocking(true).and_then(|()| {
            options.set_send_buffer_size(SEND_BUFFER)?;
            // Bounds how long the kernel holds bytes that the client does not acknowledge or has no room for.
            options.set_tcp_user_timeout(Some(self.settings.write_deadline))
        });
        let mut socket = mio::net::TcpStream::from_std(socket);
        let slot = self.connections.vacant_entry();
        self.generation = self.generation.wrapping_add(1);
        let key = ConnectionKey { index: slot.key() as u32, generation: self.generation };
        let registered = prepared.and_then(|()| {
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.sockets.get_ref().registry().register(&mut socket, Token(slot.key()), interest)
        });
        if let Err(error) = registered {
            tracing::warn!(%error, user.id = %user, "stream handoff failed; the connection is closed");
            // It was not counted as opened, so it is not counted as closed.
            self.metrics.streams_rejected.get_or_create(&Reason { reason: "error" }).inc();
            return;
        }
        let (at, new) = self.hub.enter(user);
        if new {
            self.desired.add(user);
            self.metrics.users.set(self.hub.users() as i64);
        }
        slot.insert(Connection {
            socket,
            generation: key.generation,
            user: at,
            session,
            key: signed_by,
            state: State::Joining(resume),
            position: match resume {
                Resume::After(cursor) => cursor,
                Resume::Head | Resume::Invalid => Position { epoch: Epoch(0), seq: 0 },
            },
            started_after: match resume {
                Resume::After(cursor) => cursor.seq,
                Resume::Head | Resume::Invalid => 0,
            },
            rest: Bytes::new(),
            page: VecDeque::new(),
            came_after_batch: self.backfill.head_batches(),
            session_requested: false,
            session_confirmed: session.is_none(),
            range_request: None,
            pending_ready: None,
            pending_resync: None,
            closing: None,
            goodbye_written: false,
            heartbeat_at: self.now + jittered(heartbeat.every(self.settings.heartbeat)),
            ends_at: ends.saturating_duration_since(self.started).as_millis() as Millis,
            ends_why,
            blocked_since: self.now,
            due: 0,
            unexpected_input: 0,
            heartbeat,
            framing,
            _permit: permit,
        });
        self.metrics.streams.inc();
        self.metrics.streams_opened.inc();
        if let Some(entry) = self.hub.get_mut(at) {
            entry.connections.push(key);
        }
        self.enforce_user_limit(at, session.is_none());
        tracing::debug!(user.id = %user, connection = key.generation, resumes = resume != Resume::Head, new, "stream opened");
        self.schedule(key);
        let now = self.now;
        if let Some(connection) = self.connection(key) {
            let written = connection.write(head, now);
            self.note_write(key, written);
        }
        if self.drain.is_some() {
            return self.start_closing(key, Goodbye::Drain);
        }
        // After the HTTP check the session may have ended, and the key may have been removed.
        let ended = session.is_some_and(|session| self.ended.contains(user, session));
        if ended || !self.keys.accepts(signed_by) {
            return self.start_closing(key, Goodbye::Revoked);
        }
        self.join(key);
    }

    /// Closes the user's oldest streams over the limit. Confirmed and unconfirmed streams are counted separately, so that the
    /// token of an ended session cannot replace live streams.
    pub(super) fn enforce_user_limit(&mut self, user: u32, confirmed: bool) {
        let limit = self.settings.streams_per_user;
        let Some(entry) = self.hub.get(user) else { return };
        let staying = entry.connections.iter().copied().filter(|key| {
            self.connections.get(key.index as usize).is_some_and(|connection| {
                connection.closing.is_none() && connection.session_confirmed == confirmed
            })
        });
        let staying: Vec<_> = staying.collect();
        let over = staying.len().saturating_sub(limit);
        for key in staying.into_iter().take(over) {
            self.start_closing(key, Goodbye::Replaced);
        }
    }

    /// Requests what a joining connection needs, not before the subscription is confirmed: an earlier answer could miss events
    /// between the two. The session comes first: without a confirmed one, no events are read and no position is assigned.
    pub(super) fn join(&mut self, key: ConnectionKey) {
        let redis_degraded = self.redis_degraded;
        let Some(connection) = self.connections.get_mut(key.index as usize) else { return };
        let Some(entry) = self.hub.get(connection.user) else { return };
        let position = entry.sequencer.position();
        let may_request = entry.subscribed_on.is_some() || redis_degraded;
        if !connection.session_requested && (may_request || position.is_some()) {
            connection.session_requested = true;
            self.backfill.request_head(HeadRequest {
                user: entry.user,
                requested_at: position,
                why: HeadReason::Join,
                session: connection.session,
            });
        }
        if !connection.session_confirmed {
            return;
        }
        match connection.state {
            State::Joining(Resume::After(cursor)) if may_request && connection.range_request.is_none() => {
                self.request_range(key, cursor.seq);
            }
            // Otherwise the requested head brings the position.
            State::Joining(Resume::Head | Resume::Invalid) if position.is_some() => self.join_at_head(key),
            State::Joining(_) | State::Joined => {}
        }
    }

    pub(super) fn join_at_head(&mut self, key: ConnectionKey) {
        let Some(connection) = self.connections.get_mut(key.index as usize) else { return };
        let Some(position) = self.hub.get(connection.user).and_then(|entry| entry.sequencer.position())
        else {
            return;
        };
        let State::Joining(resume) = connection.state else { return };
        if !connection.session_confirmed {
            return;
        }
        connection.state = State::Joined;
        connection.position = position;
        connection.started_after = position.seq;
        connection.pending_ready = Some(false);
        connection.pending_resync = (resume == Resume::Invalid).then_some(ResyncReason::Unknown);
        self.write_pending(key);
    }

    pub(super) fn join_at_cursor(connection: &mut Connection) {
        connection.state = State::Joined;
        connection.pending_ready = Some(true);
    }

    /// Writes the goodbye after the current block, then closes.
    pub(super) fn start_closing(&mut self, key: ConnectionKey, why: Goodbye) {
        let now = self.now;
        let Some(connection) = self.connection(key) else { return };
        if connection.closing.is_some() {
            return;
        }
        connection.closing = Some(why);
        connection.due = now
            + match why {
                Goodbye::Expired => EXPIRED_WITHIN,
                Goodbye::Revoked => REVOKED_WITHIN,
                Goodbye::Busy | Goodbye::Drain | Goodbye::Replaced | Goodbye::Rotate => GOODBYE_WITHIN,
            };
        let due = connection.due;
        self.wheel.insert(key, due);
        self.write_pending(key);
    }

    /// Closes the streams whose token was signed by a key that is no longer trusted.
    pub(super) fn close_streams_of_removed_keys(&mut self, trusted: &TrustedKeys) {
        let signed = self.connections.iter().filter(|(_, connection)| !trusted.accepts(connection.key));
        let ending: Vec<_> = signed
            .map(|(index, connection)| ConnectionKey {
                index: index as u32,
                generation: connection.generation,
            })
            .collect();
        if !ending.is_empty() {
            tracing::warn!(streams = ending.len(), "public key removed; closing the streams that it opened");
        }
        for key in ending {
            self.start_closing(key, Goodbye::Revoked);
        }
    }

    pub(super) fn close(&mut self, key: ConnectionKey, reason: &'static str) {
        self.to_close.push((key, reason));
    }

    /// Removes closed connections. Not in [`Self::close`], whose callers may be iterating over the user's connections.
    pub(super) fn remove_closed(&mut self) {
        while let Some((key, reason)) = self.to_close.pop() {
            if self.connection(key).is_none() {
                continue;
            }
            let mut connection = self.connections.remove(key.index as usize);
            let _ = self.sockets.get_ref().registry().deregister(&mut connection.socket);
            self.backlog -= bytes_of(&connection.page);
            if let Some(flush) = self.flushes.remove(&key) {
                flush.fail(reason);
            }
            if !connection.rest.is_empty() {
                self.metrics.slow_consumers.dec();
            }
            self.metrics.streams.dec();
            self.metrics.closed(reason);
            if let Some(entry) = self.hub.get_mut(connection.user) {
                entry.connections.retain(|other| *other != key);
                self.closed_streams.note(entry.user, &connection, reason);
                tracing::debug!(user.id = %entry.user, connection = key.generation, reason, "stream closed");
                if entry.connections.is_empty() {
                    entry.empty_since = Some(self.now);
                    self.lingering.push_back((self.now + LINGER, entry.user));
                }
            }
            self.trim(connection.user);
        }
        self.metrics.replay_buffer_bytes.set(self.backlog as i64);
    }

    pub(super) fn connection(&mut self, key: ConnectionKey) -> Option<&mut Connection> {
        let connection = self.connections.get_mut(key.index as usize)?;
        (connection.generation == key.generation).then_some(connection)
    }

    /// Removes a user who has had no connection for [`LINGER`].
    pub(super) fn forget_user(&mut self, user: UserId) {
        let Some(at) = self.hub.find(user) else { return };
        let idle = self
            .hub
            .get(at)
            .is_some_and(|entry| entry.empty_since.is_some_and(|left| left + LINGER <= self.now));
        if idle && let Some(entry) = self.hub.remove(at) {
            self.backlog -= entry.replay.bytes();
            self.ticks.remove(&(entry.tick_at, at));
            self.desired.remove(user);
            self.metrics.users.set(self.hub.users() as i64);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, net::Ipv4Addr, os::fd::OwnedFd, sync::Arc, time::Duration, time::Instant};

    use mio::Poll;
    use protocol::{channels::Channels, claims::KeyName};
    use service_kit::{
        ended_sessions::EndedSessions,
        limiter::{self, Limit, Limiter, Subject},
        redis_topology::RedisTopology,
        secrets::Secrets,
        traces::Tracer,
    };
    use tokio::runtime::Handle;

    use super::*;
    use crate::{
        api_client::ApiClient,
        backfill::Backfill,
        config::{self, Delivery, Opening},
        engine::{Rights, watch},
        frame::{Framing, Heartbeat},
        keys::Keys,
        limits::StreamLimits,
        metrics::Metrics,
        subscriber::DesiredSubscriptions,
    };

    #[tokio::test]
    async fn admission_that_fails_early_is_neither_opened_nor_ended() {
        let second = Duration::from_secs(1);
        let metrics = Arc::new(Metrics::default());
        let api = ApiClient::new("http://127.0.0.1:9", Secrets::random(), metrics.clone());
        let settings = Delivery {
            heartbeat: second,
            reconcile: second,
            degraded_reconcile: second,
            write_deadline: second,
            streams_per_user: 1,
            replay_buffer_bytes: 1,
        };
        let mut engine = Engine::new(
            settings,
            watch(Poll::new().unwrap()).unwrap(),
            Backfill::new(api.clone(), Handle::current(), Tracer::default(), metrics.clone()),
            Rights {
                keys: Arc::new(Keys::new("http://localhost", api, metrics.clone())),
                ended_sessions: EndedSessions::default(),
            },
            DesiredSubscriptions::new(Channels::default()),
            metrics.clone(),
        );
        let topology = RedisTopology::single("redis://localhost").unwrap();
        let of_limiter = limiter::Metrics::default();
        let (limiter, _worker) = Limiter::new(topology, Channels::default(), second, of_limiter);
        let stream = config::Admission { streams: 1, streams_per_address: 0, rate: 1, max_age: second };
        let opening = Opening { per_user: Limit::Off, per_address: Limit::Off, patience: second };
        let limits = StreamLimits::new(&stream, &opening, limiter);
        let permit = limits.admit(Subject::User(UserId(1)), Ipv4Addr::LOCALHOST.into()).await;

        engine.admit(NewStream {
            // A file that rejects socket options.
            socket: OwnedFd::from(File::open("/dev/null").unwrap()).into(),
            user: UserId(1),
            session: None,
            key: KeyName([0; 8]),
            resume: Resume::Head,
            heartbeat: Heartbeat::default(),
            framing: Framing::Close,
            head: Bytes::new(),
            ends: Instant::now() + second,
            ends_why: Goodbye::Rotate,
            permit: permit.ok().unwrap(),
        });
        engine.remove_closed();
        let ended = metrics.streams_closed.get_or_create(&Reason { reason: "error" }).get();
        assert_eq!((metrics.streams_opened.get(), ended, metrics.streams.get()), (0, 0, 0));
        assert_eq!(metrics.streams_rejected.get_or_create(&Reason { reason: "error" }).get(), 1);
    }
}
