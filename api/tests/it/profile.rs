//! A user's own profile, and who is told of a change.

use api::config::Config;
use futures_util::future::join_all;
use serde_json::{Value, json};
use sqlx::PgPool;
use testkit::http::Call;

use crate::{
    failures::{Listener, with_redis},
    support::{ApiUser, App, add_users, assert_problem, assert_unacceptable, execute, number, redis_url},
};

fn patch(user: &ApiUser, body: &Value) -> Call {
    user.call("PATCH", "/api/auth_user").json(body)
}

/// What each `user.updated` of a feed says.
async fn told(app: &App, user: &ApiUser) -> Vec<Value> {
    let events = app.feed(user.id).await.into_iter();
    events.filter(|(name, _)| name == "user.updated").map(|(_, data)| data).collect()
}

async fn partners(one: &ApiUser, other: &ApiUser) -> String {
    let conversation = one.start(&other.name).await;
    one.say(&conversation, "hi").await;
    other.say(&conversation, "hello").await;
    conversation
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn profile_changes_by_what_is_given(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    let mut wanted = json!({
        "id": john.id, "username": "john", "avatarURL": null, "sharesPresence": true, "addableBy": "everybody",
    });
    for (change, member, now) in [
        (json!({}), "username", json!("john")),
        (json!({ "avatarURL": "https://a.example/1" }), "avatarURL", json!("https://a.example/1")),
        (
            json!({ "username": null, "sharesPresence": null, "other": 7 }),
            "avatarURL",
            json!("https://a.example/1"),
        ),
        (json!({ "sharesPresence": false }), "sharesPresence", json!(false)),
        (json!({ "addableBy": "partners" }), "addableBy", json!("partners")),
        (json!({ "addableBy": "nobody" }), "addableBy", json!("nobody")),
        (json!({ "username": "  Jo\u{301}hn \t Doe " }), "username", json!("J\u{f3}hn Doe")),
        (json!({ "avatarURL": null }), "avatarURL", json!(null)),
    ] {
        wanted[member] = now;
        assert_eq!(patch(&john, &change).expect(200).await.json(), wanted, "{change}");
        let mut read = john.auth_user().expect(200).await.json();
        assert_eq!(read.as_object_mut().unwrap().remove("unreadTotal"), Some(json!(0)));
        assert_eq!(read, wanted, "{change}");
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn unacceptable_profile_changes_nothing(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    add_users(&pool, ["jane", "Jos\u{e9}"]).await;
    let avatar = "Avatar must be an http or https URL, 2048 max";
    let long = format!("https://a.example/{}", "x".repeat(2_048));
    for (field, value, sentence) in [
        ("username", json!(""), "Username required"),
        ("username", json!(" \u{200b}\u{3164}"), "Username required"),
        ("username", json!("x".repeat(65)), "Username too long. 64 max"),
        ("username", json!("jane"), "Username taken"),
        ("username", json!(" ja\u{200b}ne "), "Username taken"),
        ("username", json!("Jose\u{301}"), "Username taken"),
        ("avatarURL", json!(""), avatar),
        ("avatarURL", json!("javascript:alert(1)"), avatar),
        ("avatarURL", json!("https://john:secret@a.example/"), avatar),
        ("avatarURL", json!(" https://a.example/"), avatar),
        ("avatarURL", json!(long), avatar),
        ("addableBy", json!("friends"), "addableBy must be everybody, partners or nobody"),
    ] {
        let answer = patch(&john, &json!({ field: value, "sharesPresence": false })).send().await.unwrap();
        assert_unacceptable(&answer, field, sentence);
    }
    for body in [
        json!([]),
        json!({ "username": 7 }),
        json!({ "avatarURL": false }),
        json!({ "sharesPresence": "no" }),
    ] {
        patch(&john, &body).expect(400).await;
    }
    john.call("PATCH", "/api/auth_user").expect(415).await;
    let gone = app.login("john").await;
    gone.call("POST", "/api/logout").expect(204).await;
    assert_problem(&patch(&gone, &json!({})).send().await.unwrap(), 401, "Unauthorized");
    let now = john.auth_user().expect(200).await.json();
    assert_eq!((&now["username"], &now["sharesPresence"]), (&json!("john"), &json!(true)));
    assert_eq!(told(&app, &john).await.len(), 0);
    // Another case is another name, as for users who come from an issuer.
    assert_eq!(patch(&john, &json!({ "username": "JANE" })).expect(200).await.json()["username"], "JANE");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn names_change_only_where_the_setting_allows_it(pool: PgPool) {
    let app = App::with(&pool, |config| config.usernames_change = false).await;
    let john = app.user(&pool, "john").await;
    for name in ["jack", "john"] {
        let answer = patch(&john, &json!({ "username": name })).send().await.unwrap();
        assert_unacceptable(&answer, "username", "Usernames cannot be changed");
    }
    let change = json!({ "username": null, "avatarURL": "https://a.example/" });
    assert_eq!(patch(&john, &change).expect(200).await.json()["username"], "john");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn change_is_told_to_partners_and_members_of_small_groups(pool: PgPool) {
    let (config, channels) = with_redis(&pool, &redis_url());
    let app = App::start_with(Config { usernames_change: true, ..config }).await;
    let john = app.user(&pool, "john").await;
    let mut others = Vec::new();
    for name in ["partner", "stranger", "blocker", "member", "many"] {
        others.push(app.user(&pool, name).await);
    }
    let [partner, stranger, blocker, member, many] = &others[..] else { unreachable!() };
    for other in [partner, blocker] {
        partners(&john, other).await;
    }
    // She has not written yet.
    let with_stranger = john.start("stranger").await;
    john.say(&with_stranger, "hi").await;
    blocker.call("PUT", &format!("/api/blocks/{}", john.id)).expect(204).await;
    member.group("small", &["john", "blocker"]).await;
    let large = many.group("large", &["john"]).await;
    let size = |count: i64| {
        format!("UPDATE messenger.conversations SET participant_count = {count} WHERE id = {large}")
    };
    execute(&pool, size(33)).await;

    let mut heard = Listener::start(&redis_url(), &channels.user(partner.id)).await;
    patch(&john, &json!({ "avatarURL": "https://a.example/1" })).expect(200).await;
    let now = json!({ "id": john.id, "username": "john", "avatarURL": "https://a.example/1" });
    let published = heard.next().await;
    assert_eq!((published.event.as_str(), json!(published.data)), ("user.updated", now.clone()));
    for user in [&john, partner, member] {
        assert_eq!(told(&app, user).await, std::slice::from_ref(&now), "{}", user.name);
    }
    for user in [stranger, blocker, many] {
        assert_eq!(told(&app, user).await.len(), 0, "{}", user.name);
    }
    // What changes nothing, and what others do not see, is told to nobody.
    for change in [
        json!({ "avatarURL": "https://a.example/1" }),
        json!({ "sharesPresence": false, "addableBy": "nobody" }),
    ] {
        patch(&john, &change).expect(200).await;
    }
    assert_eq!(told(&app, &john).await.len(), 1);
    // A replay tells the state of today.
    execute(&pool, size(32)).await;
    patch(&john, &json!({ "username": "jack" })).expect(200).await;
    let now = json!({ "id": john.id, "username": "jack", "avatarURL": "https://a.example/1" });
    assert_eq!(told(&app, partner).await, [now.clone(), now.clone()]);
    assert_eq!(told(&app, many).await, [now]);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn of_two_who_want_a_name_one_has_it_and_nobody_waits_forever(pool: PgPool) {
    let app = App::start(&pool).await;
    let mut users = Vec::new();
    for number in 0..6 {
        users.push(app.user(&pool, &format!("user{number}")).await);
    }
    for (number, one) in users.iter().enumerate() {
        for other in &users[number + 1..] {
            partners(one, other).await;
        }
    }
    for round in 0..5 {
        let body = json!({ "username": format!("wanted{round}") });
        let answers = join_all(users.iter().map(|user| patch(user, &body).send())).await;
        let statuses: Vec<_> = answers.into_iter().map(|answer| answer.unwrap().status).collect();
        assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
        assert!(statuses.iter().all(|status| [200, 422].contains(status)), "{statuses:?}");
    }
    for user in &users {
        assert_eq!(told(&app, user).await.len(), 5);
    }
    assert_eq!(number(&pool, "SELECT count(*) FROM messenger.events WHERE kind = 'user.updated'").await, 5);
    app.stop().await;
}
