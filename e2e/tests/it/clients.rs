//! The clients of `docs/clients.md` receive exactly the feed, whatever happens to gateways, connections and the session; so
//! do the libraries that depend most on the order of lines.

use std::{
    fs,
    future::ready,
    net::SocketAddr,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use e2e::{
    Browser, Front, World,
    browser::WebPage,
    clients::{ClientProgram, Language, block, event, strict},
    ledger::StoredFeed,
};
use protocol::{ids::UserId, position::Seq};
use serde_json::json;
use testkit::{PATIENCE, proxy::Proxy, until};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::sleep,
};

use crate::{
    support::{Traffic, Two, until_metric},
    web::stream::{BLANK, blank},
};

const PAUSE: Duration = Duration::from_millis(40);

const CUT_HERE: &str = "cut here";

const DOCUMENTED: [(&str, Language); 6] = [
    ("eventsource", Language::Node("eventsource")),
    ("eventsource-parser", Language::Node("eventsource-parser")),
    ("python", Language::Python),
    ("shell", Language::Shell),
    ("go", Language::Go),
    ("java", Language::Java),
];

const STRICT: [&str; 3] = ["eventsource-2", "extended-eventsource", "fetch-event-source"];

const PAGE: &str = "
    window.lines = [];
    window.troubles = [];
    console.log = (...words) => lines.push(words.join(' '));
    window.signIn = () => troubles.push('401');
    window.reload = () => troubles.push('resync');
";

/// Answers 502 as a proxy without upstreams does.
async fn bad_gateway() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut head = [0; 4_096];
            let _ = socket.read(&mut head).await;
            let answer = b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nConnection: close\r\n\
                           Content-Length: 20\r\n\r\n<h1>Bad Gateway</h1>";
            let _ = socket.write_all(answer).await;
        }
    });
    address
}

