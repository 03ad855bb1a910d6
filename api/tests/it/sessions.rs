//! Sessions: listing and ending them, their last use, and stream tokens.

use std::time::Duration;

use api::{
    config::Lifetimes,
    last_used::{COARSE, LastUsed},
    pruner::prune_sessions_after,
};
use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use protocol::{
    claims::{Audience, Claims},
    event::Revoked,
    feed::{HeadsRequest, Login},
    ids::SessionId,
};
use serde_json::{Value, json};
use sqlx::PgPool;
use testkit::http::Answer;

use crate::{
    failures::{Listener, metric, with_redis},
    support::{
        ApiUser, App, ORIGIN, ROUTES, add_users, assert_common_headers, assert_problem, database, execute,
        keys, number, once_not_busy, redis_url, text,
    },
};

/// Pairs of id and device, and the index of the current session.
async fn listed(user: &ApiUser) -> (Vec<(String, String)>, Option<usize>) {
    let answer = user.call("GET", "/api/sessions").expect(200).await;
    assert_common_headers(&answer);
    let Value::Array(list) = answer.json() else { panic!("a list") };
    let mut current = list.iter().enumerate().filter(|(_, session)| session["current"] == true);
    let place = current.next().map(|(place, _)| place);
    assert!(current.next().is_none(), "one is the current one");
    let pairs = list.iter().map(|session| {
        assert_eq!(session.as_object().unwrap().len(), 5, "{session}");
        let time = |name: &str| session[name].as_str().unwrap().parse::<DateTime<Utc>>().unwrap();
        assert!(time("createdAt") <= time("lastUsedAt"));
        (text(&session["id"]), text(&session["device"]))
    });
    (pairs.collect(), place)
}

fn id(user: &ApiUser) -> String {
    user.session().to_string()
}

fn login(user: &ApiUser) -> Login {
    Login { user: user.id, session: user.session() }
}

