//! SQL `messenger.publish` in the transactions of host applications, and the relay that appends what they have committed.

use std::{collections::BTreeMap, time::Duration};

use api::{
    config::Keep,
    pruner,
    store::relay::{Looked, RelayOutcome, TurnBounds, relay_events},
};
use protocol::ids::UserId;
use rand::{RngExt as _, SeedableRng, rngs::StdRng, seq::IndexedRandom as _};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, postgres::PgConnectOptions};
use testkit::until;
use tokio::time::Instant;

use crate::support::{App, add_users, database, execute, number, options};

/// A host's connection.
async fn host(pool: &PgPool) -> PgConnection {
    PgConnection::connect_with(&options(pool)).await.unwrap()
}

pub(crate) async fn run(connection: &mut PgConnection, sql: impl Into<String>) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(sql.into())).execute(connection).await.map(|_| ())
}

fn state(result: &sqlx::Result<()>) -> Option<String> {
    result.as_ref().err()?.as_database_error()?.code().map(Into::into)
}

pub(crate) async fn until_in_feed(app: &App, user: UserId, names: &[&str]) -> Vec<Value> {
    until("the events are in the feed", || async { app.feed(user).await.len() >= names.len() }).await;
    let events = app.feed(user).await;
    assert_eq!(events.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), names);
    events.into_iter().map(|(_, data)| data).collect()
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn what_a_host_commits_is_in_the_feed_and_nothing_else(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane) = (app.user(&pool, "john").await.id, app.user(&pool, "jane").await.id);
    let mut host = host(&pool).await;
    for isolation in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        let publish = format!(
            "BEGIN ISOLATION LEVEL {isolation};
             SELECT messenger.publish({john}, 'order.paid', '{{\"b\": 1, \"a\": [1.50, \"é\"]}}');
             SAVEPOINT one;
             SELECT messenger.publish({john}, 'order.lost', '1');
             ROLLBACK TO one;
             SELECT messenger.publish({john}, 'Order:2_x-y', NULL);
             SAVEPOINT two;
             SELECT messenger.publish({jane}, 'order.seen', '\"x\"');
             RELEASE two;
             COMMIT;
             BEGIN ISOLATION LEVEL {isolation};
             SELECT messenger.publish({john}, 'order.rolled', '2');
             ROLLBACK"
        );
        run(&mut host, publish).await.unwrap();
    }
    let datas = until_in_feed(&app, john, &["order.paid", "Order:2_x-y"].repeat(3)).await;
    assert_eq!(datas[..2], [json!({ "a": [1.5, "é"], "b": 1 }), Value::Null]);
    until_in_feed(&app, jane, &["order.seen"; 3]).await;
    until("nothing is left", || async {
        number(&pool, "SELECT count(*) FROM messenger.staged_events").await == 0
    })
    .await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn prepared_transaction_publishes_when_it_is_committed(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await.id;
    let mut host = host(&pool).await;
    let database = options(&pool).get_database().unwrap().to_owned();
    for (n, end) in ["COMMIT", "ROLLBACK"].into_iter().enumerate() {
        let publish = |name| format!("SELECT messenger.publish({john}, '{name}', '{n}')");
        let prepare = format!("BEGIN; {}; PREPARE TRANSACTION '{database} {n}'", publish("prepared"));
        run(&mut host, prepare).await.unwrap();
        // Others go on, and do not carry it along.
        run(&mut host, publish("other")).await.unwrap();
        until_in_feed(&app, john, &["other", "prepared", "other"][..=2 * n]).await;
        run(&mut host, format!("{end} PREPARED '{database} {n}'")).await.unwrap();
    }
    run(&mut host, format!("SELECT messenger.publish({john}, 'last', NULL)")).await.unwrap();
    until_in_feed(&app, john, &["other", "prepared", "other", "last"]).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn publish_rejects_what_no_event_can_be(pool: PgPool) {
    add_users(&pool, ["john"]).await;
    let mut host = host(&pool).await;
    let long = |length| "x".repeat(length);
    let event = |name: &str| format!("1, '{name}', '1'");
    let key = |key: &str| format!("1, 'a', '1', '{key}'");
    for (good, arguments) in [
        (true, event("a")),
        (true, event("A1.b2_c:d-4")),
        (true, event(&long(128))),
        (true, event("messages.new")),
        (true, event("my.message")),
        (false, event("")),
        (false, event(&long(129))),
        (false, event("1a")),
        (false, event("a..b")),
        (false, event("a.")),
        (false, event("a b")),
        (false, event("ä")),
        (false, event("a\n")),
        (false, event("message")),
        (false, event("Message.x")),
        (false, event("ERROR-x")),
        (false, event("typing_x")),
        (false, event("user:x")),
        (false, "1, NULL, '1'".into()),
        (false, "NULL::bigint, 'a', '1'".into()),
        (false, "NULL::text, 'a', '1'".into()),
        (false, format!("'{}', 'a', '1'", long(256))),
        (true, format!("1, 'a', to_jsonb(repeat('x', {}))", 48 * 1024 - 2)),
        (false, format!("1, 'a', to_jsonb(repeat('x', {}))", 48 * 1024 - 1)),
        // As it is written on the stream.
        (
            true,
            format!("1, 'a', to_jsonb(repeat(chr(8232) || chr(133) || chr(8233), {}))", (48 * 1024 - 2) / 18),
        ),
        (
            false,
            format!(
                "1, 'a', to_jsonb(repeat(chr(8232) || chr(133) || chr(8233), {}))",
                (48 * 1024 - 2) / 18 + 1
            ),
        ),
        (true, key("!~")),
        (true, key(&long(128))),
        (false, key("")),
        (false, key(&long(129))),
        (false, key("a b")),
        (false, key("é")),
    ] {
        let done = run(&mut host, format!("SELECT messenger.publish({arguments})")).await;
        assert_eq!(state(&done).as_deref(), (!good).then_some("22023"), "{arguments}: {done:?}");
    }
    for reserved in [
        "message",
        "conversation",
        "participant",
        "receipt",
        "user",
        "typing",
        "presence",
        "ready",
        "resync",
        "goodbye",
        "error",
        "open",
    ] {
        let done = run(&mut host, format!("SELECT messenger.publish(1, '{reserved}.x', '1')")).await;
        assert_eq!(state(&done).as_deref(), Some("22023"), "{reserved}");
    }
    // A receiver who does not exist is a notice.
    let before = number(&pool, "SELECT count(*) FROM messenger.staged_events").await;
    for receiver in ["999", "-1", "'nobody'", "''"] {
        run(&mut host, format!("SELECT messenger.publish({receiver}, 'a', '1')")).await.unwrap();
    }
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.staged_events").await, before);
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn host_names_users_by_the_subjects_of_the_external_issuer(pool: PgPool) {
    let issuer = "https://login.example";
    add_users(&pool, ["john", "jane"]).await;
    execute(
        &pool,
        format!(
            "INSERT INTO messenger.identities (issuer, subject, user_id)
             VALUES ('{issuer}', 'auth0|1', 1), ('https://other.example', 'auth0|2', 2), ('{issuer}', '2', 1)"
        ),
    )
    .await;
    let app = App::with(&pool, |config| config.external_issuer = Some(issuer.into())).await;
    let issuer_is_known = "SELECT count(issuer) FROM messenger.external_issuer";
    until("the relay has begun", || async { number(&pool, issuer_is_known).await == 1 }).await;
    let mut host = host(&pool).await;
    for receiver in ["'auth0|1'", "'auth0|2'", "'AUTH0|1'", "'2'"] {
        run(&mut host, format!("SELECT messenger.publish({receiver}, 'a', to_jsonb({receiver}::text))"))
            .await
            .unwrap();
    }
    assert_eq!(until_in_feed(&app, UserId(1), &["a", "a"]).await, [json!("auth0|1"), json!("2")]);
    assert!(app.feed(UserId(2)).await.is_empty());
    app.stop().await;
}

/// A role that may execute the function and nothing else, and one that may not.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn role_of_least_right_can_publish_and_read_nothing(pool: PgPool) {
    add_users(&pool, ["john"]).await;
    let name = options(&pool).get_database().unwrap().to_owned();
    let role = format!("{name}_host");
    execute(
        &pool,
        format!(
            r#"CREATE ROLE "{role}" LOGIN PASSWORD 'hunter2'; GRANT USAGE ON SCHEMA messenger TO "{role}""#
        ),
    )
    .await;
    let options: PgConnectOptions = options(&pool).username(&role).password("hunter2");
    let mut host = PgConnection::connect_with(&options).await.unwrap();
    let publish = ["messenger.publish(1, 'a', '1')", "messenger.publish('subject', 'a', '1')"];
    for call in publish {
        let done = run(&mut host, format!("SELECT {call}")).await;
        assert_eq!(state(&done).as_deref(), Some("42501"), "without a grant: {call}");
    }
    execute(
        &pool,
        format!(
            r#"GRANT EXECUTE ON FUNCTION messenger.publish(bigint, text, jsonb, text),
                                         messenger.publish(text, text, jsonb, text) TO "{role}""#
        ),
    )
    .await;
    for call in publish {
        run(&mut host, format!("SELECT {call}")).await.unwrap();
    }
    let tables: Vec<String> =
        sqlx::query_scalar("SELECT relname::text FROM pg_class WHERE relnamespace = 'messenger'::regnamespace AND relkind IN ('r', 'S', 'v')")
            .fetch_all(&pool)
            .await
            .unwrap();
    assert!(tables.len() > 20);
    for table in tables {
        let done = run(&mut host, format!("SELECT * FROM messenger.{table}")).await;
        assert_eq!(state(&done).as_deref(), Some("42501"), "{table}");
    }
    for call in [
        "SELECT * FROM messenger.relay_events(1, true, NULL, NULL, '0', 0, 1, 1, 1)",
        "SELECT messenger.stage_event(1, 'message', '1', NULL)",
        "SELECT * FROM messenger.append_to_feed(1, 1, 0)",
        "SELECT messenger.find_user('john')",
        "SELECT * FROM messenger.post_message(NULL, 1, 1, 'x', NULL, NULL, NULL, NULL)",
        "CREATE TABLE messenger.mine ()",
    ] {
        let done = run(&mut host, call).await;
        assert!(matches!(state(&done).as_deref(), Some("42501" | "42883")), "{call}: {done:?}");
    }
    // Objects of the host's that have our names change nothing.
    run(
        &mut host,
        "CREATE TEMP TABLE users (id bigint); CREATE TEMP TABLE staged_events (id bigint);
         CREATE FUNCTION pg_temp.octet_length(text) RETURNS integer LANGUAGE sql AS 'SELECT 0';
         SET search_path = pg_temp, messenger, pg_catalog",
    )
    .await
    .unwrap();
    let large = "SELECT messenger.publish(1, 'a', to_jsonb(repeat('x', 50000)))";
    assert_eq!(state(&run(&mut host, large).await).as_deref(), Some("22023"));
    host.close().await.unwrap();
    execute(&pool, format!(r#"DROP OWNED BY "{role}"; DROP ROLE "{role}""#)).await;
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.staged_events").await, 1);
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn open_transaction_delays_nobody(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let mut slow = host(&pool).await;
    let publish =
        |name: &str, key: &str| format!("SELECT messenger.publish({}, '{name}', '1', '{key}')", john.id);
    run(&mut slow, format!("BEGIN; {}", publish("slow", "k"))).await.unwrap();
    let mut host = host(&pool).await;
    // Neither the same receiver, nor the same key, nor a message waits.
    run(&mut host, format!("SET statement_timeout = '1s'; {}", publish("quick", "k"))).await.unwrap();
    until_in_feed(&app, john.id, &["conversation.created", "quick"]).await;
    jane.say(&conversation, "hi").await;
    run(&mut slow, format!("{}; COMMIT", publish("slow", "other"))).await.unwrap();
    // The one that came first has the key.
    until_in_feed(&app, john.id, &["conversation.created", "quick", "message", "slow"]).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn repeated_key_is_published_once_per_receiver_while_its_event_is_kept(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane) = (app.user(&pool, "john").await.id, app.user(&pool, "jane").await.id);
    let mut host = host(&pool).await;
    let publish =
        |user: UserId, n: u32, key: &str| format!("SELECT messenger.publish({user}, 'n', '{n}', '{key}');");
    // In one transaction, in one turn of the relay, and later.
    run(&mut host, [publish(john, 1, "k"), publish(john, 2, "k"), publish(john, 3, "K")].concat())
        .await
        .unwrap();
    assert_eq!(until_in_feed(&app, john, &["n", "n"]).await, [1, 3]);
    run(&mut host, [publish(john, 4, "k"), publish(jane, 5, "k"), publish(john, 6, "other")].concat())
        .await
        .unwrap();
    assert_eq!(until_in_feed(&app, john, &["n"; 3]).await, [1, 3, 6]);
    assert_eq!(until_in_feed(&app, jane, &["n"]).await, [5]);

    // Keys go with their events.
    let keep = Keep {
        age: Duration::from_hours(1),
        events: 1,
        idempotency_keys: Duration::from_hours(1),
        messages: None,
        edit_window: Duration::ZERO,
    };
    pruner::prune_all(&database(&pool, 1), keep).await.unwrap();
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.event_keys").await, 2);
    run(&mut host, [publish(john, 7, "k"), publish(john, 8, "other")].concat()).await.unwrap();
    until("the key is free again", || async {
        number(&pool, format!("SELECT head_seq FROM messenger.feed_heads WHERE user_id = {john}")).await == 4
    })
    .await;
    let mut answer = app.ranges(vec![protocol::feed::RangeAfter { user: john, after: 3 }]).await;
    assert_eq!(answer.ranges.remove(0).events.remove(0).data.get(), "7");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn user_deleted_before_the_relay_is_skipped(pool: PgPool) {
    add_users(&pool, ["john", "jane", "bob"]).await;
    let mut host = host(&pool).await;
    let publish = "SELECT messenger.publish(id, 'a', '1', 'k') FROM messenger.users;
                   DELETE FROM messenger.users WHERE username = 'jane'";
    run(&mut host, publish).await.unwrap();
    let app = App::start(&pool).await;
    until_in_feed(&app, UserId(1), &["a"]).await;
    until_in_feed(&app, UserId(3), &["a"]).await;
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.events").await, 2);
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.feed").await, 2);
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.event_keys").await, 2);
    app.stop().await;
}

/// One turn of a relay of the test's own.
async fn turn(
    relay: &mut PgConnection,
    me: i64,
    looked: &mut Option<Looked>,
    events: i64,
) -> Option<(u64, bool)> {
    let bounds = TurnBounds { events, receivers: 4_000, bytes: 1 << 20 };
    match relay_events(relay, me, true, None, looked.as_ref(), bounds).await.unwrap() {
        RelayOutcome::Passive => None,
        RelayOutcome::Looked { looked: now, taken, more, .. } => {
            *looked = Some(now);
            Some((taken, more))
        }
    }
}

async fn turns_to_the_end(relay: &mut PgConnection, looked: &mut Option<Looked>) {
    while let Some((_, true)) = turn(relay, 1, looked, 100).await {}
}

/// A transaction of a host, and what it has published that no savepoint took back: receiver and number.
#[derive(Default)]
struct HostTransaction {
    began: usize,
    ended: Option<usize>,
    published: Vec<(usize, u32)>,
    savepoints: Vec<usize>,
}

const HOSTS: usize = 5;
const RECEIVERS: usize = 3;

/// Transactions of hosts, interleaved at random with turns of the relay that take a few events each. Everything that was committed must
/// arrive without a second look at everything, once; each transaction in its order; and what was committed before another transaction
/// began before that one's. `PUBLISH_SEED` runs one, `PUBLISH_SEEDS` that many.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn relay_misses_nothing_and_keeps_the_order_of_transactions(pool: PgPool) {
    let first = std::env::var("PUBLISH_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    let seeds: u64 = std::env::var("PUBLISH_SEEDS").map_or(30, |seeds| seeds.parse().unwrap());
    let seeds = if std::env::var_os("PUBLISH_SEED").is_some() { 1 } else { seeds };
    let mut relay = host(&pool).await;
    let mut hosts = Vec::new();
    for _ in 0..HOSTS {
        hosts.push(host(&pool).await);
    }
    let mut looked = None;
    turns_to_the_end(&mut relay, &mut looked).await;
    for seed in (0..seeds).map(|nth| u64::wrapping_add(first, nth)) {
        println!("PUBLISH_SEED={seed}");
        schedule(seed, &pool, &mut relay, &mut hosts, &mut looked).await;
    }
}

async fn schedule(
    seed: u64,
    pool: &PgPool,
    relay: &mut PgConnection,
    hosts: &mut [PgConnection],
    looked: &mut Option<Looked>,
) {
    let mut random = StdRng::seed_from_u64(seed);
    let database = options(pool).get_database().unwrap().to_owned();
    let users: Vec<i64> = sqlx::query_scalar(
        "INSERT INTO messenger.users (username) SELECT gen_random_uuid()::text FROM generate_series(1, $1) RETURNING id",
    )
    .bind(RECEIVERS as i32)
    .fetch_all(pool)
    .await
    .unwrap();
    let mut open: Vec<Option<HostTransaction>> = (0..HOSTS).map(|_| None).collect();
    let (mut prepared, mut committed): (Vec<(String, HostTransaction)>, Vec<HostTransaction>) =
        Default::default();
    let (mut number, mut clock) = (0, 0);
    for step in 0..250 {
        clock += 1;
        let nth = random.random_range(0..HOSTS);
        let connection = &mut hosts[nth];
        // At the end everything is committed.
        let ending = step >= 230;
        match (&mut open[nth], random.random_range(0..100)) {
            (_, 0..25) => {
                let most = random.random_range(1..5);
                turn(relay, 1, looked, most).await.unwrap();
            }
            (_, 25..28) if !prepared.is_empty() => {
                let (name, mut transaction) = prepared.swap_remove(random.random_range(0..prepared.len()));
                let end = ["COMMIT", "ROLLBACK"].choose(&mut random).unwrap();
                run(connection, format!("{end} PREPARED '{name}'")).await.ok();
                // The same connection may be in a transaction, which cannot do it.
                match sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_prepared_xacts WHERE gid = $1)")
                    .bind(&name)
                    .fetch_one(pool)
                    .await
                    .unwrap()
                {
                    true => {
                        prepared.push((name, transaction));
                        open[nth] = None;
                        run(connection, "ROLLBACK").await.unwrap();
                    }
                    false if *end == "COMMIT" => {
                        transaction.ended = Some(clock);
                        committed.push(transaction);
                    }
                    false => {}
                }
            }
            (slot @ None, _) if !ending => {
                let isolation =
                    ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"].choose(&mut random).unwrap();
                run(connection, format!("BEGIN ISOLATION LEVEL {isolation}")).await.unwrap();
                *slot = Some(HostTransaction { began: clock, ..Default::default() });
            }
            (None, _) => {}
            (Some(transaction), 28..70) => {
                number += 1;
                let to = random.random_range(0..RECEIVERS);
                let user = users[to];
                run(connection, format!("SELECT messenger.publish({user}, 'n', '{number}')")).await.unwrap();
                transaction.published.push((to, number));
            }
            (Some(transaction), 70..76) => {
                run(connection, format!("SAVEPOINT s{}", transaction.savepoints.len())).await.unwrap();
                transaction.savepoints.push(transaction.published.len());
            }
            (Some(transaction), 76..80) if !transaction.savepoints.is_empty() => {
                let nth = random.random_range(0..transaction.savepoints.len());
                run(connection, format!("ROLLBACK TO s{nth}")).await.unwrap();
                transaction.published.truncate(transaction.savepoints[nth]);
                transaction.savepoints.truncate(nth + 1);
            }
            (slot, 80..84) => {
                run(connection, "ROLLBACK").await.unwrap();
                *slot = None;
            }
            (slot, 84..88) => {
                let name = format!("{database} {seed} {clock}");
                run(connection, format!("PREPARE TRANSACTION '{name}'")).await.unwrap();
                prepared.push((name, slot.take().unwrap()));
            }
            (slot, _) => {
                run(connection, "COMMIT").await.unwrap();
                let mut transaction = slot.take().unwrap();
                transaction.ended = Some(clock);
                committed.push(transaction);
            }
        }
    }
    for (connection, open) in hosts.iter_mut().zip(open) {
        if open.is_some() {
            run(connection, "ROLLBACK").await.unwrap();
        }
    }
    for (name, mut transaction) in prepared {
        run(&mut hosts[0], format!("COMMIT PREPARED '{name}'")).await.unwrap();
        clock += 1;
        transaction.ended = Some(clock);
        committed.push(transaction);
    }
    turns_to_the_end(relay, looked).await;
    assert_eq!(
        crate::support::number(pool, "SELECT count(*) FROM messenger.staged_events").await,
        0,
        "seed {seed}"
    );

    for (receiver, user) in users.iter().enumerate() {
        let feed: Vec<(i64, String)> = sqlx::query_as(
            "SELECT f.seq, e.data FROM messenger.feed AS f JOIN messenger.events AS e ON e.id = -f.event_id
             WHERE f.user_id = $1 ORDER BY f.seq",
        )
        .bind(user)
        .fetch_all(pool)
        .await
        .unwrap();
        let place: BTreeMap<u32, usize> =
            feed.iter().enumerate().map(|(place, (_, data))| (data.parse().unwrap(), place)).collect();
        assert_eq!(
            feed.iter().map(|(seq, _)| *seq).collect::<Vec<_>>(),
            (1..=feed.len() as i64).collect::<Vec<_>>()
        );
        let mine = |transaction: &HostTransaction| -> Vec<u32> {
            transaction
                .published
                .iter()
                .filter(|(to, _)| *to == receiver)
                .map(|(_, number)| *number)
                .collect()
        };
        let expected: usize = committed.iter().map(|transaction| mine(transaction).len()).sum();
        assert_eq!((place.len(), feed.len()), (expected, expected), "seed {seed}: once each");
        for one in &committed {
            let numbers = mine(one);
            assert!(numbers.is_sorted_by_key(|number| place[number]), "seed {seed}: order in a transaction");
            for other in committed.iter().filter(|other| one.ended.unwrap() < other.began) {
                for (before, after) in numbers.iter().zip(mine(other)) {
                    assert!(
                        place[before] < place[&after],
                        "seed {seed}: {before} was committed before {after} began"
                    );
                }
                if let (Some(last), Some(first)) = (numbers.last(), mine(other).first()) {
                    assert!(
                        place[last] < place[first],
                        "seed {seed}: {last} was committed before {first} began"
                    );
                }
            }
        }
    }
}

/// Postgres keeps dead rows while a transaction is open, here one that has published itself.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn look_reads_nothing_that_was_taken_while_a_transaction_is_open(pool: PgPool) {
    add_users(&pool, ["john"]).await;
    let (mut relay, mut slow) = (host(&pool).await, host(&pool).await);
    let mut looked = None;
    turns_to_the_end(&mut relay, &mut looked).await;
    let many = "SELECT count(messenger.publish(1, 'a', '1')) FROM generate_series(1, 3000)";
    run(&mut slow, format!("BEGIN; {many}")).await.unwrap();
    for _ in 0..3 {
        execute(&pool, many).await;
        turns_to_the_end(&mut relay, &mut looked).await;
    }
    run(&mut relay, "BEGIN").await.unwrap();
    let read = "SELECT pg_stat_get_xact_tuples_returned('messenger.staged_events_by_transaction'::regclass)
                     + pg_stat_get_xact_tuples_returned('messenger.staged_events'::regclass)";
    let before: i64 = sqlx::query_scalar(read).fetch_one(&mut relay).await.unwrap();
    assert_eq!(turn(&mut relay, 1, &mut looked, 2_000).await, Some((0, false)));
    let idle: i64 = sqlx::query_scalar(read).fetch_one(&mut relay).await.unwrap();
    execute(&pool, "SELECT messenger.publish(1, 'a', '1')").await;
    assert_eq!(turn(&mut relay, 1, &mut looked, 2_000).await, Some((1, false)));
    let one: i64 = sqlx::query_scalar(read).fetch_one(&mut relay).await.unwrap();
    assert_eq!((idle - before, one - idle), (0, 1), "index entries read");
    run(&mut relay, "COMMIT").await.unwrap();
    run(&mut slow, "COMMIT").await.unwrap();
    turns_to_the_end(&mut relay, &mut looked).await;
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.feed").await, 12_001);
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn turn_is_bounded_by_events_receivers_and_bytes(pool: PgPool) {
    add_users(&pool, ["john"]).await;
    execute(
        &pool,
        "INSERT INTO messenger.staged_events (receivers, name, data)
         SELECT ARRAY[1, -1, -2], 'a', to_jsonb(repeat('x', 998)) FROM generate_series(1, 10)",
    )
    .await;
    let mut relay = host(&pool).await;
    let mut looked = None;
    for (events, receivers, bytes, taken) in
        [(3, 100, 1 << 20, 3), (9, 6, 1 << 20, 2), (9, 100, 3_000, 1), (9, 1, 1, 1), (9, 100, 1 << 20, 3)]
    {
        let bounds = TurnBounds { events, receivers, bytes };
        let RelayOutcome::Looked { looked: now, taken: took, more, events } =
            relay_events(&mut relay, 1, true, None, looked.as_ref(), bounds).await.unwrap()
        else {
            panic!("passive");
        };
        assert_eq!(
            (took, more, events.len() as u64),
            (taken, number(&pool, "SELECT count(*) FROM messenger.staged_events").await > 0, taken)
        );
        looked = Some(now);
    }
}

/// `publish` stages nothing like this; and what somebody writes to the table by hand stops neither the relay nor a feed.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn nothing_that_is_staged_stops_the_relay(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await.id;
    let stage = |receivers: &str, data: &str, key: &str| {
        format!(
            "INSERT INTO messenger.staged_events (receivers, name, data, key_hash) VALUES ({receivers}, 'by.hand', '{data}', {key})"
        )
    };
    let key = r"'\x00112233445566778899aabbccddeeff'";
    execute(&pool, stage("ARRAY[1]", "not JSON", "NULL")).await;
    execute(&pool, stage("ARRAY[NULL, -1, 9999]::bigint[]", "1", "NULL")).await;
    execute(&pool, stage("ARRAY[1, 1]", "2", key)).await;
    execute(&pool, stage("ARRAY[1]", "3", key)).await;
    execute(&pool, "SELECT messenger.publish(1, 'last', '4')").await;
    let datas = until_in_feed(&app, john, &["by.hand", "by.hand", "last"]).await;
    assert_eq!(datas, [Value::Null, json!(2), json!(4)]);
    for bad in [stage("'{}'", "1", "NULL"), stage("ARRAY[1]", "", "NULL"), stage("ARRAY[1]", "1", r"'\x00'")]
    {
        let mut connection = host(&pool).await;
        assert_eq!(state(&run(&mut connection, bad).await).as_deref(), Some("23514"));
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn one_replica_relays_until_its_lease_expires(pool: PgPool) {
    add_users(&pool, ["john"]).await;
    let (mut one, mut two) = (host(&pool).await, host(&pool).await);
    let (mut ones, mut twos) = (None, None);
    assert_eq!(turn(&mut one, 1, &mut ones, 10).await, Some((0, false)));
    assert_eq!(turn(&mut two, 2, &mut twos, 10).await, None);
    let began = Instant::now();
    execute(&pool, "SELECT messenger.publish(1, 'a', '1')").await;
    // The first one dies: the second finds out by itself.
    loop {
        match turn(&mut two, 2, &mut twos, 10).await {
            None => tokio::time::sleep(Duration::from_millis(50)).await,
            taken => break assert_eq!(taken, Some((1, false))),
        }
    }
    assert!(began.elapsed() < Duration::from_secs(2));
    // The first one was only slow: it takes nothing, whether or not it renews its lease.
    execute(&pool, "SELECT messenger.publish(1, 'a', '2')").await;
    assert_eq!(turn(&mut one, 1, &mut ones, 10).await, None);
    let bounds = TurnBounds { events: 10, receivers: 10, bytes: 100 };
    let stale = relay_events(&mut one, 1, false, None, None, bounds).await.unwrap();
    assert!(matches!(stale, RelayOutcome::Passive));
    // While a turn of the second is under way, its expired lease is not taken.
    run(&mut two, "BEGIN").await.unwrap();
    assert_eq!(turn(&mut two, 2, &mut twos, 10).await, Some((1, false)));
    tokio::time::sleep(Duration::from_millis(1_300)).await;
    assert_eq!(turn(&mut one, 1, &mut ones, 10).await, None);
    run(&mut two, "COMMIT").await.unwrap();
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.feed").await, 2);
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn replica_that_stops_hands_the_relay_over(pool: PgPool) {
    let one = App::start(&pool).await;
    let john = one.user(&pool, "john").await.id;
    let active = "SELECT count(*) FROM messenger.relay WHERE renewed_at > now() - interval '1 second'";
    until("the first one relays", || async { number(&pool, active).await == 1 }).await;
    let two = App::start(&pool).await;
    one.stop().await;
    execute(&pool, format!("SELECT messenger.publish({john}, 'a', '1')")).await;
    let began = Instant::now();
    until_in_feed(&two, john, &["a"]).await;
    assert!(began.elapsed() < Duration::from_secs(2));
    two.stop().await;
}

/// Each is a host of its own at a random isolation level, over random receivers in random order, next to our own commands on the same
/// users. Nobody is told of a conflict, and every feed has each event once.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn concurrent_hosts_and_commands_never_conflict(pool: PgPool) {
    let transactions: usize =
        std::env::var("PUBLISH_TRANSACTIONS").map_or(1_000, |number| number.parse().unwrap());
    let app = App::start(&pool).await;
    let mut users = Vec::new();
    for n in 0..12 {
        users.push(app.user(&pool, &format!("user{n}")).await);
    }
    let conversations = {
        let mut all = Vec::new();
        for pair in users.chunks(2) {
            all.push(pair[0].start(&pair[1].name).await);
        }
        all
    };
    let at_once = std::sync::Arc::new(tokio::sync::Semaphore::new(80));
    let mut tasks = tokio::task::JoinSet::new();
    for nth in 0..transactions {
        let (options, at_once) = (options(&pool), at_once.clone());
        let ids: Vec<i64> = users.iter().map(|user| user.id.0).collect();
        tasks.spawn(async move {
            let _permit = at_once.acquire().await.unwrap();
            let mut random = StdRng::seed_from_u64(nth as u64);
            let mut host = PgConnection::connect_with(&options).await.unwrap();
            let isolation =
                ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"].choose(&mut random).unwrap();
            run(&mut host, format!("BEGIN ISOLATION LEVEL {isolation}")).await?;
            let mut sent = BTreeMap::new();
            for n in 0..random.random_range(1..8) {
                let to = *ids.choose(&mut random).unwrap();
                *sent.entry(to).or_insert(0) += 1;
                let key = if random.random() { format!(", '{nth}-{n}'") } else { String::new() };
                run(&mut host, format!("SELECT messenger.publish({to}, 'n', '[{nth}, {n}]'{key})")).await?;
            }
            let commits = random.random_bool(0.8);
            run(&mut host, if commits { "COMMIT" } else { "ROLLBACK" }).await?;
            host.close().await.unwrap();
            Ok::<_, sqlx::Error>(if commits { sent } else { BTreeMap::new() })
        });
    }
    let stop = tokio_util::sync::CancellationToken::new();
    let commands = async {
        let mut posted = 0;
        while !stop.is_cancelled() {
            for (pair, conversation) in users.chunks(2).zip(&conversations) {
                pair[posted % 2].post_message(conversation, "hi").expect(201).await;
            }
            posted += 1;
        }
        posted
    };
    let hosts = async {
        let mut expected = BTreeMap::new();
        while let Some(done) = tasks.join_next().await {
            for (user, events) in done.unwrap().expect("no host is told of a conflict") {
                *expected.entry(user).or_insert(0) += events;
            }
        }
        stop.cancel();
        expected
    };
    let (posted, expected) = tokio::join!(commands, hosts);
    until("everything is relayed", || async {
        number(&pool, "SELECT count(*) FROM messenger.staged_events").await == 0
    })
    .await;
    for user in &users {
        let feed = app.feed(user.id).await;
        let published: Vec<&Value> =
            feed.iter().filter(|(name, _)| name == "n").map(|(_, data)| data).collect();
        let distinct: std::collections::BTreeSet<String> =
            published.iter().map(ToString::to_string).collect();
        let wanted = expected.get(&user.id.0).copied().unwrap_or(0);
        assert_eq!((published.len(), distinct.len()), (wanted, wanted));
        assert_eq!(feed.len() - published.len(), 1 + posted);
    }
    assert_eq!(crate::failures::metric(&app, "messenger_api_database_conflicts_total").await, Some(0));
    app.stop().await;
}
