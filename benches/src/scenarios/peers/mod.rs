//! Ours and other servers of event streams in one run: the same load processes, messages and rates, one after the other in
//! rounds whose order alternates. A server that is not installed is left out, and that is said.

mod parts;
mod table;

use std::path::PathBuf;

use clap::ValueEnum;

use self::table::{Figures, Table};
use super::{GatewayBuild, Sizes};
use crate::{
    peers::Peer,
    report::{figure, heading, progress},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Contender {
    Ours,
    /// As in Debian: one worker per core
    Nchan,
    NchanOneWorker,
    NchanRedis,
    Pushpin,
}

/// A column of the table.
struct Entrant<'a> {
    name: String,
    server: EntrantServer<'a>,
}

#[derive(Clone, Copy)]
enum EntrantServer<'a> {
    Gateway(&'a GatewayBuild),
    Peer(Peer),
}

pub async fn run(sizes: &Sizes) -> anyhow::Result<()> {
    let entrants = entrants(sizes);
    let mut table = Table::new(entrants.iter().map(|entrant| entrant.name.clone()));
    for round in 0..sizes.rounds {
        let mut order: Vec<usize> = (0..entrants.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let Entrant { name, server } = &entrants[index];
            heading(format_args!("  {name}, round {} of {}", round + 1, sizes.rounds));
            let figures = match parts::measure(*server, sizes).await {
                Ok(figures) => figures,
                // Only ours has to bear it.
                Err(error) if matches!(server, EntrantServer::Peer(_)) => {
                    figure("FAILED", format_args!("{error:#}"));
                    Figures::default()
                }
                Err(error) => return Err(error),
            };
            table.add(index, figures);
        }
    }
    heading("  side by side, medians of the rounds");
    table.print();
    for note in NOTES {
        figure("note", note);
    }
    Ok(())
}

fn entrants(sizes: &Sizes) -> Vec<Entrant<'_>> {
    let mut entrants = Vec::new();
    for contender in &sizes.contenders {
        let (name, peer) = match contender {
            Contender::Ours => {
                entrants.extend(sizes.gateways.iter().map(|build| Entrant {
                    name: build.name.clone(),
                    server: EntrantServer::Gateway(build),
                }));
                continue;
            }
            Contender::Nchan => ("nchan in memory", Peer::Nchan { redis: false, one_worker: false }),
            Contender::NchanOneWorker => {
                ("nchan, one worker", Peer::Nchan { redis: false, one_worker: true })
            }
            Contender::NchanRedis => ("nchan + Redis", Peer::Nchan { redis: true, one_worker: false }),
            Contender::Pushpin => ("Pushpin", Peer::Pushpin),
        };
        if let Some(missing) = peer.missing() {
            figure("SKIPPED", format_args!("{name} is not installed (Debian: {missing})"));
            progress(format_args!("{name} is skipped: {missing} not found"));
            continue;
        }
        entrants.push(Entrant { name: name.into(), server: EntrantServer::Peer(peer) });
    }
    entrants
}

const NOTES: [&str; 6] = [
    "ours checks a token and a session for each stream, sends heartbeats and reconciles with Postgres meanwhile; the others do not",
    "events reach ours from Redis, committed to the feed before; nchan by pipelined POST; Pushpin by ZeroMQ",
    "ours counts as opened at `ready`, after the session is confirmed and the feed's head is known; the others at the answer's head",
    "memory is the growth of PSS since before the first stream, over all processes of the server; CPU likewise",
    "the Redis behind a server is apart, after the plus; api and Postgres, which ours needs as well, are not in the table",
    "nginx has a worker per core, as in Debian, unless the table says one; Pushpin is without its message_rate, and opens 50 streams at a time; neither logs",
];

impl GatewayBuild {
    /// The one beside this program.
    pub fn own() -> Self {
        Self { name: "ours".into(), binary: None }
    }

    pub fn in_folder(text: &str) -> Result<Self, String> {
        let (name, folder) = text.split_once('=').ok_or("it has the form NAME=FOLDER")?;
        let binary = PathBuf::from(folder).join("stream-gateway");
        if !binary.exists() {
            return Err(format!("there is no {}", binary.display()));
        }
        Ok(Self { name: name.into(), binary: Some(binary) })
    }
}
