//! The figures of one phase of a deployment, and their checks.

use std::fmt::{self, Display};

use testkit::usage::Cpu;

use super::Pace;
use crate::{
    clock::Micros,
    load::{PostReport, Report, Status},
    report::{Percentiles, count, figure, heading, megabytes, tally},
    scenarios::Costs,
};

/// New streams per second that one gateway accepts by default.
const ACCEPT_RATE: usize = 5_000;

pub(super) struct DeploymentCosts {
    pub(super) services: Costs,
    pub(super) nginx: Cpu,
}

impl DeploymentCosts {
    pub(super) fn since(&self, earlier: &Self) -> Self {
        Self { services: self.services.since(&earlier.services), nginx: self.nginx - earlier.nginx }
    }
}

/// One gateway's drain, from SIGTERM until it is replaced.
pub(super) struct DrainReport {
    pub(super) streams: u64,
    pub(super) began: Micros,
    pub(super) ended: Micros,
}

impl DrainReport {
    fn rate(&self, pace: &Pace) -> f64 {
        self.streams as f64 / pace.drain_window.as_secs_f64()
    }

    fn per_second(&self, times: &[Micros]) -> PerSecond {
        let meanwhile = |time: &&Micros| (self.began..self.ended).contains(*time);
        PerSecond::of(&times.iter().filter(meanwhile).copied().collect::<Vec<_>>())
    }
}

pub(super) struct DeployPhase {
    pub(super) name: &'static str,
    pub(super) began: Micros,
    pub(super) ended: Micros,
    pub(super) status: Status,
    pub(super) report: Report,
    pub(super) drains: Vec<DrainReport>,
    pub(super) costs: DeploymentCosts,
    pub(super) most_memory: u64,
}

impl DeployPhase {
    pub(super) fn say(&self, posted: &PostReport, begin: Micros, pace: &Pace) {
        let report = &self.report;
        heading(format_args!("  {}: {:.0} s", self.name, (self.ended - self.began) as f64 / 1e6));
        figure("from commit to arrival, all events", Percentiles::of(report.delays.clone()));
        figure("the longest of each stream", Percentiles::of(report.longest_delays.clone()));
        figure("connections that ended", self.status.endings());
        if !report.away.is_empty() {
            figure("reconnect time, from end to `ready`", Percentiles::of(report.away.clone()));
            figure("reconnects per second", PerSecond::of(&report.begun_at));
        }
        for drain in &self.drains {
            let what = format!("drained: {} streams, {:.0}/s", count(drain.streams), drain.rate(pace));
            figure(&what, format_args!("streams closed per second: {}", drain.per_second(&report.ended_at)));
            figure(&what, format_args!("reconnects per second: {}", drain.per_second(&report.begun_at)));
        }
        let within = |time: &Micros| (self.began..self.ended).contains(&(begin + time));
        let latencies = posted.dues.iter().zip(&posted.latencies).filter(|(due, _)| within(due));
        let latencies: Vec<u32> = latencies.map(|(_, latency)| *latency).collect();
        let messages = count(latencies.len() as u64);
        figure(
            "POST, from due to the 201",
            format_args!("{}; {messages} messages", Percentiles::of(latencies)),
        );
        let failures = posted.failures.iter().filter(|(time, _)| within(time));
        tally("POST failed", failures.map(|(_, failure)| failure.clone()));
        self.costs.services.say();
        figure("CPU seconds of nginx", format_args!("{:.2}", self.costs.nginx.seconds()));
        figure("PSS of a gateway, at most", megabytes(self.most_memory));
    }

    /// Reconnects are spread over the drain, and never above the accept rate.
    pub(super) fn judge(&self, pace: &Pace) -> anyhow::Result<()> {
        let most = PerSecond::of(&self.report.begun_at).max;
        anyhow::ensure!(most < ACCEPT_RATE, "{}: {most} reconnects in one second", self.name);
        for drain in self.drains.iter().filter(|_| pace.keeps_to_rates) {
            let rate = drain.rate(pace);
            for times in [&self.report.ended_at, &self.report.begun_at] {
                let seen = drain.per_second(times);
                anyhow::ensure!(
                    seen.keeps_to(rate),
                    "drained at {rate:.0} a second by the settings, and seen were {seen}"
                );
            }
        }
        Ok(())
    }
}

struct PerSecond {
    p50: usize,
    p99: usize,
    max: usize,
}

impl PerSecond {
    /// Over all seconds from the first to the last of these ordered times.
    fn of(times: &[Micros]) -> Self {
        const GRAIN: usize = 50_000;
        const SECOND: Micros = 1_000_000;
        let in_second_from = |from: Micros| {
            times.partition_point(|time| *time < from + SECOND) - times.partition_point(|time| *time < from)
        };
        let (first, last) = (times.first().copied().unwrap_or(0), times.last().copied().unwrap_or(0));
        let begins = (first..=last.saturating_sub(SECOND).max(first)).step_by(GRAIN);
        let mut counts: Vec<usize> = begins.map(in_second_from).collect();
        counts.sort_unstable();
        let at = |hundredths: usize| counts[(counts.len() - 1) * hundredths / 100];
        Self { p50: at(50), p99: at(99), max: times.iter().copied().map(in_second_from).max().unwrap_or(0) }
    }

    /// Streams close in steps and return at random, so seconds differ.
    fn keeps_to(&self, rate: f64) -> bool {
        self.p50 as f64 <= 1.1 * rate + 5.0 && self.max as f64 <= 1.6 * rate + 10.0
    }
}

impl Display for PerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { p50, p99, max } = self;
        write!(f, "p50 {p50}, p99 {p99}, max {max}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_second_windows_begin_at_any_moment() {
        let all = |times: &[Micros]| {
            let PerSecond { p50, p99, max } = PerSecond::of(times);
            (p50, p99, max)
        };
        assert_eq!(all(&[]), (0, 0, 0));
        assert_eq!(all(&[7]), (1, 1, 1));
        assert_eq!(all(&[0, 600_000, 900_000, 1_500_000, 1_599_999, 1_600_000, 9_000_000]).2, 4);
        let steady: Vec<Micros> = (0..1_000).map(|number| number * 100_000).collect();
        assert_eq!(all(&steady), (10, 10, 10));
        assert!(PerSecond::of(&steady).keeps_to(10.0));
        let all_at_once: Vec<Micros> = (0..1_000).collect();
        assert!(!PerSecond::of(&all_at_once).keeps_to(33.0));
        let twice_as_fast = PerSecond::of(&steady.iter().map(|time| time / 2).collect::<Vec<_>>());
        assert!(!twice_as_fast.keeps_to(10.0));
    }
}
