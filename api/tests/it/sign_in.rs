//! Logging in at a provider: redirect, callback, exchange, and every failure.

use std::time::Duration;

use api::{
    config::ProviderSettings,
    domain::user::Profile,
    oauth::attempt::{Attempt, Seal},
    pruner,
    store::{StoreError, identities},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use protocol::claims::Audience;
use serde_json::{Value, json};
use service_kit::secrets::Secrets;
use sqlx::PgPool;
use testkit::{http::Answer, ports::free_port, until};
use tokio::io::AsyncWriteExt;

use crate::{
    failures::metric,
    process::serve,
    providers::{
        CLIENT_SECRET, DISCOVERY, Fake, LoginBrowser, Providers, Say, begin, code_in, github_at, oidc_at,
        ours, parameter, set_cookies, with_parameter,
    },
    raw,
    support::{
        App, ORIGIN, SECRET, add_users, assert_common_headers, assert_problem, database, execute, keys,
        number, text, until_waiting_for_locks,
    },
};

fn seal() -> Seal {
    Seal::new(&Secrets::parse(SECRET).unwrap())
}

/// A login that began with a changed attempt; returns the page where it ends.
async fn finish_with_attempt(app: &App, provider: &str, change: impl FnOnce(&mut Attempt)) -> url::Url {
    let mut browser = LoginBrowser::default();
    let callback = browser.come_back(app, provider, "1").await;
    let (name, sealed) = browser.cookie("login_").unwrap();
    let mut attempt = seal().open(&sealed).unwrap();
    change(&mut attempt);
    browser.set_cookie(&name, &seal().seal(&attempt));
    browser.finish(app, callback).await
}

async fn count(pool: &PgPool, table: &str) -> i64 {
    number(pool, format!("SELECT count(*) FROM messenger.{table}")).await
}

async fn sign_ins(app: &App, provider: &str, outcome: &str) -> u64 {
    let series =
        format!("messenger_api_provider_logins_total{{provider=\"{provider}\",outcome=\"{outcome}\"}}");
    metric(app, &series).await.unwrap_or_default()
}

/// Checks a login's answer completely.
async fn assert_logged_in(app: &App, answer: &Answer, username: &str) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_common_headers(answer);
    let body = answer.json();
    assert_eq!(body["authUser"]["username"], username);
    let names: Vec<_> = body.as_object().unwrap().keys().collect();
    assert_eq!(names, ["authUser", "expiresAt", "token"]);
    let token = body["token"].as_str().unwrap();
    let claims = keys().verifier().verify(token, &[Audience::Api]).unwrap();
    assert_eq!(claims.sub.to_string(), text(&body["authUser"]["id"]));
    let cookie = answer.cookie();
    assert_eq!(cookie, format!("messenger_session={token}"));
    let mut me = app.get("/api/auth_user").bearer(token).expect(200).await.json();
    for (member, value) in
        [("unreadTotal", json!(0)), ("sharesPresence", json!(true)), ("addableBy", json!("everybody"))]
    {
        assert_eq!(me.as_object_mut().unwrap().remove(member), Some(value), "{member}");
    }
    assert_eq!(me, body["authUser"]);
    app.get("/api/auth_user").header("cookie", &cookie).expect(200).await;
    body["authUser"].clone()
}

