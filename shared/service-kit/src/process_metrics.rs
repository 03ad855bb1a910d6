//! The standard process metrics (Prometheus, "Writing client libraries"), read from the kernel at each scrape, and the build.

use std::{fmt, fs, sync::atomic::AtomicU64, time::SystemTime};

use nix::{
    sys::resource::{RLIM_INFINITY, Resource, getrlimit},
    time::{ClockId, clock_gettime},
    unistd::{SysconfVar, sysconf},
};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, family::Family, gauge::ConstGauge, gauge::Gauge},
    registry::Registry,
};

pub fn register(registry: &mut Registry, name: &'static str, version: &'static str) {
    registry.register_collector(Box::new(ProcessCollector { started: since_1970() }));
    let build = Family::<[(&'static str, &'static str); 2], Gauge<f64, AtomicU64>>::default();
    build.get_or_create(&[("service", name), ("version", version)]).set(1.0);
    registry.register("messenger_build_info", "1, labelled with the name and version of the program", build);
}

fn since_1970() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[derive(Debug)]
struct ProcessCollector {
    started: f64,
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let cpu = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_err(|_| fmt::Error)?;
        let cpu = ConstCounter::new(cpu.tv_sec() as f64 + cpu.tv_nsec() as f64 / 1e9);
        let metric_type = EncodeMetric::metric_type(&cpu);
        let name = "process_cpu_seconds";
        cpu.encode(encoder.encode_descriptor(name, "CPU time used, user and system", None, metric_type)?)?;

        let mut gauge = |name, help, value: Option<f64>| {
            let Some(value) = value else { return Ok(()) };
            let gauge = ConstGauge::new(value);
            let metric_type = EncodeMetric::metric_type(&gauge);
            gauge.encode(encoder.encode_descriptor(name, help, None, metric_type)?)
        };
        gauge(
            "process_start_time_seconds",
            "Start time of the process since the Unix epoch",
            Some(self.started),
        )?;
        gauge("process_resident_memory_bytes", "Resident memory", resident_bytes())?;
        gauge("process_open_fds", "Open file descriptors", open_files())?;
        let most_files = getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft);
        let most_files = most_files.filter(|most| *most != RLIM_INFINITY).map(|most| most as f64);
        gauge("process_max_fds", "Limit of open file descriptors", most_files)
    }
}

fn resident_bytes() -> Option<f64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: f64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * sysconf(SysconfVar::PAGE_SIZE).ok()?? as f64)
}

fn open_files() -> Option<f64> {
    // One of them is the listing's own.
    Some(fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_metrics_describe_this_process() {
        let mut registry = Registry::default();
        register(&mut registry, "test", "1.2.3");
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        assert!(value("process_cpu_seconds_total") > 0.0, "{text}");
        assert!(value("process_resident_memory_bytes") > 500_000.0, "{text}");
        assert!(
            value("process_open_fds") >= 3.0 && value("process_open_fds") <= value("process_max_fds"),
            "{text}"
        );
        assert!((value("process_start_time_seconds") - since_1970()).abs() < 60.0, "{text}");
        assert!(text.contains(r#"messenger_build_info{service="test",version="1.2.3"} 1"#), "{text}");
    }
}
