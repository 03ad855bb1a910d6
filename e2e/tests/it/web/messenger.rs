//! The messenger's pages by the roles and names that users and screen readers find, compared with the database.

use std::{
    ops::Deref,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use e2e::{
    TestUser, World,
    browser::{BrowserContext, Locator, POLL, WebPage},
};
use futures_util::future::join_all;
use protocol::ids::ConversationId;
use serde_json::{Value, json};
use sqlx::PgPool;
use testkit::{PATIENCE, soon, until};
use tokio::sync::watch;

pub(crate) struct Messenger(WebPage);

impl Deref for Messenger {
    type Target = WebPage;

    fn deref(&self) -> &WebPage {
        &self.0
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShownMessage {
    /// None until the server has answered.
    pub(crate) id: Option<String>,
    pub(crate) mine: bool,
    pub(crate) text: String,
    pub(crate) pending: bool,
    pub(crate) failed: bool,
}

const ROWS: &str = "Array.from(document.querySelectorAll('ol[role=log] li.message'), (li) => ({
    id: li.dataset.id ?? null,
    mine: li.dataset.mine === 'true',
    text: li.querySelector('.content').textContent,
    pending: li.hasAttribute('data-pending'),
    failed: li.hasAttribute('data-failed'),
}))";

/// Records which texts were ever on screen twice. Tests write each text once.
const WATCH: &str = "
    window.twice = [];
    new MutationObserver(() => {
        const texts = Array.from(document.querySelectorAll('ol[role=log] li.message .content'), (text) => text.textContent);
        twice.push(...texts.filter((text, at) => texts.indexOf(text) !== at && !twice.includes(text)));
    }).observe(document, { subtree: true, childList: true, characterData: true });
";

const PACE: Duration = Duration::from_millis(50);

impl Messenger {
    pub(crate) async fn blank(context: &BrowserContext) -> Self {
        let page = context.page().await;
        page.call(json!([["addInitScript", { "content": WATCH }]])).await;
        Self(page)
    }

    pub(crate) async fn visit(context: &BrowserContext, path: &str) -> Self {
        let messenger = Self::blank(context).await;
        messenger.goto(path).await;
        messenger
    }

    pub(crate) async fn open(context: &BrowserContext, path: &str) -> Self {
        let messenger = Self::visit(context, path).await;
        messenger.live().await;
        messenger
    }

    pub(crate) async fn at(context: &BrowserContext, conversation: ConversationId) -> Self {
        let messenger = Self::open(context, &path_of(conversation)).await;
        let there = "document.querySelector('ol[role=log]:not([aria-busy])')";
        messenger.wait_for("the messages are there", there).await;
        messenger
    }

    pub(crate) async fn close(self) {
        self.0.close().await;
    }

    pub(crate) async fn live(&self) {
        self.is("live").await;
    }

    pub(crate) async fn is(&self, state: &str) {
        let expression = format!("document.querySelector('#connection')?.dataset.state === '{state}'");
        self.wait_for(&format!("the page says {state}"), &expression).await;
    }

    /// The protocol of a request that bypasses the cache.
    pub(crate) async fn protocol(&self) -> Value {
        let requests = "performance.getEntriesByType('resource')";
        self.evaluate(&format!("{requests}.findLast(({{ name }}) => name.includes('/api/')).nextHopProtocol"))
            .await
    }

    pub(crate) async fn say(&self, text: &str) {
        let field = self.field();
        field.fill(text).await;
        field.press("Enter").await;
    }

    pub(crate) async fn go_on_saying(&self, world: &World, talk: &Talk) {
        while !talk.over.load(Ordering::Relaxed) {
            self.say(&world.text()).await;
            talk.said.send_modify(|said| *said += 1);
            tokio::time::sleep(PACE).await;
        }
    }

