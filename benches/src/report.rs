//! Output: progress on standard error, figures on standard output, one a line.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
};

/// Percentiles of samples in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Percentiles {
    pub p50: u32,
    pub p99: u32,
    pub max: u32,
}

impl Percentiles {
    pub fn of(mut samples: Vec<u32>) -> Self {
        samples.sort_unstable();
        // The smallest sample that at least this share does not exceed.
        let at = |share: f64| {
            let rank = (samples.len() as f64 * share).ceil() as usize;
            samples.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

impl Display for Percentiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p99, max] = [self.p50, self.p99, self.max].map(|micros| f64::from(micros) / 1_000.0);
        write!(f, "p50 {p50:.2} ms, p99 {p99:.2} ms, max {max:.1} ms")
    }
}

#[expect(clippy::print_stdout, reason = "figures are what this program is for")]
pub fn heading(text: impl Display) {
    println!("\n{text}");
}

#[expect(clippy::print_stdout, reason = "figures are what this program is for")]
pub fn figure(name: impl Display, value: impl Display) {
    println!("  {:<44} {value}", name.to_string());
}

#[expect(clippy::print_stdout, reason = "figures are what this program is for")]
pub fn print(line: impl Display) {
    println!("{line}");
}

/// A figure for each different text, by how often it comes.
pub fn tally(what: &str, texts: impl Iterator<Item = String>) {
    let mut tally = BTreeMap::<String, usize>::new();
    texts.for_each(|text| *tally.entry(text).or_default() += 1);
    tally.into_iter().for_each(|(text, times)| figure(format_args!("{what} {times} times"), text));
}

pub fn progress(text: impl Display) {
    eprintln!("… {text}");
}

/// 12345 becomes `12,345`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

pub fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_by_rank() {
        let all = Percentiles::of((1..=1_000).rev().collect());
        assert_eq!(all, Percentiles { p50: 500, p99: 990, max: 1_000 });
        assert_eq!(Percentiles::of(vec![7]), Percentiles { p50: 7, p99: 7, max: 7 });
        assert_eq!(Percentiles::of(vec![]), Percentiles { p50: 0, p99: 0, max: 0 });
    }

    #[test]
    fn numbers_are_grouped() {
        let said: Vec<_> = [0, 999, 1_000, 1_234_567].map(count).into();
        assert_eq!(said, ["0", "999", "1,000", "1,234,567"]);
    }
}