/// Logs in at a real provider.
async fn log_in(app: &App, provider: &str, account: &str, username: &str) -> Value {
    let mut browser = LoginBrowser::default();
    let code = code_in(&browser.sign_in(app, provider, account).await);
    assert_logged_in(app, &browser.exchange(app, &code).await, username).await
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn login_at_a_real_provider_finds_the_same_user_again(pool: PgPool) {
    let providers = Providers::start();
    let app = App::with_providers(&pool, providers.both()).await;
    let options = app.get("/api/login_options").expect(200).await.json();
    assert_eq!(options["providers"], json!(["github", "oidc"]));
    for (provider, issuer, account) in
        [("github", &providers.github, "583231"), ("oidc", &providers.oidc, "77")]
    {
        let name = format!("octo-{provider}");
        providers.account(account, &name, "https://a.example/1").await;
        let mut browser = LoginBrowser::default();

        let answer = browser.get(&app, &ours(&format!("/api/oauth/{provider}"))).await;
        assert_eq!(answer.status, 307);
        assert_common_headers(&answer);
        let cookies = set_cookies(&answer);
        assert_eq!(cookies.len(), 1);
        assert!(cookies[0].text.ends_with("; Path=/; Max-Age=600; HttpOnly; SameSite=Lax"));
        let there = url::Url::parse(answer.header("location").unwrap()).unwrap();
        let sent = |name| parameter(&there, name);
        assert_eq!(cookies[0].name, format!("messenger_login_{}", &sent("state").unwrap()[..8]));
        assert!(there.as_str().starts_with(&format!("{issuer}/")));
        assert_eq!(sent("code_challenge_method").as_deref(), Some("S256"));
        assert_eq!(sent("response_type").as_deref(), Some("code"));
        assert_eq!(sent("redirect_uri"), Some(format!("{ORIGIN}/api/oauth/{provider}/callback")));
        let scope = if provider == "github" { "read:user" } else { "openid profile" };
        assert_eq!(sent("scope").as_deref(), Some(scope));
        assert_eq!(sent("nonce").is_some(), provider == "oidc");
        // No secret of ours passes through the browser to the provider.
        assert!(sent("state").unwrap().len() >= 43 && sent("code_verifier").is_none());

        let callback = browser.come_back(&app, provider, account).await;
        let attempt = format!("messenger_login_{}", &parameter(&callback, "state").unwrap()[..8]);
        let answer = browser.get(&app, &callback).await;
        assert_eq!(answer.status, 307);
        assert_common_headers(&answer);
        let page = url::Url::parse(answer.header("location").unwrap()).unwrap();
        let code = code_in(&page);
        assert_eq!(page.as_str(), format!("{ORIGIN}/callback?code={code}"));
        let cookies = set_cookies(&answer);
        let texts: Vec<_> = cookies.iter().map(|cookie| cookie.text.as_str()).collect();
        assert_eq!(texts.len(), 2, "{texts:?}");
        assert_eq!(cookies[0].name, format!("messenger_code_{}", &code[..8]));
        assert!(texts[0].ends_with("; Path=/; Max-Age=60; HttpOnly; SameSite=Lax"));
        assert_eq!(texts[1], format!("{attempt}=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"));
        // The table has neither half.
        let hashes = "SELECT unnest(ARRAY[code_hash, binding_hash]) FROM messenger.login_codes";
        let kept: Vec<Vec<u8>> = sqlx::query_scalar(hashes).fetch_all(&pool).await.unwrap();
        for half in [&code, &cookies[0].value] {
            let half = URL_SAFE_NO_PAD.decode(half).unwrap();
            assert!(half.len() == 32 && kept.len() == 2 && !kept.contains(&half));
        }

        let answer = browser.exchange(&app, &code).await;
        let me = assert_logged_in(&app, &answer, &name).await;
        assert_eq!(me["avatarURL"], "https://a.example/1");
        assert_eq!(browser.cookie("code_"), None, "it is cleared");
        assert_eq!(count(&pool, "login_codes").await, 0);

        // Later, with another name and picture at the provider.
        providers.account(account, "renamed", "https://a.example/2").await;
        let again = log_in(&app, provider, account, &name).await;
        assert_eq!(again["id"], me["id"]);
        assert_eq!(again["avatarURL"], "https://a.example/2");

        let id = text(&me["id"]);
        let identity =
            format!("identities WHERE (issuer, subject, user_id) = ('{issuer}', '{account}', {id})");
        assert_eq!(count(&pool, &identity).await, 1);
        assert_eq!(sign_ins(&app, provider, "started").await, 3);
        assert_eq!(sign_ins(&app, provider, "succeeded").await, 2);
    }
    // The same answer in the form of the other provider.
    providers.answer_by_forms().await;
    log_in(&app, "github", "583231", "octo-github").await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn refusal_of_a_real_provider_is_shown_on_the_page(pool: PgPool) {
    let providers = Providers::start();
    providers.account("1", "sam", "https://a.example/1").await;
    let app = App::with_providers(&pool, providers.both()).await;
    let mut with_another_secret = providers.both();
    for provider in &mut with_another_secret {
        let (ProviderSettings::GitHub { registration, .. } | ProviderSettings::Oidc { registration, .. }) =
            provider;
        registration.client_secret = "another-secret".into();
    }
    let impostor = App::with_providers(&pool, with_another_secret).await;
    let error = |page: &url::Url| {
        assert_eq!(parameter(page, "code"), None, "{page}");
        parameter(page, "error").unwrap()
    };
    for provider in ["github", "oidc"] {
        // The person declines.
        let page = LoginBrowser::default().sign_in(&app, provider, "nobody").await;
        assert_eq!(error(&page), "access_denied");

        // The provider's code a second time.
        let mut browser = LoginBrowser::default();
        let callback = browser.come_back(&app, provider, "1").await;
        let (name, sealed) = browser.cookie("login_").unwrap();
        code_in(&browser.finish(&app, callback.clone()).await);
        browser.set_cookie(&name, &sealed);
        assert_eq!(error(&browser.finish(&app, callback).await), "provider_error");

        // A stolen code of another browser, with another verifier.
        let page = finish_with_attempt(&app, provider, |attempt| attempt.verifier = "x".repeat(43)).await;
        assert_eq!(error(&page), "provider_error");

        // The wrong client secret.
        let page = LoginBrowser::default().sign_in(&impostor, provider, "1").await;
        assert_eq!(error(&page), "provider_error");
        assert_eq!(sign_ins(&app, provider, "access_denied").await, 1);
        assert_eq!(sign_ins(&app, provider, "provider_error").await, 2);
    }
    // An id token of another attempt.
    let page = finish_with_attempt(&app, "oidc", |attempt| attempt.nonce = "another".into()).await;
    assert_eq!(error(&page), "provider_error");
    impostor.stop().await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn callback_works_only_in_the_browser_that_began(pool: PgPool) {
    let fake = Fake::start().await;
    let app = App::with_providers(&pool, [github_at(&fake.url), oidc_at(&fake.url)]).await;
    for (provider, other) in [("github", "oidc"), ("oidc", "github")] {
        let mut browser = LoginBrowser::default();
        let callback = begin(&app, provider, &mut browser).await;
        let (name, cookie) = browser.cookie("login_").unwrap();
        let mut elsewhere = LoginBrowser::default();
        begin(&app, provider, &mut elsewhere).await;
        let (_, others_cookie) = elsewhere.cookie("login_").unwrap();
        let attempt = seal().open(&cookie).unwrap();
        let changed_attempt = |name: &str, value: Value| {
            let mut changed = json!(attempt);
            changed[name] = value;
            seal().seal(&serde_json::from_value(changed).unwrap())
        };
        let expired = changed_attempt("expires_at", json!(1_700_000_000));
        let at_another = changed_attempt("provider", json!(other));
        let tampered = format!("{}A{}", &cookie[..9], &cookie[10..]);
        let by_another_secret =
            Seal::new(&Secrets::parse("another secret that is long enough").unwrap()).seal(&attempt);
        let changed = |name, value: Option<&str>| with_parameter(&callback, name, value);
        for (what, cookie, callback) in [
            ("no cookie", None, callback.clone()),
            ("another browser's", Some(&others_cookie), callback.clone()),
            ("too late", Some(&expired), callback.clone()),
            ("another provider's", Some(&at_another), callback.clone()),
            ("tampered", Some(&tampered), callback.clone()),
            ("not sealed by us", Some(&by_another_secret), callback.clone()),
            ("invalid", Some(&"x.y".to_owned()), callback.clone()),
            ("no state", Some(&cookie), changed("state", None)),
            ("wrong state", Some(&cookie), changed("state", Some("x"))),
            ("a longer state", Some(&cookie), changed("state", Some(&format!("{}x", attempt.state)))),
            ("another issuer", Some(&cookie), changed("iss", Some("https://evil.example"))),
            ("a denial that is not ours", Some(&others_cookie), changed("error", Some("access_denied"))),
        ] {
            let mut browser = LoginBrowser::default();
            if let Some(cookie) = cookie {
                browser.set_cookie(&name, cookie);
            }
            let answer = browser.get(&app, &callback).await;
            let page = format!("{ORIGIN}/callback?error=bad_state");
            assert_eq!(answer.header("location"), Some(&*page), "{what}");
            // A forged link does not end the login that the browser began.
            assert!(set_cookies(&answer).is_empty(), "{what}");
        }
        let requests = fake.requests("/token") + fake.requests("/login/oauth/access_token");
        assert_eq!(requests, 0, "no token was requested");
        assert_eq!(sign_ins(&app, provider, "bad_state").await, 12);
        // After all that the first login still succeeds.
        code_in(&browser.finish(&app, changed("iss", Some(&fake.url))).await);
        fake.forget();
    }

    // A provider that promises `iss` and once leaves it out.
    let naming = Fake::start().await;
    let mut discovery = naming.discovery();
    discovery["authorization_response_iss_parameter_supported"] = json!(true);
    naming.say(DISCOVERY, Say::Json(200, discovery));
    let strict = App::with_providers(&pool, [oidc_at(&naming.url)]).await;
    let page = naming.sign_in(&strict, "oidc").await;
    assert_eq!(parameter(&page, "error").as_deref(), Some("bad_state"));
    strict.stop().await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn failing_provider_is_shown_on_the_page(pool: PgPool) {
    let fake = Fake::start().await;
    let providers = || [github_at(&fake.url), oidc_at(&fake.url)];
    let app = App::with_providers(&pool, providers()).await;
    // Only for a provider that never answers: a slow machine needs longer for the others.
    let impatient = App::with(&pool, |config| {
        config.providers = providers().into();
        config.provider_time_limit = Duration::from_millis(300);
    })
    .await;
    let raw = |status, body: &[u8]| Say::Raw(status, "text/html", body.to_vec());
    let ok = |value: Value| Say::Json(200, value);
    let mut complete = json!({ "access_token": "a", "token_type": "bearer", "id": 1, "sub": "1" });
    fake.say("/elsewhere", ok(complete.clone()));
    complete["x"] = "x".repeat(1 << 20).into();
    let huge = || ok(complete.clone());
    let moved = || Say::Redirect(format!("{}/elsewhere", fake.url));
    let error_form = b"error=x&error_description=y".to_vec();
    let error_form = Say::Raw(200, "application/x-www-form-urlencoded", error_form);
    let (unavailable, error, profile) = ("provider_unavailable", "provider_error", "bad_profile");

    for (provider, token, me) in [("github", "/login/oauth/access_token", "/user"), ("oidc", "/token", "/me")]
    {
        let cases = [
            (token, Say::Nothing, unavailable),
            (token, Say::HangUp, unavailable),
            (token, raw(500, b"oops"), unavailable),
            (token, raw(503, b""), unavailable),
            (token, raw(429, b""), unavailable),
            (token, Say::Json(400, json!({ "error": "temporarily_unavailable" })), unavailable),
            (token, huge(), error),
            (token, moved(), error),
            (token, raw(200, b"<html>"), error),
            (token, raw(200, b""), error),
            (token, raw(404, b""), error),
            (token, ok(json!([])), error),
            (token, ok(json!({ "token_type": "bearer" })), error),
            (token, ok(json!({ "access_token": "a\r\nb", "token_type": "bearer" })), error),
            (token, ok(json!({ "error": "bad_verification_code" })), error),
            (token, ok(json!({ "error": 7 })), error),
            (token, error_form.clone(), error),
            (me, Say::Nothing, unavailable),
            (me, Say::HangUp, unavailable),
            (me, raw(502, b""), unavailable),
            (me, raw(401, b""), error),
            (me, moved(), error),
            (me, huge(), profile),
            (me, raw(200, b"<html>"), profile),
            (me, raw(200, b"\xff\xfe"), profile),
            (me, ok(json!({ "login": "sam" })), profile),
            (me, ok(json!({ "id": null, "sub": null })), profile),
            (me, ok(json!({ "id": -1, "sub": -1 })), profile),
            (me, ok(json!({ "id": "", "sub": "" })), profile),
            (me, ok(json!({ "id": "a\u{0}", "sub": "a\u{0}" })), profile),
            (me, ok(json!([1])), profile),
        ];
        for (at, say, code) in cases {
            fake.is_well();
            let app = if matches!(say, Say::Nothing) { &impatient } else { &app };
            fake.say(at, say);
            let page = fake.sign_in(app, provider).await;
            let requests = fake.requests(at);
            assert_eq!(page.as_str(), format!("{ORIGIN}/callback?error={code}"), "{at}, {requests} requests");
        }
        assert_eq!(sign_ins(&app, provider, "provider_unavailable").await, 7);
        assert_eq!(sign_ins(&impatient, provider, "provider_unavailable").await, 2);
        assert_eq!(fake.requests("/elsewhere"), 0, "redirects are not followed");
        // No user was created and no row is left.
        fake.is_well();
        code_in(&fake.sign_in(&app, provider).await);
    }
    assert_eq!(count(&pool, "users").await, 1);

    // The provider's error instead of an answer.
    let mut browser = LoginBrowser::default();
    for (said, code) in [
        ("access_denied", "access_denied"),
        ("temporarily_unavailable", "provider_unavailable"),
        ("invalid_scope", "provider_error"),
        ("\"><script>", "provider_error"),
    ] {
        let callback = begin(&app, "github", &mut browser).await;
        let callback = with_parameter(&with_parameter(&callback, "code", None), "error", Some(said));
        let page = browser.finish(&app, callback).await;
        assert_eq!(page.as_str(), format!("{ORIGIN}/callback?error={code}"));
    }
    let callback = with_parameter(&begin(&app, "github", &mut browser).await, "code", None);
    let page = browser.finish(&app, callback).await;
    assert_eq!(parameter(&page, "error").as_deref(), Some("provider_error"));
    app.stop().await;
    impatient.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn failed_discovery_is_retried(pool: PgPool) {
    let fake = Fake::start().await;
    let start = async |time_limit| {
        App::with(&pool, |config| {
            config.providers = vec![oidc_at(&fake.url)];
            config.provider_time_limit = time_limit;
        })
        .await
    };
    let patient = Duration::from_secs(10);
    let mut of_another_issuer = fake.discovery();
    of_another_issuer["issuer"] = json!("https://id.example");
    for (say, code) in [
        (Say::Nothing, "provider_unavailable"),
        (Say::Json(500, json!({})), "provider_unavailable"),
        (Say::Json(404, json!({})), "provider_error"),
        (Say::Json(200, json!({})), "provider_error"),
        (Say::Json(200, of_another_issuer), "provider_error"),
    ] {
        let app = start(if matches!(say, Say::Nothing) { Duration::from_millis(300) } else { patient }).await;
        fake.say(DISCOVERY, say);
        let before = fake.requests(DISCOVERY);
        // Concurrent logins share one discovery.
        let pages = join_all((0..5).map(|_| fake.sign_in(&app, "oidc"))).await;
        for page in pages {
            assert_eq!(page.as_str(), format!("{ORIGIN}/callback?error={code}"));
        }
        assert_eq!(fake.requests(DISCOVERY) - before, 1);
        app.stop().await;
    }
    let app = start(patient).await;
    fake.say(DISCOVERY, Say::HangUp);
    assert!(parameter(&fake.sign_in(&app, "oidc").await, "error").is_some());
    fake.is_well();
    until("it is requested again", || async {
        parameter(&fake.sign_in(&app, "oidc").await, "code").is_some()
    })
    .await;
    // The document is cached.
    let before = fake.requests(DISCOVERY);
    fake.say(DISCOVERY, Say::HangUp);
    code_in(&fake.sign_in(&app, "oidc").await);
    assert_eq!(fake.requests(DISCOVERY), before);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn unreachable_provider_is_shown_on_the_page(pool: PgPool) {
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let app = App::with_providers(&pool, [github_at(&nowhere), oidc_at(&nowhere)]).await;
    for provider in ["github", "oidc"] {
        let page = LoginBrowser::default().sign_in_at_fake(&app, provider).await;
        assert_eq!(page.as_str(), format!("{ORIGIN}/callback?error=provider_unavailable"));
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn code_works_once_in_one_browser_for_a_minute(pool: PgPool) {
    let fake = Fake::start().await;
    let start = || App::with_providers(&pool, [github_at(&fake.url)]);
    let (app, replica) = (start().await, start().await);
    let arrive = async || {
        let mut browser = LoginBrowser::default();
        (code_in(&browser.sign_in_at_fake(&app, "github").await), browser)
    };
    let refused = |answer: &Answer| {
        assert_problem(answer, 401, "Unauthorized");
        assert!(set_cookies(answer).is_empty());
    };

    // In another browser: one without the cookie, and one that has its own.
    let (code, mut browser) = arrive().await;
    let (other_code, mut other) = arrive().await;
    refused(&LoginBrowser::default().exchange(&app, &code).await);
    refused(&other.exchange(&app, &code).await);
    refused(&browser.exchange(&app, &other_code).await);
    // Nor something else in its place.
    for wrong in ["", "x", &code.to_uppercase(), &format!("{code}="), &code[1..]] {
        refused(&browser.exchange(&app, wrong).await);
    }
    let (name, binding) = browser.cookie("code_").unwrap();
    refused(&browser.exchange(&app, &binding).await);
    // The code is still unused. Any replica takes it.
    assert_logged_in(&app, &browser.exchange(&replica, &code).await, "sam").await;
    assert_logged_in(&app, &other.exchange(&app, &other_code).await, "sam").await;

    browser.set_cookie(&name, &binding);
    refused(&browser.exchange(&app, &code).await);
    refused(&browser.exchange(&replica, &code).await);

    // Concurrently at both replicas: one succeeds.
    let (code, browser) = arrive().await;
    let (name, binding) = browser.cookie("code_").unwrap();
    // Also beside another cookie of the same name.
    let cookie = format!("{name}=x; {name}={binding}; {name}=y");
    let answers = join_all((0..20).map(|n| {
        let call = if n % 2 == 0 { &app } else { &replica }.post("/api/oauth/exchange");
        call.header("cookie", &cookie).json(&json!({ "code": code })).send()
    }))
    .await;
    let given = answers.iter().filter(|answer| answer.as_ref().unwrap().status == 200).count();
    assert_eq!(given, 1);

    let (code, mut browser) = arrive().await;
    let longer = "login_codes WHERE expires_at > now() + interval '1 min'";
    assert_eq!(count(&pool, longer).await, 0);
    let (young, mut in_time) = arrive().await;
    sqlx::query("UPDATE messenger.login_codes SET expires_at = now() WHERE code_hash = sha256($1)")
        .bind(code.as_bytes())
        .execute(&pool)
        .await
        .unwrap();
    refused(&browser.exchange(&app, &code).await);
    let database = database(&pool, 1);
    assert_eq!(pruner::prune_codes(&database).await.unwrap(), 1);
    assert_eq!(pruner::prune_codes(&database).await.unwrap(), 0);
    database.close().await;
    assert_logged_in(&app, &in_time.exchange(&app, &young).await, "sam").await;

    let (code, mut browser) = arrive().await;
    execute(&pool, "DELETE FROM messenger.users").await;
    refused(&browser.exchange(&app, &code).await);
    app.stop().await;
    replica.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn logins_in_several_tabs_do_not_interfere(pool: PgPool) {
    let fake = Fake::start().await;
    let app = App::with_providers(&pool, [github_at(&fake.url), oidc_at(&fake.url)]).await;
    let mut browser = LoginBrowser::default();
    // Three begin, return in reverse, and exchange in a third order.
    let mut callbacks = Vec::new();
    for provider in ["github", "oidc", "github"] {
        callbacks.push(begin(&app, provider, &mut browser).await);
    }
    let mut codes = Vec::new();
    for callback in callbacks.into_iter().rev() {
        codes.push(code_in(&browser.finish(&app, callback).await));
    }
    assert!(browser.cookies("login_").is_empty(), "each is taken back by its own end");
    for code in [&codes[1], &codes[0], &codes[2]] {
        assert_logged_in(&app, &browser.exchange(&app, code).await, "sam").await;
    }
    assert!(browser.cookies("code_").is_empty());

    // Beyond the bound the oldest cookies are removed: of attempts and of unused codes.
    let mut callbacks = Vec::new();
    for _ in 0..6 {
        callbacks.push(begin(&app, "github", &mut browser).await);
    }
    assert_eq!(browser.cookies("login_").len(), 4);
    let mut pages = Vec::new();
    for callback in callbacks {
        pages.push(browser.finish(&app, callback).await);
    }
    let outcomes: Vec<_> = pages.iter().map(|page| parameter(page, "error")).collect();
    let bad_state = Some("bad_state".to_owned());
    assert_eq!(outcomes, [bad_state.clone(), bad_state, None, None, None, None]);
    pages.push(browser.sign_in_at_fake(&app, "github").await);
    assert_eq!(browser.cookies("code_").len(), 4);
    for (page, status) in pages[2..].iter().zip([401, 200, 200, 200, 200]) {
        assert_eq!(browser.exchange(&app, &code_in(page)).await.status, status, "{page}");
    }

    // A cookie with our prefix but not our form stays.
    let odd = "messenger_login_a.b=1; messenger_login_=2; ".repeat(20);
    let answer = app.get("/api/oauth/github").header("cookie", &odd).expect(307).await;
    let cookies = set_cookies(&answer);
    let (given, taken_back): (Vec<_>, Vec<_>) = cookies.iter().partition(|cookie| !cookie.value.is_empty());
    assert_eq!((given.len(), taken_back.len()), (1, 16));
    assert!(taken_back.iter().all(|cookie| cookie.name == "messenger_login_"));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn code_is_not_consumed_unless_its_session_begins(pool: PgPool) {
    let fake = Fake::start().await;
    let app = App::with_providers(&pool, [github_at(&fake.url)]).await;
    let mut browser = LoginBrowser::default();
    let code = code_in(&browser.sign_in_at_fake(&app, "github").await);
    // As if the process died in between.
    execute(&pool, "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not now'; END $$;
         CREATE TRIGGER fail BEFORE INSERT ON messenger.sessions EXECUTE FUNCTION fail()").await;
    assert_problem(&browser.exchange(&app, &code).await, 500, "Internal server error");
    execute(&pool, "DROP TRIGGER fail ON messenger.sessions").await;
    assert_logged_in(&app, &browser.exchange(&app, &code).await, "sam").await;
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn login_completes_although_its_client_hung_up(pool: PgPool) {
    let fake = Fake::start().await;
    let with_token = with_token_in_query(&pool, &fake).await;
    let app = App::with_providers(&pool, [github_at(&fake.url)]).await;
    add_users(&pool, ["john"]).await;
    let request = |browser: &LoginBrowser, line: &str, body: &Value| {
        let cookies = browser.cookies("").into_iter().map(|(name, value)| format!("{name}={value}"));
        let cookies: Vec<_> = cookies.collect();
        let body = body.to_string();
        format!(
            "{line} HTTP/1.1\r\nhost: test\r\ncookie: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            cookies.join("; "),
            body.len(),
        )
    };
    let mut browser = LoginBrowser::default();
    let code = code_in(&browser.sign_in_at_fake(&app, "github").await);
    let exchange = request(&browser, "POST /api/oauth/exchange", &json!({ "code": code }));
    let mut browser = LoginBrowser::default();
    let callback = begin(&app, "github", &mut browser).await;
    let back = callback.as_str().strip_prefix(ORIGIN).unwrap();
    let callback = request(&browser, &format!("GET {back}"), &json!({}));
    let login = request(&LoginBrowser::default(), "POST /api/login", &json!({ "username": "john" }));
    // The row is locked, so that the client hangs up before the login ends.
    for (sessions, app, request, held) in [
        (0, &app, exchange, "login_codes"),
        (1, &with_token, callback, "identities"),
        (2, &app, login, "users"),
    ] {
        assert_eq!(count(&pool, "sessions").await, sessions);
        let mut holder = pool.begin().await.unwrap();
        let lock = sqlx::AssertSqlSafe(format!("LOCK TABLE messenger.{held}"));
        sqlx::query(lock).execute(&mut *holder).await.unwrap();
        let mut socket = raw::connect(app).await;
        socket.write_all(request.as_bytes()).await.unwrap();
        until_waiting_for_locks(&pool, 1).await;
        drop(socket);
        holder.rollback().await.unwrap();
        until("the session has begun", || async { count(&pool, "sessions").await == sessions + 1 }).await;
    }
    app.stop().await;
    with_token.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn exchange_checks_in_the_contracts_order(pool: PgPool) {
    let app = App::start(&pool).await;
    let post = async |form: &str, body: &str| {
        raw::post(&app, "/api/oauth/exchange", &[("content-type", form)], body).await
    };
    let huge = format!(r#"{{"code":"{}"}}"#, "x".repeat(17 * 1024));
    for (body, status) in [(huge.as_str(), 413), ("{", 400), (r#"{"code":7}"#, 400), ("[]", 400), ("{}", 401)]
    {
        let sentence = "Content type of application/json required";
        assert_problem(&post("application/x-www-form-urlencoded", body).await, 415, sentence);
        assert_problem(&post("text/plain", body).await, 415, sentence);
        assert_eq!(post("application/json", body).await.status, status, "{status}");
    }
    for body in ["{}", r#"{"code":null}"#, r#"{"code":""}"#, r#"{"code":"a\u0000"}"#] {
        let answer = post("application/json", body).await;
        assert_problem(&answer, 401, "Unauthorized");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn provider_without_settings_is_disabled(pool: PgPool) {
    let fake = Fake::start().await;
    let none = App::start(&pool).await;
    let one = App::with_providers(&pool, [github_at(&fake.url)]).await;
    for method in ["GET", "HEAD", "POST", "DELETE"] {
        let of_none = ["github", "oidc"].map(|provider| (&none, provider));
        let of_one = ["oidc", "gitlab", "GitHub", ""].map(|provider| (&one, provider));
        for (app, provider) in of_none.into_iter().chain(of_one) {
            for path in [format!("/api/oauth/{provider}"), format!("/api/oauth/{provider}/callback?code=x")] {
                let answer = app.call(method, &path).bearer("bad").send().await.unwrap();
                assert_eq!(answer.status, 404, "{method} {path}");
                if method != "HEAD" {
                    assert_problem(&answer, 404, "Not found");
                }
            }
        }
        for path in ["/api/oauth/github", "/api/oauth/github/callback"] {
            let answer = one.call(method, path).bearer("bad").send().await.unwrap();
            assert_common_headers(&answer);
            if ["GET", "HEAD"].contains(&method) {
                assert_eq!((answer.status, answer.body.len()), (307, 0), "{method} {path}");
            } else {
                assert_problem(&answer, 405, "Method not allowed");
                assert_eq!(answer.header("allow"), Some("GET, HEAD"));
            }
        }
    }
    for path in ["/api/oauth", "/api/oauth/github/callback/x", "/api/oauth/github/x"] {
        assert_eq!(one.get(path).send().await.unwrap().status, 404, "{path}");
    }
    none.stop().await;
    one.stop().await;
}

async fn with_token_in_query(pool: &PgPool, fake: &Fake) -> App {
    App::with(pool, |config| {
        config.providers = vec![github_at(&fake.url)];
        config.callback_token_in_query = true;
    })
    .await
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn callback_token_in_query_serves_the_original_client(pool: PgPool) {
    let fake = Fake::start().await;
    let app = with_token_in_query(&pool, &fake).await;
    let mut browser = LoginBrowser::default();
    let callback = begin(&app, "github", &mut browser).await;
    let answer = browser.get(&app, &callback).await;
    let page = url::Url::parse(answer.header("location").unwrap()).unwrap();
    let names: Vec<_> = page.query_pairs().map(|(name, _)| name.into_owned()).collect();
    assert_eq!(names, ["token", "expires_at"]);
    let token = parameter(&page, "token").unwrap();
    let expires_at = chrono::DateTime::parse_from_rfc3339(&parameter(&page, "expires_at").unwrap()).unwrap();
    let claims = keys().verifier().verify(&token, &[Audience::Api]).unwrap();
    assert_eq!(claims.exp, expires_at.timestamp());
    app.get("/api/auth_user").bearer(&token).expect(200).await;
    assert_eq!(browser.cookie("session"), Some(("messenger_session".into(), token)));
    assert_eq!((browser.cookie("code_"), browser.cookie("login_")), (None, None));
    assert_eq!(count(&pool, "login_codes").await, 0);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn behind_https_every_cookie_is_secure(pool: PgPool) {
    let fake = Fake::start().await;
    let app = App::with(&pool, |config| {
        config.origin = "https://chat.example".parse().unwrap();
        config.providers = vec![github_at(&fake.url)];
    })
    .await;
    let answer = app.get("/api/oauth/github").expect(307).await;
    let there = url::Url::parse(answer.header("location").unwrap()).unwrap();
    let back = "https://chat.example/api/oauth/github/callback";
    assert_eq!(parameter(&there, "redirect_uri").as_deref(), Some(back));
    let cookies = set_cookies(&answer);
    assert!(cookies[0].text.starts_with("__Host-messenger_login_"), "{}", cookies[0].text);
    assert!(cookies[0].text.ends_with("; Path=/; Max-Age=600; HttpOnly; SameSite=Lax; Secure"));
    let state = parameter(&there, "state").unwrap();
    let answer = app
        .get(&format!("/api/oauth/github/callback?code=x&state={state}"))
        .header("cookie", &format!("{}={}", cookies[0].name, cookies[0].value))
        .expect(307)
        .await;
    assert!(answer.header("location").unwrap().starts_with("https://chat.example/callback?code="));
    for cookie in set_cookies(&answer) {
        assert!(cookie.text.starts_with("__Host-messenger_"), "{}", cookie.text);
        assert!(
            cookie.text.contains("; Path=/; ") && cookie.text.ends_with("; HttpOnly; SameSite=Lax; Secure")
        );
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn taken_name_gets_a_suffix(pool: PgPool) {
    let fake = Fake::start().await;
    let app = App::with_providers(&pool, [github_at(&fake.url)]).await;
    app.user(&pool, "sam").await;
    let mut names = Vec::new();
    for id in 1..=3 {
        let account = json!({ "id": id, "login": " s\u{7}am", "avatar_url": "javascript:1" });
        fake.say("/user", Say::Json(200, account));
        let mut browser = LoginBrowser::default();
        let code = code_in(&browser.sign_in_at_fake(&app, "github").await);
        let body = browser.exchange(&app, &code).await.json();
        assert_eq!(body["authUser"]["avatarURL"], Value::Null);
        names.push(text(&body["authUser"]["username"]));
    }
    assert_eq!(names, ["sam-2", "sam-3", "sam-4"]);

    // When the numbers are used up, the suffix is random.
    let mut connection = pool.acquire().await.unwrap();
    for subject in 0..20 {
        let profile = Profile::new("https://id.example", &format!("s{subject}"), Some("sam"), None).unwrap();
        assert!(identities::provision(&mut connection, &profile).await.unwrap().created);
    }
    let random = "users WHERE username ~ '^sam-[0-9a-f]{8}$'";
    assert_eq!((count(&pool, random).await, count(&pool, "users").await), (4, 24));
    drop(connection);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn concurrent_first_logins_make_one_user(pool: PgPool) {
    let database = database(&pool, 16);
    let provision = async |subject: String| {
        let profile = Profile::new("https://id.example", &subject, Some("sam"), None).unwrap();
        loop {
            match database.run(async |connection| identities::provision(connection, &profile).await).await {
                // A slow machine opens sixteen connections too slowly. Nothing was written.
                Err(StoreError::Unavailable(reason)) if reason.starts_with("pool timed out") => {}
                provisioned => return provisioned.unwrap(),
            }
        }
    };
    for round in 0..20 {
        // All of one account, and as many others with the same name.
        let same = join_all((0..8).map(|_| provision(format!("same-{round}"))));
        let others = join_all((0..8).map(|other| provision(format!("other-{round}-{other}"))));
        let (same, others) = tokio::join!(same, others);
        assert_eq!(same.iter().filter(|same| same.created).count(), 1);
        assert!(same.iter().all(|other| other.user == same[0].user));
        assert!(others.iter().all(|other| other.created && other.user != same[0].user));
        let users = count(&pool, "users").await;
        assert_eq!((users, count(&pool, "identities").await), (9 * (round + 1), users));
    }
    database.close().await;
    assert_eq!(count(&pool, "feed_heads").await, 180);
}

#[sqlx::test(migrations = false)]
async fn login_secrets_are_not_logged(pool: PgPool) {
    let fake = Fake::start().await;
    let settings = [
        ("STATE_SECRET", SECRET),
        ("GITHUB_CLIENT_ID", "messenger"),
        ("GITHUB_CLIENT_SECRET", CLIENT_SECRET),
        ("GITHUB_URL", &fake.url),
        ("GITHUB_API_URL", &fake.url),
    ];
    let server = serve(&pool, &settings);
    let mut secrets = vec![CLIENT_SECRET.to_owned(), "a-code-from-elsewhere".into(), "a secret".into()];
    let mut browser = LoginBrowser::default();
    for (at, say) in [
        ("/user", None),
        ("/login/oauth/access_token", Some(Say::Json(400, json!({ "error": "a secret" })))),
        ("/login/oauth/access_token", Some(Say::Json(200, json!({ "access_token": ["a secret"] })))),
        ("/user", Some(Say::Raw(200, "text/plain", b"a secret".to_vec()))),
        ("/user", Some(Say::Json(200, json!({ "id": "a secret" })))),
        ("/user", Some(Say::HangUp)),
    ] {
        fake.is_well();
        let goes_well = say.is_none();
        say.into_iter().for_each(|say| fake.say(at, say));
        let callback = begin(&server.public, "github", &mut browser).await;
        let (_, sealed) = browser.cookie("login_").unwrap();
        let attempt = seal().open(&sealed).unwrap();
        secrets.extend([sealed, attempt.state, attempt.verifier]);
        let page = browser.finish(&server.public, callback).await;
        if goes_well {
            let code = code_in(&page);
            secrets.push(browser.cookie("code_").unwrap().1);
            let answer = browser.exchange(&server.public, &code).await;
            secrets.extend([code, text(&answer.json()["token"])]);
        } else {
            assert!(parameter(&page, "error").is_some(), "{page}");
        }
    }
    let said = server.stop().await;
    assert!(said.contains("logged in at a provider") && said.contains("login failed"), "{said}");
    for secret in &secrets {
        assert!(!said.contains(secret), "{secret} is in {said}");
    }
}

#[sqlx::test(migrations = false)]
async fn provider_needs_a_trusted_certificate(pool: PgPool) {
    let (fake, certificate) = Fake::start_with_tls().await;
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("own.pem");
    std::fs::write(&own, certificate).unwrap();
    // Another certificate for the same name.
    let (_, another) = Fake::start_with_tls().await;
    let others = folder.path().join("others.pem");
    std::fs::write(&others, another).unwrap();
    for (trusted, outcome) in [(&others, "error"), (&own, "code")] {
        let settings = [
            ("SSL_CERT_FILE", trusted.to_str().unwrap()),
            ("OIDC_ISSUER", &*fake.url),
            ("OIDC_CLIENT_ID", "x"),
            ("OIDC_CLIENT_SECRET", "x"),
            ("STATE_SECRET", SECRET),
        ];
        let server = serve(&pool, &settings);
        let page = fake.sign_in(&server.public, "oidc").await;
        assert!(parameter(&page, outcome).is_some(), "{page}");
        assert_eq!(fake.requests("/token") > 0, outcome == "code");
        server.stop().await;
    }
}