async fn until_all(clients: &mut [ClientProgram], what: &str, holds: impl Fn(&ClientProgram) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !clients.iter().all(&holds) {
        if Instant::now() > deadline {
            let late = clients.iter_mut().filter(|client| !holds(client)).map(ClientProgram::describe);
            panic!("waited {PATIENCE:?} in vain: {what}: {}", late.collect::<Vec<_>>().join("\n"));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

async fn until_caught_up(world: &World, jane: UserId, clients: &mut [ClientProgram], page: Option<&WebPage>) {
    let head = StoredFeed::read(&world.sql, jane).await.head_cursor();
    until_all(clients, "all receive the newest event", |client| client.has(&head)).await;
    if let Some(page) = page {
        page.wait_for("the newest event", &format!("lines.some((line) => line.startsWith('{head} '))")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documented_clients_receive_exactly_the_feed() {
    let browser = Browser::launch().await;
    let commands = tokio::task::spawn_blocking(|| {
        let documented =
            DOCUMENTED.into_iter().filter_map(|(name, language)| Some((name, language.prepare()?)));
        let rust = ("rust", Command::new(env!("CARGO_BIN_EXE_rust-client")));
        (documented.chain([rust]).collect::<Vec<_>>(), STRICT.map(|library| (library, strict(library))))
    });
    let front = Front::plain();
    let origin = front.origin();
    let world = Arc::new(World::at(&origin).await);
    let api = world.api().ready().await;
    let plan = || {
        let plan = world.gateway(api.internal()).env("RECONCILE_SECONDS", 1);
        plan.env("DRAIN_WAIT_SECONDS", 0).env("DRAIN_WINDOW_SECONDS", 1)
    };
    let (mut a, mut b) = tokio::join!(plan().ready(), plan().ready());
    let two = Two::meet(&world, &api).await;
    let jane = two.jane.id;

    // Stable addresses in front of gateways that come and go.
    let (door, strict_door) = tokio::join!(Proxy::start(a.public()), Proxy::start(a.public()));
    let _nginx = front.open_at(&[api.public()], &[door.address()]).await;
    let folder = tempfile::tempdir().unwrap();
    let token_file = folder.path().join("token");
    fs::write(&token_file, &two.jane.token).unwrap();
    let start = |(name, command), door: &Proxy| {
        ClientProgram::start(name, command, &format!("http://{}/api/messages", door.address()), &token_file)
    };
    let (documented, strict) = commands.await.unwrap();
    let mut documented: Vec<_> = documented.into_iter().map(|command| start(command, &door)).collect();
    let mut strict: Vec<_> = strict.into_iter().map(|command| start(command, &strict_door)).collect();
    let context = blank(&browser, &origin).await;
    context.expect("Failed to load resource");
    context.sign_in(&two.jane).await;
    let page = context.open(BLANK).await;
    let script = format!("{PAGE}\n{}", block("Browser"));
    page.call(json!([["addScriptTag", { "content": script }]])).await;
    let readers = documented.len() + strict.len() + 1;
    until_metric(&a, "messenger_gateway_streams", readers as f64).await;
    let begin = StoredFeed::read(&world.sql, jane).await.head;
    let traffic = Traffic::start(&world, &[&api], &[(two.john.clone(), two.conversation)], PAUSE);
    traffic.more(30).await;

    // The gateway dies, and the proxy in front of it answers for a while.
    a.kill();
    door.aim(bad_gateway().await);
    strict_door.aim(b.public());
    until_all(&mut documented, "all get a 502", |client| client.reported("502")).await;
    until("the page gets a 502", || ready(page.statuses("/api/messages").contains(&502))).await;
    door.aim(b.public());
    traffic.more(30).await;
    until_caught_up(&world, jane, &mut documented, Some(&page)).await;
    until_caught_up(&world, jane, &mut strict, None).await;

    a.restart().await;
    a.until_ready().await;
    door.aim(a.public());
    strict_door.aim(a.public());
    b.terminate();
    assert!(b.wait().await.success());
    traffic.more(30).await;
    until_caught_up(&world, jane, &mut documented, Some(&page)).await;
    until_caught_up(&world, jane, &mut strict, None).await;

    // Connections break inside an event, and again where it is replayed.
    door.cut_behind(CUT_HERE);
    strict_door.cut_behind(CUT_HERE);
    let url = api.url(&format!("/api/conversations/{}/messages", two.conversation));
    let text = format!("{} {CUT_HERE} and not before", world.text());
    world.client.post(url).bearer(&two.john.token).json(&json!({ "content": text })).expect(201).await;
    until_metric(&a, "messenger_gateway_streams", 0.0).await;
    door.resume();
    strict_door.resume();
    traffic.more(30).await;
    traffic.stop().await;
    until_caught_up(&world, jane, &mut documented, Some(&page)).await;
    until_caught_up(&world, jane, &mut strict, None).await;

    // The strict readers give up here.
    assert_exact(&world, jane, begin, &strict).await;
    drop(strict);

    // Jane's session ends; the token file has no valid token until the next login.
    fs::write(&token_file, "renewed too late").unwrap();
    let next = world.login(&api, "jane").await;
    let session = world.claims(&two.jane).sid.unwrap();
    let end = world.client.call("DELETE", api.url(&format!("/api/sessions/{session}")));
    end.bearer(&next.token).expect(204).await;
    two.say(&world, &api, 10).await;
    until_all(&mut documented, "all get a 401", |client| client.reported("401")).await;
    page.wait_for("the login is wanted", "troubles.includes('401')").await;
    fs::write(&token_file, &next.token).unwrap();
    context.sign_in(&next).await;
    page.evaluate("connect()").await;
    two.say(&world, &api, 10).await;
    until_caught_up(&world, jane, &mut documented, Some(&page)).await;
    assert_exact(&world, jane, begin, &documented).await;
    let lines = page.evaluate("lines").await;
    let lines = lines.as_array().unwrap().iter().map(|line| event(line.as_str().unwrap()));
    StoredFeed::read(&world.sql, jane).await.assert_is("browser", &lines.collect::<Vec<_>>(), begin);
    assert_eq!(page.evaluate("troubles").await, json!(["401"]));
}

async fn assert_exact(world: &World, jane: UserId, begin: Seq, clients: &[ClientProgram]) {
    let feed = StoredFeed::read(&world.sql, jane).await;
    let difference = |client: &ClientProgram| {
        let difference = feed.difference(&client.events(), begin)?;
        Some(format!("{}: {difference}", client.name))
    };
    let differences: Vec<_> = clients.iter().filter_map(difference).collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
