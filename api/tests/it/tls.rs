//! Postgres and Redis over TLS with the real binary: right and wrong certificates.

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
};

use sqlx::{Connection, PgConnection};
use testkit::{
    http::Client,
    process::Process,
    servers::{Postgres, Redis},
    tls::{Authority, Door},
    until,
};

use crate::process::{command, run, serve_from};

fn by_tls(postgres: &Postgres, host: &str, root: &Authority) -> String {
    let root = root.root();
    format!(
        "postgres://postgres@{host}:{}/postgres?sslmode=verify-full&sslrootcert={}",
        postgres.address().port(),
        root.display()
    )
}

/// The first line that `migrate` logs, without waiting for its retries.
fn first_said(url: &str) -> String {
    let mut command = command();
    command.arg("migrate").env("DATABASE_URL", url).stdout(Stdio::piped());
    let mut process = Process::start(&mut command).unwrap();
    let mut said = String::new();
    BufReader::new(process.child().stdout.take().unwrap()).read_line(&mut said).unwrap();
    said
}

#[test]
fn postgres_certificate_must_match_authority_and_host() {
    let authority = Authority::new();
    let postgres = Postgres::start_with_tls(&authority);
    let said = first_said(&by_tls(&postgres, "localhost", &Authority::new()));
    assert!(said.contains("UnknownIssuer"), "{said}");
    let said = first_said(&by_tls(&postgres, "127.0.0.1", &authority));
    assert!(said.contains("not valid for name"), "{said}");
    let (success, said) = run(&["migrate"], &[("DATABASE_URL", &by_tls(&postgres, "localhost", &authority))]);
    assert!(success, "{said}");
}

#[test]
fn postgres_without_tls_gets_no_password() {
    let postgres = Postgres::start();
    let (success, said) =
        run(&["migrate"], &[("DATABASE_URL", &by_tls(&postgres, "localhost", &Authority::new()))]);
    assert!(!success && said.contains("server does not support TLS"), "{said}");
}

#[tokio::test]
async fn serves_with_postgres_and_redis_behind_tls() {
    let authority = Authority::new();
    let (postgres, redis) = (Postgres::start_with_tls(&authority), Redis::start());
    let door = Door::start(redis.address(), &authority).await;
    let database_url = by_tls(&postgres, "localhost", &authority);
    let redis_url = format!("rediss://localhost:{}", door.port());
    let serve_trusting = |authority: &Authority| {
        let root = authority.root();
        serve_from(&database_url, &[("REDIS_URL", &redis_url), ("SSL_CERT_FILE", root.to_str().unwrap())])
    };
    let says = async |server: &str, note: &str| {
        until(note, || async {
            let answer = Client::default().get(format!("{server}/readyz")).send().await;
            answer.is_ok_and(|answer| answer.body.starts_with(note.as_bytes()))
        })
        .await;
    };

    let server = serve_trusting(&authority);
    says(&server.ops, "ready\n").await;
    let mut plain = PgConnection::connect(&postgres.url()).await.unwrap();
    let clear: Vec<bool> = sqlx::query_scalar(
        "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
         WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()",
    )
    .fetch_all(&mut plain)
    .await
    .unwrap();
    assert!(!clear.is_empty() && clear.iter().all(|ssl| *ssl), "a connection is in the clear: {clear:?}");
    server.stop().await;

    let server = serve_trusting(&Authority::new());
    says(&server.ops, "ready, degraded: Redis does not answer").await;
}
