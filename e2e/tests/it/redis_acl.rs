//! Redis users with the minimal rights of docs/deploy.md. A missing right is logged, and events are only late.

use std::path::Path;

use e2e::World;
use testkit::{cluster::Cluster, servers::Redis, until};

use crate::{presence::assert_presence_works, support::Busy};

const PASSWORDS: [(&str, &str); 2] =
    [("messenger-api", "api-password"), ("messenger-gateway", "gateway-password")];
const ADMIN: (&str, &str) = ("admin", "admin-password");

/// The commands of the `nth` block of docs/deploy.md that creates users, for a world with this prefix.
fn lines(nth: usize, prefix: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/deploy.md");
    let text = std::fs::read_to_string(path).unwrap();
    let blocks = text.split("\n```").filter(|block| block.contains("\nACL SETUSER"));
    let block = blocks.into_iter().nth(nth).expect("the page has a block for each kind of Redis");
    let of_ours = |line: &str| {
        let ours = PASSWORDS.iter().find(|(user, _)| line.contains(&format!("SETUSER {user} ")));
        let line = line.replace(">…", &format!(">{}", ours.map_or("", |(_, password)| *password)));
        ["&user:", "&probe:", "~limit:", "~presence:"].iter().fold(line, |line, pattern| {
            let (kind, name) = pattern.split_at(1);
            line.replace(pattern, &format!("{kind}{prefix}{name}"))
        })
    };
    block.lines().filter(|line| line.starts_with("ACL ")).map(of_ours).collect()
}

/// Parentheses group words.
fn words(line: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for part in line.split(' ') {
        match words.last_mut().filter(|word| word.starts_with('(') && !word.ends_with(')')) {
            Some(open) => *open += &format!(" {part}"),
            None => words.push(part.to_owned()),
        }
    }
    words
}

fn obey(redis: &mut Redis, lines: &[String]) {
    let (user, password) = ADMIN;
    redis.tell(&["ACL", "SETUSER", user, "on", &format!(">{password}"), "+@all", "~*", "&*"]);
    redis.log_in(user, password);
    for line in lines {
        redis.tell(&words(line).iter().map(String::as_str).collect::<Vec<_>>());
    }
}

fn url_of(user: usize, urls: &str) -> String {
    let (user, password) = PASSWORDS[user];
    urls.replace("redis://", &format!("redis://{user}:{password}@"))
}

async fn busy(world: World, urls: &str) -> Busy {
    let api = || world.api().env("REDIS_URL", url_of(0, urls)).ready();
    let (one, two) = tokio::join!(api(), api());
    let gateway = |internal| world.gateway(internal).env("REDIS_URL", url_of(1, urls)).ready();
    let (a, b) = tokio::join!(gateway(one.internal()), gateway(two.internal()));
    Busy::of(world, vec![one, two], vec![a, b]).await
}

async fn assert_all_is_well(busy: &Busy) {
    busy.until_redis_is_healthy().await;
    busy.until_events_come_by_redis().await;
    busy.until_limits_are_shared().await;
    for service in busy.apis.iter().chain(&busy.gateways) {
        let lines = service.log().lines();
        let refused =
            lines.iter().find(|line| line.contains("ACL failure") || line.contains("no permissions"));
        assert_eq!(refused, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_redis_right_is_logged_and_loses_nothing() {
    let mut redis = Redis::start();
    let world = World::with_redis(redis.url()).await;
    let prefix = world.prefix().to_owned();
    obey(&mut redis, &lines(0, &prefix));
    let users = format!("{prefix}user:1");
    for (user, words) in [
        ("messenger-api", ["SUBSCRIBE", &users].as_slice()),
        ("messenger-gateway", &["PUBLISH", &users, "forged"]),
        ("messenger-gateway", &["SUBSCRIBE", "user:1"]),
        ("messenger-api", &["GET", "user:1"]),
    ] {
        let answer = redis.command(&[&["ACL", "DRYRUN", user], words].concat()).unwrap();
        assert!(answer.contains("no permissions"), "{user} {words:?}: {answer}");
    }
    // What only the sweep of a lost gateway needs.
    let (gateways, own) = (format!("{prefix}presence:gateways"), format!("{prefix}presence:gateway:one"));
    for words in
        [["HKEYS", &own].as_slice(), &["DEL", &own], &["ZREM", &gateways, "one"], &["EXISTS", &gateways]]
    {
        let answer = redis.command(&[&["ACL", "DRYRUN", "messenger-api"], words].concat()).unwrap();
        assert!(answer.contains("OK"), "{words:?}: {answer}");
    }
    let busy = busy(world, &redis.url()).await;
    assert_all_is_well(&busy).await;
    assert_presence_works(&busy.world, &busy.apis[0], &busy.gateways[0], "new").await;

    let traffic = busy.traffic();
    let said = async |what: &str, services: &[e2e::Service]| {
        for service in services {
            until("the log says what is missing", || async {
                service.log().lines().iter().any(|line| line.contains(what))
            })
            .await;
        }
    };
    // Revoking rights closes connections that use them.
    redis.tell(&["ACL", "SETUSER", "messenger-gateway", "-subscribe"]);
    redis.tell(&["ACL", "SETUSER", "messenger-api", "-publish"]);
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).unwrap();
    said("no permissions", &busy.gateways).await;
    said("no permissions", &busy.apis).await;
    busy.until_redis_is_degraded().await;
    traffic.more(40).await;
    redis.tell(&["ACL", "SETUSER", "messenger-gateway", "+subscribe"]);
    redis.tell(&["ACL", "SETUSER", "messenger-api", "+publish"]);
    busy.until_redis_is_healthy().await;

    // Passwords change in Redis only.
    for (user, _) in PASSWORDS {
        redis.tell(&["ACL", "SETUSER", user, "resetpass", ">another-password"]);
    }
    redis.command(&["CLIENT", "KILL", "USER", "messenger-gateway"]).unwrap();
    redis.command(&["CLIENT", "KILL", "USER", "messenger-api"]).unwrap();
    said("username-password", &busy.gateways).await;
    said("username-password", &busy.apis).await;
    traffic.more(40).await;
    for (user, password) in PASSWORDS {
        redis.tell(&["ACL", "SETUSER", user, &format!(">{password}")]);
    }
    busy.until_redis_is_healthy().await;
    traffic.stop().await;
    busy.assert_exact().await;
    busy.until_events_come_by_redis().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_cluster_the_documented_rights_are_enough_too() {
    let mut cluster = Cluster::start();
    let urls = cluster.urls();
    let settings = [("REDIS_TOPOLOGY", "cluster".to_owned()), ("REDIS_URL", urls.clone())];
    let world = World::with_redis_settings(settings).await;
    let lines = lines(1, world.prefix());
    cluster.nodes.iter_mut().for_each(|node| obey(node, &lines));
    let busy = busy(world, &urls).await;
    assert_all_is_well(&busy).await;
    let channel = busy.world.channel(busy.crowd.users[0].id);
    cluster.move_slot_of(&channel, (cluster.owner(&channel) + 1) % cluster.nodes.len());
    busy.until_redis_is_healthy().await;
    assert_all_is_well(&busy).await;
    busy.assert_exact().await;
}
