//! Exporting a user of any size takes the same memory.

use e2e::World;
use testkit::soon;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::Two;

const MESSAGES: u64 = 100_000;
const BYTES: u64 = 1_000;
const MIB: u64 = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_flat_while_a_large_user_is_exported() {
    let world = World::new().await;
    let api = world.api().ready().await;
    let two = Two::meet(&world, &api).await;
    let fill = "WITH made AS (
                    INSERT INTO messenger.messages (conversation_id, number, sender_id, content)
                    SELECT $1, last_number + n, $2, repeat('x', $4)
                    FROM messenger.conversations, generate_series(1, $3) AS n WHERE id = $1
                )
                UPDATE messenger.conversations SET last_number = last_number + $3 WHERE id = $1";
    let fill = sqlx::query(fill).bind(two.conversation.0).bind(two.john.id.0);
    let fill = fill.bind(MESSAGES.cast_signed()).bind(i32::try_from(BYTES).unwrap());
    fill.execute(&world.sql).await.unwrap();
    let service = world.service_token("crm", "admin").await;
    let path = format!("/api/users/{}/export", two.john.id);
    let address = api.url("").strip_prefix("http://").unwrap().to_owned();
    let export = async || {
        let mut socket = TcpStream::connect(&address).await.unwrap();
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {service}\r\nconnection: close\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).await.unwrap();
        socket
    };

    // What the first one needs, it needs once.
    let mut socket = export().await;
    let mut bytes = vec![0; 64 * 1024];
    for _ in 0..100 {
        soon("a part of the export", socket.read(&mut bytes)).await.unwrap();
    }
    drop(socket);
    let memory = || api.memory().unwrap().rss;
    let (before, mut most, mut read) = (memory(), 0, 0);
    let mut end = String::new();
    let mut socket = export().await;
    loop {
        let count = soon("the rest of the export", socket.read(&mut bytes)).await.unwrap();
        if count == 0 {
            break;
        }
        if read / (4 * MIB) != (read + count as u64) / (4 * MIB) {
            most = most.max(memory());
        }
        read += count as u64;
        end.push_str(&String::from_utf8_lossy(&bytes[..count]));
        end.drain(..end.len().saturating_sub(200));
    }
    let grown = most.saturating_sub(before);
    println!("{} MiB of JSON, {} KiB more memory", read / MIB, grown / 1024);
    assert!(end.contains(r#"{"type":"end"}"#), "{end}");
    assert!(read > MESSAGES * BYTES);
    assert!(grown < 16 * MIB, "{} MiB for {} MiB", grown / MIB, read / MIB);
}
