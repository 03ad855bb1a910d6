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

const APIS: u8 = 2;
const GATEWAYS: u8 = 3;
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
    apis: Vec<Service>,
    gateways: Vec<Service>,
    pub(super) nginx: Nginx,
    pub(super) streams: StreamLoad,
    total: usize,
    spent_by_apis: Cpu,
    spent_by_gateways: Cpu,
    drains: Vec<DrainReport>,
    most_memory: u64,
}

#[derive(Clone, Copy)]
enum ServiceKind {
    Api,
    Gateway,
}

impl<'a> Deployment<'a> {
    pub(super) async fn open(world: &'a Bench, pace: &'a Pace, total: usize) -> anyhow::Result<Self> {
        let network: [u8; 2] = [rand::random_range(1..255), rand::random_range(1..255)];
        let at = |host: u8| Ipv4Addr::new(127, network[0], network[1], host);
        let api_hosts: Vec<_> = (0..APIS).map(|number| at(10 + number)).collect();
        let gateway_hosts: Vec<_> = (0..GATEWAYS).map(|number| at(20 + number)).collect();
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
        let (mut apis, mut gateways) = (Vec::new(), Vec::new());
        for host in api_hosts {
            let plan = world.api().env("TRUSTED_PROXIES", PROXIES).env("LISTEN", format_args!("{host}:8080"));
            let plan = plan.env("INTERNAL_LISTEN", format_args!("{host}:8081"));
            apis.push(plan.env("SHUTDOWN_WAIT_SECONDS", pace.api_wait.as_secs()).ready().await);
        }
        for host in gateway_hosts {
            let plan = world.gateway(internal).env("TRUSTED_PROXIES", PROXIES);
            let plan = plan.env("LISTEN", format_args!("{host}:8090"));
            let plan = plan.env("DRAIN_WAIT_SECONDS", pace.drain_wait.as_secs());
            gateways.push(plan.env("DRAIN_WINDOW_SECONDS", pace.drain_window.as_secs()).ready().await);
        }
        Ok(Self {
            world,
            pace,
            apis,
            gateways,
            nginx,
            streams: StreamLoad::start()?,
            total,
            spent_by_apis: Cpu(Duration::ZERO),
            spent_by_gateways: Cpu(Duration::ZERO),
            drains: Vec::new(),
            most_memory: 0,
        })
    }

    pub(super) fn services(&self) -> impl Iterator<Item = &Service> {
        self.apis.iter().chain(&self.gateways)
    }

    fn of(&mut self, kind: ServiceKind) -> &mut Vec<Service> {
        match kind {
            ServiceKind::Api => &mut self.apis,
            ServiceKind::Gateway => &mut self.gateways,
        }
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
        for number in 0..self.gateways.len() {
            let began = now();
            let streams = self.gateways[number].metric("messenger_gateway_streams").await as u64;
            self.replace_in_order(ServiceKind::Gateway, number).await?;
            sleep(self.pace.pause).await;
            self.drains.push(DrainReport { streams, began, ended: now() });
        }
        for number in 0..self.apis.len() {
            self.replace_in_order(ServiceKind::Api, number).await?;
            sleep(self.pace.pause).await;
        }
        Ok(())
    }

    pub(super) async fn kill_each(&mut self) -> anyhow::Result<()> {
        for (kind, many) in [(ServiceKind::Gateway, self.gateways.len()), (ServiceKind::Api, self.apis.len())]
        {
            for number in 0..many {
                self.kill(kind, number)?;
                sleep(self.pace.down).await;
                self.start_again(kind, number).await;
                sleep(self.pace.pause).await;
            }
        }
        Ok(())
    }

    pub(super) async fn kill_all(&mut self) -> anyhow::Result<()> {
        let everyone = [(ServiceKind::Gateway, self.gateways.len()), (ServiceKind::Api, self.apis.len())];
        let everyone =
            everyone.into_iter().flat_map(|(kind, many)| (0..many).map(move |number| (kind, number)));
        for (kind, number) in everyone.clone() {
            self.kill(kind, number)?;
        }
        sleep(ALL_DOWN).await;
        // api first: a gateway needs its keys to become ready.
        for (kind, number) in everyone.rev() {
            self.start_again(kind, number).await;
        }
        Ok(())
    }

    /// As in a rollout without a surge: SIGTERM, and the proxy drops the replica at the same time.
    async fn replace_in_order(&mut self, kind: ServiceKind, number: usize) -> anyhow::Result<()> {
        self.look_at_memory()?;
        let service = &mut self.of(kind)[number];
        let host = service.public().ip();
        service.terminate();
        self.nginx.leave_out(&[host]).await;
        let service = &mut self.of(kind)[number];
        let mut cpu = service.cpu()?;
        let deadline = Instant::now() + ENDS_WITHIN;
        let status = loop {
            if let Some(status) = service.ended() {
                break status;
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "still there after {ENDS_WITHIN:?}: {:?}",
                service.log().complaints()
            );
            // Its CPU time cannot be read any more once it has ended.
            cpu = service.cpu().unwrap_or(cpu);
            sleep(Duration::from_millis(20)).await;
        };
        anyhow::ensure!(status.success(), "ended with {status}: {:?}", service.log().complaints());
        self.spend(kind, cpu);
        self.start_again(kind, number).await;
        self.nginx.leave_out(&[]).await;
        Ok(())
    }

    fn kill(&mut self, kind: ServiceKind, number: usize) -> anyhow::Result<()> {
        let service = &mut self.of(kind)[number];
        let cpu = service.cpu()?;
        service.kill();
        self.spend(kind, cpu);
        Ok(())
    }

    async fn start_again(&mut self, kind: ServiceKind, number: usize) {
        let service = &mut self.of(kind)[number];
        service.restart().await;
        service.until_ready().await;
    }

    fn spend(&mut self, kind: ServiceKind, cpu: Cpu) {
        let spent = match kind {
            ServiceKind::Api => &mut self.spent_by_apis,
            ServiceKind::Gateway => &mut self.spent_by_gateways,
        };
        spent.0 += cpu.0;
    }

    fn look_at_memory(&mut self) -> anyhow::Result<()> {
        for gateway in &self.gateways {
            self.most_memory = self.most_memory.max(gateway.memory()?.pss);
        }
        Ok(())
    }

    fn costs(&self) -> anyhow::Result<DeploymentCosts> {
        let sum = |services: &[Service], spent: Cpu| {
            services.iter().try_fold(spent, |sum, service| anyhow::Ok(Cpu(sum.0 + service.cpu()?.0)))
        };
        Ok(DeploymentCosts {
            services: Costs {
                gateway: sum(&self.gateways, self.spent_by_gateways)?,
                api: sum(&self.apis, self.spent_by_apis)?,
                postgres: self.world.postgres_cpu()?,
                redis: self.world.redis_cpu()?,
                load: self.streams.cpu()?,
            },
            nginx: self.nginx.cpu()?,
        })
    }
}