async fn is_refused(user: &ApiUser) -> bool {
    user.auth_user().send().await.unwrap().status == 401
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn sessions_are_listed_by_last_use(pool: PgPool) {
    let app = App::start(&pool).await;
    app.user(&pool, "jane").await;
    app.user(&pool, "john").await;
    let login = async |user_agent: &str| {
        let call = app.post("/api/login").json(&json!({ "username": "john" }));
        text(&call.header("user-agent", user_agent).expect(200).await.json()["token"])
    };
    let firefox = login("Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0").await;
    login("<script>alert(1)</script>").await;
    let phone = app.login("john").await;
    let expired = app.login("john").await;
    let revoked = app.login("john").await;
    expired.set_session(&pool, "expires_at = now()").await;
    revoked.set_session(&pool, "revoked_at = now()").await;
    phone.set_session(&pool, "last_used_at = now() + interval '1 s', device = ''").await;
    let (list, current) = listed(&phone).await;
    let devices: Vec<_> = list.iter().map(|(_, device)| device.as_str()).collect();
    // The last is the session that `app.user` began.
    assert_eq!(devices, ["Unknown device", "Unknown device", "Firefox on Linux", "Unknown device"]);
    assert_eq!((list[0].0.as_str(), current), (id(&phone).as_str(), Some(0)));
    // From another session the list is the same, and that one is current.
    let answer = app.get("/api/sessions").bearer(&firefox).expect(200).await;
    assert_eq!(answer.json()[2]["current"], true);
    assert_eq!(answer.json()[0]["current"], false);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn ended_session_is_rejected_by_every_replica_and_published(pool: PgPool) {
    let (config_one, channels) = with_redis(&pool, &redis_url());
    let one = App::start_with(config_one).await;
    let other = App::start(&pool).await;
    let john = one.user(&pool, "john").await;
    let (phone, tablet, desk) = (one.login("john").await, one.login("john").await, one.login("john").await);
    let jane = one.user(&pool, "jane").await;
    let mut heard = Listener::start(&redis_url(), &channels.user(john.id)).await;
    let ended = async |heard: &mut Listener| heard.next_as::<Revoked>().await.revoked;

    phone.at(&other).auth_user().expect(200).await;
    let answer = john.call("DELETE", &format!("/api/sessions/{}", id(&phone))).expect(204).await;
    assert!(answer.body.is_empty());
    assert_common_headers(&answer);
    assert_eq!(ended(&mut heard).await, phone.session());
    assert!(is_refused(&phone).await && is_refused(&phone.at(&other)).await);
    assert_eq!(listed(&john).await.0.len(), 3);

    john.call("DELETE", "/api/sessions").expect(204).await;
    let mut both = [ended(&mut heard).await, ended(&mut heard).await];
    both.sort();
    assert_eq!(both, [tablet.session(), desk.session()]);
    for gone in [&tablet, &desk] {
        assert!(is_refused(gone).await && is_refused(&gone.at(&other)).await);
    }
    assert_eq!(listed(&john).await, (vec![(id(&john), "Unknown device".into())], Some(0)));
    john.call("DELETE", "/api/sessions").expect(204).await;

    let answer = john.call("POST", "/api/logout").expect(204).await;
    assert_eq!(
        answer.header("set-cookie"),
        Some("messenger_session=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"),
        "the attributes are those of the login"
    );
    assert_eq!(ended(&mut heard).await, john.session());
    assert!(is_refused(&john.at(&other)).await);
    for gone in [john.call("POST", "/api/logout"), john.call("GET", "/api/sessions")] {
        assert_problem(&gone.send().await.unwrap(), 401, "Unauthorized");
    }
    // No other user's.
    jane.at(&other).auth_user().expect(200).await;
    one.stop().await;
    other.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn only_live_sessions_of_the_caller_can_be_ended(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane) = (app.user(&pool, "john").await, app.user(&pool, "jane").await);
    let (gone, expired) = (app.login("john").await, app.login("john").await);
    john.call("DELETE", &format!("/api/sessions/{}", id(&gone))).expect(204).await;
    expired.set_session(&pool, "expires_at = now()").await;
    for other in [id(&jane), id(&gone), id(&expired), "999".into(), "0".into(), "no-id".into()] {
        let answer = john.call("DELETE", &format!("/api/sessions/{other}")).send().await.unwrap();
        assert_problem(&answer, 404, "Not found");
        // The caller's own session is checked first.
        let answer = gone.call("DELETE", &format!("/api/sessions/{other}")).send().await.unwrap();
        assert_problem(&answer, 401, "Unauthorized");
    }
    jane.auth_user().expect(200).await;
    // The caller may end their own session.
    john.call("DELETE", &format!("/api/sessions/{}", id(&john))).expect(204).await;
    assert!(is_refused(&john).await);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn other_origins_can_neither_end_sessions_nor_get_tokens(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    let one = format!("/api/sessions/{}", id(&john));
    for (method, path) in [
        ("DELETE", "/api/sessions"),
        ("DELETE", &*one),
        ("DELETE", "/api/sessions/no-id"),
        ("POST", "/api/logout"),
        ("POST", "/api/stream_token"),
    ] {
        let call = |cookie: &str| app.call(method, path).header("cookie", cookie);
        for other_site in [call(&john.cookie), call(&john.cookie).header("origin", "http://evil.example")] {
            assert_eq!(other_site.expect(403).await.json()["code"], "origin_not_allowed");
        }
        // 401 goes before 403.
        let invalid = call("messenger_session=x").header("origin", "http://evil.example");
        assert_problem(&invalid.send().await.unwrap(), 401, "Unauthorized");
    }
    john.auth_user().expect(200).await;
    app.post("/api/stream_token").header("cookie", &john.cookie).header("origin", ORIGIN).expect(200).await;
    app.post("/api/logout").header("cookie", &john.cookie).header("origin", ORIGIN).expect(204).await;
    assert!(is_refused(&john).await);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn sessions_ending_each_other_do_not_deadlock(pool: PgPool) {
    let app = App::start(&pool).await;
    for _ in 0..5 {
        let mut sessions = vec![app.user(&pool, "john").await];
        for _ in 0..7 {
            sessions.push(app.login("john").await);
        }
        let calls = sessions.iter().map(|session| once_not_busy(|| session.call("DELETE", "/api/sessions")));
        let answers = join_all(calls).await;
        assert!(answers.iter().all(|answer| [204, 401].contains(&answer.status)));
        assert!(answers.iter().any(|answer| answer.status == 204));
    }
    assert_eq!(metric(&app, "messenger_api_database_conflicts_total").await, Some(0));
    app.stop().await;
}

async fn last_used(pool: &PgPool, user: &ApiUser) -> DateTime<Utc> {
    sqlx::query_scalar("SELECT last_used_at FROM messenger.sessions WHERE id = $1")
        .bind(user.session().0)
        .fetch_one(pool)
        .await
        .unwrap()
}

async fn age(pool: &PgPool, by: Duration) {
    let seconds = by.as_secs();
    execute(pool, format!("UPDATE messenger.sessions SET last_used_at = now() - interval '{seconds} s'"))
        .await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn token_with_another_users_session_is_rejected(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    john.say(&conversation, "hi").await;
    age(&pool, COARSE + Duration::from_secs(1)).await;
    let before = last_used(&pool, &jane).await;
    // A valid signature over john's id and jane's live session.
    let impostor = john.bearing(john.forge(|claims| claims.sid = Some(jane.session())));
    for route in ROUTES {
        let answer = impostor.call_route(route, &conversation, &jane).send().await.unwrap();
        assert_eq!(answer.status, 401, "{route}: {}", answer.text());
    }
    impostor.post_message(&conversation, "hi").expect(401).await;
    john.auth_user().expect(200).await;
    app.stop().await;
    assert_eq!(last_used(&pool, &jane).await, before, "another's token is no use of a session");
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn last_use_needs_no_write_per_request(pool: PgPool) {
    let app = App::start(&pool).await;
    let reader = app.user(&pool, "john").await;
    let (writer, streamer, idle) =
        (app.login("john").await, app.login("john").await, app.login("john").await);
    age(&pool, COARSE + Duration::from_secs(1)).await;
    let before = last_used(&pool, &idle).await;
    for _ in 0..3 {
        reader.auth_user().expect(200).await;
        writer.start_conversation("nobody").expect(404).await;
        // A gateway requests the sessions of its streams.
        let logins = vec![login(&streamer)];
        app.heads(&HeadsRequest { logins, ..HeadsRequest::default() }).await;
    }
    for user in [&reader, &writer, &streamer] {
        assert_eq!(last_used(&pool, user).await, before, "nothing was written yet");
    }
    app.stop().await;
    // Notes are written at shutdown too.
    for user in [&reader, &writer, &streamer] {
        assert!(last_used(&pool, user).await > before + COARSE);
    }
    assert_eq!(last_used(&pool, &idle).await, before);
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn last_use_moves_coarsely_and_for_live_sessions_only(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, gone) = (app.user(&pool, "john").await, app.login("john").await);
    let jane = app.user(&pool, "jane").await;
    gone.call("POST", "/api/logout").expect(204).await;
    let database = database(&pool, 1);
    let moved = async || {
        let used = LastUsed::default();
        used.note(login(&john));
        used.note(login(&gone));
        used.note(Login { user: john.id, session: SessionId(999) });
        // Another user's session.
        used.note(Login { user: john.id, session: jane.session() });
        let moved = used.write(&database).await.unwrap();
        // A written session is not written again for a while.
        used.note(login(&john));
        assert_eq!(used.write(&database).await.unwrap(), 0);
        moved
    };
    age(&pool, COARSE.checked_sub(Duration::from_mins(1)).unwrap()).await;
    assert_eq!(moved().await, 0, "recent enough");
    age(&pool, COARSE + Duration::from_secs(1)).await;
    assert_eq!(moved().await, 1);
    assert_eq!(moved().await, 0);
    database.close().await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn old_ended_sessions_are_deleted_in_steps(pool: PgPool) {
    add_users(&pool, ["john"]).await;
    execute(&pool, "INSERT INTO messenger.sessions (user_id, expires_at, revoked_at)
         SELECT 1,
                now() + CASE n % 5 WHEN 0 THEN interval '-8 d' WHEN 1 THEN interval '-6 d' ELSE interval '1 d' END,
                now() + CASE n % 5 WHEN 2 THEN interval '-8 d' WHEN 3 THEN interval '-6 d' END
         FROM generate_series(1, 2500) AS n").await;
    let database = database(&pool, 1);
    for round in [vec![400, 400, 200, 0], vec![0, 0, 0]] {
        let (mut after, mut deleted) = (Some(SessionId(0)), Vec::new());
        while let Some(place) = after {
            let (now, next) = prune_sessions_after(&database, place).await.unwrap();
            deleted.push(now);
            after = next;
        }
        assert_eq!(deleted, round);
    }
    let left = number(&pool, "SELECT count(*) FROM messenger.sessions").await;
    assert_eq!(left, 1_500);
    database.close().await;
}

fn stream_claims(answer: &Answer) -> Claims {
    let body = answer.json();
    assert_eq!(body.as_object().unwrap().len(), 2, "{body}");
    let claims = keys().verifier().verify(body["token"].as_str().unwrap(), &[Audience::Stream]).unwrap();
    let expires_at: DateTime<Utc> = body["expiresAt"].as_str().unwrap().parse().unwrap();
    assert_eq!(expires_at.timestamp(), claims.exp);
    claims
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn stream_token_is_for_streams_and_ends_with_its_session(pool: PgPool) {
    let lifetimes = Lifetimes { session: Duration::from_hours(1), stream_token: Duration::from_mins(2) };
    let app = App::with(&pool, |config| config.lifetimes = lifetimes).await;
    let john = app.user(&pool, "john").await;
    let answer = john.call("POST", "/api/stream_token").expect(200).await;
    assert_common_headers(&answer);
    assert_eq!(answer.header("set-cookie"), None);
    let claims = stream_claims(&answer);
    assert_eq!((claims.sub, claims.sid), (john.id, Some(john.session())));
    assert_eq!(claims.exp - claims.iat, 120);
    let session_ends = async || {
        number(&pool, "SELECT floor(extract(epoch FROM expires_at))::bigint FROM messenger.sessions").await
    };
    assert_eq!(claims.session_exp, Some(session_ends().await));

    // REST does not accept it, not even for a new one.
    let token = text(&answer.json()["token"]);
    let stream_token = john.bearing(token.clone());
    for route in ROUTES {
        assert_eq!(stream_token.call_route(route, "1", &john).send().await.unwrap().status, 401, "{route}");
    }
    let cookie = format!("messenger_session={token}");
    let by_cookie = app.post("/api/stream_token").header("cookie", &cookie).header("origin", ORIGIN);
    assert_problem(&by_cookie.send().await.unwrap(), 401, "Unauthorized");

    execute(&pool, "UPDATE messenger.sessions SET expires_at = now() + interval '30 s'").await;
    let claims = stream_claims(&john.call("POST", "/api/stream_token").expect(200).await);
    assert_eq!((claims.session_exp, claims.exp), (Some(session_ends().await), session_ends().await));
    john.call("POST", "/api/logout").expect(204).await;
    let refused = john.call("POST", "/api/stream_token").send().await.unwrap();
    assert_problem(&refused, 401, "Unauthorized");
    app.stop().await;
}
