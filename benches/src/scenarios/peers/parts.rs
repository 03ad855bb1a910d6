//! What is measured of each server, always in the same way: opening and memory, a steady rate, the ceiling, one to many.

use std::{path::PathBuf, time::Duration};

use anyhow::Context as _;
use protocol::ids::UserId;
use testkit::{
    service::Service,
    usage::{Cpu, Memory},
    user::TestUser,
};

use super::{
    EntrantServer,
    table::{Figures, Shared},
};
use crate::{
    clock::{Micros, now},
    fixtures::{self, Bench},
    load::{Audience, Opening, Order, Status, StreamLoad, Viewer, check},
    peers::{Peer, PeerEvents, PeerServer},
    publisher::{PublishReport, Window},
    report::{Percentiles, count, figure, progress},
    scenarios::{GatewayBuild, PATIENCE, Sizes, UNLIMITED},
    source::{Commits, EventLoad},
};

/// Longer than a part: a reconcile would deliver the events that Redis is measured by.
const NO_RECONCILE: u64 = 300;
/// Events under way at the ceiling: enough that nobody waits for the next one, fewer than overflow a queue.
const UNDER_WAY: u64 = 4_096;
/// Without an arrival for this long, what is missing is lost.
const SILENCE: Duration = Duration::from_secs(10);

/// Everything that a server of ours needs.
struct Ours<'a> {
    world: Bench,
    api: Service,
    users: Vec<TestUser>,
    build: &'a GatewayBuild,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    AsShipped,
    Ceiling,
    OneToMany,
}

enum Server<'a> {
    Gateway { ours: &'a Ours<'a>, gateway: Service },
    Peer(PeerServer),
}

#[derive(Clone, Copy)]
struct Footprint {
    server: u64,
    broker: Option<u64>,
}

enum Source<'a> {
    Feed(EventLoad<'a>),
    Peer(PeerEvents<'a>),
}

#[derive(Clone, Copy)]
struct Spent {
    server: Cpu,
    broker: Option<Cpu>,
    /// This process, which publishes; for ours, it commits to the feed, too.
    publisher: Cpu,
}

/// One server with its streams, and their events.
struct Trial<'a> {
    server: &'a Server<'a>,
    streams: StreamLoad,
    source: Source<'a>,
    delivered: PathBuf,
    before: Footprint,
    sizes: &'a Sizes,
    figures: &'a mut Figures,
    lost: u64,
}

pub async fn measure(entrant: EntrantServer<'_>, sizes: &Sizes) -> anyhow::Result<Figures> {
    let (ours, peer) = match entrant {
        EntrantServer::Gateway(build) => (Some(Ours::start(build, sizes).await?), None),
        EntrantServer::Peer(peer) => (None, Some(peer)),
    };
    let mut figures = Figures::default();
    let mut lost = 0;
    for part in [Part::AsShipped, Part::Ceiling, Part::OneToMany] {
        let server = Server::start(ours.as_ref(), peer, part).await?;
        let folder = tempfile::tempdir()?;
        let viewers: Vec<Viewer> = match &ours {
            Some(ours) => fixtures::viewers(&ours.users).collect(),
            None => (1..=sizes.streams as i64)
                .map(|id| Viewer { user: UserId(id), token: String::new() })
                .collect(),
        };
        // One to many: all have the first user's stream.
        let viewer = |index: usize| &viewers[if part == Part::OneToMany { 0 } else { index }];
        let receivers = if part == Part::OneToMany { 1 } else { viewers.len() };
        let users: Vec<UserId> = viewers[..receivers].iter().map(|viewer| viewer.user).collect();
        let delivered = folder.path().join("delivered");
        let mut streams = StreamLoad::start()?;
        streams.order(&Order::Viewers(Audience {
            foreign: peer.is_some(),
            delivered: Some(delivered.clone()),
            ..Audience::of(fixtures::viewers_file(folder.path(), (0..viewers.len()).map(viewer))?)
        }))?;
        let source = match &server {
            Server::Gateway { ours, .. } => Source::Feed(EventLoad::new(&ours.world, users.clone()).await?),
            Server::Peer(peer) => Source::Peer(PeerEvents::new(peer, users.clone())),
        };
        let before = server.memory()?;
        let figures = &mut figures;
        let mut trial =
            Trial { server: &server, streams, source, delivered, before, sizes, figures, lost: 0 };
        match part {
            Part::AsShipped => {
                trial.open_and_look()?;
                trial.one_event().await?;
                trial.steady().await?;
            }
            Part::Ceiling => trial.ceiling().await?,
            Part::OneToMany => trial.one_to_many().await?,
        }
        let report = trial.streams.report()?;
        lost += trial.lost + report.faults;
        if let Some(fault) = &report.first_fault {
            figure("the first fault", fault);
        }
        if let Server::Gateway { ours, gateway } = &server {
            check(&report, &fixtures::heads(&ours.world, &users).await?)?;
            crate::scenarios::print_complaints([gateway]);
        }
    }
    figures.lost = Some(lost as f64);
    figure("events lost, repeated or out of order", lost);
    Ok(figures)
}

