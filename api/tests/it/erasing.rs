//! Erasing a user and exporting their data, by the back end of a product.

use std::collections::HashSet;

use api::erasing::erase_next;
use futures_util::future::join_all;
use protocol::{
    feed::{HeadsRequest, KnownHead},
    ids::UserId,
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool};
use testkit::{
    http::{Answer, Call},
    issuer::ISSUER,
    until,
};

use crate::{
    failures::{Listener, with_redis},
    services::create,
    support::{
        ApiUser, App, assert_counts_agree, assert_problem, database, execute, number, once_not_busy,
        redis_url, text, until_waiting_for_locks,
    },
};

const MARKER: &str = "unspeakable";

struct Host {
    app: App,
    token: String,
}

impl Host {
    async fn start(pool: &PgPool) -> Self {
        let app = App::with(pool, |config| config.external_issuer = Some(ISSUER.into())).await;
        Self { app, token: create(pool, "crm", "admin,users") }
    }

    fn erase(&self, user: UserId) -> Call {
        self.app.call("DELETE", &format!("/api/users/{user}")).bearer(&self.token)
    }

    fn export(&self, user: UserId) -> Call {
        self.app.get(&format!("/api/users/{user}/export")).bearer(&self.token)
    }
}

const UNFINISHED: &str = "SELECT count(*) FROM messenger.erasures WHERE finished_at IS NULL";

async fn until_erased(pool: &PgPool) {
    until("erasing has finished", || async { number(pool, UNFINISHED).await == 0 }).await;
}

fn deleted(user: UserId) -> Value {
    json!({ "id": user, "username": format!("deleted-{user}"), "avatarURL": null })
}

/// Rows in which a user still is, by table, but for those that keep their id.
async fn rows_of(pool: &PgPool, user: UserId) -> Vec<String> {
    let mut left = Vec::new();
    for (table, column) in [
        ("users", "id"),
        ("identities", "user_id"),
        ("login_codes", "user_id"),
        ("sessions", "user_id"),
        ("last_seen", "user_id"),
        ("blocks", "blocker_id"),
        ("blocks", "blocked_id"),
        ("idempotency_keys", "sender_id"),
        ("event_keys", "user_id"),
        ("feed", "user_id"),
        ("feed_heads", "user_id"),
        ("erasure_steps", "user_id"),
    ] {
        if number(pool, format!("SELECT count(*) FROM messenger.{table} WHERE {column} = {user}")).await > 0 {
            left.push(format!("{table}.{column}"));
        }
    }
    left
}

/// Everything in every table, as text.
async fn dump(pool: &PgPool) -> String {
    let tables: Vec<String> =
        sqlx::query_scalar("SELECT tablename::text FROM pg_tables WHERE schemaname = 'messenger'")
            .fetch_all(pool)
            .await
            .unwrap();
    let mut all = String::new();
    for table in tables {
        let rows = format!("SELECT coalesce(string_agg(t::text, ' '), '') FROM messenger.{table} AS t");
        all += &sqlx::query_scalar::<_, String>(AssertSqlSafe(rows)).fetch_one(pool).await.unwrap();
    }
    all
}

