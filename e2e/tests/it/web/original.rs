//! The client of the application that this one rebuilds works against our two services without a changed line.
//!
//! Its files are not ours to keep here. The first test makes the same calls in a real browser. With the files, the second test runs
//! them: `ORIGINAL_CLIENT` names a folder with `static/` of
//! nicolasparada/go-messenger-demo and, as `router.js`, version 0.8.0 of nicolasparada/js-router, which it loads from elsewhere.

use std::path::PathBuf;

use e2e::{Browser, Front, browser::WebPage};
use serde_json::json;

use super::site::site;

/// As the original's `http.js`: the login's token in a header, and in the query of an `EventSource`.
const CLIENT: &str = r"
    window.heard = [];
    window.failed = [];
    window.call = async (method, path, body) => {
        const headers = { authorization: `Bearer ${window.token ?? ''}` };
        if (body) headers['content-type'] = 'application/json; charset=utf-8';
        if (!window.token) delete headers.authorization;
        const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body), credentials: 'omit' });
        const text = await answer.clone().json().catch(() => answer.text());
        return { status: answer.status, redirected: answer.redirected, body: text };
    };
    window.listen = () => new Promise((open) => {
        const url = new URL('/api/messages', location.origin);
        url.searchParams.set('token', window.token);
        window.source = new EventSource(url.toString());
        source.onmessage = (event) => heard.push(JSON.parse(event.data));
        source.onopen = open;
        source.onerror = () => failed.push(source.readyState);
    });
    window.enter = async (username) => {
        const answer = await call('POST', '/api/login', { username });
        window.token = answer.body.token;
        window.me = answer.body.authUser;
        window.until = new Date(answer.body.expiresAt);
        return answer.status;
    };
";

async fn person(browser: &Browser, origin: &str, name: &str) -> (e2e::browser::BrowserContext, WebPage) {
    let context = browser.context(name, origin).await;
    context.expect("the server responded with a status of"); // Wrong on purpose.
    let page = context.open("/icon.svg").await;
    page.evaluate(&format!("{CLIENT}; null")).await;
    assert_eq!(page.evaluate(&format!("enter('{name}')")).await, 200);
    (context, page)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_calls_of_the_original_client_are_answered_as_it_expects() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    for name in ["john", "jane"] {
        site.world.person(name).await;
    }
    let (_john_context, john) = person(&browser, &site.origin, "john").await;
    let (_jane_context, jane) = person(&browser, &site.origin, "jane").await;
    assert_eq!(
        john.evaluate("me.username === 'john' && me.avatarURL === null && until > new Date()").await,
        true
    );
    assert_eq!(john.evaluate("call('GET', '/api/conversations')").await["body"], json!([]));
    jane.evaluate("listen().then(() => null)").await;

    let names = john.evaluate("call('GET', '/api/usernames?search=JA')").await;
    assert_eq!(names["body"], json!(["jane"]));
    let wrong = john.evaluate("call('POST', '/api/conversations', { username: ' ' })").await;
    assert_eq!(
        (&wrong["status"], &wrong["body"]["errors"]["username"]),
        (&json!(422), &json!("Username required"))
    );
    let started = john.evaluate("call('POST', '/api/conversations', { username: 'jane' })").await;
    assert_eq!(started["status"], 201);
    let id = started["body"]["id"].as_str().unwrap();
    // The redirect leads to the existing one.
    let again = john.evaluate("call('POST', '/api/conversations', { username: 'jane' })").await;
    assert_eq!(
        (&again["status"], &again["redirected"], &again["body"]["id"]),
        (&json!(200), &json!(true), &json!(id))
    );

    let messages = format!("/api/conversations/{id}/messages");
    let other = john.evaluate(&format!("call('GET', '/api/conversations/{id}/other_participant')")).await;
    assert_eq!(other["body"]["username"], "jane");
    let wrong = john.evaluate(&format!("call('POST', '{messages}', {{ content: '  ' }})")).await;
    assert_eq!(wrong["body"]["errors"]["content"], "Message content required");
    let text = site.world.text();
    let sent = john.evaluate(&format!("call('POST', '{messages}', {{ content: '{text}' }})")).await;
    assert_eq!(
        (&sent["status"], &sent["body"]["mine"], &sent["body"]["content"]),
        (&json!(201), &json!(true), &json!(text))
    );

    // An unnamed event, for the other user only, and never twice after a break.
    jane.wait_for("she hears it", "heard.length === 1").await;
    let heard = jane.evaluate("heard[0]").await;
    assert_eq!(heard["content"], text.as_str());
    assert_eq!((&heard["mine"], &heard["conversationId"]), (&json!(false), &json!(id)));
    let unread = jane.evaluate("call('GET', '/api/conversations')").await;
    assert_eq!(
        (&unread["body"][0]["hasUnreadMessages"], &unread["body"][0]["lastMessage"]["mine"]),
        (&json!(true), &json!(false))
    );
    let read = jane.evaluate(&format!("call('POST', '/api/conversations/{id}/read_messages')")).await;
    assert_eq!((&read["status"], &read["body"]), (&json!(204), &json!("")));
    let page = jane.evaluate(&format!("call('GET', '{messages}')")).await;
    assert_eq!(page["body"].as_array().unwrap().len(), 1);
    let listed = jane.evaluate("call('GET', '/api/conversations')").await;
    assert_eq!(listed["body"][0]["hasUnreadMessages"], false);

    // It reads errors from `body.message`.
    let gone = john.evaluate("call('GET', '/api/conversations/0/messages')").await;
    assert_eq!((&gone["status"], &gone["body"]["message"]), (&json!(404), &json!("Conversation not found")));
    john.evaluate("window.token = 'invalid'").await;
    let refused = john.evaluate("call('GET', '/api/auth_user')").await;
    assert_eq!((&refused["status"], &refused["body"]["message"]), (&json!(401), &json!("Unauthorized")));
    assert_eq!(jane.evaluate("failed.length").await, 0);
    jane.evaluate("source.close()").await;
}

