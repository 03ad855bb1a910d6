//! Request heads at every listener: malformed ones are refused in one form, answers keep the connection or say that they close,
//! and no head makes a service panic.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    time::{Duration, Instant},
};

use e2e::{Service, World};
use futures_util::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IteratorRandom};
use serde_json::json;
use testkit::{raw::answer, soon};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

const FUZZED_FOR: Duration = Duration::from_mins(1);
const WORKERS: u64 = 3;
/// An incomplete request gets no answer; longer than this is not waited for.
const ANSWER_TIME: Duration = Duration::from_millis(150);

fn listeners(api: &Service, gateway: &Service) -> [(&'static str, SocketAddr, &'static str); 5] {
    [
        ("api", api.public(), "/.well-known/jwks.json"),
        ("api, internal", api.internal(), "/.well-known/jwks.json"),
        ("api, ops", api.ops(), "/livez"),
        ("gateway", gateway.public(), "/api/messages"),
        ("gateway, ops", gateway.ops(), "/livez"),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_heads_are_refused_alike_by_every_listener() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    for (name, address, path) in listeners(&api, &gateway) {
        let malformed = [
            ("GET foo HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "bad_target"),
            ("CONNECT h:80 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "bad_target"),
            ("GET h:1 HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), "bad_target"),
            (format!("GET {path} HTTP/1.1\r\n\r\n"), "bad_host"),
            (format!("GET {path} HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n"), "bad_host"),
        ];
        let mut socket = TcpStream::connect(address).await.unwrap();
        for (request, code) in malformed {
            socket.write_all(request.as_bytes()).await.unwrap();
            let answer = answer(&mut socket).await;
            assert_eq!(answer.status, 400, "{name}: {request}");
            assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{name}");
            let problem = answer.json();
            assert_eq!((&problem["code"], &problem["status"]), (&json!(code), &json!(400)), "{name}");
            assert_eq!(problem["requestId"].as_str(), answer.header("x-request-id"), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ops_endpoints_answer_head_requests() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    for ops in [api.ops(), gateway.ops()] {
        let call = |method, path| world.client.call(method, format!("http://{ops}{path}"));
        for path in ["/livez", "/readyz", "/metrics", "/log"] {
            let (get, head) = (call("GET", path).expect(200).await, call("HEAD", path).expect(200).await);
            assert!(!get.body.is_empty() && head.body.is_empty(), "{path}");
            assert_eq!(get.header("content-type"), head.header("content-type"), "{path}");
            let refused = call("DELETE", path).expect(405).await;
            assert!(refused.header("allow").is_some_and(|allow| allow.starts_with("GET, HEAD")), "{path}");
        }
        call("HEAD", "/admin/explain").expect(400).await;
        assert_eq!(call("POST", "/admin/explain").expect(405).await.header("allow"), Some("GET, HEAD"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_early_answer_keeps_the_connection_or_says_close() {
    let world = World::new().await;
    let (api, gateway) = world.pair().await;
    let refused = [
        ("POST", "/api/nothing", 404),
        ("PUT", "/api/messages", 405),
        ("POST", "/internal/feed/heads", 401),
        ("POST", "/api/login", 415),
        ("POST", "/livez", 405),
        ("GET", "/livez", 200),
        ("GET", "/.well-known/jwks.json", 200),
    ];
    for (name, address, path) in listeners(&api, &gateway) {
        for (method, target, status) in refused {
            // A path of another listener is a 404 or a 405: an early answer as well.
            let request = |more: &str| format!("{method} {target} HTTP/1.1\r\nHost: x\r\n{more}\r\n\r\n");
            let mut socket = TcpStream::connect(address).await.unwrap();
            socket.set_nodelay(true).unwrap();
            socket.write_all(request("Content-Length: 4").as_bytes()).await.unwrap();
            tokio::task::yield_now().await;
            socket.write_all(b"body").await.unwrap();
            let early = answer(&mut socket).await;
            let expected = [status, 404, 405, 401, 200];
            assert!(expected.contains(&early.status), "{name}, {method} {target}: {}", early.status);
            assert_ne!(early.header("connection"), Some("close"), "{name}, {method} {target}");
            socket.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
            let next = answer(&mut socket).await;
            assert!([200, 401].contains(&next.status), "{name}: {}", next.status);

            let mut socket = TcpStream::connect(address).await.unwrap();
            socket.write_all(request("Content-Length: 9999999").as_bytes()).await.unwrap();
            let early = answer(&mut socket).await;
            assert_eq!(early.header("connection"), Some("close"), "{name}, {method} {target}");
        }
    }
}

async fn connect_from_elsewhere(address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    socket.connect(address).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_has_all_its_connections_hurts_no_other() {
    let world = World::new().await;
    let api = world.api().env("CONNECTIONS_PER_ADDRESS", 8).ready().await;
    let gateway = world.gateway(api.internal()).env("CONNECTIONS_PER_ADDRESS", 8).ready().await;
    for (service, path) in [(&api, "/.well-known/jwks.json"), (&gateway, "/api/messages")] {
        let half = format!("GET {path} HTTP/1.1\r\n");
        let mut held = Vec::new();
        for _ in 0..8 {
            let mut socket = TcpStream::connect(service.public()).await.unwrap();
            socket.write_all(half.as_bytes()).await.unwrap();
            held.push(socket);
        }
        let mut over = TcpStream::connect(service.public()).await.unwrap();
        let closed = soon("the connection is closed", over.read_u8()).await;
        assert!(closed.is_err(), "nothing is said");
        let mut elsewhere = connect_from_elsewhere(service.public()).await;
        elsewhere.write_all(format!("{half}Host: x\r\n\r\n").as_bytes()).await.unwrap();
        assert!([200, 401].contains(&answer(&mut elsewhere).await.status));
    }
    for (service, name) in [(&api, "api"), (&gateway, "gateway")] {
        let metric = format!("messenger_{name}_http_connections_closed_total");
        assert!(service.metric_where(&metric, r#"reason="address_limit""#).await >= 1.0, "{metric}");
    }
}

struct Heads {
    random: StdRng,
    token: String,
}

impl Heads {
    /// One of these, which `|` separates.
    fn pick<'a>(&mut self, from: &'a str) -> &'a str {
        from.split('|').choose(&mut self.random).unwrap_or_default()
    }

    fn target(&mut self) -> String {
        const PATHS: &str = "/|/api|/api/|/api/login|/api/messages|/api/conversations|\
            /api/conversations/1/messages|/api/conversations/%31|/api/auth_user|\
            /api/oauth/oidc/callback|/api/sessions/0|/index.html|/.well-known/jwks.json|\
            /internal/feed/heads|/internal/keys|/livez|/readyz|/metrics|/log|\
            /admin/explain|//|///api|/api//messages|/..|/%2e%2e/%2f|/%|/%zz|/\u{e9}|\
            /api/messages/";
        const OTHERS: &str = "foo|*|h:1|h:80|[::1]:80|user@h:1|http://|http://h|http://h?x|\
            http://user:p@h:1/api/messages|https://[::1]/metrics|ftp://h/livez|://|?x|#|\
            | |:|@|[|http:/h|\\|h:99999999|x/y";
        const QUERIES: &str = "|||?|?a=b|?before=%|?search=%00|?lastEventId=1-1|?heartbeat=event|\
            ?user=1&seq=1|?&&=&|?limit=99999999999999999999|?\u{e9}|#x|?kid=%ff";
        let path = if self.random.random_ratio(2, 3) { PATHS } else { OTHERS };
        let mut target = self.pick(path).to_owned() + self.pick(QUERIES);
        if self.random.random_ratio(1, 50) {
            target += &"a".repeat(self.random.random_range(1..20_000));
        }
        target
    }

    fn header(&mut self) -> String {
        const NAMES: &str = "host|Host|content-length|transfer-encoding|content-type|accept|\
            accept-encoding|authorization|cookie|origin|expect|connection|upgrade|\
            if-none-match|last-event-id|x-request-id|x-forwarded-for|traceparent|te|\
            trailer|sec-fetch-site|access-control-request-method|idempotency-key|\
            range|| |x|x:y|\u{e9}";
        const VALUES: &str = "|x|a.example:80|0|4|-1|99999999999999999999|chunked|gzip, chunked|\
            application/json|text/event-stream|text/event-stream;q=0|\
            text/event-stream;q=\"|gzip;q=0.5, *;q=0|\"|\"a, b\", W/\"c\"|*|\
            100-continue|close|keep-alive|upgrade|h2c|websocket|null|\
            http://localhost:8080|Bearer x|Basic|1-1|\
            00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01|192.0.2.1, ::1|\
            same-origin|POST|;;=;|,,,|\u{e9}\u{301}|\0|\t|a\rb|trailers";
        let colon = self.pick(": |:|: | : ||:\t");
        self.pick(NAMES).to_owned() + colon + self.pick(VALUES)
    }

    fn request(&mut self) -> Vec<u8> {
        let method = self.pick("GET|GET|POST|HEAD|PUT|DELETE|OPTIONS|PATCH|CONNECT|TRACE|get|PRI|X-Y||G\0");
        let version =
            self.pick("HTTP/1.1|HTTP/1.1|HTTP/1.1|HTTP/1.1|HTTP/1.0|HTTP/2.0|HTTP/9.9|HTTP/1.||http/1.1");
        let end = self.pick("\r\n|\r\n|\r\n|\r\n|\r\n|\n|\r|\r\n ");
        let mut text = format!("{method} {} {version}{end}", self.target());
        if self.random.random_ratio(4, 5) {
            let _ = write!(text, "Host: x{end}");
        }
        if self.random.random_ratio(1, 3) {
            let _ = write!(text, "Authorization: Bearer {}{end}", self.token);
        }
        for _ in 0..self.random.random_range(0..6) {
            text += &self.header();
            text += end;
        }
        if self.random.random_ratio(1, 200) {
            (0..self.random.random_range(90..200)).for_each(|n| text += &format!("x-{n}: y{end}"));
        }
        text += end;
        text += self.pick(
            "||body|4\r\nbody\r\n0\r\n\r\n|{\"username\":\"john\"}|ffffffffffffffffff\r\n|0\r\nx: y\r\n\r\n",
        );
        text.into_bytes()
    }

    fn bytes(&mut self) -> Vec<u8> {
        let requests = self.random.random_range(1..4);
        let mut bytes: Vec<u8> = (0..requests).flat_map(|_| self.request()).collect();
        if self.random.random_ratio(1, 3) {
            for _ in 0..self.random.random_range(1..5) {
                let at = self.random.random_range(0..bytes.len());
                match self.random.random_range(0..4) {
                    0 => bytes[at] = self.random.random(),
                    1 => bytes.insert(at, self.random.random()),
                    2 if bytes.len() > 1 => drop(bytes.remove(at)),
                    _ => bytes.truncate(at.max(1)),
                }
            }
        }
        bytes
    }

    /// Sends it in one packet or two, perhaps half-closes, and returns the answer.
    async fn exchange(&mut self, address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.set_nodelay(true).unwrap();
        let cut = self.random.random_range(0..=bytes.len());
        let _ = socket.write_all(&bytes[..cut]).await;
        tokio::task::yield_now().await;
        let _ = socket.write_all(&bytes[cut..]).await;
        if self.random.random_ratio(1, 2) {
            let _ = socket.shutdown().await;
        }
        let mut answer = vec![0; 64];
        let read = timeout(ANSWER_TIME, socket.read(&mut answer)).await;
        answer.truncate(read.ok().and_then(Result::ok).unwrap_or(0));
        answer
    }
}

#[expect(clippy::disallowed_methods, reason = "a fuzz run is repeated by its seed")]
fn seed() -> u64 {
    std::env::var("FUZZ_SEED").ok().map_or_else(rand::random, |seed| seed.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_head_makes_a_service_panic() {
    let world = World::new().await;
    // At `debug` each request is a line.
    let api = world.api().env("LOG", "info").ready().await;
    let gateway = world.gateway(api.internal()).env("LOG", "info").ready().await;
    let john = world.user(&api, "john").await;
    let seed = seed();
    println!("the same again: FUZZ_SEED={seed}");
    let began = Instant::now();
    let fuzz = async |name: &str, address: SocketAddr, worker: u64| {
        let mut heads =
            Heads { random: StdRng::seed_from_u64(seed.wrapping_add(worker)), token: john.token.clone() };
        while began.elapsed() < FUZZED_FOR {
            let bytes = heads.bytes();
            let answer = heads.exchange(address, &bytes).await;
            let digits = answer.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..5)).unwrap_or_default();
            let status = String::from_utf8_lossy(digits).parse::<u16>().unwrap_or(0);
            assert!(
                answer.is_empty() || (100..500).contains(&status) || status == 505,
                "FUZZ_SEED={seed}, {name}: {:?} for {}",
                String::from_utf8_lossy(&answer),
                bytes.escape_ascii()
            );
        }
    };
    let all = listeners(&api, &gateway);
    let workers = all.iter().zip(0..).flat_map(|((name, address, _), listener)| {
        (0..WORKERS).map(move |worker| (*name, *address, listener * WORKERS + worker))
    });
    join_all(workers.map(|(name, address, worker)| fuzz(name, address, worker))).await;
    for (service, prefix) in [(&api, "api"), (&gateway, "gateway")] {
        let panics = service.metric(&format!("messenger_{prefix}_http_handler_panics_total")).await;
        assert_eq!(panics, 0.0, "FUZZ_SEED={seed}");
        assert!(service.is_ready().await, "FUZZ_SEED={seed}");
    }
    // The world checks the logs for panics.
}
