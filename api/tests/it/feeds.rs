//! The feed: gapless numbers under concurrency and failures, the internal endpoints, and pruning.

use std::time::Duration;

use api::{
    config::Keep,
    pruner::{PruneStep, prune_after, prune_bodies, prune_keys},
};
use futures_util::future::join_all;
use protocol::{
    feed::{HeadsRequest, KnownHead, Login, MAX_PAIRS, RangeAfter},
    ids::{SessionId, UserId},
    position::{Epoch, Position},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use sqlx::{AssertSqlSafe, PgPool};
use testkit::http::{Answer, Call};
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::{
    failures::{Listener, with_redis},
    raw,
    support::{
        ApiUser, App, assert_counts_agree, assert_problem, database, execute, number, once_not_busy, options,
        redis_url, text, until_waiting_for_locks,
    },
};

/// Checks one user's feed against the tables.
async fn assert_feeds_agree_with_tables(app: &App, pool: &PgPool, users: &[ApiUser]) {
    let messages: Vec<(i64, i64, i64, String)> =
        sqlx::query_as("SELECT id, conversation_id, sender_id, content FROM messenger.messages ORDER BY conversation_id, number")
            .fetch_all(pool)
            .await
            .unwrap();
    let conversations: Vec<(i64, i64, i64)> =
        sqlx::query_as("SELECT id, user_a, user_b FROM messenger.conversations")
            .fetch_all(pool)
            .await
            .unwrap();
    for user in users {
        let feed = app.feed(user.id).await; // Asserts that it is numbered without gaps.
        for &(conversation, a, b) in &conversations {
            let id = json!(conversation.to_string());
            let events: Vec<_> = feed.iter().filter(|(_, data)| data["conversationId"] == id).collect();
            if ![a, b].contains(&user.id.0) {
                assert!(events.is_empty(), "event of another conversation");
                continue;
            }
            // Within a conversation: each message once, in the order of its numbers, as this reader sees it.
            let expected = messages.iter().filter(|message| message.1 == conversation);
            let expected = expected.map(|(id, _, sender, content)| {
                let mine = *sender == user.id.0;
                (if mine { "message.sent" } else { "message" }, json!([mine, id.to_string(), content]))
            });
            let seen = events.iter().filter(|(name, _)| name.starts_with("message"));
            let seen = seen.map(|(name, data)| (&**name, json!([data["mine"], data["id"], data["content"]])));
            assert_eq!(seen.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
            // Read positions only move forward.
            let reads = events.iter().filter(|(name, _)| name == "conversation.read");
            let positions: Vec<i64> =
                reads.map(|(_, data)| text(&data["lastReadMessageId"]).parse().unwrap()).collect();
            assert!(positions.is_sorted_by(|a, b| a < b), "{positions:?}");
        }
    }
    assert_counts_agree(pool).await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn feed_has_no_gaps_under_interleaving_aborts_and_retries(pool: PgPool) {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let apps = [App::start(&pool).await, App::start(&pool).await];
    let mut users = Vec::new();
    for n in 0..5 {
        users.push(apps[0].user(&pool, &format!("user{n}")).await);
    }
    let mut conversations = Vec::new();
    for a in 0..users.len() {
        for b in a + 1..users.len() {
            conversations.push((a, b, users[a].start(&users[b].name).await));
        }
    }
    let mut actions = Vec::new();
    for n in 0..400 {
        let (a, b, conversation) = &conversations[random.random_range(0..conversations.len())];
        let who = users[if random.random() { *a } else { *b }].at(&apps[random.random_range(0..2)]);
        let app = &apps[random.random_range(0..2)];
        let pause = Duration::from_micros(random.random_range(0..1_000_000));
        let kind = random.random_range(0..10);
        let (pool, conversation) = (&pool, conversation.clone());
        actions.push(async move {
            tokio::time::sleep(pause).await;
            match kind {
                0..=3 => _ = insist(|| who.post_message(&conversation, &format!("m{n}")), 201).await,
                // Retries, as after a lost answer.
                4 => {
                    let post = || who.post_message(&conversation, &format!("r{n}"));
                    let send = || post().header("idempotency-key", &format!("k{n}"));
                    let (first, second) = tokio::join!(insist(send, 201), insist(send, 201));
                    assert_eq!(first.body, second.body);
                }
                // The client hangs up at some moment of the request.
                5 => {
                    let _socket = send_raw(app, &who, &conversation).await;
                    tokio::time::sleep(pause / 60).await;
                }
                // Rolled back after it has drawn its numbers.
                6 => abort(pool, &who, &conversation).await,
                7 => _ = insist(|| who.read_messages(&conversation), 204).await,
                8 => _ = insist(|| who.messages(&conversation, "?limit=3"), 200).await,
                _ => _ = insist(|| who.post_message(&conversation, ""), 422).await,
            }
        });
    }
    join_all(actions).await;
    // A stopping service waits for commands whose clients hung up.
    for app in apps {
        app.stop().await;
    }
    let app = App::start(&pool).await;
    assert_feeds_agree_with_tables(&app, &pool, &users).await;
    app.stop().await;
}

async fn insist(call: impl Fn() -> Call, status: u16) -> Answer {
    let answer = once_not_busy(call).await;
    assert_eq!(answer.status, status, "{}", answer.text());
    answer
}

async fn send_raw(app: &App, who: &ApiUser, conversation: &str) -> TcpStream {
    let mut socket = raw::connect(app).await;
    let body = r#"{"content":"hung up"}"#;
    let request = format!(
        "POST /api/conversations/{conversation}/messages HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n\
         authorization: Bearer {}\r\ncontent-length: {}\r\n\r\n{body}",
        who.token,
        body.len(),
    );
    socket.write_all(request.as_bytes()).await.unwrap();
    socket
}

async fn abort(pool: &PgPool, who: &ApiUser, conversation: &str) {
    let mut transaction = pool.begin().await.unwrap();
    let (session, user) = (who.session(), who.id);
    let post = format!(
        "SELECT FROM messenger.post_message({session}, {user}, {conversation}, 'x', NULL, NULL, 'r', NULL)"
    );
    sqlx::query(AssertSqlSafe(post)).fetch_all(&mut *transaction).await.unwrap();
    transaction.rollback().await.unwrap();
}

/// Both see unread messages; the second finds them read.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn concurrent_reads_move_the_read_mark_once(pool: PgPool) {
    let (app, other) = (App::start(&pool).await, App::start(&pool).await);
    let (john, jane, conversation) = app.pair(&pool).await;
    john.say(&conversation, "hi").await;
    let mut holder = pool.begin().await.unwrap();
    sqlx::query("SELECT FROM messenger.conversations FOR NO KEY UPDATE").execute(&mut *holder).await.unwrap();
    // In one process the second would wait for the first.
    let release = async {
        until_waiting_for_locks(&pool, 2).await;
        holder.rollback().await.unwrap();
    };
    tokio::join!(
        jane.read_messages(&conversation).expect(204),
        jane.at(&other).messages(&conversation, "").expect(200),
        release
    );
    let reads = app.feed(jane.id).await.into_iter().filter(|(name, _)| name == "conversation.read").count();
    assert_eq!(reads, 1);
    app.stop().await;
    other.stop().await;
}

/// Otherwise a smaller number could be committed after a larger one, and paging or read marks would skip it. Ids may come in any order.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn order_of_messages_does_not_depend_on_ids(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    // As from several nodes of a distributed Postgres, each with a range of its own.
    let mut said = Vec::new();
    for first in [9_000, 500, 70_000, 3] {
        execute(&pool, format!("ALTER SEQUENCE messenger.messages_id_seq RESTART {first}")).await;
        for n in 0..3 {
            said.push(john.say(&conversation, &format!("{first} {n}")).await);
        }
    }
    let ids = |page: &Answer| {
        let page = page.json();
        page.as_array().unwrap().iter().map(|message| text(&message["id"])).collect::<Vec<_>>()
    };
    let page = jane.messages(&conversation, &format!("?after={}&limit=5", said[1])).expect(200).await;
    assert_eq!(ids(&page), said[2..7]);
    let seen = jane.conversation(&conversation).expect(200).await.json();
    assert_eq!((&seen["lastReadMessageId"], &seen["unreadCount"]), (&json!(said[6]), &json!(5)));
    let page = jane.messages(&conversation, &format!("?before={}&limit=4", said[11])).expect(200).await;
    assert_eq!(ids(&page), said[7..11].iter().rev().cloned().collect::<Vec<_>>());
    let seen = jane.conversation(&conversation).expect(200).await.json();
    assert_eq!((&seen["lastReadMessageId"], &seen["unreadCount"]), (&json!(said[10]), &json!(1)));
    assert_eq!(seen["lastMessage"]["id"], json!(said[11]));
    assert_eq!(
        john.conversation(&conversation).expect(200).await.json()["otherLastReadMessageId"],
        json!(said[10])
    );
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn command_is_published_although_its_client_hung_up(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(config).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    // The row is locked, so that the client hangs up before the command ends.
    let mut holder = pool.begin().await.unwrap();
    sqlx::query("SELECT FROM messenger.conversations FOR UPDATE").execute(&mut *holder).await.unwrap();
    let socket = send_raw(&app, &john, &conversation).await;
    until_waiting_for_locks(&pool, 1).await;
    drop(socket);
    let mut heard = Listener::start(&redis_url(), &channels.user(jane.id)).await;
    holder.rollback().await.unwrap();
    let envelope = heard.next().await;
    assert_eq!((envelope.seq, envelope.event.as_str()), (2, "message"));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn heads_returns_changed_heads_and_ended_logins(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    john.say(&conversation, "hi").await;
    let unknown = |user| KnownHead { user, head: None };
    let heads = async |users| app.heads(&HeadsRequest { users, ..HeadsRequest::default() }).await;
    let answer = heads(vec![unknown(john.id), unknown(jane.id), unknown(UserId(99))]).await;
    assert_eq!(answer.heads.len(), 3);
    let head_of = |user| answer.heads.iter().find(|head| head.user == user).unwrap().head;
    assert_eq!(head_of(UserId(99)), None);
    let johns = head_of(john.id).unwrap();
    assert_eq!(johns.seq, 2);

    let known = |head| KnownHead { user: john.id, head: Some(head) };
    let same = heads(vec![known(johns)]).await;
    assert!(same.heads.is_empty());
    assert_eq!(same.ended_logins, []);
    for other in [
        Position { seq: 1, ..johns },
        Position { seq: 3, ..johns },
        Position { seq: u64::MAX, ..johns },
        Position { epoch: Epoch(johns.epoch.0 ^ 1), ..johns },
    ] {
        assert_eq!(heads(vec![known(other)]).await.heads[0].head, Some(johns));
    }

    let (revoked, expired) = (app.login("john").await, app.login("john").await);
    revoked.set_session(&pool, "revoked_at = now()").await;
    expired.set_session(&pool, "expires_at = now()").await;
    let of = |user: &ApiUser, session| Login { user: user.id, session };
    let live = [of(&john, john.session()), of(&jane, jane.session())];
    let mut ended = vec![
        of(&john, revoked.session()),
        of(&john, expired.session()),
        of(&john, SessionId(999)),
        // Both sessions are live, but swapped.
        of(&jane, john.session()),
        of(&john, jane.session()),
    ];
    let logins = [&live[..], &ended].concat();
    let mut reported = app.heads(&HeadsRequest { logins, ..HeadsRequest::default() }).await.ended_logins;
    reported.sort();
    ended.sort();
    assert_eq!(reported, ended);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn ranges_returns_the_events_after_each_position(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    for n in 0..120 {
        john.say(&conversation, &format!("m{n}")).await;
    }
    let head = Some(121);
    let expected = [
        ((jane.id, 119), (head, 2, false)),
        ((UserId(99), 0), (None, 0, false)),
        ((john.id, 0), (head, 100, true)),
        ((jane.id, 121), (head, 0, false)),
        ((jane.id, u64::MAX), (head, 0, false)),
        ((jane.id, 119), (head, 2, false)),
    ];
    let answer = app.ranges(expected.map(|((user, after), _)| RangeAfter { user, after }).into()).await;
    let found = answer.ranges.iter().map(|range| {
        for (n, event) in range.events.iter().enumerate() {
            assert_eq!(event.seq, range.after + 1 + n as u64);
            assert_eq!(event.epoch, range.head.unwrap().epoch);
        }
        ((range.user, range.after), (range.head.map(|head| head.seq), range.events.len(), range.more))
    });
    assert_eq!(found.collect::<Vec<_>>(), expected);
    // More ranges get fewer events each: the answer is bounded.
    let many = app.ranges(vec![RangeAfter { user: john.id, after: 0 }; MAX_PAIRS]).await;
    assert!(many.ranges.iter().all(|range| range.events.len() == 4 && range.more));
    app.stop().await;
}

/// A gateway reads 32 MiB of an answer, so that a thousand ranges of the longest texts must fit.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn ranges_of_long_texts_are_cut_and_continue(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    for _ in 0..3 {
        john.say(&conversation, &"\u{1}".repeat(4_000)).await;
    }
    // Few ranges have room for all, many for one text each.
    for (ranges, steps) in [(1, 1), (MAX_PAIRS, 3)] {
        let mut after = 0;
        for step in 1..=steps {
            let answer = app.ranges(vec![RangeAfter { user: jane.id, after }; ranges]).await;
            let bytes: usize = answer
                .ranges
                .iter()
                .flat_map(|range| &range.events)
                .map(|event| event.data.get().len())
                .sum();
            assert!(bytes < 26 << 20, "{bytes}");
            for range in &answer.ranges {
                assert_eq!(range.events[0].seq, after + 1, "a range without an event would be a gap");
                assert_eq!(range.more, step < steps);
            }
            after += answer.ranges[0].events.len() as u64;
        }
        assert_eq!(after, 4);
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn internal_requests_are_bounded(pool: PgPool) {
    let app = App::start(&pool).await;
    let users = |n: usize| json!({ "users": vec![json!({ "user": "1" }); n] });
    let logins = |n: usize| json!({ "users": [], "logins": vec![json!({ "user": "1", "session": "1" }); n] });
    let ranges = |n: usize| json!({ "ranges": vec![json!({ "user": "1", "after": 0 }); n] });
    for (path, fits, too_many) in [
        ("/internal/feed/heads", users(MAX_PAIRS), users(MAX_PAIRS + 1)),
        ("/internal/feed/heads", logins(MAX_PAIRS), logins(MAX_PAIRS + 1)),
        ("/internal/feed/ranges", ranges(MAX_PAIRS), ranges(MAX_PAIRS + 1)),
    ] {
        app.internal(path, &fits).expect(200).await;
        let too_many = app.internal(path, &too_many).send().await.unwrap();
        assert_problem(&too_many, 400, "More than 1000 in one request");
        let padded = json!({ "padding": "x".repeat(600 * 1024) });
        assert_problem(&app.internal(path, &padded).expect(413).await, 413, "Body too large");
    }
    for bad in [
        json!({ "ranges": [{ "user": 1, "after": 0 }] }),
        json!({ "ranges": [{ "user": "1", "after": -1 }] }),
        json!({}),
    ] {
        assert_eq!(app.internal("/internal/feed/ranges", &bad).send().await.unwrap().status, 400);
    }
    app.stop().await;
}

fn keep(events: u64) -> Keep {
    let hour = Duration::from_hours(1);
    Keep { age: hour, events, idempotency_keys: hour, messages: None, edit_window: hour }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn pruning_deletes_only_old_prefixes_by_count_and_age(pool: PgPool) {
    let database = database(&pool, 4);
    let keep = keep(10);
    // (seq, age in seconds), and the events left.
    let fresh = |range: std::ops::RangeInclusive<i64>| range.map(|seq| (seq, 0)).collect::<Vec<_>>();
    let mut by_age = fresh(1..=8);
    by_age[..3].iter_mut().for_each(|event| event.1 = 7_200);
    let mut a_clock_went_wrong = fresh(1..=8);
    a_clock_went_wrong[0].1 = 7_200;
    a_clock_went_wrong[2].1 = 7_200;
    let all_old = fresh(1..=5).into_iter().map(|(seq, _)| (seq, 7_200)).collect();
    let cases = [
        (fresh(1..=10), 1..11),
        (fresh(1..=25), 16..26),
        (by_age, 4..9),
        (a_clock_went_wrong, 2..9),
        (all_old, 0..0),
        (fresh(1..=2_500), 2_491..2_501),
        (Vec::new(), 0..0),
    ];
    for (n, (events, _)) in cases.iter().enumerate() {
        execute(&pool, format!("INSERT INTO messenger.users (username) VALUES ('u{n}')")).await;
        let user = n as i64 + 1;
        let (seqs, ages): (Vec<i64>, Vec<i64>) = events.iter().copied().unzip();
        sqlx::query(
            "WITH bodies AS (
                 INSERT INTO messenger.events (kind, count, created_at)
                 SELECT 'conversation.read', seq, now() - age * interval '1 s' FROM unnest($2::bigint[], $3::bigint[]) AS e (seq, age)
                 RETURNING id, count AS seq
             )
             INSERT INTO messenger.feed (user_id, seq, event_id) SELECT $1, seq, -id FROM bodies",
        )
        .bind(user)
        .bind(&seqs)
        .bind(&ages)
        .execute(&pool)
        .await
        .unwrap();
        let head = events.len();
        execute(&pool, format!("UPDATE messenger.feed_heads SET head_seq = {head} WHERE user_id = {user}"))
            .await;
    }
    let total = || number(&pool, "SELECT count(*) FROM messenger.feed");
    let before = total().await;
    // Two replicas prune step by step.
    let walk = async || {
        let (mut after, mut deleted) = (UserId(0), 0);
        loop {
            let PruneStep { deleted: now, next } = prune_after(&database, keep, after).await.unwrap();
            deleted += now;
            match next {
                Some(next) => after = next,
                None => return deleted,
            }
        }
    };
    let (one, other) = tokio::join!(walk(), walk());
    assert_eq!((one + other).cast_signed(), before - total().await, "each event is deleted once");
    for (n, (_, left)) in cases.iter().enumerate() {
        let kept: Vec<i64> =
            sqlx::query_scalar("SELECT seq FROM messenger.feed WHERE user_id = $1 ORDER BY seq")
                .bind(n as i64 + 1)
                .fetch_all(&pool)
                .await
                .unwrap();
        assert_eq!(kept, left.clone().collect::<Vec<_>>(), "case {n}");
    }
    assert_eq!(walk().await, 0);
    database.close().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn old_bodies_and_keys_are_deleted_after_their_feed_rows(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let key = |key: &str| john.post_message(&conversation, "hi").header("idempotency-key", key);
    let first = key("old").expect(201).await;
    key("new").expect(201).await;
    jane.read_messages(&conversation).expect(204).await;
    let (database, keep) = (database(&pool, 1), keep(1_000));
    let bodies = || number(&pool, "SELECT count(*) FROM messenger.events");
    assert_eq!(bodies().await, 3, "one of the conversation, one each of reading and its receipt");
    // Older than the events of feeds may be, but not by the margin: a walk may still find rows that refer to it.
    execute(
        &pool,
        "UPDATE messenger.events SET created_at = now() - interval '24 hours' WHERE kind = 'receipt.read'",
    )
    .await;
    assert_eq!(prune_bodies(&database, keep).await.unwrap(), 0);
    execute(
        &pool,
        "UPDATE messenger.events SET created_at = now() - interval '26 hours' WHERE kind = 'receipt.read'",
    )
    .await;
    assert_eq!(prune_bodies(&database, keep).await.unwrap(), 1);
    assert_eq!(bodies().await, 2);
    // A feed that still refers to it ends there, as if it were pruned: its reader resyncs, and nothing is skipped in silence.
    let range = app.ranges(vec![RangeAfter { user: john.id, after: 0 }]).await.ranges.remove(0);
    assert_eq!((range.head.unwrap().seq, range.events.len()), (4, 0));
    john.say(&conversation, "after it").await;
    let range = app.ranges(vec![RangeAfter { user: john.id, after: 0 }]).await.ranges.remove(0);
    assert_eq!(range.events.iter().map(|event| event.seq).collect::<Vec<_>>(), [5]);

    assert_eq!(prune_keys(&database, keep).await.unwrap(), 0);
    let one =
        "UPDATE messenger.idempotency_keys SET created_at = now() - interval '61 minutes' WHERE made_id = 1";
    execute(&pool, one).await;
    assert_eq!(prune_keys(&database, keep).await.unwrap(), 1);
    assert_ne!(key("old").expect(201).await.json()["id"], first.json()["id"], "the key is forgotten");
    assert_eq!(key("new").expect(201).await.header("idempotent-replayed"), Some("true"));
    database.close().await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn no_idempotency_key_is_stored(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, _, conversation) = app.pair(&pool).await;
    let key = "marker-of-a-key";
    john.post_message(&conversation, "hi").header("idempotency-key", key).expect(201).await;
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT relname::text FROM pg_class WHERE relnamespace = 'messenger'::regnamespace AND relkind = 'r'",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    assert!(tables.len() > 10);
    for table in tables {
        let found = format!("SELECT count(*) FROM messenger.{table} AS t WHERE t::text LIKE '%{key}%'");
        assert_eq!(number(&pool, found).await, 0, "{table}");
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn new_epoch_changes_the_epoch_of_every_feed(pool: PgPool) {
    execute(&pool, "INSERT INTO messenger.users (username) SELECT 'u' || n FROM generate_series(1, 50) AS n")
        .await;
    let epochs = async || {
        sqlx::query_scalar::<_, i64>("SELECT epoch FROM messenger.feed_heads").fetch_all(&pool).await.unwrap()
    };
    let mut all = epochs().await;
    api::maintenance::new_epoch(options(&pool)).await.unwrap();
    all.extend(epochs().await);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 100, "all different");
}
