//! Bad input is answered by a clear error or cut, and affects no other client. `World` asserts at the end of every test that no
//! service panicked.

use std::{net::SocketAddr, time::Duration};

use e2e::{Service, User, World, ledger::assert_exact};
use futures_util::future::join_all;
use serde_json::json;
use testkit::{raw, soon, sse::EventSource, until};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{Two, browser};

fn status(answer: &[u8]) -> Option<u16> {
    String::from_utf8_lossy(answer).strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
}

struct Neighbours {
    two: Two,
    jane: EventSource,
}

impl Neighbours {
    async fn new(world: &World, api: &Service, gateway: &Service) -> Self {
        let two = Two::meet(world, api).await;
        let jane = browser(gateway.stream(&two.jane));
        jane.ready().await;
        Self { two, jane }
    }

    async fn assert_unharmed(&self, world: &World, api: &Service) {
        self.two.say(world, api, 3).await;
        assert_exact(&world.sql, self.two.jane.id, "the neighbour", &self.jane).await;
        assert_eq!(self.jane.record().opened, 1, "the neighbour's stream stays open");
    }
}

fn random_bytes(length: usize) -> Vec<u8> {
    (0..length).map(|_| rand::random()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_huge_requests_get_an_error_or_are_cut() {
    let world = World::new().await;
    let (mut api, mut gateway) = world.pair().await;
    let neighbours = Neighbours::new(&world, &api, &gateway).await;

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
    for service in [&api, &gateway] {
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
    neighbours.assert_unharmed(&world, &api).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_sent_and_trickled_requests_are_cut() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let neighbours = Neighbours::new(&world, &api, &gateway).await;
    let token = &neighbours.two.john.token;
    let conversation = neighbours.two.conversation;
    let heads =
        ["", "G", "GET /api/messages", "GET /api/messages HTTP/1.1\r\nhost: a\r\n"].map(str::to_owned);
    let body = format!(
        "POST /api/conversations/{conversation}/messages HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{\"content\":"
    );
    let trickle = async |address: SocketAddr| {
        let mut socket = TcpStream::connect(address).await.unwrap();
        let trickled = soon("a trickled head is cut", async {
            socket.write_all(b"GET /api/messages HTTP/1.1\r\nhost: a\r\nx: ").await.unwrap();
            let mut bytes = 0;
            while socket.write_all(b"a").await.is_ok() {
                bytes += 1;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            bytes
        });
        assert!(trickled.await < 400, "it must not go on as long as bytes come");
    };
    let to_gateway = join_all(heads.iter().map(|head| raw::exchange(gateway.public(), head.as_bytes())));
    let to_api =
        join_all(heads.iter().chain([&body]).map(|head| raw::exchange(api.public(), head.as_bytes())));
    let trickles = join_all([gateway.public(), api.public()].map(trickle));
    let (to_gateway, to_api, _) = tokio::join!(to_gateway, to_api, trickles);
    for answer in to_gateway.iter().chain(&to_api) {
        let status = status(answer);
        assert!(answer.is_empty() || matches!(status, Some(400 | 408)), "{status:?}");
    }
    neighbours.assert_unharmed(&world, &api).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_sent_requests_leave_room_for_others() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let neighbours = Neighbours::new(&world, &api, &gateway).await;
    let mut held = Vec::new();
    for _ in 0..500 {
        let mut socket = TcpStream::connect(gateway.public()).await.unwrap();
        socket.write_all(b"GET /api/messages HTTP/1.1\r\n").await.unwrap();
        held.push(socket);
    }
    let mut new = gateway.stream(&neighbours.two.jane).stream().await;
    new.named("ready").await;
    neighbours.assert_unharmed(&world, &api).await;
}

fn request(user: &User, more: &str) -> String {
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
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let neighbours = Neighbours::new(&world, &api, &gateway).await;
    let jane = &neighbours.two.jane;
    let mut socket = TcpStream::connect(gateway.public()).await.unwrap();
    let nothing = "GET /api/nothing HTTP/1.1\r\nhost: a\r\n\r\n";
    let unauthorized = "GET /api/messages HTTP/1.1\r\nhost: a\r\n\r\n";
    let late = "GET /api/nothing HTTP/1.1\r\nhost: late\r\n\r\n";
    let all = format!("{nothing}{unauthorized}{}{late}{late}", request(jane, ""));
    socket.write_all(all.as_bytes()).await.unwrap();
    let mut text = String::new();
    read_until(&mut socket, &mut text, "event: ready").await;
    neighbours.two.say(&world, &api, 1).await;
    read_until(&mut socket, &mut text, "\"mine\":false").await;
    let places: Vec<_> = ["HTTP/1.1 404", "HTTP/1.1 401", "HTTP/1.1 200", "retry:", "event: ready"]
        .map(|part| text.find(part))
        .to_vec();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?}");
    assert_eq!(text.matches("HTTP/1.1").count(), 3, "what came behind the stream's request is thrown away");
    neighbours.assert_unharmed(&world, &api).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unexpected_input_on_a_stream_is_discarded() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let neighbours = Neighbours::new(&world, &api, &gateway).await;
    let mut socket = TcpStream::connect(gateway.public()).await.unwrap();
    socket.write_all(request(&neighbours.two.jane, "").as_bytes()).await.unwrap();
    let mut text = String::new();
    read_until(&mut socket, &mut text, "event: ready").await;
    for piece in ["GET / HTTP/1.1\r\n\r\n", "\0\0\0", "id: 7\n\ndata: x\n\n"] {
        socket.write_all(piece.as_bytes()).await.unwrap();
        neighbours.two.say(&world, &api, 1).await;
        text.clear();
        read_until(&mut socket, &mut text, "\"mine\":false").await;
    }
    // A flood is discarded or cut; never buffered, and never at the neighbour's cost.
    let before = gateway.memory().unwrap().rss;
    let flood = async {
        let piece = vec![b'x'; 1 << 20];
        for _ in 0..200 {
            if socket.write_all(&piece).await.is_err() {
                break;
            }
        }
    };
    let flooded = soon("the flood is taken or cut, and not left waiting", flood);
    tokio::join!(flooded, neighbours.assert_unharmed(&world, &api));
    let grown = gateway.memory().unwrap().rss.saturating_sub(before);
    assert!(grown < 20 << 20, "grew by {grown} bytes under 200 MB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_but_legal_requests_for_a_stream_are_answered_soundly() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let neighbours = Neighbours::new(&world, &api, &gateway).await;
    let jane = &neighbours.two.jane;
    for more in [
        "content-length: 5\r\n\r\nhello",
        "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
        "connection: upgrade\r\nupgrade: h2c\r\n",
        "expect: 100-continue\r\n",
        "connection: close\r\n",
    ] {
        let mut socket = TcpStream::connect(gateway.public()).await.unwrap();
        socket.write_all(request(jane, more).as_bytes()).await.unwrap();
        let mut text = String::new();
        read_until(&mut socket, &mut text, "HTTP/1.1 ").await;
        read_until(&mut socket, &mut text, "\r\n\r\n").await;
        let status = status(&text.as_bytes()[text.rfind("HTTP/1.1 ").unwrap()..]).unwrap();
        if status == 200 {
            read_until(&mut socket, &mut text, "event: ready").await;
            neighbours.two.say(&world, &api, 1).await;
            read_until(&mut socket, &mut text, "\"mine\":false").await;
        } else {
            assert!((400..500).contains(&status), "{more:?}: {status}");
        }
    }
    neighbours.assert_unharmed(&world, &api).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn api_bodies_of_every_wrong_kind_get_their_error() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let neighbours = Neighbours::new(&world, &api, &gateway).await;
    let john = &neighbours.two.john;
    let url = api.url(&format!("/api/conversations/{}/messages", neighbours.two.conversation));
    let deep = format!("{}1{}", "[".repeat(5_000), "]".repeat(5_000));
    let raw: [(&[u8], u16); 8] = [
        (b"", 400),
        (b"{", 400),
        (b"\"text\"", 400),
        (b"[]", 400),
        (b"{\"content\": 7}", 400),
        (b"{\"content\": \"\xff\xfe\"}", 400),
        (b"{\"content\": \"\\ud800\"}", 400),
        (deep.as_bytes(), 400),
    ];
    for (body, wanted) in raw {
        let head = format!(
            "POST {} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            url.strip_prefix(&api.url("")).unwrap(),
            john.token,
            body.len()
        );
        let answer = raw::exchange(api.public(), &[head.as_bytes(), body].concat()).await;
        assert_eq!(
            status(&answer),
            Some(wanted),
            "{:?}",
            String::from_utf8_lossy(&body[..body.len().min(40)])
        );
    }
    let call =
        |content: &str| world.client.post(&url).bearer(&john.token).json(&json!({ "content": content }));
    assert_eq!(call(&"x".repeat(20_000)).send().await.unwrap().status, 413);
    call("a\0b").expect(422).await;
    call(&"é".repeat(481)).expect(422).await;
    neighbours.assert_unharmed(&world, &api).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_connections_leave_nothing_behind() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let neighbours = Neighbours::new(&world, &api, &gateway).await;
    for _ in 0..20 {
        let openings = (0..20).map(|number| {
            let opening = gateway.stream(&neighbours.two.john);
            async move {
                let mut stream = opening.stream().await;
                if number % 2 == 0 {
                    stream.named("ready").await;
                }
            }
        });
        join_all(openings).await;
    }
    until("only the neighbour's stream is left", || async {
        gateway.metric("messenger_gateway_streams").await == 1.0
    })
    .await;
    until("only the neighbour is left, and subscribed", || async {
        gateway.metric("messenger_gateway_users").await == 1.0
            && gateway.metric("messenger_gateway_actual_subscriptions").await
                == gateway.metric("messenger_gateway_desired_subscriptions").await
    })
    .await;
    neighbours.assert_unharmed(&world, &api).await;
}