const SERVE: &str = r"async (route) => {
    const fs = process.getBuiltinModule('node:fs');
    const folder = FOLDER;
    const { hostname, pathname } = new URL(route.request().url());
    if (hostname !== 'localhost') {
        const body = pathname.includes('router') ? fs.readFileSync(`${folder}/router.js`) : '';
        return route.fulfill({ contentType: 'text/javascript', headers: { 'access-control-allow-origin': '*' }, body });
    }
    if (pathname.startsWith('/api/')) return route.continue();
    const file = `${folder}/static${pathname}`;
    const found = fs.existsSync(file) && fs.statSync(file).isFile() ? file : `${folder}/static/index.html`;
    const types = { js: 'text/javascript', css: 'text/css', html: 'text/html' };
    return route.fulfill({ contentType: types[found.split('.').pop()], body: fs.readFileSync(found) });
}";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the original client's files: ORIGINAL_CLIENT"]
async fn the_original_client_itself_works_unchanged() {
    #[expect(clippy::disallowed_methods, reason = "runs only with the files")]
    let folder = PathBuf::from(std::env::var("ORIGINAL_CLIENT").expect("ORIGINAL_CLIENT is set"));
    assert!(folder.join("static/index.html").exists() && folder.join("router.js").exists());
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let enter = async |name: &str| {
        site.world.person(name).await;
        let context = browser.context(name, &site.origin).await;
        let serve = SERVE.replace("FOLDER", &json!(folder).to_string());
        context.call(json!([["route", { "js": "() => true" }, { "js": serve }]])).await;
        let page = context.open("/").await;
        page.css("input").fill(name).await;
        page.css("button").click().await;
        page.css("#conversation-form").appears().await;
        (context, page)
    };
    let (_john_context, john) = enter("john").await;
    let (_jane_context, jane) = enter("jane").await;

    john.css("#username-input").fill("ja").await;
    john.wait_for(
        "names are offered",
        "document.querySelector('#usernames-datalist option')?.value === 'jane'",
    )
    .await;
    john.css("#username-input").fill("jane").await;
    john.css("#username-input").press("Enter").await;
    let texts: Vec<_> = (0..30).map(|_| site.world.text()).collect();
    for (number, text) in texts.iter().enumerate() {
        john.css("#message-form input").fill(text).await;
        john.css("#message-form button").click().await;
        let shown = format!("document.querySelectorAll('#messages li').length === {}", number + 1);
        john.wait_for("it is shown", &shown).await;
        john.wait_for("the next can be written", "!document.querySelector('#message-form input').disabled")
            .await;
    }

    jane.css(".conversation.has-unread-messages a").click().await;
    jane.wait_for(
        "a page of messages",
        "document.querySelectorAll('#messages li:not(.load-more)').length === 25",
    )
    .await;
    jane.css("#load-more-button").click().await;
    jane.wait_for("all messages", "document.querySelectorAll('#messages p').length === 30").await;
    let live = site.world.text();
    john.css("#message-form input").fill(&live).await;
    john.css("#message-form button").click().await;
    jane.wait_for("the live one", "document.querySelectorAll('#messages p').length === 31").await;
    let seen = jane.css("#messages p").texts().await;
    assert_eq!(seen, [texts, vec![live.clone()]].concat());
    assert_eq!(jane.css("#messages li.mine").count().await, 0);

    john.goto("/").await;
    assert!(john.css(".conversation .message-preview p").text().await.contains(&format!("You: {live}")));
    john.css("#username-input").fill("jane").await;
    john.css("#username-input").press("Enter").await;
    john.css("#message-form").appears().await;
    jane.css("#back-link").click().await;
    jane.css("#logout-button").click().await;
    jane.css("#login-form").appears().await;
}
