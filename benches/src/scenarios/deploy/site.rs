//! The processes of a deployment, and what happens to them: replaced in order as a rollout does it, or killed and started again.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use testkit::{
    nginx::{self, Nginx, Replicated},
    service::Service,
    usage::Cpu,
};
use tokio::time::sleep;

use super::{
    Pace,
    phase::{DeployPhase, DeploymentCosts, DrainReport},
};
use crate::{
    clock::now,
    fixtures::Bench,
    load::{Order, StreamLoad},
    report::progress,
    scenarios::{Costs, PATIENCE},
};

const GATEWAY_HOSTS: [u8; 3] = [20, 21, 22];
const API_HOSTS: [u8; 2] = [10, 11];
/// Longer than the shortest `retry`: some reconnect while nothing runs.
const ALL_DOWN: Duration = Duration::from_secs(3);
/// Longer than the wait, the drain and the last goodbyes together.
const ENDS_WITHIN: Duration = Duration::from_mins(2);
const PROXIES: &str = "127.0.0.0/8";

/// Everything that runs. Each process has an address of its own, as pods have: no outgoing connection can take its port
/// while it is down.
pub(super) struct Deployment<'a> {
    world: &'a Bench,
    pace: &'a Pace,
    /// Gateways first.
    replicas: Vec<DeployedService>,
    pub(super) nginx: Nginx,
    pub(super) streams: StreamLoad,
    total: usize,
    drains: Vec<DrainReport>,
    most_memory: u64,
}

struct DeployedService {
    service: Service,
    /// By its earlier processes.
    spent: Cpu,
}

impl<'a> Deployment<'a> {
    pub(super) async fn open(world: &'a Bench, pace: &'a Pace, total: usize) -> anyhow::Result<Self> {
        let network: [u8; 2] = [rand::random_range(1..255), rand::random_range(1..255)];
        let at = |host: u8| Ipv4Addr::new(127, network[0], network[1], host);
        let (gateway_hosts, api_hosts) = (GATEWAY_HOSTS.map(at), API_HOSTS.map(at));
        let on = |hosts: &[Ipv4Addr], port: u16| hosts.iter().map(|host| (*host, port).into()).collect();
        let internal = (at(1), 8081).into();
        let nginx = Nginx::start(nginx::Upstreams {
            address: (at(1), 8080).into(),
            tls: false,
            apis: on(&api_hosts, 8080),
            gateways: on(&gateway_hosts, 8090),
            replicated: Some(Replicated { address: internal, apis: on(&api_hosts, 8081) }),
        })
        .await;
        let mut services = Vec::new();
        // api first: a gateway needs its keys to become ready.
        for host in api_hosts {
            let plan = world.api().env("TRUSTED_PROXIES", PROXIES).env("LISTEN", format_args!("{host}:8080"));
            let plan = plan.env("INTERNAL_LISTEN", format_args!("{host}:8081"));
            services.push(plan.env("SHUTDOWN_WAIT_SECONDS", pace.api_wait.as_secs()).ready().await);
        }
        for host in gateway_hosts {
            let plan = world.gateway(internal).env("TRUSTED_PROXIES", PROXIES);
            let plan = plan.env("LISTEN", format_args!("{host}:8090"));
            let plan = plan.env("DRAIN_WAIT_SECONDS", pace.drain_wait.as_secs());
            services.push(plan.env("DRAIN_WINDOW_SECONDS", pace.drain_window.as_secs()).ready().await);
        }
        services.rotate_left(API_HOSTS.len());
        let replica = |service| DeployedService { service, spent: Cpu(Duration::ZERO) };
        Ok(Self {
            world,
            pace,
            replicas: services.into_iter().map(replica).collect(),
            nginx,
            streams: StreamLoad::start()?,
            total,
            drains: Vec::new(),
            most_memory: 0,
        })
    }

    pub(super) fn services(&self) -> impl Iterator<Item = &Service> {
        self.replicas.iter().map(|replica| &replica.service)
    }