impl Trial<'_> {
    fn streams(&self) -> f64 {
        self.sizes.streams as f64
    }

    /// At full speed.
    fn open(&mut self) -> anyhow::Result<()> {
        let total = self.sizes.streams;
        progress(format_args!("opening {total} streams"));
        self.streams.order(&Order::Measure { since: now() })?;
        let mut opening = Opening::at_full_speed(self.server.address());
        if let Server::Peer(peer) = &self.server {
            opening.at_once = peer.opens_at_once();
        }
        self.streams.order(&Order::Open(opening))?;
        if let Err(error) =
            self.streams.until("all streams are ready", PATIENCE, |status| status.ready == total)
        {
            let fault = self.streams.report()?.first_fault.unwrap_or_default();
            return Err(error.context(fault));
        }
        Ok(())
    }

    fn open_and_look(&mut self) -> anyhow::Result<()> {
        let spent = self.server.spent()?;
        self.open()?;
        let cpu = self.server.spent()?.since(&spent).server;
        let report = self.streams.report()?;
        let rate = self.streams() / report.last_ready().as_secs_f64();
        let each = cpu.per(1e6, self.sizes.streams as u64);
        figure("opened", format_args!("{rate:.0} streams/s; {each:.0} µs of CPU for each"));
        (self.figures.opened, self.figures.opening_cpu) = (Some(rate), Some(each));
        self.figures.idle_bytes = self.look("PSS per idle stream")?;
        Ok(())
    }

    async fn one_event(&mut self) -> anyhow::Result<()> {
        progress("one event to each");
        self.streams.order(&Order::Measure { since: now() })?;
        let published = match &mut self.source {
            Source::Feed(feed) => feed.one_each().await?,
            Source::Peer(events) => events.one_each()?,
        };
        self.arrive(published.events)?;
        self.figures.event_bytes = self.look("PSS per stream after an event to each")?;
        Ok(())
    }

    /// Growth per stream since before the first, after a pause in which buffers are returned.
    fn look(&mut self, what: &str) -> anyhow::Result<Shared> {
        std::thread::sleep(self.sizes.settling);
        let (now, before, streams) = (self.server.memory()?, self.before, self.streams());
        let each = |now: u64, before: u64| now.saturating_sub(before) as f64 / streams;
        let broker = now.broker.zip(before.broker).map(|(now, before)| each(now, before));
        let bytes = Shared { server: Some(each(now.server, before.server)), broker };
        figure(
            what,
            format_args!("{:.0} bytes, Redis {:.0}", each(now.server, before.server), broker.unwrap_or(0.0)),
        );
        Ok(bytes)
    }

    async fn steady(&mut self) -> anyhow::Result<()> {
        let (rate, length) = (self.sizes.fanout_rate, self.sizes.fanout_length);
        progress(format_args!("{rate} events a second"));
        let mut at_start = None;
        let begin = begin(self.server, &mut self.streams, &mut at_start);
        let published = match &mut self.source {
            Source::Feed(feed) => feed.steady(rate, length, Commits::Meanwhile, begin).await?,
            Source::Peer(events) => events.steady(rate, length, begin)?,
        };
        let PublishReport { events, latest, .. } = published;
        self.arrive(events)?;
        let (_, spent) = at_start.context("the source begins")?;
        let spent = self.server.spent()?.since(&spent);
        let latency = Percentiles::of(self.streams.report()?.latencies);
        let cpu = spent.per(1e5, events);
        self.figures.steady_cpu = cpu;
        self.figures.publisher_cpu = Some(spent.publisher.per(1e5, events));
        let millis = |micros: u32| Some(f64::from(micros) / 1e3);
        (self.figures.p50, self.figures.p99) = (millis(latency.p50), millis(latency.p99));
        figure(format_args!("{} events at {}/s", count(events), count(rate.into())), latency);
        figure("the source was late by at most", format_args!("{:.1} ms", latest as f64 / 1e3));
        say_cpu(cpu);
        Ok(())
    }

    async fn ceiling(&mut self) -> anyhow::Result<()> {
        self.open()?;
        let events = self.sizes.flood;
        progress("one to one, as fast as possible");
        let already = self.streams.status()?.events_ever;
        let mut window =
            Window { most: UNDER_WAY, delivered: self.delivered.clone(), already, for_at_most: None };
        let mut at_start = None;
        let begin = begin(self.server, &mut self.streams, &mut at_start);
        let published = match &mut self.source {
            Source::Feed(feed) => feed.flood(events, window, begin).await?,
            Source::Peer(peer) => {
                window.for_at_most = Some(self.sizes.ceiling_length);
                peer.flood(events, window, begin)?
            }
        };
        let status = self.arrive(published.events)?;
        let (since, spent) = at_start.context("the source begins")?;
        let spent = self.server.spent()?.since(&spent);
        let rate = status.events as f64 / (status.last_event_at.saturating_sub(since) as f64 / 1e6);
        self.figures.most = Some(rate);
        figure("one to one at most", format_args!("{rate:.0}/s ({} events)", count(published.events)));
        say_cpu(spent.per(1e5, status.events));
        Ok(())
    }

    async fn one_to_many(&mut self) -> anyhow::Result<()> {
        self.open()?;
        let (rate, length) = (self.sizes.many_rate, self.sizes.fanout_length);
        progress("one to many");
        let mut at_start = None;
        let begin = begin(self.server, &mut self.streams, &mut at_start);
        let published = match &mut self.source {
            Source::Feed(feed) => feed.steady(rate, length, Commits::Meanwhile, begin).await?,
            Source::Peer(events) => events.steady(rate, length, begin)?,
        };
        let deliveries = published.events * self.sizes.streams as u64;
        let status = self.arrive(deliveries)?;
        let (since, spent) = at_start.context("the source begins")?;
        let spent = self.server.spent()?.since(&spent);
        let took = status.last_event_at.saturating_sub(since) as f64 / 1e6;
        let latency = Percentiles::of(self.streams.report()?.latencies);
        let cpu = spent.per(1e5, deliveries);
        (self.figures.many_cpu, self.figures.many_seconds) = (cpu, Some(took));
        let verdict = if took < length.as_secs_f64() + 0.5 { "kept up" } else { "DID NOT KEEP UP" };
        figure(
            format_args!("one to many, {} deliveries in {length:?}", count(deliveries)),
            format_args!("{verdict}: the last after {took:.1} s; {latency}"),
        );
        say_cpu(cpu);
        Ok(())
    }

    /// All of these events since `Measure`, or what there is when nothing arrives any more: the rest counts as lost.
    fn arrive(&mut self, events: u64) -> anyhow::Result<Status> {
        let mut newest = (0, now());
        loop {
            let status = self.streams.status()?;
            if status.events != newest.0 {
                newest = (status.events, now());
            }
            let silent = Duration::from_micros(now() - newest.1);
            if status.events >= events || silent > SILENCE {
                let lost = events.saturating_sub(status.events);
                if lost > 0 {
                    figure("MISSING", format_args!("{} of {} events", count(lost), count(events)));
                }
                self.lost += lost;
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

type Start = Option<(Micros, Spent)>;

/// What a source does before its first event.
fn begin<'t>(
    server: &'t Server<'_>,
    streams: &'t mut StreamLoad,
    at_start: &'t mut Start,
) -> impl FnOnce(Micros) -> anyhow::Result<()> + 't {
    move |since| {
        streams.order(&Order::Measure { since })?;
        *at_start = Some((since, server.spent()?));
        Ok(())
    }
}

fn say_cpu(Shared { server, broker }: Shared) {
    let [server, broker] = [server, broker].map(Option::unwrap_or_default);
    figure("CPU seconds per 100k deliveries", format_args!("{server:.2}, Redis {broker:.2}"));
}

impl<'a> Ours<'a> {
    async fn start(build: &'a GatewayBuild, sizes: &Sizes) -> anyhow::Result<Self> {
        let world = Bench::new().await;
        let users = fixtures::make_users(&world, sizes.streams).await?;
        let api = world.api().ready().await;
        Ok(Self { world, api, users, build })
    }

    async fn gateway(&self, part: Part) -> Service {
        let plan = self.build.plan(&self.world, &self.api).env("ACCEPT_RATE", UNLIMITED);
        let plan = match part {
            Part::AsShipped => plan,
            Part::Ceiling => plan.env("RECONCILE_SECONDS", NO_RECONCILE),
            Part::OneToMany => plan.env("MAX_STREAMS_PER_USER", self.users.len()),
        };
        plan.ready().await
    }
}

impl<'a> Server<'a> {
    async fn start(ours: Option<&'a Ours<'a>>, peer: Option<Peer>, part: Part) -> anyhow::Result<Self> {
        match (ours, peer) {
            (Some(ours), _) => Ok(Self::Gateway { ours, gateway: ours.gateway(part).await }),
            (None, Some(peer)) => Ok(Self::Peer(PeerServer::start(peer)?)),
            (None, None) => anyhow::bail!("nothing to measure"),
        }
    }

    fn address(&self) -> std::net::SocketAddr {
        match self {
            Self::Gateway { gateway, .. } => gateway.public(),
            Self::Peer(peer) => peer.address(),
        }
    }

    fn spent(&self) -> anyhow::Result<Spent> {
        let publisher = Cpu::of(std::process::id())?;
        Ok(match self {
            Self::Gateway { ours, gateway } => {
                Spent { server: gateway.cpu()?, broker: Some(ours.world.redis_cpu()?), publisher }
            }
            Self::Peer(peer) => Spent { server: peer.cpu()?, broker: peer.broker_cpu()?, publisher },
        })
    }

    fn memory(&self) -> anyhow::Result<Footprint> {
        Ok(match self {
            Self::Gateway { ours, gateway } => Footprint {
                server: gateway.memory()?.pss,
                broker: Some(Memory::of(ours.world.redis.id())?.pss),
            },
            Self::Peer(peer) => Footprint { server: peer.memory()?, broker: peer.broker_memory()? },
        })
    }
}

impl Spent {
    fn since(&self, earlier: &Self) -> Self {
        Self {
            server: self.server - earlier.server,
            broker: self.broker.zip(earlier.broker).map(|(now, before)| now - before),
            publisher: self.publisher - earlier.publisher,
        }
    }

    fn per(&self, many: f64, events: u64) -> Shared {
        Shared {
            server: Some(self.server.per(many, events)),
            broker: self.broker.map(|cpu| cpu.per(many, events)),
        }
    }
}
