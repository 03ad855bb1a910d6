//! Events for a peer: the same messages at the same times as ours get.

use std::time::Duration;

use chrono::Utc;
use protocol::ids::UserId;
use rand::seq::SliceRandom;

use super::PeerServer;
use crate::{
    clock::{self, Micros, now},
    publisher::{Burst, PublishReport, Window},
    source::{FLOOD_BURST, due_times, message},
};

pub struct PeerEvents<'a> {
    server: &'a PeerServer,
    /// By channel, in the order of turns: the number of its newest event.
    channels: Vec<(UserId, u64)>,
    next: usize,
}

impl<'a> PeerEvents<'a> {
    pub fn new(server: &'a PeerServer, users: impl IntoIterator<Item = UserId>) -> Self {
        let mut channels: Vec<_> = users.into_iter().map(|user| (user, 0)).collect();
        channels.shuffle(&mut rand::rng());
        Self { server, channels, next: 0 }
    }

    pub fn one_each(&mut self) -> anyhow::Result<PublishReport> {
        let bursts = self.bursts(&vec![0; self.channels.len()]);
        self.publish(bursts, now(), None)
    }

    pub fn steady(
        &mut self,
        per_second: u32,
        length: Duration,
        begin: impl FnOnce(Micros) -> anyhow::Result<()>,
    ) -> anyhow::Result<PublishReport> {
        let dues: Vec<Micros> = due_times(per_second, length).collect();
        let bursts = dues.chunk_by(|a, b| a == b).flat_map(|dues| self.bursts(dues)).collect();
        let since = clock::soon();
        begin(since)?;
        self.publish(bursts, since, None)
    }

    pub fn flood(
        &mut self,
        events: u64,
        window: Window,
        begin: impl FnOnce(Micros) -> anyhow::Result<()>,
    ) -> anyhow::Result<PublishReport> {
        let bursts = self.bursts(&vec![0; events as usize]);
        let since = clock::soon();
        begin(since)?;
        self.publish(bursts, since, Some(window))
    }

    fn publish(
        &self,
        bursts: Vec<Burst>,
        since: Micros,
        window: Option<Window>,
    ) -> anyhow::Result<PublishReport> {
        let publisher = self.server.publisher(since, window)?;
        bursts.into_iter().try_for_each(|burst| publisher.send(burst))?;
        publisher.finish()
    }

    fn bursts(&mut self, dues: &[Micros]) -> Vec<Burst> {
        dues.chunks(FLOOD_BURST).map(|dues| self.burst(dues)).collect()
    }

    fn burst(&mut self, dues: &[Micros]) -> Burst {
        let (_, connections) = self.server.wire();
        let mut commands = vec![Vec::new(); connections];
        for &due in dues {
            let turn = self.next % self.channels.len();
            self.next += 1;
            let (user, seq) = &mut self.channels[turn];
            *seq += 1;
            let message = message(*seq, due, turn, Utc::now());
            self.server.write_command(user.0.cast_unsigned(), &message, &mut commands[turn % connections]);
        }
        Burst { due: dues.first().copied().unwrap_or_default(), events: dues.len() as u64, commands }
    }
}