    /// Until all streams are back, and a pause for the events that they missed.
    pub(super) async fn phase(
        &mut self,
        name: &'static str,
        happens: impl AsyncFnOnce(&mut Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<DeployPhase> {
        progress(name);
        let began = now();
        self.streams.order(&Order::Measure { since: began })?;
        let costs = self.costs()?;
        self.most_memory = 0;
        happens(self).await?;
        let total = self.total;
        self.streams.until("all are back", PATIENCE, |status| status.ready == total)?;
        sleep(self.pace.pause).await;
        self.look_at_memory()?;
        Ok(DeployPhase {
            name,
            began,
            ended: now(),
            status: self.streams.status()?,
            report: self.streams.report()?,
            drains: std::mem::take(&mut self.drains),
            costs: self.costs()?.since(&costs),
            most_memory: self.most_memory,
        })
    }

    pub(super) async fn leave_alone(&mut self) -> anyhow::Result<()> {
        sleep(self.pace.calm).await;
        Ok(())
    }

    pub(super) async fn roll(&mut self) -> anyhow::Result<()> {
        for number in 0..self.replicas.len() {
            let began = now();
            let streams = self.replicas[number].service.metric("messenger_gateway_streams").await as u64;
            self.replace_in_order(number).await?;
            sleep(self.pace.pause).await;
            if number < GATEWAY_HOSTS.len() {
                self.drains.push(DrainReport { streams, began, ended: now() });
            }
        }
        Ok(())
    }

    pub(super) async fn kill_each(&mut self) -> anyhow::Result<()> {
        for number in 0..self.replicas.len() {
            self.replicas[number].kill()?;
            sleep(self.pace.down).await;
            self.replicas[number].start_again().await;
            sleep(self.pace.pause).await;
        }
        Ok(())
    }

    pub(super) async fn kill_all(&mut self) -> anyhow::Result<()> {
        self.replicas.iter_mut().try_for_each(DeployedService::kill)?;
        sleep(ALL_DOWN).await;
        // api first: a gateway needs its keys to become ready.
        for replica in self.replicas.iter_mut().rev() {
            replica.start_again().await;
        }
        Ok(())
    }

    /// As in a rollout without a surge: SIGTERM, and the proxy drops the replica at the same time.
    async fn replace_in_order(&mut self, number: usize) -> anyhow::Result<()> {
        self.look_at_memory()?;
        let replica = &mut self.replicas[number];
        let service = &mut replica.service;
        service.terminate();
        self.nginx.leave_out(&[service.public().ip()]).await;
        let mut cpu = service.cpu()?;
        let deadline = Instant::now() + ENDS_WITHIN;
        let status = loop {
            if let Some(status) = service.ended() {
                break status;
            }
            let complaints = || service.log().complaints();
            anyhow::ensure!(
                Instant::now() < deadline,
                "still there after {ENDS_WITHIN:?}: {:?}",
                complaints()
            );
            // Its CPU time cannot be read any more once it has ended.
            cpu = service.cpu().unwrap_or(cpu);
            sleep(Duration::from_millis(20)).await;
        };
        anyhow::ensure!(status.success(), "ended with {status}: {:?}", service.log().complaints());
        replica.spent.0 += cpu.0;
        replica.start_again().await;
        self.nginx.leave_out(&[]).await;
        Ok(())
    }

    fn look_at_memory(&mut self) -> anyhow::Result<()> {
        for gateway in &self.replicas[..GATEWAY_HOSTS.len()] {
            self.most_memory = self.most_memory.max(gateway.service.memory()?.pss);
        }
        Ok(())
    }

    fn costs(&self) -> anyhow::Result<DeploymentCosts> {
        let sum = |replicas: &[DeployedService]| {
            replicas.iter().try_fold(Cpu(Duration::ZERO), |sum, replica| {
                anyhow::Ok(Cpu(sum.0 + replica.spent.0 + replica.service.cpu()?.0))
            })
        };
        let (gateways, apis) = self.replicas.split_at(GATEWAY_HOSTS.len());
        Ok(DeploymentCosts {
            services: Costs {
                gateway: sum(gateways)?,
                api: sum(apis)?,
                postgres: self.world.postgres_cpu()?,
                redis: self.world.redis_cpu()?,
                load: self.streams.cpu()?,
            },
            nginx: self.nginx.cpu()?,
        })
    }
}

impl DeployedService {
    fn kill(&mut self) -> anyhow::Result<()> {
        self.spent.0 += self.service.cpu()?.0;
        self.service.kill();
        Ok(())
    }

    async fn start_again(&mut self) {
        self.service.restart().await;
        self.service.until_ready().await;
    }
}
