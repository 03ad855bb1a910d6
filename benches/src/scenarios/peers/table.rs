//! The figures of all rounds as one table in Markdown.

use crate::report::{count, print};

/// Of one server in one round. `None`: not measured.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    pub idle_bytes: Shared,
    pub event_bytes: Shared,
    pub steady_cpu: Shared,
    pub publisher_cpu: Option<f64>,
    pub p50: Option<f64>,
    pub p99: Option<f64>,
    pub most: Option<f64>,
    pub many_cpu: Shared,
    pub many_seconds: Option<f64>,
    pub opened: Option<f64>,
    pub opening_cpu: Option<f64>,
    pub lost: Option<f64>,
}

/// The server's part, and that of the Redis behind it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shared {
    pub server: Option<f64>,
    pub broker: Option<f64>,
}

type Line = (&'static str, fn(&[Figures]) -> String);

const LINES: [Line; 12] = [
    ("process bytes per idle stream (+ Redis)", |all| shared(all, |one| one.idle_bytes, whole)),
    ("after one event each", |all| shared(all, |one| one.event_bytes, whole)),
    ("CPU s per 100k deliveries, steady rate", |all| {
        shared(all, |one| one.steady_cpu, |value| format!("{value:.2}"))
    }),
    ("CPU s of the publisher per 100k", |all| {
        one(all, |one| one.publisher_cpu, |value| format!("{value:.2}"))
    }),
    ("p50 ms", |all| one(all, |one| one.p50, |value| format!("{value:.2}"))),
    ("p99 ms", |all| one(all, |one| one.p99, |value| format!("{value:.2}"))),
    ("one to one at most, msg/s", |all| one(all, |one| one.most, whole)),
    ("one to many, CPU s per 100k", |all| shared(all, |one| one.many_cpu, |value| format!("{value:.2}"))),
    ("one to many, last arrival after s", |all| {
        one(all, |one| one.many_seconds, |value| format!("{value:.1}"))
    }),
    ("opened streams/s", |all| one(all, |one| one.opened, whole)),
    ("CPU µs per opened stream", |all| one(all, |one| one.opening_cpu, whole)),
    ("events lost, repeated or out of order", |all| one(all, |one| one.lost, whole)),
];

pub struct Table {
    columns: Vec<(String, Vec<Figures>)>,
}

impl Table {
    pub fn new(names: impl Iterator<Item = String>) -> Self {
        Self { columns: names.map(|name| (name, Vec::new())).collect() }
    }

    pub fn add(&mut self, column: usize, figures: Figures) {
        self.columns[column].1.push(figures);
    }

    pub fn print(&self) {
        let names: Vec<&str> = self.columns.iter().map(|(name, _)| &**name).collect();
        print(format_args!("| | {} |", names.join(" | ")));
        print(format_args!("|---|{}", "--:|".repeat(names.len())));
        for (title, cell) in LINES {
            let cells: Vec<String> = self.columns.iter().map(|(_, rounds)| cell(rounds)).collect();
            print(format_args!("| {title} | {} |", cells.join(" | ")));
        }
    }
}

fn whole(value: f64) -> String {
    count(value.round().max(0.0) as u64)
}

fn one(rounds: &[Figures], of: impl Fn(&Figures) -> Option<f64>, text: impl Fn(f64) -> String) -> String {
    median(rounds.iter().filter_map(of).collect()).map_or_else(|| "–".into(), text)
}

fn shared(
    rounds: &[Figures],
    of: impl Fn(&Figures) -> Shared,
    text: impl Fn(f64) -> String + Copy,
) -> String {
    let server = one(rounds, |figures| of(figures).server, text);
    match median(rounds.iter().filter_map(|figures| of(figures).broker).collect()) {
        Some(broker) => format!("{server} + {}", text(broker)),
        None => server,
    }
}

/// Of an even number, the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    let (low, high) = (values.get(values.len().checked_sub(1)? / 2)?, values.get(values.len() / 2)?);
    Some(f64::midpoint(*low, *high))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_show_the_median_and_the_broker() {
        let round = |server, broker| Figures {
            idle_bytes: Shared { server: Some(server), broker },
            ..Figures::default()
        };
        let line = LINES[0].1;
        assert_eq!(line(&[round(1_000.0, Some(10.0)), round(3_000.0, Some(20.0))]), "2,000 + 15");
        assert_eq!(line(&[round(9.0, None), round(1.0, None), round(2.0, None)]), "2");
        assert_eq!(line(&[Figures::default()]), "–");
    }
}
