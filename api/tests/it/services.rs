//! Service tokens: made and revoked by commands of the binary, and good for their own paths alone.

use std::time::Duration;

use serde_json::json;
use sqlx::PgPool;
use testkit::soon;
use tokio::time::Instant;

use crate::{
    process::{assert_says, database_url, run},
    support::{App, ROUTES, assert_problem, execute, number},
};

/// `api service-token …`; what it says.
pub(crate) fn service_token(pool: &PgPool, arguments: &[&str]) -> (bool, String) {
    run(&[&["service-token"], arguments].concat(), &[("DATABASE_URL", &database_url(pool))])
}

/// A new token.
pub(crate) fn create(pool: &PgPool, name: &str, scopes: &str) -> String {
    let (success, said) = service_token(pool, &["create", "--name", name, "--scope", scopes]);
    assert!(success, "{said}");
    let token = said.strip_suffix('\n').unwrap();
    assert!(token.starts_with("msk_") && token.len() == 47, "the token alone: {said}");
    token.to_owned()
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn service_tokens_are_created_listed_and_revoked(pool: PgPool) {
    assert_eq!(service_token(&pool, &["list"]), (true, String::new()));
    let shop = create(&pool, "shop", "publish,users");
    let other = create(&pool, "admin-tool", "admin");
    let (success, said) = service_token(&pool, &["create", "--name", "shop", "--scope", "publish"]);
    assert!(!success && said.contains("there is a service token shop"), "{said}");
    for bad in [["--name", "a b", "--scope", "publish"], ["--name", "x", "--scope", "root"]] {
        assert!(!service_token(&pool, &[&["create"], &bad[..]].concat()).0, "{bad:?}");
    }
    assert!(
        !service_token(&pool, &["create", "--name", "x"]).0,
        "a token without a scope is good for nothing"
    );

    execute(
        &pool,
        "UPDATE messenger.service_tokens SET last_used_at = '2026-01-02 03:04:05Z' WHERE name = 'shop'",
    )
    .await;
    let (_, said) = service_token(&pool, &["list"]);
    let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split('\t').collect()).collect();
    let [admin, listed] = &lines[..] else { panic!("{said}") };
    assert_eq!((admin[0], admin[1], admin[3]), ("admin-tool", "admin", "used never"));
    assert_eq!((listed[0], listed[1], listed[3]), ("shop", "publish,users", "used 2026-01-02T03:04:05Z"));

    // Only hashes are stored.
    let stored: String =
        sqlx::query_scalar("SELECT string_agg(t::text, ' ') FROM messenger.service_tokens AS t")
            .fetch_one(&pool)
            .await
            .unwrap();
    for token in [&shop, &other] {
        assert!(!stored.contains(token.as_str()) && !said.contains(token.as_str()));
    }

    assert_eq!(service_token(&pool, &["revoke", "shop"]), (true, String::new()));
    let (success, said) = service_token(&pool, &["revoke", "shop"]);
    assert!(!success);
    assert_says(&said, &["there is no service token shop"]);
    assert_ne!(create(&pool, "shop", "publish"), shop, "the name is free again");
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn service_token_acts_for_no_user(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    let service = john.bearing(create(&pool, "shop", "publish,users,admin"));
    let unknown = john.bearing(format!("msk_{}", "A".repeat(43)));
    for route in ROUTES {
        for (user, status, code) in [(&service, 403, "user_token_required"), (&unknown, 401, "unauthorized")]
        {
            let answer = user.call_route(route, &conversation, &jane).send().await.unwrap();
            assert_eq!(answer.status, status, "{route}");
            if !route.starts_with("HEAD") {
                assert_eq!(answer.json()["code"], code, "{route}");
            }
        }
    }
    // 415 precedes it, limits and bodies follow.
    let path = format!("/api/conversations/{conversation}/messages");
    service.call("POST", &path).header("content-type", "text/plain").expect(415).await;
    service.call("POST", &path).json(&json!({ "content": "x".repeat(100_000) })).expect(403).await;
    let cookie = format!("messenger_session={}", service.token);
    let answer = app.get("/api/auth_user").header("cookie", &cookie).send().await.unwrap();
    assert_problem(&answer, 401, "Unauthorized");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn revoked_service_token_is_rejected_within_two_seconds(pool: PgPool) {
    let app = App::start(&pool).await;
    let token = create(&pool, "shop", "publish");
    let status = async || app.get("/api/auth_user").bearer(&token).send().await.unwrap().status;
    assert_eq!((status().await, status().await), (403, 403));
    let used =
        "SELECT count(*) FROM messenger.service_tokens WHERE last_used_at > now() - interval '1 minute'";
    assert_eq!(number(&pool, used).await, 1);
    assert!(service_token(&pool, &["revoke", "shop"]).0);
    let revoked = Instant::now();
    while status().await != 401 {
        assert!(revoked.elapsed() < Duration::from_secs(2));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    app.stop().await;
}

/// So that a host's many requests are not as many look-ups.
#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn service_token_is_remembered_for_a_moment(pool: PgPool) {
    let app = App::start(&pool).await;
    let status = async |token: &str| app.get("/api/auth_user").bearer(token).send().await.unwrap().status;
    soon("the machine is fast enough", async {
        loop {
            let token = create(&pool, "shop", "publish");
            let before = Instant::now();
            assert_eq!(status(&token).await, 403);
            execute(&pool, "DELETE FROM messenger.service_tokens").await;
            let after = status(&token).await;
            if before.elapsed() < Duration::from_secs(1) {
                break assert_eq!(after, 403);
            }
        }
    })
    .await;
    app.stop().await;
}