    pub(crate) fn field(&self) -> Locator<'_> {
        self.role("textbox", "Message")
    }

    pub(crate) fn messages(&self) -> Locator<'_> {
        self.css("ol[role=log] li.message")
    }

    pub(crate) fn line(&self, conversation: ConversationId) -> Locator<'_> {
        self.css(&format!("nav[aria-label=Conversations] li[data-conversation-id='{conversation}']"))
    }

    pub(crate) async fn rows(&self) -> Vec<ShownMessage> {
        let rows = self.evaluate(ROWS).await;
        let row = |row: &Value| ShownMessage {
            id: row["id"].as_str().map(str::to_owned),
            mine: row["mine"] == true,
            text: row["text"].as_str().unwrap().to_owned(),
            pending: row["pending"] == true,
            failed: row["failed"] == true,
        };
        rows.as_array().unwrap().iter().map(row).collect()
    }

    pub(crate) async fn shows_last(&self, text: &str) {
        let last = "document.querySelector('ol[role=log] li.message:last-child .content')?.textContent";
        self.wait_for(&format!("{text} is on screen"), &format!("{last} === {}", Value::from(text))).await;
    }

    pub(crate) async fn shows_login(&self) {
        self.role("button", "Log in").appears().await;
        assert_eq!(self.messages().count().await, 0);
        assert_eq!(self.css("nav").count().await, 0);
    }
}

#[derive(Default)]
pub(crate) struct Talk {
    over: AtomicBool,
    said: watch::Sender<u64>,
}

impl Talk {
    pub(crate) async fn more(&self, messages: u64) {
        let mut said = self.said.subscribe();
        let wanted = *said.borrow() + messages;
        soon("they go on talking", said.wait_for(|said| *said >= wanted)).await.unwrap();
    }

    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

pub(crate) fn path_of(conversation: ConversationId) -> String {
    format!("/conversations/{conversation}")
}

async fn rows_in_sql(sql: &PgPool, user: &TestUser, conversation: ConversationId) -> Vec<ShownMessage> {
    let query =
        "SELECT id, sender_id, content FROM messenger.messages WHERE conversation_id = $1 ORDER BY id";
    let rows: Vec<(i64, i64, String)> =
        sqlx::query_as(query).bind(conversation.0).fetch_all(sql).await.unwrap();
    let row = |(id, sender, text): (i64, i64, String)| ShownMessage {
        id: Some(id.to_string()),
        mine: sender == user.id.0,
        text,
        pending: false,
        failed: false,
    };
    rows.into_iter().map(row).collect()
}

/// Each page shows all messages of the conversation, once, in order, and nothing pending.
async fn assert_show(sql: &PgPool, conversation: ConversationId, watching: &[(&TestUser, &Messenger)]) {
    for (user, page) in watching {
        page.live().await;
        let wanted = rows_in_sql(sql, user, conversation).await;
        let deadline = Instant::now() + PATIENCE;
        let mut shown = page.rows().await;
        // Nothing signals that a page is complete, so a wrong page waits for the timeout.
        while shown != wanted && Instant::now() < deadline {
            tokio::time::sleep(POLL).await;
            shown = page.rows().await;
        }
        if shown != wanted {
            let at = wanted.iter().zip(&shown).take_while(|(wanted, shown)| wanted == shown).count();
            panic!(
                "{}: {} messages on screen, {} in the database; they part at {at}\n wanted {:#?}\n shown {:#?}",
                user.name,
                shown.len(),
                wanted.len(),
                &wanted[at..wanted.len().min(at + 3)],
                &shown[at..shown.len().min(at + 3)],
            );
        }
        assert_eq!(page.evaluate("twice").await, json!([]), "{}: on screen twice, for a moment", user.name);
    }
}

/// The same, again after one more message from each: nothing old can arrive later unnoticed.
pub(crate) async fn assert_all_show(
    world: &World,
    conversation: ConversationId,
    watching: &[(&TestUser, &Messenger)],
) {
    assert_show(&world.sql, conversation, watching).await;
    join_all(watching.iter().map(|(_, page)| async { page.say(&world.text()).await })).await;
    assert_sql_has(&world.sql, conversation, watching).await;
    assert_show(&world.sql, conversation, watching).await;
}

async fn assert_sql_has(sql: &PgPool, conversation: ConversationId, watching: &[(&TestUser, &Messenger)]) {
    for (user, page) in watching {
        until(&format!("all that {} said is sent", user.name), || async {
            let mine: Vec<_> = page.rows().await.into_iter().filter(|row| row.mine).collect();
            let sent: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM messenger.messages WHERE conversation_id = $1 AND sender_id = $2",
            )
            .bind(conversation.0)
            .bind(user.id.0)
            .fetch_one(sql)
            .await
            .unwrap();
            mine.iter().all(|row| !row.pending) && i64::try_from(mine.len()).unwrap() == sent
        })
        .await;
    }
}
