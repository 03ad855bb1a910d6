//! Socket I/O. Only [`Engine::write_pending`] decides what is written to a connection next.

use std::{collections::VecDeque, io, time::SystemTime};

use rand::RngExt;

use super::{
    Engine, bytes_of,
    connection::{Connection, MAX_UNEXPECTED_INPUT, Written},
};
use crate::{
    event::EncodedEvent,
    frame::{self, Goodbye},
    hub::{ConnectionKey, Hub},
    metrics::{DeliveryPath, Reason},
    trace::Flush,
};

impl Engine {
    pub(super) fn on_socket(&mut self, event: &mio::event::Event) {
        let index = event.token().0;
        let Some(connection) = self.connections.get_mut(index) else { return };
        let key = ConnectionKey { index: index as u32, generation: connection.generation };
        if event.is_error() {
            let error = connection.socket.take_error().ok().flatten();
            return self.close(key, error.as_ref().map_or("client", why_broken));
        }
        if event.is_readable() {
            let open = connection.discard_input();
            let closing = connection.closing;
            if connection.unexpected_input > MAX_UNEXPECTED_INPUT {
                connection.end_body();
                return self.close(key, "unexpected_input");
            }
            if !matches!(open, Ok(true)) {
                return self.close(key, closing.map_or("client", Goodbye::as_str));
            }
        }
        if event.is_writable() {
            self.write_pending(key);
        }
    }

    /// Accounts for a write. `true` when the socket took everything.
    pub(super) fn note_write(&mut self, key: ConnectionKey, written: io::Result<Written>) -> bool {
        match written {
            Ok(Written::All) => true,
            Ok(Written::Short) => {
                self.metrics.slow_consumers.inc();
                self.metrics.slow_consumer_episodes.inc();
                let closing = self.connection(key).is_some_and(|connection| connection.closing.is_some());
                if !closing {
                    self.schedule(key);
                }
                false
            }
            Err(error) => {
                self.close(key, why_broken(&error));
                false
            }
        }
    }

    /// Writes what is pending, as far as the socket takes it: the rest of a block, control events, the events after the cursor.
    /// Requests events that are not in memory.
    pub(super) fn write_pending(&mut self, key: ConnectionKey) {
        let now = self.now;
        loop {
            let Some(connection) = self.connections.get_mut(key.index as usize) else { return };
            if connection.generation != key.generation {
                return;
            }
            if !connection.rest.is_empty() {
                match connection.flush(now) {
                    Ok(Written::All) => {
                        self.metrics.slow_consumers.dec();
                        self.flushes.remove(&key);
                    }
                    Ok(Written::Short) => return,
                    Err(error) => return self.close(key, why_broken(&error)),
                }
                continue;
            }
            let Some(entry) = self.hub.get(connection.user) else { return };
            let position = entry.sequencer.position();
            let mut delivered = None;
            let block = if let Some(why) = connection.closing {
                if connection.goodbye_written {
                    return connection.finish_writing();
                }
                connection.goodbye_written = true;
                frame::goodbye(why, rand::rng().random_range(why.retry()))
            } else if !connection.is_joined() {
                return;
            } else if let Some(resumed) = connection.pending_ready.take() {
                let cursor = connection.position;
                let with_id = connection.pending_resync.is_none();
                let heartbeat = connection.heartbeat.every(self.settings.heartbeat);
                let cursor = match (with_id, position) {
                    (false, Some(head)) => head,
                    _ => cursor,
                };
                frame::ready(cursor, resumed && with_id, with_id, heartbeat, SystemTime::now())
            } else if let (Some(why), Some(head)) = (connection.pending_resync, position) {
                connection.pending_resync = None;
                connection.position = head;
                connection.started_after = head.seq;
                connection.range_request = None;
                self.backlog -= bytes_of(&connection.page);
                connection.page = VecDeque::new();
                self.metrics.resyncs.get_or_create(&Reason { reason: why.as_str() }).inc();
                tracing::info!(user.id = %entry.user, event.seq = head.seq, reason = why.as_str(), "stream must resync; its client reloads");
                frame::resync(head, why)
            } else if let Some(event) = connection.page.pop_front() {
                self.backlog -= event.frame.len();
                if connection.page.is_empty() {
                    connection.page = VecDeque::new();
                }
                if event.position.epoch != connection.position.epoch
                    || event.position.seq != connection.position.seq + 1
                {
                    continue; // Already written, as a live event.
                }
                connection.position = event.position;
                let flush = begin_flush(&self.hub, connection, &event);
                delivered = Some((event.created_at, DeliveryPath::Replay, flush));
                event.frame
            } else if let Some(event) = entry.replay.after(connection.position) {
                connection.position = event.position;
                let flush = begin_flush(&self.hub, connection, event);
                delivered = Some((event.created_at, DeliveryPath::Redis, flush));
                event.frame.clone()
            } else {
                let head = connection.position;
                let behind =
                    position.is_some_and(|position| position.epoch == head.epoch && position.seq > head.seq);
                if behind && connection.range_request.is_none() {
                    self.request_range(key, head.seq);
                } else if !behind && !entry.replay.is_empty() {
                    let user = connection.user;
                    self.trim(user);
                }
                return;
            };
            let written = connection.write_block(&block, now);
            if let Some((created_at, path, flush)) = delivered {
                self.note_delivery(created_at, path);
                self.note_flush(key, flush, &written);
            }
            if !self.note_write(key, written) {
                return;
            }
        }
    }

    /// A recorded flush ends when the socket has taken everything.
    pub(super) fn note_flush(
        &mut self,
        key: ConnectionKey,
        flush: Option<Flush>,
        written: &io::Result<Written>,
    ) {
        let Some(flush) = flush else { return };
        match written {
            Ok(Written::All) => drop(flush),
            Ok(Written::Short) => _ = self.flushes.insert(key, flush),
            Err(error) => flush.fail(why_broken(error)),
        }
    }

    pub(super) fn note_delivery(&self, created_at: i64, path: DeliveryPath) {
        let delivery = &self.path_metrics[path as usize];
        delivery.counter.inc();
        delivery.lag.observe((self.wall - created_at).max(0) as f64 / 1_000.0);
    }
}

/// Returns a span only if the event is traced.
pub(super) fn begin_flush(hub: &Hub, connection: &Connection, event: &EncodedEvent) -> Option<Flush> {
    let trace = event.trace.as_ref()?;
    let streams = hub.get(connection.user).map_or(1, |entry| entry.connections.len());
    trace.flush(streams, connection.generation)
}

/// `TimedOut`: the client acknowledged nothing for the write deadline (`TCP_USER_TIMEOUT`).
fn why_broken(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::TimedOut { "slow_consumer" } else { "client" }
}
