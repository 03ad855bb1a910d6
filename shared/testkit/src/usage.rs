//! CPU time and memory of processes, from the kernel.

use std::{fs, io, ops::Sub, time::Duration};

use nix::unistd::{SysconfVar, sysconf};

#[derive(Debug, Clone, Copy)]
pub struct Cpu(pub Duration);

impl Cpu {
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self(ticks(read_stat(pid)?.own)))
    }

    /// Of a process and its children, including ended ones: Postgres has one per connection.
    pub fn of_family(pid: u32) -> io::Result<Self> {
        let parent = read_stat(pid)?;
        let children = children(pid)?.into_iter().filter_map(|child| Some(read_stat(child).ok()?.own));
        Ok(Self(ticks(parent.own + parent.ended_children + children.sum::<u64>())))
    }

    pub fn seconds(self) -> f64 {
        self.0.as_secs_f64()
    }

    pub fn per(self, many: f64, count: u64) -> f64 {
        self.seconds() * many / count.max(1) as f64
    }
}

impl Sub for Cpu {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
}

pub fn children(pid: u32) -> io::Result<Vec<u32>> {
    let all = fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(all.filter(|&child| read_stat(child).is_ok_and(|stat| stat.parent == pid)).collect())
}

struct Stat {
    parent: u32,
    own: u64,
    ended_children: u64,
}

fn read_stat(pid: u32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may contain anything.
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or_default().split_whitespace().collect();
    let number = |index: usize| -> io::Result<u64> {
        let field = fields.get(index).and_then(|field| field.parse().ok());
        field.ok_or_else(|| io::Error::other(format!("no field {index} in {text:?}")))
    };
    Ok(Stat {
        parent: number(1)? as u32,
        own: number(11)? + number(12)?,
        ended_children: number(13)? + number(14)?,
    })
}

fn ticks(count: u64) -> Duration {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    Duration::from_secs_f64(count as f64 / per_second as f64)
}

#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Proportional set size: shared pages are divided among their users.
    pub pss: u64,
    pub rss: u64,
}

impl Memory {
    pub fn of(pid: u32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
            let missing = || io::Error::other(format!("no {name} in smaps_rollup"));
            kilobytes.map(|kilobytes| kilobytes * 1_024).ok_or_else(missing)
        };
        Ok(Self { pss: field("Pss:")?, rss: field("Rss:")? })
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Instant};

    use super::*;

    #[test]
    fn work_done_here_is_seen() {
        let own = std::process::id();
        let (before, began) = (Cpu::of(own).unwrap(), Instant::now());
        while (Cpu::of(own).unwrap() - before).0 < Duration::from_millis(50) {
            assert!(began.elapsed() < Duration::from_secs(30));
        }
        let memory = Memory::of(own).unwrap();
        assert!(memory.pss > 0 && memory.rss >= memory.pss);
    }

    #[test]
    fn cpu_of_children_counts_while_they_live_and_after() {
        let own = std::process::id();
        let busy = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
        let before = Cpu::of_family(own).unwrap();
        let mut child = Command::new("sh").args(["-c", busy]).spawn().unwrap();
        child.wait().unwrap();
        assert!((Cpu::of_family(own).unwrap() - before).0 > Duration::ZERO);
    }
}
