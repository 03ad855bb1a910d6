//! Screenshots for review, accessibility rules, and the size of a first visit.

use e2e::{Browser, Front, TestUser, browser::WebPage};
use protocol::ids::ConversationId;
use serde_json::{Value, json};

use super::{
    messenger::{Messenger, path_of},
    site::{Site, site},
};

const SIZES: [(&str, u32, u32); 2] = [("desktop", 1280, 800), ("phone", 390, 844)];
const THEMES: [&str; 2] = ["light", "dark"];

/// Several conversations, one of them long, with everything that can be on screen.
async fn furnish(site: &Site) -> (TestUser, ConversationId) {
    let (world, api) = (&*site.world, site.api());
    let jane = world.user(api, "jane").await;
    let mut conversations = Vec::new();
    for name in ["amelie", "tomás", "奈緒", "a_rather_long_username_indeed", "priya", "john"] {
        let user = world.user(api, name).await;
        let conversation = world.conversation(api, &jane, &user).await;
        conversations.push((user, conversation));
    }
    let say = async |from: &TestUser, conversation: ConversationId, text: &str| {
        let url = api.url(&format!("/api/conversations/{conversation}/messages"));
        world.client.post(url).bearer(&from.token).json(&json!({ "content": text })).expect(201).await;
    };
    for ((user, conversation), text) in conversations.iter().zip([
        "Are you coming tonight?",
        "¡Vale! Hasta mañana.",
        "ありがとう",
        "The figures are in the usual place, as soon as we find out where that is.",
        "👍",
    ]) {
        say(user, *conversation, text).await;
    }
    let (john, conversation) = conversations.pop().unwrap();
    for (mine, text) in [
        (false, "Did you see what they did to the harbour?"),
        (false, "https://example.org/harbour-before-and-after"),
        (
            true,
            "I walked there this morning. It took me a while to understand what was different, \
                and then I saw that the old crane is back, painted.",
        ),
        (false, "The crane!"),
        (true, "The crane.\nIn red."),
        (false, "😍😍😍"),
        (true, "Saturday, then? We could take the ferry across and have lunch on the other side."),
        (false, "Saturday is good. Eleven?"),
    ] {
        say(if mine { &jane } else { &john }, conversation, text).await;
    }
    let times = "UPDATE messenger.messages SET created_at = created_at
        - make_interval(mins => 7 * (SELECT count(*) FROM messenger.messages later WHERE later.id > messages.id)::int)
        - CASE WHEN content LIKE 'Did you%' OR content LIKE 'https%' THEN interval '1 day' ELSE interval '0' END";
    sqlx::query(times).execute(&world.sql).await.unwrap();
    let read =
        "UPDATE messenger.participants AS p SET last_read_message_id = m.id, last_read_number = m.number
        FROM messenger.messages AS m
        WHERE m.content LIKE '%crane is back%' AND p.conversation_id = $1 AND p.user_id = $2";
    sqlx::query(read).bind(conversation.0).bind(john.id.0).execute(&world.sql).await.unwrap();
    (jane, conversation)
}

async fn look(page: &WebPage, name: &str) {
    let mut complaints = Vec::new();
    for theme in THEMES {
        page.call(json!([["emulateMedia", { "colorScheme": theme, "reducedMotion": "reduce" }]])).await;
        for (size, width, height) in SIZES {
            page.call(json!([["setViewportSize", { "width": width, "height": height }]])).await;
            page.evaluate(
                "new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))",
            )
            .await;
            page.screenshot(&format!("{name}-{theme}-{size}")).await;
            let found = page.axe().await;
            complaints.extend(found.into_iter().map(|found| format!("{name}, {theme}, {size}: {found}")));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_page_is_accessible_in_both_themes_on_both_sizes() {
    let browser = Browser::launch().await;
    let settings = [
        ("GITHUB_CLIENT_ID", "id"),
        ("GITHUB_CLIENT_SECRET", "a secret that opens nothing"),
        ("OIDC_ISSUER", "http://127.0.0.1:9"),
        ("OIDC_CLIENT_ID", "id"),
        ("OIDC_CLIENT_SECRET", "a secret that opens nothing"),
    ];
    let site = site(Front::plain(), &settings).await;
    let (jane, conversation) = furnish(&site).await;
    let stranger = browser.context("a stranger", &site.origin).await;
    stranger.expect("status of 401");
    let access = stranger.open("/").await;
    access.role("link", "Continue with GitHub").appears().await;
    access.role("link", "Continue with single sign-on").appears().await;
    look(&access, "access").await;
    access.goto("/callback?error=access_denied").await;
    access.text("You did not allow the login.").appears().await;
    look(&access, "access-refused").await;

    let context = browser.context("jane", &site.origin).await;
    context.sign_in(&jane).await;
    let home = Messenger::open(&context, "/").await;
    home.line(conversation).appears().await;
    look(&home, "home").await;
    home.close().await;

    let talk = Messenger::at(&context, conversation).await;
    talk.field().fill("See you at the ferry").await;
    look(&talk, "conversation").await;
    talk.field().fill("").await;
    talk.close().await;

    site.world.login(site.api(), "jane").await;
    let named = "UPDATE messenger.sessions SET device = CASE WHEN id = $1 THEN 'Chrome on Linux' ELSE 'Safari on iPhone' END";
    let session = site.world.claims(&jane).sid.unwrap();
    sqlx::query(named).bind(session.0).execute(&site.world.sql).await.unwrap();
    let sessions = Messenger::open(&context, "/sessions").await;
    sessions.css("li[data-session-id]").first().appears().await;
    look(&sessions, "sessions").await;

    sessions.goto(&path_of(ConversationId(404))).await;
    context.expect("status of 404");
    sessions.text("There is no such conversation.").appears().await;
    look(&sessions, "not-found").await;
}

/// Bytes on the wire of everything that a first visit loads, headers included.
async fn weight(page: &WebPage) -> Value {
    page.evaluate(
        "(() => {
            const all = ['navigation', 'resource'].flatMap((type) => performance.getEntriesByType(type));
            const files = all.filter(({ name }) => !name.includes('/api/'));
            const sum = (list) => list.reduce((bytes, { transferSize }) => bytes + transferSize, 0);
            return { all: sum(all), files: sum(files), requests: all.length, unknown: all.filter(({ transferSize }) => !transferSize).map(({ name }) => name) };
        })()",
    )
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_visit_weighs_less_than_100_kilobytes() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (jane, conversation) = furnish(&site).await;
    let context = browser.context("jane", &site.origin).await;
    context.sign_in(&jane).await;
    let page = Messenger::at(&context, conversation).await;
    let weight = weight(&page).await;
    println!("a first visit: {weight}");
    let bytes = weight["all"].as_u64().unwrap();
    assert!((10_000..100_000).contains(&bytes), "{weight}");
    assert_eq!(
        page.happenings()
            .iter()
            .filter(|happening| happening.kind == "response" && !happening.url.starts_with(&site.origin))
            .count(),
        0,
        "nothing comes from elsewhere"
    );
}
