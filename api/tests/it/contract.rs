//! Every endpoint: its success and its particular errors.

use chrono::{DateTime, Utc};
use protocol::{
    claims::{Audience, KeySet},
    position::Position,
};
use serde_json::{Value, json};
use sqlx::PgPool;
use testkit::http::Answer;

use crate::support::{
    ApiUser, App, ORIGIN, ROUTES, add_users, assert_common_headers, assert_problem, assert_unacceptable,
    execute, keys, text,
};

fn cursor(answer: &Answer) -> Position {
    answer.header("feed-cursor").expect("the answer carries Feed-Cursor").parse().unwrap()
}

#[track_caller]
fn assert_json(answer: &Answer, expected: &Value) {
    assert_common_headers(answer);
    assert_eq!(answer.header("content-type"), Some("application/json; charset=utf-8"));
    assert_eq!(&answer.json(), expected);
}

fn time(value: &Value) -> DateTime<Utc> {
    let text = text(value);
    assert!(text.ends_with('Z') && text.len() == "2026-01-02T03:04:05.000006Z".len(), "{text}");
    text.parse().unwrap()
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn login_returns_user_token_and_cookie(pool: PgPool) {
    let app = App::start(&pool).await;
    execute(
        &pool,
        "INSERT INTO messenger.users (username, avatar_url) VALUES ('john', 'https://a.example/j.png')",
    )
    .await;
    let answer = app.post("/api/login").json(&json!({ "username": "john" })).expect(200).await;
    assert_common_headers(&answer);
    let body = answer.json();
    assert_eq!(
        body["authUser"],
        json!({ "id": "1", "username": "john", "avatarURL": "https://a.example/j.png" })
    );
    let claims = keys().verifier().verify(body["token"].as_str().unwrap(), &[Audience::Api]).unwrap();
    assert_eq!((claims.sub.0, claims.iss.as_str()), (1, ORIGIN));
    assert_eq!(time(&body["expiresAt"]).timestamp(), claims.exp);
    assert!((3_500..=3_600).contains(&(claims.exp - claims.iat)), "the configured lifetime");
    let cookie = answer.header("set-cookie").unwrap();
    for part in ["HttpOnly", "SameSite=Lax", "Path=/", "Max-Age="] {
        assert!(cookie.contains(part), "{cookie}");
    }
    assert!(!cookie.contains("Secure"), "ORIGIN is not https here");
    assert_eq!(answer.cookie(), format!("messenger_session={}", body["token"].as_str().unwrap()));
    // The cookie alone is enough.
    app.get("/api/auth_user").header("cookie", &answer.cookie()).expect(200).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn login_by_name_is_off_by_default(pool: PgPool) {
    let app = App::start(&pool).await;
    app.user(&pool, "john").await;
    for name in [json!(" john"), json!("nobody"), json!(""), json!(null), json!("jo\u{0}hn")] {
        let answer = app.post("/api/login").json(&json!({ "username": name })).expect(404).await;
        assert_problem(&answer, 404, "User not found");
    }
    app.stop().await;

    let off = App::with(&pool, |config| config.dev_login = false).await;
    for method in ["GET", "POST"] {
        let answer = off.call(method, "/api/login").json(&json!({ "username": "john" })).expect(404).await;
        assert_problem(&answer, 404, "Not found");
    }
    off.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn cookies_are_secure_if_the_origin_is_https(pool: PgPool) {
    let app = App::with(&pool, |config| config.origin = "https://chat.example".parse().unwrap()).await;
    add_users(&pool, ["john"]).await;
    let answer = app.post("/api/login").json(&json!({ "username": "john" })).expect(200).await;
    let cookie = answer.header("set-cookie").unwrap();
    // Browsers accept a cookie of this name only from this host over https.
    assert!(cookie.starts_with("__Host-messenger_session="), "{cookie}");
    assert!(cookie.contains("; Path=/; ") && !cookie.contains("Domain") && cookie.ends_with("; Secure"));
    app.get("/api/auth_user").header("cookie", &answer.cookie()).expect(200).await;
    let plain = answer.cookie().replace("__Host-", "");
    app.get("/api/auth_user").header("cookie", &plain).expect(401).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn auth_user_returns_the_caller_and_their_cursor(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    let before = john.auth_user().expect(200).await;
    let caller = |unread: i64| {
        json!({
            "id": john.id, "username": "john", "avatarURL": null, "unreadTotal": unread, "sharesPresence": true,
            "addableBy": "everybody",
        })
    };
    assert_json(&before, &caller(0));
    assert_eq!(cursor(&before).seq, 0);
    let jane = app.user(&pool, "jane").await;
    let conversation = john.start("jane").await;
    let after = john.auth_user().expect(200).await;
    assert_eq!(cursor(&after), Position { seq: 1, ..cursor(&before) });
    // Over all conversations, as of that cursor.
    let bob = app.user(&pool, "bob").await;
    let other = bob.start("john").await;
    jane.say(&conversation, "1").await;
    jane.say(&conversation, "2").await;
    bob.say(&other, "3").await;
    let unread = john.auth_user().expect(200).await;
    assert_json(&unread, &caller(3));
    assert_eq!(cursor(&unread).seq, 5);
    john.read_messages(&conversation).expect(204).await;
    john.say(&other, "own messages are read").await;
    assert_json(&john.auth_user().expect(200).await, &caller(1));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn token_is_rejected_once_its_user_or_session_is_gone(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    let (bob, ann) = (app.user(&pool, "bob").await, app.user(&pool, "ann").await);
    john.set_session(&pool, "revoked_at = now()").await;
    jane.set_session(&pool, "expires_at = now()").await;
    execute(&pool, format!("DELETE FROM messenger.users WHERE id = {}", bob.id)).await;
    for gone in [&john, &jane, &bob] {
        let calls = ROUTES.map(|route| gone.call_route(route, "1", &ann));
        for call in calls.into_iter().chain([gone.post_message("1", "hi")]) {
            let answer = call.expect(401).await;
            assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            if !answer.body.is_empty() {
                assert_problem(&answer, 401, "Unauthorized");
            }
        }
    }
    let stolen = ann.forge(|claims| claims.sub = john.id);
    assert_problem(&app.get("/api/auth_user").bearer(&stolen).send().await.unwrap(), 401, "Unauthorized");
    ann.auth_user().expect(200).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn only_our_own_unexpired_api_tokens_are_accepted(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    let good = john.token.clone();
    let expired = john.forge(|claims| claims.exp = Utc::now().timestamp() - 1);
    let stream = john.forge(|claims| claims.aud = Audience::Stream);
    let issuer = john.forge(|claims| claims.iss = "http://elsewhere".into());
    for token in ["", "x", "a.b.c", &format!("{good}x"), &good[..good.len() - 4], &expired, &stream, &issuer]
    {
        let answer = app.get("/api/auth_user").bearer(token).send().await.unwrap();
        assert_problem(&answer, 401, "Unauthorized");
    }
    assert_problem(&app.get("/api/auth_user").send().await.unwrap(), 401, "Unauthorized");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn refresh_extends_session_token_and_cookie(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    execute(&pool, "UPDATE messenger.sessions SET expires_at = now() + interval '5 s', last_used_at = now() - interval '1 h'").await;
    let answer = john.refresh_token().expect(200).await;
    assert_common_headers(&answer);
    let body = answer.json();
    assert!(body.get("authUser").is_none());
    let claims = keys().verifier().verify(body["token"].as_str().unwrap(), &[Audience::Api]).unwrap();
    assert_eq!((claims.sub, claims.sid), (john.id, Some(john.session())));
    assert_eq!(time(&body["expiresAt"]).timestamp(), claims.exp);
    assert_eq!(answer.cookie(), format!("messenger_session={}", body["token"].as_str().unwrap()));
    let (left, used): (f64, bool) = sqlx::query_as(
        "SELECT extract(epoch FROM expires_at - now())::float8, last_used_at > now() - interval '1 min' FROM messenger.sessions",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!((3_500.0..=3_600.0).contains(&left) && used);
    assert!(claims.exp as f64 <= Utc::now().timestamp() as f64 + left + 1.0, "never past its session");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn both_listeners_serve_the_keys_that_verify_our_tokens(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    for base in [&app.public, &app.internal] {
        let answer = app.client.get(format!("{base}/.well-known/jwks.json")).expect(200).await;
        assert_common_headers(&answer);
        let jwks = answer.json();
        assert!(jwks["keys"][0].get("d").is_none(), "the private half stays here");
        let verifier = KeySet::from_jwks(ORIGIN, &serde_json::from_value(jwks).unwrap());
        assert!(verifier.verify(&john.token, &[Audience::Api]).is_ok());
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn names_are_found_by_prefix(pool: PgPool) {
    let app = App::start(&pool).await;
    let me = app.user(&pool, "anna_me").await;
    execute(&pool, r"INSERT INTO messenger.users (username) VALUES ('Anna'), ('anne'), ('ANNIE'), ('ann'), ('annabel'), ('annika'), ('bob'),
          ('50%'), ('50_'), ('500'), ('a\b'), ('x y')").await;
    for (search, found) in [
        ("ann", json!(["ann", "Anna", "annabel", "anne", "ANNIE"])),
        ("%20ANNI%09", json!(["ANNIE", "annika"])),
        ("anna_", json!([])),
        ("%25", json!([])),
        ("_", json!([])),
        ("50%25", json!(["50%"])),
        ("50_", json!(["50_"])),
        ("a%5C", json!([r"a\b"])),
        ("x+y", json!(["x y"])),
        ("bobby", json!([])),
        ("b%00", json!([])),
        ("%ff", json!([])),
    ] {
        assert_json(&me.usernames(search).expect(200).await, &found);
    }
    for nothing in ["", "%20%09", "+"] {
        assert_unacceptable(&me.usernames(nothing).expect(422).await, "search", "Search required");
    }
    assert_unacceptable(&me.call("GET", "/api/usernames").expect(422).await, "search", "Search required");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn starting_a_conversation_creates_it_once_for_both(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    let seen_by = |other: &str, id: &str| {
        json!({
            "id": "1", "kind": "direct", "title": null, "participantCount": 2, "role": "member",
            "otherParticipant": { "id": id, "username": other, "avatarURL": null }, "lastMessage": null,
            "hasUnreadMessages": false, "unreadCount": 0, "lastReadMessageId": null, "otherLastReadMessageId": null,
        })
    };
    let created = john.start_conversation(" jane\n").expect(201).await;
    assert_json(&created, &seen_by("jane", "2"));
    assert_json(&john.conversation("1").expect(200).await, &seen_by("jane", "2"));
    assert_json(&jane.conversation("1").expect(200).await, &seen_by("john", "1"));
    assert_eq!(app.feed(john.id).await, [("conversation.created".into(), seen_by("jane", "2"))]);
    assert_eq!(app.feed(jane.id).await, [("conversation.created".into(), seen_by("john", "1"))]);

    for (who, other) in [(&john, "jane"), (&jane, "john")] {
        let again = who.start_conversation(other).expect(302).await;
        assert_common_headers(&again);
        assert_eq!(again.header("location"), Some("/api/conversations/1"));
    }
    assert_eq!(app.feed(john.id).await.len(), 1);

    for empty in
        [json!({ "username": "" }), json!({ "username": " \n" }), json!({ "username": null }), json!({})]
    {
        let answer = john.call("POST", "/api/conversations").json(&empty).expect(422).await;
        assert_unacceptable(&answer, "username", "Username required");
    }
    let oneself = john.start_conversation("john").send().await.unwrap();
    assert_problem(&oneself, 403, "You cannot start a conversation with yourself");
    for nobody in ["nobody", "ja\0ne"] {
        assert_problem(&john.start_conversation(nobody).expect(404).await, 404, "User not found");
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn sent_message_reaches_both_users_as_each_sees_it(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let content = "hello\t \"jane\" \u{2028}.";
    let call = john.post_message(&conversation, "hello\t \"jane\" \u{2028}. ");
    let posted = call.header("idempotency-key", "k-1").expect(201).await;
    let at = posted.json()["createdAt"].clone();
    time(&at);
    let sender = json!({ "id": john.id, "username": "john", "avatarURL": null });
    let seen = |mine| {
        json!({
            "id": "1", "content": content, "conversationId": "1", "sender": sender, "createdAt": at, "editedAt": null,
            "deletedAt": null, "mine": mine,
        })
    };
    assert_json(&posted, &seen(true));
    assert!(posted.header("idempotent-replayed").is_none());

    let (mut sent, received) = (seen(true), seen(false));
    // Keys are not stored: only the event that is published has it.
    sent["idempotencyKey"] = Value::Null;
    assert_eq!(app.feed(john.id).await[1..], [("message.sent".into(), sent)]);
    assert_eq!(app.feed(jane.id).await[1..], [("message".into(), received)]);

    // Inside a conversation the message has no conversationId.
    let last = |mine| {
        let mut last = seen(mine);
        last.as_object_mut().unwrap().remove("conversationId");
        last
    };
    let johns = john.conversation(&conversation).expect(200).await.json();
    assert_eq!((&johns["lastMessage"], &johns["unreadCount"]), (&last(true), &json!(0)));
    assert_eq!(johns["hasUnreadMessages"], false);
    let janes = jane.conversation(&conversation).expect(200).await.json();
    assert_eq!((&janes["lastMessage"], &janes["unreadCount"]), (&last(false), &json!(1)));
    assert_eq!(janes["hasUnreadMessages"], true);
    assert_eq!(jane.conversations("").expect(200).await.json(), json!([janes]));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn content_is_normalised(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, _, conversation) = app.pair(&pool).await;
    // The rules have a test beside them.
    let accepted = [
        ("  a\r\n\r\n\n \t b  c ", "  a\n\n \t b  c"),
        ("x\u{a0}\u{a0}y\u{a0}", "x\u{a0}\u{a0}y"),
        ("<b>&amp;</b>", "<b>&amp;</b>"),
        (&format!("{}  ", "😀".repeat(4_000)), &"😀".repeat(4_000)),
    ];
    for (input, kept) in accepted {
        let answer = john.post_message(&conversation, input).expect(201).await;
        assert_eq!(answer.json()["content"], kept, "{input:?}");
        let listed = john.messages(&conversation, "?limit=1").expect(200).await.json();
        assert_eq!(listed[0]["content"], kept);
    }

    let path = format!("/api/conversations/{conversation}/messages");
    for (body, sentence) in [
        (json!({ "content": " \n \t " }), "Message content required"),
        (json!({ "content": null }), "Message content required"),
        (json!({}), "Message content required"),
        (json!({ "content": "\u{200b}\u{2800}" }), "Message content required"),
        (json!({ "content": "é".repeat(4_001) }), "Message too long. 4000 max"),
        (json!({ "content": "a\0b" }), "Message must not contain the character U+0000"),
    ] {
        let answer = john.call("POST", &path).json(&body).expect(422).await;
        assert_unacceptable(&answer, "content", sentence);
    }
    app.stop().await;

    let app = App::with(&pool, |config| config.longest_message = 5).await;
    let john = john.at(&app);
    assert_json(
        &app.get("/api/limits").bearer("no token").expect(200).await,
        &json!({ "maxMessageLength": 5, "maxGroupSize": 1_000, "editWindowSeconds": 86_400 }),
    );
    john.post_message(&conversation, "12345").expect(201).await;
    let answer = john.post_message(&conversation, "123456").expect(422).await;
    assert_unacceptable(&answer, "content", "Message too long. 5 max");
    // Each code point in the longest form that JSON has: as two escapes.
    let body = |escapes: usize| {
        format!(r#"{{"content":"{}","padding":"{}"}}"#, r"\ud83d\ude00".repeat(escapes), "x".repeat(900))
    };
    let post = |body| john.call("POST", &path).header("content-type", "application/json").body(body);
    post(body(5)).expect(201).await;
    post(body(15)).expect(413).await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn repeated_key_returns_the_same_message_without_events(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    app.user(&pool, "bob").await;
    let other = john.start("bob").await;
    let post = |conversation: &str, content: &str, key: &str| {
        john.post_message(conversation, content).header("idempotency-key", key)
    };
    let first = post(&conversation, "hi", "key!").expect(201).await;
    // Equal once normalised.
    for content in ["hi", "\nhi \n"] {
        let again = post(&conversation, content, "key!").expect(201).await;
        assert_eq!(again.body, first.body);
        assert_eq!(again.header("idempotent-replayed"), Some("true"));
    }
    for conflict in [post(&conversation, "ho", "key!"), post(&other, "hi", "key!"), post("999", "hi", "key!")]
    {
        let sentence = "Idempotency-Key was already used for another message";
        assert_unacceptable(&conflict.expect(422).await, "idempotencyKey", sentence);
    }
    // Keys are per sender and case-sensitive.
    jane.post_message(&conversation, "hi").header("idempotency-key", "key!").expect(201).await;
    assert_ne!(post(&conversation, "hi", "KEY!").expect(201).await.body, first.body);
    assert_eq!(app.feed(john.id).await.len(), 2 + 3);

    for bad in ["", "a b", &"k".repeat(129)] {
        let sentence = "Idempotency-Key must be 1 to 128 visible ASCII characters";
        assert_unacceptable(&post(&conversation, "hi", bad).expect(422).await, "idempotencyKey", sentence);
    }
    let twice = post(&conversation, "hi", "a").header("idempotency-key", "b").expect(422).await;
    assert_eq!(twice.json()["errors"].as_object().unwrap().len(), 1);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn conversation_is_visible_to_its_participants_only(pool: PgPool) {
    let app = App::start(&pool).await;
    let (_, _, conversation) = app.pair(&pool).await;
    let bob = app.user(&pool, "bob").await;
    for id in
        [conversation.as_str(), "999", "0", "-1", "01", "x", "1.0", "9223372036854775808", "%31", "1%00"]
    {
        for call in [
            bob.conversation(id),
            bob.other_participant(id),
            bob.messages(id, ""),
            bob.post_message(id, "hi"),
            bob.read_messages(id),
        ] {
            assert_problem(&call.send().await.unwrap(), 404, "Conversation not found");
        }
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn other_participant_is_the_other_user(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    for (who, other) in [(&john, &jane), (&jane, &john)] {
        let answer = who.other_participant(&conversation).expect(200).await;
        assert_json(&answer, &json!({ "id": other.id, "username": other.name, "avatarURL": null }));
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn reading_a_page_moves_the_read_position_to_its_newest_message(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    for n in 1..=4 {
        john.say(&conversation, &format!("m{n}")).await;
    }
    let state = async |who: &ApiUser| {
        let seen = who.conversation(&conversation).expect(200).await.json();
        let value = |name| seen[name].clone();
        (value("unreadCount"), value("lastReadMessageId"), value("otherLastReadMessageId"))
    };
    let quiet = [
        jane.messages(&conversation, "?markRead=false"),
        jane.messages(&conversation, "").header("sec-fetch-site", "cross-site"),
        jane.call("HEAD", &format!("/api/conversations/{conversation}/messages")),
        jane.messages(&conversation, "?before=1"),
    ];
    for call in quiet {
        call.expect(200).await;
        assert_eq!(state(&jane).await, (json!(4), Value::Null, Value::Null));
    }
    let page = jane.messages(&conversation, "?before=3").expect(200).await;
    assert_eq!(cursor(&page).seq, 5, "the position before the read, and before its own event");
    assert_eq!(state(&jane).await, (json!(2), json!("2"), Value::Null));
    assert_eq!(state(&john).await, (json!(0), Value::Null, json!("2")));
    // Only forward; without a move there is no event.
    jane.messages(&conversation, "?before=2").expect(200).await;
    jane.messages(&conversation, "?before=3&markRead=true").expect(200).await;
    assert_eq!(state(&jane).await.1, "2");
    jane.messages(&conversation, "?after=2&limit=1").expect(200).await;
    assert_eq!(state(&jane).await, (json!(1), json!("3"), Value::Null));

    jane.read_messages(&conversation).expect(204).await;
    jane.read_messages(&conversation).expect(204).await;
    assert_eq!(state(&jane).await, (json!(0), json!("4"), Value::Null));
    let read = |id: &str, unread: i64| {
        let data = json!({ "conversationId": "1", "lastReadMessageId": id, "unreadCount": unread });
        ("conversation.read".to_owned(), data)
    };
    assert_eq!(app.feed(jane.id).await[5..], [read("2", 2), read("3", 1), read("4", 0)]);
    let receipt = |id: &str| {
        let data = json!({ "conversationId": "1", "userId": jane.id, "lastReadMessageId": id });
        ("receipt.read".to_owned(), data)
    };
    assert_eq!(app.feed(john.id).await[5..], [receipt("2"), receipt("3"), receipt("4")]);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn own_messages_are_never_unread(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    john.say(&conversation, "1").await;
    jane.say(&conversation, "2").await;
    john.say(&conversation, "3").await;
    jane.say(&conversation, "4").await;
    let unread = async || {
        let seen = [
            john.conversation(&conversation).expect(200).await,
            jane.conversation(&conversation).expect(200).await,
        ];
        seen.map(|seen| seen.json()["unreadCount"].as_i64().unwrap())
    };
    assert_eq!(unread().await, [2, 2]);
    john.messages(&conversation, "?before=3").expect(200).await;
    assert_eq!(unread().await, [1, 2]);
    jane.messages(&conversation, "").expect(200).await;
    assert_eq!(unread().await, [1, 0]);
    john.say(&conversation, "5").await;
    assert_eq!(unread().await, [1, 1]);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn reading_an_empty_conversation_publishes_nothing(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    assert_json(&john.messages(&conversation, "").expect(200).await, &json!([]));
    let answer = john.read_messages(&conversation).expect(204).await;
    assert_common_headers(&answer);
    assert!(answer.body.is_empty());
    assert_eq!((app.feed(john.id).await.len(), app.feed(jane.id).await.len()), (1, 1));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn out_of_range_parameters_are_named(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, _, conversation) = app.pair(&pool).await;
    john.say(&conversation, "hi").await;
    let bob = app.user(&pool, "bob").await;
    let elsewhere = bob.say(&bob.start("john").await, "in another conversation").await;
    for limit in ["0", "101", "-1", "ten", "99999999999999999999"] {
        let answer = john.messages(&conversation, &format!("?limit={limit}")).expect(422).await;
        assert_unacceptable(&answer, "limit", "Limit must be from 1 to 100");
    }
    for (query, field, sentence) in [
        ("?before=x", "before", "No such message"),
        ("?after=-1", "after", "No such message"),
        ("?before=01", "before", "No such message"),
        ("?before=999999", "before", "No such message"),
        ("?after=999999", "after", "No such message"),
        (&format!("?before={elsewhere}"), "before", "No such message"),
        (&format!("?after={elsewhere}"), "after", "No such message"),
        ("?markRead=no", "markRead", "markRead must be true or false"),
    ] {
        assert_unacceptable(&john.messages(&conversation, query).expect(422).await, field, sentence);
    }
    for fine in ["limit=1", "limit=100", "before=", "before=1&after=1", "unknown=1", "%ff=%zz&&=&"] {
        john.messages(&conversation, &format!("?{fine}")).expect(200).await;
    }
    let not_listed = bob.start("jane").await;
    for before in ["x", "999", "0", not_listed.as_str()] {
        let answer = john.conversations(&format!("?before={before}")).expect(422).await;
        assert_unacceptable(&answer, "before", "No such conversation");
    }
    // Their conversation without messages is not in the list: nothing follows it.
    assert_json(&bob.conversations(&format!("?before={not_listed}")).expect(200).await, &json!([]));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn lists_carry_the_cursor_from_before_the_read(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    assert_json(&jane.conversations("").expect(200).await, &json!([]));
    for n in 0..3 {
        john.say(&conversation, "hi").await;
        for answer in [
            jane.conversations("").expect(200).await,
            jane.messages(&conversation, "?markRead=false").expect(200).await,
        ] {
            assert_eq!(cursor(&answer).seq, 2 + n);
        }
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn request_id_is_in_the_answer_and_the_event(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let answer = john
        .post_message(&conversation, "hi")
        .header("x-request-id", "my_request-1")
        .header("traceparent", traceparent)
        .expect(201)
        .await;
    assert_eq!(answer.header("x-request-id"), Some("my_request-1"));
    let other = john.post_message(&conversation, "ho").header("x-request-id", "not good");
    let other = other.header("traceparent", "x").expect(201).await;
    let made = other.header("x-request-id").unwrap();
    assert_ne!(made, "not good");
    let range = protocol::feed::RangeAfter { user: jane.id, after: 1 };
    let events = app.ranges(vec![range]).await.ranges.remove(0).events;
    assert_eq!(events[0].request_id.as_deref(), Some("my_request-1"));
    assert_eq!(events[0].traceparent.as_deref(), Some(traceparent));
    assert_eq!(events[1].request_id.as_deref(), Some(made));
    assert_eq!(events[1].traceparent, None);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn openapi_document_is_public_and_complete(pool: PgPool) {
    let app = App::start(&pool).await;
    let document = app.call("GET", "/api/openapi.json").expect(200).await;
    assert_common_headers(&document);
    let document = document.json();
    for (path, methods) in document["paths"].as_object().unwrap() {
        if path == "/api/messages" {
            continue; // The gateway's.
        }
        let path = path.replace("{provider}", "github").replace("{conversationId}", "1");
        let path = path.replace("{sessionId}", "1").replace("{userId}", "1").replace("{messageId}", "1");
        for method in methods.as_object().unwrap().keys() {
            let answer = app.call(&method.to_uppercase(), &path).send().await.unwrap();
            assert_ne!(answer.status, 405, "{method} {path}");
        }
        if !path.contains("github") {
            let answer = app.call("TRACE", &path).send().await.unwrap();
            assert_problem(&answer, 405, "Method not allowed");
        }
    }
    app.stop().await;
}
