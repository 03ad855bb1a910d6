//! Bad input is answered clearly or cut, and affects no other client.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use sqlx::PgPool;
use testkit::{http::Answer, soon};
use tokio::io::AsyncWriteExt;

use crate::{
    raw,
    support::{ApiUser, App, assert_problem},
};

/// The head of a request that sends a message.
fn head(user: &ApiUser, framing: &str) -> String {
    let token = &user.token;
    format!(
        "POST /api/conversations/1/messages HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         authorization: Bearer {token}\r\ncontent-type: application/json\r\n{framing}\r\n\r\n"
    )
}

async fn post(app: &App, user: &ApiUser, body: impl AsRef<[u8]>) -> Answer {
    let body = body.as_ref();
    let head = head(user, &format!("content-length: {}", body.len()));
    raw::exchange(app, [head.as_bytes(), body].concat()).await.expect("an answer")
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn malformed_body_is_400_with_the_place_of_the_error(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, ..) = app.pair(&pool).await;
    let deep = format!(r#"{{"content":{}{}}}"#, "[".repeat(5_000), "]".repeat(5_000));
    for (body, error) in [
        (&b""[..], "is not JSON at line 1, column 0"),
        (b"{", "is not JSON at line 1, column 1"),
        (b"{\"content\":\n\"a\"", "is not JSON at line 2, column 3"),
        (b"{\"content\":\"a\"} x", "is not JSON at line 1, column 17"),
        (b"{\"content\":\"a\nb\"}", "is not JSON at line 2, column 0"),
        (b"{'content':'a'}", "is not JSON at line 1, column 2"),
        (b"\xef\xbb\xbf{\"content\":\"a\"}", "is not JSON at line 1, column 1"),
        (br#"{"content":"\ud800"}"#, "is not JSON at line 1, column 19"),
        (b"\"content\"", "does not have the right shape at line 1, column 9"),
        (b"null", "does not have the right shape at line 1, column 4"),
        (b"[\"a\"]", "does not have the right shape at line 1, column 0"),
        (br#"{"content":5}"#, "does not have the right shape at line 1, column 12"),
        (br#"{"content":["a"]}"#, "does not have the right shape at line 1, column 11"),
        (br#"{"content":"a","content":"b"}"#, "does not have the right shape at line 1, column 24"),
        (b"{\"content\":\"\xff\"}", "is not UTF-8 from byte 12 on"),
        (b"{\"other\":\"\xff\",\"content\":\"a\"}", "is not UTF-8 from byte 10 on"),
        (deep.as_bytes(), "does not have the right shape at line 1, column 11"),
    ] {
        assert_problem(&post(&app, &john, body).await, 400, &format!("The body {error}"));
    }
    // Unknown keys are ignored, however deep.
    let ignored = format!(r#"{{"x":{}{},"content":"fine"}}"#, "[".repeat(5_000), "]".repeat(5_000));
    assert_eq!(post(&app, &john, ignored).await.status, 201);
    assert_eq!(app.feed(john.id).await.len(), 2);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn body_size_is_bounded_in_every_framing(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, ..) = app.pair(&pool).await;
    let padded = |size: usize| {
        let body = r#"{"content":"a","x":""}"#;
        body.replace(r#""""#, &format!("\"{}\"", "x".repeat(size - body.len())))
    };
    // Room for a text of 4,000 code points of twelve bytes each, and 1 KiB.
    const LARGEST: usize = 12 * 4_000 + 1_024;
    assert_eq!(post(&app, &john, padded(LARGEST)).await.status, 201);
    for size in [LARGEST + 1, 100_000, 900_000] {
        assert_problem(&post(&app, &john, padded(size)).await, 413, "Body too large");
    }
    // Chunked, without a length.
    let chunked = |size: usize| {
        let body = padded(size);
        format!("{}{:x}\r\n{body}\r\n0\r\n\r\n", head(&john, "transfer-encoding: chunked"), body.len())
    };
    assert_eq!(raw::exchange(&app, chunked(LARGEST)).await.unwrap().status, 201);
    assert_problem(&raw::exchange(&app, chunked(100_000)).await.unwrap(), 413, "Body too large");
    // Room for the names of a group; other bodies are smaller.
    let padded = |path: &str, padding: usize| {
        let body = format!(r#"{{"username":"jane","x":"{}"}}"#, "x".repeat(padding));
        john.call("POST", path).header("content-type", "application/json").body(body)
    };
    padded("/api/conversations", 256 * 1024 - 30).expect(302).await;
    padded("/api/conversations", 256 * 1024).expect(413).await;
    padded("/api/conversations/1/participants", 16 * 1024 - 30).expect(422).await;
    padded("/api/conversations/1/participants", 16 * 1024).expect(413).await;
    // The announced length is enough for 413.
    let mut socket = raw::connect(&app).await;
    let head = head(&john, "content-length: 99999999999");
    socket.write_all(head.as_bytes()).await.unwrap();
    assert_problem(&raw::read_to_end(&mut socket).await.unwrap(), 413, "Body too large");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn slow_and_incomplete_requests_are_cut(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, _, conversation) = app.pair(&pool).await;
    let head = head(&john, "content-length: 15");
    // A body that is too slow, also byte by byte.
    let slow_body = async {
        let mut socket = raw::connect(&app).await;
        socket.write_all(format!("{head}{{\"con").as_bytes()).await.unwrap();
        for byte in b"tent" {
            tokio::time::sleep(Duration::from_secs(2)).await;
            // Fails if the deadline came first.
            let _ = socket.write_all(&[*byte]).await;
        }
        assert_problem(&raw::read_to_end(&mut socket).await.unwrap(), 408, "The body did not arrive in time");
    };
    // An endless head is cut without an answer.
    let cut = AtomicBool::new(false);
    let slow_head = async {
        let mut socket = raw::connect(&app).await;
        socket.write_all(b"POST /api/login HTTP/1.1\r\nhost: x\r\nx: ").await.unwrap();
        soon("it is cut", raw::read_to_end(&mut socket)).await;
        cut.store(true, Ordering::Relaxed);
    };
    let half = async {
        for cut in [0, 1, head.len() / 2, head.len(), head.len() + 5] {
            let whole = format!("{head}{{\"content\":\"a\"}}");
            let mut socket = raw::connect(&app).await;
            socket.write_all(&whole.as_bytes()[..cut]).await.unwrap();
            socket.shutdown().await.unwrap();
            if let Some(answer) = raw::read_to_end(&mut socket).await {
                assert_eq!(answer.status, 400);
            }
        }
    };
    let others = async {
        john.say(&conversation, "undisturbed").await;
        assert!(!cut.load(Ordering::Relaxed), "they do not wait for the slow ones");
        for _ in 1..50 {
            john.say(&conversation, "undisturbed").await;
        }
    };
    tokio::join!(slow_body, slow_head, half, others);
    assert_eq!(app.feed(john.id).await.len(), 51, "nothing half-sent was taken");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn garbage_is_rejected_or_cut(pool: PgPool) {
    let app = App::start(&pool).await;
    let long = "x".repeat(1 << 20);
    for bytes in [
        b"\x00\x01\x02\x03".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"GET /api/auth_user HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n".to_vec(),
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
        b"POST /api/login HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef".to_vec(),
        b"POST /api/login HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n".to_vec(),
        b"POST /api/login HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
        format!("GET /{long} HTTP/1.1\r\nhost: x\r\n\r\n").into_bytes(),
        format!("GET / HTTP/1.1\r\nhost: x\r\nx: {long}\r\n\r\n").into_bytes(),
        format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(10_000)).into_bytes(),
    ] {
        if let Some(answer) = raw::exchange(&app, &bytes).await {
            assert!((400..500).contains(&answer.status), "{}: {:?}", answer.status, &bytes[..bytes.len().min(40)]);
        }
    }
    app.get("/.well-known/jwks.json").expect(200).await;
    app.stop().await;
}

/// Any request: a 500 is a fault of ours.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn no_input_causes_a_500(pool: PgPool) {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let app = App::start(&pool).await;
    let (john, ..) = app.pair(&pool).await;
    const PIECES: &str = "api conversations 1 messages read_messages other_participant usernames auth_user login \
                          refresh_token 0 -1 99999999999999999999 %00 %ff .. * ' %25 + é";
    const QUERIES: &str = "? ?search=%00 ?search=%25 ?search=%ff%fe ?search=' ?before=1 ?before=%00 ?limit=1 ?limit=%00 \
                           ?after=9223372036854775807 ?after=9223372036854775808 ?markRead=%00 ?search=\\ ?search=_ \
                           ?&&==&% ?before=1&before=2 ?search=\u{202e}";
    let [pieces, queries] = [PIECES, QUERIES].map(|words| words.split_whitespace().collect::<Vec<_>>());
    const BODIES: &[&str] = &[
        "",
        "{}",
        "null",
        "[]",
        r#"{"username":"jane"}"#,
        r#"{"username":"\u0000"}"#,
        r#"{"content":"x"}"#,
        r#"{"content":"\u0000"}"#,
        r#"{"content":1e999}"#,
        r#"{"content":{}}"#,
        r#"{"username":"'; DROP TABLE users; --"}"#,
        r#"{"content":"\u2028"}"#,
        r#"{"username":"\ud83d\ude00"}"#,
        "\u{0}",
        r#"{"":""}"#,
    ];
    const HEADERS: &[(&str, &str)] = &[
        ("idempotency-key", "k"),
        ("idempotency-key", ""),
        ("idempotency-key", "é"),
        ("x-request-id", "r"),
        ("x-request-id", "\t"),
        ("content-type", "application/json"),
        ("content-type", "é"),
        ("origin", "null"),
        ("cookie", "messenger_session="),
        ("cookie", ";;=;"),
        ("sec-fetch-site", "x"),
        ("expect", "100-continue"),
        ("accept", "\""),
        ("traceparent", "00-é"),
    ];
    fn pick<T: Copy>(random: &mut StdRng, from: &[T]) -> T {
        from[random.random_range(0..from.len())]
    }
    for _ in 0..1_500 {
        let method = pick(&mut random, &["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS"]);
        let mut path = "/api".to_owned();
        for _ in 0..random.random_range(0..5) {
            path = format!("{path}/{}", pick(&mut random, &pieces));
        }
        if random.random() {
            path += pick(&mut random, &queries);
        }
        let mut body = pick(&mut random, BODIES).as_bytes().to_vec();
        if random.random_ratio(1, 4) && !body.is_empty() {
            let at = random.random_range(0..body.len());
            body[at] = random.random();
        }
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n",
            body.len()
        );
        if random.random_ratio(4, 5) {
            head += &format!("authorization: Bearer {}\r\n", john.token);
        }
        if random.random_ratio(4, 5) {
            head += "content-type: application/json\r\n";
        }
        for _ in 0..random.random_range(0..3) {
            let (name, value) = pick(&mut random, HEADERS);
            head += &format!("{name}: {value}\r\n");
        }
        let request = [head.as_bytes(), b"\r\n", &body].concat();
        if let Some(answer) = raw::exchange(&app, &request).await {
            assert!(answer.status < 500, "{} for {}", answer.status, String::from_utf8_lossy(&request));
        }
    }
    app.stop().await;
}
