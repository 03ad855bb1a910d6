//! `healthcheck`: queries the local service, for platforms that can only run a command in its container, where there is no
//! other HTTP client. It needs no setting but `OPS_LISTEN`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use clap::ValueEnum;
use thiserror::Error;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// Limits the whole query, below the 3 s of the image's HEALTHCHECK.
const TIME_LIMIT: Duration = Duration::from_secs(2);
const LONGEST_ANSWER: u64 = 4_096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Probe {
    Livez,
    Readyz,
}

impl Probe {
    fn path(self) -> &'static str {
        match self {
            Self::Livez => "/livez",
            Self::Readyz => "/readyz",
        }
    }
}

#[derive(Debug, Error)]
pub enum Unhealthy {
    #[error("{0} does not answer: {1}")]
    Silent(SocketAddr, io::Error),
    #[error("{0}")]
    Refused(String),
}

pub async fn ask(ops_listen: SocketAddr, probe: Probe) -> Result<String, Unhealthy> {
    let address = reachable(ops_listen);
    let answer = timeout(TIME_LIMIT, get(address, probe.path())).await;
    let answer = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let answer = answer.map_err(|error| Unhealthy::Silent(address, error))?;
    let (head, note) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let note = note.trim().to_owned();
    match head.split(' ').nth(1) {
        Some("200") => Ok(note),
        _ if note.is_empty() => Err(Unhealthy::Refused(head.lines().next().unwrap_or_default().to_owned())),
        _ => Err(Unhealthy::Refused(note)),
    }
}

/// A listener on all addresses is reachable at the loopback.
fn reachable(listening: SocketAddr) -> SocketAddr {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listening.port())
}

async fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut connection = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    connection.take(LONGEST_ANSWER).read_to_string(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write as _},
        net::TcpListener,
        thread,
    };

    use testkit::soon;

    use super::*;

    /// A service that reads a request, answers and hangs up. Without an answer it stays silent, like a stopped process.
    fn service(answer: Option<&'static str>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            // The kernel accepts connections of a stopped process, too.
            let Some(answer) = answer else { return thread::park() };
            let (mut connection, _) = listener.accept().unwrap();
            // Reads everything: the kernel resets a connection that is closed with unread data.
            let mut request = BufReader::new(&connection).lines().map(Result::unwrap);
            assert_eq!(request.next().as_deref(), Some("GET /readyz HTTP/1.1"));
            assert!(request.any(|line| line.is_empty()));
            connection.write_all(answer.as_bytes()).unwrap();
        });
        address
    }

    async fn queried(answer: Option<&'static str>) -> Result<String, String> {
        ask(service(answer), Probe::Readyz).await.map_err(|unhealthy| unhealthy.to_string())
    }

    #[tokio::test]
    async fn only_a_200_is_healthy_and_the_service_says_why_not() {
        assert_eq!(
            queried(Some("HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nready\n")).await,
            Ok("ready".into())
        );
        let unready =
            queried(Some("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 9\r\n\r\nstopping\n"));
        assert_eq!(unready.await, Err("stopping".into()));
        assert_eq!(
            queried(Some("HTTP/1.1 404 Not Found\r\n\r\n")).await,
            Err("HTTP/1.1 404 Not Found".into())
        );
        assert_eq!(queried(Some("")).await, Err(String::new()));
    }

    /// Each byte comes soon, and the whole never.
    fn dripping() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            while connection.write_all(b"H").is_ok() {
                thread::sleep(Duration::from_millis(100));
            }
        });
        address
    }

    #[tokio::test]
    async fn a_service_that_is_silent_slow_or_away_is_unhealthy_soon() {
        let silent = queried(None).await.unwrap_err();
        assert!(silent.contains("does not answer"), "{silent}");
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(matches!(ask(closed, Probe::Livez).await, Err(Unhealthy::Silent(..))));
        let slow = soon("the query ends", ask(dripping(), Probe::Livez)).await;
        assert!(matches!(slow, Err(Unhealthy::Silent(..))), "{slow:?}");
    }

    #[test]
    fn listener_on_all_addresses_is_reached_by_loopback() {
        for (listening, expected) in [
            ("0.0.0.0:8082", "127.0.0.1:8082"),
            ("[::]:8082", "[::1]:8082"),
            ("10.1.2.3:8082", "10.1.2.3:8082"),
        ] {
            assert_eq!(reachable(listening.parse().unwrap()), expected.parse().unwrap());
        }
    }
}
