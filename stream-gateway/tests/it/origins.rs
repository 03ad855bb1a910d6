//! The contract's rules on credentials, origins and CORS for streams.

use testkit::{http::Answer, sse::StreamRequest};

use crate::support::{GatewayWorld, ORIGIN, Setup, claims, keys, now, ready, rotated_keys};

const LISTED: &str = "https://shop.example:8443";
const OTHER_SITE: &str = "https://evil.example";
const EXPOSED: &str = "Feed-Cursor, X-Request-Id, Retry-After, Idempotent-Replayed";

async fn start() -> GatewayWorld {
    Setup::config(|config| config.allowed_origins = vec![LISTED.parse().unwrap()]).start().await
}

fn with(opening: StreamRequest, headers: &[(&'static str, &str)]) -> StreamRequest {
    headers.iter().fold(opening, |opening, (name, value)| opening.header(name, value))
}

const SERVICE_TOKEN: &str = "msk_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn header_then_query_then_cookie_is_the_credential() {
    let world = start().await;
    let (john, jane) = (world.user(3), world.user(5));
    let expired = keys().sign(&claims(john.id, john.session, now() - 1));
    // A cookie of another deployment on this host, signed by an unknown key.
    let stranger = rotated_keys().sign(&claims(john.id, john.session, now() + 60));
    let cookie = format!("a=b; messenger_session={}", jane.token);
    let plain = || world.opening();
    for opening in [
        plain().bearer(&john.token),
        plain().bearer(&john.token).query_token("bad").cookie(&cookie),
        plain().query_token(&john.token),
        plain().query_token(&john.token).cookie(&cookie),
        plain().cookie(&format!("messenger_session={}", john.token)),
        // Next to cookies of other programs and an outdated one of our name.
        plain().cookie(&format!("session=x; messenger_session=; messenger_session={}", john.token)),
        plain().cookie(&format!("messenger_session={expired}; messenger_session={}", john.token)),
        plain().cookie(&format!("messenger_session={}; messenger_session=bad", john.token)),
        plain().cookie(&format!("messenger_session={stranger}; messenger_session={}", john.token)),
    ] {
        let mut stream = opening.stream().await;
        ready(&mut stream, &world.api.cursor(john.id, 3), false).await;
    }
    for (opening, status) in [
        (plain(), 401),
        (plain().bearer("bad").query_token(&john.token).cookie(&cookie), 401),
        // A token of another back end opens no stream.
        (plain().bearer(SERVICE_TOKEN), 401),
        (plain().query_token(SERVICE_TOKEN), 401),
        (plain().bearer(&expired).query_token(&john.token).cookie(&cookie), 401),
        (plain().header("authorization", "").query_token(&john.token), 401),
        (plain().header("authorization", "Basic x").cookie(&cookie), 401),
        (plain().query_token("bad").cookie(&cookie), 401),
        (plain().query_token("").cookie(&cookie), 401),
        (plain().cookie("messenger_session=bad"), 401),
        (plain().cookie("session=x"), 401),
        (plain().cookie("messenger_session=bad; messenger_session=worse"), 401),
        // 401 before 403 before 406.
        (plain().cookie("messenger_session=bad").header("origin", OTHER_SITE), 401),
        (plain().cookie(&cookie).header("origin", OTHER_SITE).without_header("accept"), 403),
        (plain().cookie(&cookie).without_header("accept"), 406),
    ] {
        assert_eq!(opening.open().await.unwrap().status, status, "{opening:?}");
    }
    world.ends(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cookie_opens_no_stream_for_another_origin() {
    let world = start().await;
    let user = world.user(3);
    let cookie = format!("messenger_session={}", user.token);
    for (headers, by_cookie) in [
        (&[][..], 200),
        (&[("origin", ORIGIN)], 200),
        (&[("origin", LISTED)], 200),
        (&[("origin", LISTED), ("sec-fetch-site", "cross-site")], 200),
        (&[("sec-fetch-site", "cross-site")], 200),
        (&[("sec-fetch-site", "none")], 200),
        (&[("origin", OTHER_SITE)], 403),
        (&[("origin", "null")], 403),
        (&[("origin", "")], 403),
        (&[("origin", "https://shop.example")], 403),
        (&[("origin", OTHER_SITE), ("sec-fetch-site", "same-origin")], 403),
    ] {
        let opening = with(world.opening().cookie(&cookie), headers);
        assert_eq!(opening.open().await.unwrap().status, by_cookie, "{headers:?}");
        // No other page can make a browser send these.
        for opening in [world.opening().bearer(&user.token), world.opening().query_token(&user.token)] {
            let opening = with(opening.cookie(&cookie), headers);
            assert_eq!(opening.open().await.unwrap().status, 200, "{headers:?}");
        }
    }
    world.ends(()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listed_origins_may_read_streams_and_refusals() {
    let world = start().await;
    let user = world.user(3);
    for (origin, known) in [(ORIGIN, true), (LISTED, true), (OTHER_SITE, false), ("null", false)] {
        let by = known.then_some(origin);
        for (opening, status) in [
            (world.opening().bearer(&user.token), 200),
            (world.opening(), 401),
            (world.opening().bearer(&user.token).without_header("accept"), 406),
        ] {
            let stream = opening.header("origin", origin).open().await.unwrap();
            assert_eq!(stream.status, status);
            assert_eq!(stream.header("access-control-allow-origin"), by);
            assert_eq!(stream.header("access-control-allow-credentials"), by.map(|_| "true"));
            assert_eq!(stream.header("access-control-expose-headers"), by.map(|_| EXPOSED));
            assert_eq!(stream.header("vary"), Some("Origin"));
        }
        let options = || world.client.call("OPTIONS", format!("http://{}/api/messages", world.public));
        let preflight = options().header("origin", origin).header("access-control-request-method", "GET");
        let answer: Answer = preflight.bearer("bad").expect(204).await;
        for (name, value) in [
            ("access-control-allow-origin", origin),
            ("access-control-allow-credentials", "true"),
            ("access-control-allow-methods", "GET"),
            (
                "access-control-allow-headers",
                "Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID, X-Request-Id",
            ),
            ("access-control-max-age", "600"),
        ] {
            assert_eq!(answer.header(name), known.then_some(value), "{origin}");
        }
        assert_eq!(answer.header("vary"), Some("Origin"));
        options().header("origin", origin).expect(405).await;
    }
    world.ends(()).await;
}