async fn told(app: &App, user: &ApiUser, kind: &str) -> Vec<Value> {
    let events = app.feed(user.id).await.into_iter();
    events.filter(|(name, _)| name == kind).map(|(_, data)| data).collect()
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn erased_user_leaves_an_id_and_others_are_told(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(api::config::Config { external_issuer: Some(ISSUER.into()), ..config }).await;
    let host = Host { app, token: create(&pool, "crm", "admin,users,publish") };
    let app = &host.app;
    let path = "/api/users/by_subject/s1";
    let put = || app.call("PUT", path).bearer(&host.token).json(&json!({ "username": "john" }));
    put().expect(201).await;
    let john = app.login("john").await;
    let (jane, mary, bob) =
        (app.user(&pool, "jane").await, app.user(&pool, "mary").await, app.user(&pool, "bob").await);

    let direct = john.start("jane").await;
    let first = john.say(&direct, &format!("{MARKER} read")).await;
    jane.say(&direct, "from jane").await;
    let unread = john.post_message(&direct, &format!("{MARKER} unread")).header("idempotency-key", "k");
    let unread = text(&unread.expect(201).await.json()["id"]);
    john.edit_message(&direct, &unread, &format!("{MARKER} edited")).expect(200).await;
    let gone = john.say(&direct, &format!("{MARKER} deleted before")).await;
    john.delete_message(&direct, &gone).expect(204).await;
    jane.call("PUT", &format!("/api/blocks/{}", bob.id)).expect(204).await;
    // What is hidden from bob is nobody's event.
    let hidden = john.start("bob").await;
    bob.call("PUT", &format!("/api/blocks/{}", john.id)).expect(204).await;
    john.say(&hidden, &format!("{MARKER} hidden")).await;
    let owned = john.group("Team", &["jane", "mary"]).await;
    let grouped = john.say(&owned, &format!("{MARKER} grouped")).await;
    mary.messages(&owned, "").expect(200).await;
    let alone = john.group(&format!("{MARKER} title"), &[]).await;
    john.say(&alone, &format!("{MARKER} alone")).await;
    let left = mary.group("Left", &["john", "jane"]).await;
    let before = john.say(&left, &format!("{MARKER} before leaving")).await;
    john.remove(&left, &john).expect(204).await;
    john.call("PUT", &format!("/api/blocks/{}", mary.id)).expect(204).await;
    // Published to john alone, and to both.
    let events = json!([
        { "to": [{ "userId": john.id }], "event": "order.paid", "data": format!("{MARKER} order"), "key": "k" },
        { "to": [{ "userId": john.id }, { "userId": jane.id }], "event": "order.paid", "data": "both" },
    ]);
    app.post("/api/events").bearer(&host.token).json(&json!({ "events": events })).expect(200).await;
    let relayed = "SELECT count(*) FROM messenger.events WHERE data IS NOT NULL AND count = 2";
    until("the events are relayed", || async { number(&pool, relayed).await == 1 }).await;
    execute(&pool, format!("INSERT INTO messenger.last_seen VALUES ({}, now())", john.id)).await;
    let unread_before = jane.auth_user().expect(200).await.json()["unreadTotal"].as_i64().unwrap();

    let mut heard = Listener::start(&redis_url(), &channels.user(jane.id)).await;
    let answer = host.erase(john.id).expect(204).await;
    assert!(answer.body.is_empty());
    assert_problem(&john.auth_user().send().await.unwrap(), 401, "Unauthorized");
    let published = heard.next().await;
    assert_eq!((published.event.as_str(), json!(published.data)), ("user.updated", deleted(john.id)));
    until_erased(&pool).await;
    until("the group without members is emptied", || async { !dump(&pool).await.contains(MARKER) }).await;
    assert_eq!(rows_of(&pool, john.id).await, Vec::<String>::new());
    assert_counts_agree(&pool).await;

    let published = told(app, &jane, "order.paid").await;
    assert_eq!(published, [json!("both")]);
    assert_eq!(
        number(&pool, "SELECT sum(count)::bigint FROM messenger.events WHERE data IS NOT NULL").await,
        1
    );

    // Each message once, to those who could see it.
    let ids = |events: Vec<Value>| events.iter().map(|event| text(&event["id"])).collect::<HashSet<_>>();
    let jane_told = told(app, &jane, "message.deleted").await;
    assert_eq!(jane_told.len(), 5, "one was deleted before");
    assert_eq!(ids(jane_told), [&first, &unread, &gone, &grouped, &before].map(String::clone).into());
    assert_eq!(ids(told(app, &mary, "message.deleted").await), [grouped, before].into());
    assert_eq!(told(app, &bob, "message.deleted").await.len(), 0);
    assert_eq!(told(app, &jane, "user.updated").await, [deleted(john.id)]);
    assert_eq!(told(app, &bob, "user.updated").await.len(), 0, "he blocked john");
    let now = jane.auth_user().expect(200).await.json()["unreadTotal"].as_i64().unwrap();
    assert_eq!(unread_before - now, 4, "those that she had not read");
    let of_group = |events: Vec<Value>, group: &str| {
        events.into_iter().filter(|event| event["conversationId"] == group).collect::<Vec<_>>()
    };
    let left_event = json!({ "conversationId": owned, "userId": john.id });
    assert_eq!(of_group(told(app, &mary, "participant.left").await, &owned), [left_event]);
    let updated = json!({ "conversationId": owned, "userId": jane.id, "role": "owner" });
    assert_eq!(of_group(told(app, &mary, "participant.updated").await, &owned), [updated]);

    // What others see now.
    let shown = jane.conversation(&direct).expect(200).await.json();
    assert_eq!(shown["otherParticipant"], deleted(john.id));
    assert_eq!(jane.other_participant(&direct).expect(200).await.json(), deleted(john.id));
    let pair = jane.participants(&direct, "").expect(200).await.json();
    assert_eq!((pair.as_array().unwrap().len(), &pair[0]["user"]), (2, &deleted(john.id)));
    let messages = jane.messages(&direct, "").expect(200).await.json();
    let contents: Vec<_> =
        messages.as_array().unwrap().iter().map(|m| (&m["content"], m["deletedAt"].is_null())).collect();
    assert_eq!(
        contents,
        [(&json!(""), false), (&json!(""), false), (&json!("from jane"), true), (&json!(""), false)]
    );
    assert_eq!(messages[0]["sender"], deleted(john.id));
    assert_eq!(jane.conversations("").expect(200).await.json().as_array().unwrap().len(), 3);
    assert_eq!(jane.participants(&owned, "").expect(200).await.json().as_array().unwrap().len(), 2);

    // Jane continues alone; her messages reach nobody.
    let mine = jane.say(&direct, "are you there?").await;
    jane.edit_message(&direct, &mine, "hello?").expect(200).await;
    jane.delete_message(&direct, &mine).expect(204).await;
    jane.read_messages(&direct).expect(204).await;
    jane.call("POST", &format!("/api/conversations/{direct}/typing")).expect(204).await;
    jane.call("PATCH", "/api/auth_user")
        .json(&json!({ "avatarURL": "https://a.example/" }))
        .expect(200)
        .await;
    assert_eq!(rows_of(&pool, john.id).await, Vec::<String>::new());
    assert_counts_agree(&pool).await;

    // There is no such user.
    let block = jane.call("PUT", &format!("/api/blocks/{}", john.id)).send().await.unwrap();
    assert_problem(&block, 404, "User not found");
    assert_problem(&jane.start_conversation("john").send().await.unwrap(), 404, "User not found");
    assert_problem(&host.export(john.id).send().await.unwrap(), 404, "User not found");
    assert_eq!(jane.usernames("jo").expect(200).await.json(), json!([]));
    let known = KnownHead { user: john.id, head: None };
    let heads = app.heads(&HeadsRequest { users: vec![known], logins: Vec::new() }).await;
    assert!(heads.heads[0].head.is_none(), "gateways close what is open");
    host.erase(john.id).expect(204).await;
    let again = put().expect(201).await.json();
    assert_ne!(text(&again["id"]), john.id.to_string(), "the same subject is a new user");

    // With the second of the two the conversation goes.
    host.erase(jane.id).expect(204).await;
    until_erased(&pool).await;
    until("the last texts are gone", || async { !dump(&pool).await.contains("from jane") }).await;
    assert_counts_agree(&pool).await;
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn erasing_and_exporting_need_the_scope_and_a_user(pool: PgPool) {
    let host = Host::start(&pool).await;
    let john = host.app.user(&pool, "john").await;
    let lacking = create(&pool, "other", "publish,users");
    for (method, path) in
        [("DELETE", format!("/api/users/{}", john.id)), ("GET", format!("/api/users/{}/export", john.id))]
    {
        for (token, status, code) in [
            (john.token.as_str(), 403, "service_token_required"),
            (&lacking, 403, "scope_required"),
            ("bad", 401, "unauthorized"),
        ] {
            let answer = host.app.call(method, &path).bearer(token).send().await.unwrap();
            assert_eq!((answer.status, &answer.json()["code"]), (status, &json!(code)), "{method} {token}");
        }
    }
    for id in ["999", "no-id", "0", "-1"] {
        for (method, path) in
            [("DELETE", format!("/api/users/{id}")), ("GET", format!("/api/users/{id}/export"))]
        {
            let answer = host.app.call(method, &path).bearer(&host.token).send().await.unwrap();
            assert_problem(&answer, 404, "User not found");
        }
    }
    john.auth_user().expect(200).await;
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn erasing_that_was_begun_is_finished_by_another_process(pool: PgPool) {
    let host = Host::start(&pool).await;
    let (john, jane, direct) = host.app.pair(&pool).await;
    let group = jane.group("Team", &["john"]).await;
    for conversation in [&direct, &group] {
        for nth in 0..6 {
            john.say(conversation, &format!("{MARKER} {nth}")).await;
            jane.say(conversation, &format!("kept {nth}")).await;
        }
    }
    host.app.stop().await;
    // The process that began it ends after each step, whatever it was.
    let begin = format!("SELECT messenger.erase_user({}, 32, 1000, NULL, NULL)", john.id);
    execute(&pool, begin).await;
    for step in 0..7 {
        // One that is rolled back leaves nothing.
        execute(&pool, "BEGIN; SELECT messenger.erase_messages(4, 1); ROLLBACK").await;
        execute(&pool, "SELECT messenger.erase_messages(4, 1)").await;
        let texts =
            number(&pool, format!("SELECT count(*) FROM messenger.messages WHERE content LIKE '{MARKER}%'"))
                .await;
        assert!((5..=12).contains(&texts), "{texts} after step {step}");
    }
    let app = App::start(&pool).await;
    until_erased(&pool).await;
    assert!(!dump(&pool).await.contains(MARKER));
    let deletions = told(&app, &jane, "message.deleted").await;
    let ids: HashSet<_> = deletions.iter().map(|event| text(&event["id"])).collect();
    assert_eq!((deletions.len(), ids.len()), (12, 12), "each once");
    assert_eq!(rows_of(&pool, john.id).await, Vec::<String>::new());
    assert_counts_agree(&pool).await;
    // Nothing is left to do.
    assert_eq!(erase_next(&database(&pool, 1), None).await.unwrap(), None);
    app.stop().await;
}

/// Their transaction began before the erasing and commits after it: the list of conversations that was made at the begin lacks theirs.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn conversations_that_were_being_made_are_left_too(pool: PgPool) {
    let host = Host::start(&pool).await;
    let (john, jane) = (host.app.user(&pool, "john").await, host.app.user(&pool, "jane").await);
    let mut under_way = pool.begin().await.unwrap();
    for made in [
        format!("SELECT messenger.start_conversation(NULL, {}, 'john', NULL, NULL)", jane.id),
        format!(
            "SELECT messenger.create_group(NULL, {}, 'Team', '{{john}}', 10, NULL, NULL, NULL, NULL)",
            jane.id
        ),
    ] {
        sqlx::raw_sql(AssertSqlSafe(made)).execute(&mut *under_way).await.unwrap();
    }
    let commit = async {
        until_waiting_for_locks(&pool, 1).await;
        under_way.commit().await.unwrap();
    };
    tokio::join!(host.erase(john.id).expect(204), commit);
    until_erased(&pool).await;
    assert_eq!(rows_of(&pool, john.id).await, Vec::<String>::new());
    let ids: Vec<String> = sqlx::query_scalar("SELECT id::text FROM messenger.conversations ORDER BY id")
        .fetch_all(&pool)
        .await
        .unwrap();
    let [direct, group] = &ids[..] else { panic!("{ids:?}") };
    for conversation in [direct, group] {
        jane.say(conversation, "hello?").await;
    }
    assert_eq!(jane.participants(group, "").expect(200).await.json().as_array().unwrap().len(), 1);
    assert_eq!(jane.other_participant(direct).expect(200).await.json(), deleted(john.id));
    assert_counts_agree(&pool).await;
    host.app.stop().await;
}

/// Its user was there when it began, and is erased when it gets the lock of the conversation.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn send_that_waits_for_an_erasing_is_refused(pool: PgPool) {
    let host = Host::start(&pool).await;
    let (john, jane, direct) = host.app.pair(&pool).await;
    let group = jane.group("Team", &["john"]).await;
    let mut erasing = pool.begin().await.unwrap();
    for step in [
        format!("SELECT messenger.erase_user({}, 32, 1000, NULL, NULL)", john.id),
        "SELECT messenger.erase_messages(100, 100)".to_owned(),
        "SELECT messenger.erase_messages(100, 100)".to_owned(),
    ] {
        sqlx::raw_sql(AssertSqlSafe(step)).execute(&mut *erasing).await.unwrap();
    }
    let commit = async {
        until_waiting_for_locks(&pool, 2).await;
        erasing.commit().await.unwrap();
    };
    let sends = [&direct, &group].map(|conversation| john.post_message(conversation, MARKER).send());
    let (answers, ()) = tokio::join!(join_all(sends), commit);
    for answer in answers {
        assert_problem(&answer.unwrap(), 404, "Conversation not found");
    }
    until_erased(&pool).await;
    assert!(!dump(&pool).await.contains(MARKER));
    assert_counts_agree(&pool).await;
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn nothing_survives_an_erasing_that_meets_other_commands(pool: PgPool) {
    let host = Host::start(&pool).await;
    let mut users = Vec::new();
    for name in ["john", "jane", "mary", "bob", "eve"] {
        users.push(host.app.user(&pool, name).await);
    }
    let [john, others @ ..] = &users[..] else { unreachable!() };
    let group = john.group("Team", &["jane", "mary"]).await;
    let direct = john.start("jane").await;
    let calls = (0..60).map(|nth| {
        let (group, direct, host) = (&group, &direct, &host);
        async move {
            let other = &others[nth % others.len()];
            match nth % 10 {
                0 | 1 => once_not_busy(|| john.post_message(group, MARKER)).await,
                2 => once_not_busy(|| john.post_message(direct, MARKER)).await,
                3 => once_not_busy(|| john.start_conversation(&other.name)).await,
                4 => once_not_busy(|| other.start_conversation("john")).await,
                5 => once_not_busy(|| other.create_group("New", &["john"])).await,
                6 => once_not_busy(|| john.create_group(MARKER, &["eve"])).await,
                7 => once_not_busy(|| others[0].post_message(group, "hi")).await,
                8 => once_not_busy(|| others[0].post_message(direct, "hi")).await,
                _ if nth == 29 => once_not_busy(|| host.erase(john.id)).await,
                _ => once_not_busy(|| others[0].read_messages(group)).await,
            }
        }
    });
    let answers: Vec<Answer> = join_all(calls).await;
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    assert!(statuses.iter().all(|status| *status < 500), "{statuses:?}");
    until_erased(&pool).await;
    let written =
        format!("SELECT count(*) FROM messenger.messages WHERE sender_id = {} AND content <> ''", john.id);
    assert_eq!(number(&pool, written).await, 0);
    assert_eq!(rows_of(&pool, john.id).await, Vec::<String>::new());
    let member = "SELECT count(*) FROM messenger.participants AS p JOIN messenger.conversations AS c ON c.id = p.conversation_id";
    assert_eq!(
        number(&pool, format!("{member} WHERE p.user_id = {} AND c.user_a IS NULL", john.id)).await,
        0
    );
    assert_counts_agree(&pool).await;
    for user in others {
        host.app.feed(user.id).await;
    }
    host.app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn export_has_what_a_user_wrote_and_their_own_rows(pool: PgPool) {
    let host = Host::start(&pool).await;
    let (john, jane, direct) = host.app.pair(&pool).await;
    execute(
        &pool,
        format!(
            "INSERT INTO messenger.identities (issuer, subject, user_id) VALUES ('{ISSUER}', 's1', {})",
            john.id
        ),
    )
    .await;
    john.say(&direct, "mine").await;
    jane.say(&direct, "hers").await;
    let edited = john.say(&direct, "first").await;
    john.edit_message(&direct, &edited, "second \u{2028} line").expect(200).await;
    let gone = john.say(&direct, "gone").await;
    john.delete_message(&direct, &gone).expect(204).await;
    let group = john.group("Team", &["jane"]).await;
    john.say(&group, "to all").await;
    let was = john.group("Was", &["jane"]).await;
    john.say(&was, "before I left").await;
    john.remove(&was, &john).expect(204).await;
    john.call("PUT", &format!("/api/blocks/{}", jane.id)).expect(204).await;
    // More than a page.
    execute(
        &pool,
        format!(
            "WITH made AS (
                 INSERT INTO messenger.messages (conversation_id, number, sender_id, content)
                 SELECT {direct}, last_number + n, CASE WHEN n % 3 = 0 THEN {} ELSE {} END, 'many ' || n
                 FROM messenger.conversations, generate_series(1, 12000) AS n WHERE id = {direct}
             )
             UPDATE messenger.conversations SET last_number = last_number + 12000 WHERE id = {direct}",
            john.id, jane.id
        ),
    )
    .await;

    let answer = host.export(john.id).expect(200).await;
    assert_eq!(answer.header("content-type"), Some("application/x-ndjson"));
    let body = answer.text();
    assert!(body.ends_with('\n') && !body.contains("hers"));
    let lines: Vec<Value> = body.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |kind: &str| lines.iter().filter(|line| line["type"] == kind).collect::<Vec<_>>();
    assert_eq!((lines[0]["type"].as_str(), lines[0]["username"].as_str()), (Some("user"), Some("john")));
    assert_eq!((of("user").len(), of("end").len(), lines.last().unwrap()), (1, 1, &json!({ "type": "end" })));
    assert_eq!(of("identity")[0]["subject"], "s1");
    assert_eq!(of("session").len(), 1);
    assert_eq!(of("block")[0]["userId"], json!(jane.id));
    let conversations: Vec<_> = of("conversation")
        .iter()
        .map(|line| (line["id"].clone(), line["title"].clone(), line["role"].clone()))
        .collect();
    assert_eq!(
        conversations,
        [
            (json!(direct), json!(null), json!("member")),
            (json!(group), json!("Team"), json!("owner")),
            (json!(was), json!(null), json!(null)),
        ]
    );
    assert_eq!(of("conversation")[0]["otherUserId"], json!(jane.id));
    let contents: Vec<_> = of("message").iter().map(|line| line["content"].as_str().unwrap()).collect();
    assert_eq!(contents.len(), 4_000 + 5);
    assert_eq!(contents[..4], ["mine", "second \u{2028} line", "", "many 3"]);
    assert_eq!(contents[4_002..], ["many 12000", "to all", "before I left"]);
    assert!(!of("message")[2]["deletedAt"].is_null() && !of("message")[1]["editedAt"].is_null());

    // Only the back end may have it, and the head alone has no body.
    host.app.call("HEAD", &format!("/api/users/{}/export", john.id)).bearer(&host.token).expect(200).await;
    let jane_has: Vec<Value> = host
        .export(jane.id)
        .expect(200)
        .await
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(jane_has.iter().all(|line| line["content"] != "mine"));
    host.app.stop().await;
}
