//! Bad input is answered by a clear error or cut, and affects no other client. `World` asserts at the end of every test that no
//! service panicked.

use e2e::{Service, TestUser, World, ledger::assert_exact};
use futures_util::future::join_all;
use testkit::{raw, soon, sse::EventSource};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{Two, ready, start, watch};

fn status(answer: &[u8]) -> Option<u16> {
    String::from_utf8_lossy(answer).strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
}

struct Neighbours {
    jane: EventSource,
    two: Two,
    gateway: Service,
    api: Service,
    world: World,
}

impl Neighbours {
    async fn new() -> Self {
        let (world, api, gateway, two) = start().await;
        let jane = watch(&gateway, &two.jane).await;
        Self { jane, two, gateway, api, world }
    }

    async fn assert_unharmed(&self) {
        self.two.say(&self.world, &self.api, 3).await;
        assert_exact(&self.world.sql, self.two.jane.id, "the neighbour", &self.jane).await;
        assert_eq!(self.jane.record().opened, 1, "the neighbour's stream stays open");
    }
}

fn random_bytes(length: usize) -> Vec<u8> {
    (0..length).map(|_| rand::random()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_huge_requests_get_an_error_or_are_cut() {
    let mut neighbours = Neighbours::new().await;
    let long = "a".repeat(1 << 20);
    let many: String = (0..20_000).map(|n| format!("x-{n}: y\r\n")).collect();
    let mut wrong: Vec<Vec<u8>> = vec![
        b"\r\n\r\n\r\n \r\n".to_vec(),
        b"\0\0\0\0\0\0\0\0\r\n\r\n".to_vec(),
        b"GET\r\n\r\n".to_vec(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"GET /api/messages HTTP/1.1\nHost a\n\n".to_vec(),
        b"GET /api/messages HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n".to_vec(),
        b"GET /api/messages HTTP/1.1\r\nhost: a\r\nx: \0\r\n\r\n".to_vec(),
        b"POST /api/login HTTP/1.1\r\nhost: a\r\ncontent-length: invalid\r\n\r\n".to_vec(),
        b"POST /api/login HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab".to_vec(),
        b"POST /api/login HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n".to_vec(),
        b"POST /api/login HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        // The beginning of a TLS connection.
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".as_slice(), &random_bytes(500)].concat(),
        format!("GET /{long} HTTP/1.1\r\nhost: a\r\n\r\n").into_bytes(),
        format!("GET / HTTP/1.1\r\nhost: a\r\nx: {long}\r\n\r\n").into_bytes(),
        format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n").into_bytes(),
        format!("{long} / HTTP/1.1\r\n\r\n").into_bytes(),
    ];
    wrong.extend((1..30).map(|length| random_bytes(length * 37)));
    let Neighbours { api, gateway, .. } = &mut neighbours;
    for service in [&*api, &*gateway] {
        let answers = join_all(wrong.iter().map(|bytes| raw::exchange(service.public(), bytes))).await;
        for (bytes, answer) in wrong.iter().zip(answers) {
            let start = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
            let status = status(&answer);
            assert!(
                answer.is_empty() || status.is_some_and(|s| (400..=505).contains(&s)),
                "{start:?}: {status:?}"
            );
            assert_ne!(status, Some(500), "{start:?}");
        }
    }
    for address in [api.internal(), api.ops(), gateway.ops()] {
        join_all(wrong.iter().map(|bytes| raw::exchange(address, bytes))).await;
    }
    assert_eq!((api.ended(), gateway.ended()), (None, None));
    neighbours.assert_unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_sent_requests_leave_room_for_others() {
    let neighbours = Neighbours::new().await;
    let mut held = Vec::new();
    for _ in 0..500 {
        let mut socket = TcpStream::connect(neighbours.gateway.public()).await.unwrap();
        socket.write_all(b"GET /api/messages HTTP/1.1\r\n").await.unwrap();
        held.push(socket);
    }
    let _new = ready(neighbours.gateway.stream(&neighbours.two.jane)).await;
    neighbours.assert_unharmed().await;
    join_all(held.iter_mut().map(raw::read_to_end)).await; // They are cut.
}

fn request(user: &TestUser, more: &str) -> String {
    format!(
        "GET /api/messages HTTP/1.1\r\nhost: a\r\naccept: text/event-stream\r\nauthorization: Bearer {}\r\n{more}\r\n",
        user.token
    )
}

async fn read_until(socket: &mut TcpStream, text: &mut String, wanted: &str) {
    let mut buffer = vec![0; 64 * 1024];
    soon(wanted, async {
        while !text.contains(wanted) {
            let length = socket.read(&mut buffer).await.unwrap();
            assert_ne!(length, 0, "ended before {wanted:?}: {text}");
            text.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_behind_pipelined_requests_comes_after_their_answers() {
    let neighbours = Neighbours::new().await;
    let Neighbours { world, api, gateway, two, .. } = &neighbours;
    let mut socket = TcpStream::connect(gateway.public()).await.unwrap();
    let nothing = "GET /api/nothing HTTP/1.1\r\nhost: a\r\n\r\n";
    let unauthorized = "GET /api/messages HTTP/1.1\r\nhost: a\r\n\r\n";
    let late = "GET /api/nothing HTTP/1.1\r\nhost: late\r\n\r\n";
    let all = format!("{nothing}{unauthorized}{}{late}{late}", request(&two.jane, ""));
    socket.write_all(all.as_bytes()).await.unwrap();
    let mut text = String::new();
    read_until(&mut socket, &mut text, "event: ready").await;
    two.say(world, api, 1).await;
    read_until(&mut socket, &mut text, "\"mine\":false").await;
    let parts = ["HTTP/1.1 404", "HTTP/1.1 401", "HTTP/1.1 200", "retry:", "event: ready"];
    let places = parts.map(|part| text.find(part));
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?}");
    assert_eq!(text.matches("HTTP/1.1").count(), 3, "what came behind the stream's request is thrown away");
    neighbours.assert_unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_but_legal_requests_for_a_stream_are_answered_soundly() {
    let neighbours = Neighbours::new().await;
    let Neighbours { world, api, gateway, two, .. } = &neighbours;
    for more in [
        "content-length: 5\r\n\r\nhello",
        "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
        "connection: upgrade\r\nupgrade: h2c\r\n",
        "expect: 100-continue\r\n",
        "connection: close\r\n",
    ] {
        let mut socket = TcpStream::connect(gateway.public()).await.unwrap();
        socket.write_all(request(&two.jane, more).as_bytes()).await.unwrap();
        let mut text = String::new();
        read_until(&mut socket, &mut text, "HTTP/1.1 ").await;
        read_until(&mut socket, &mut text, "\r\n\r\n").await;
        let status = status(&text.as_bytes()[text.rfind("HTTP/1.1 ").unwrap()..]).unwrap();
        if status == 200 {
            read_until(&mut socket, &mut text, "event: ready").await;
            two.say(world, api, 1).await;
            read_until(&mut socket, &mut text, "\"mine\":false").await;
        } else {
            assert!((400..500).contains(&status), "{more:?}: {status}");
        }
    }
    neighbours.assert_unharmed().await;
}
