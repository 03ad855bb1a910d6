//! Paging: every entry once, in order, also while new ones arrive.

use std::collections::HashSet;

use serde_json::Value;
use sqlx::PgPool;

use crate::support::{ApiUser, App, text};

fn ids(page: &Value) -> Vec<i64> {
    page.as_array().unwrap().iter().map(|item| text(&item["id"]).parse().unwrap()).collect()
}

async fn all_conversations(user: &ApiUser) -> Vec<Value> {
    let mut all: Vec<Value> = Vec::new();
    loop {
        let query = all.last().map(|last| format!("?before={}", text(&last["id"]))).unwrap_or_default();
        let page = user.conversations(&query).expect(200).await.json();
        let page = page.as_array().unwrap().clone();
        assert!(page.len() <= 25);
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn paging_lists_each_conversation_once_newest_first(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    let mut conversations = Vec::new();
    for n in 0..31 {
        let name = format!("user{n}");
        app.user(&pool, &name).await;
        conversations.push(john.start(&name).await);
    }
    // A conversation without messages is not listed.
    app.user(&pool, "silent").await;
    john.start("silent").await;
    // The order of last messages is neither that of ids nor its reverse.
    for n in 0..31 {
        john.say(&conversations[n * 7 % 31], "first").await;
    }
    for n in [3, 1, 4] {
        john.say(&conversations[n], "again").await;
    }
    let listed = all_conversations(&john).await;
    let listed: Vec<String> = listed.iter().map(|conversation| text(&conversation["id"])).collect();
    let mut expected: Vec<usize> = [4, 1, 3].into();
    expected.extend((0..31).rev().map(|n| n * 7 % 31).filter(|n| ![4, 1, 3].contains(n)));
    assert_eq!(listed, expected.into_iter().map(|n| conversations[n].clone()).collect::<Vec<_>>());
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn message_during_paging_leaves_no_gap_in_the_list(pool: PgPool) {
    let app = App::start(&pool).await;
    let john = app.user(&pool, "john").await;
    let mut conversations = Vec::new();
    for n in 0..31 {
        let name = format!("user{n}");
        app.user(&pool, &name).await;
        conversations.push(john.start(&name).await);
        john.say(&conversations[n], "hi").await;
    }
    let first = ids(&john.conversations("").expect(200).await.json());
    assert_eq!(first.len(), 25);
    // One of the first page moves to the top; it is not the page's last, so paging continues from the same point.
    john.say(&first[10].to_string(), "up").await;
    let second = ids(&john.conversations(&format!("?before={}", first[24])).expect(200).await.json());
    assert_eq!(second.len(), 6);
    let all: HashSet<i64> = first.iter().chain(&second).copied().collect();
    assert_eq!(all.len(), 31);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn paging_reads_each_message_once_in_both_directions(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    app.user(&pool, "bob").await;
    let elsewhere = john.start("bob").await;
    let mut said = Vec::new();
    for n in 0..130 {
        let who = if n % 3 == 0 { &jane } else { &john };
        said.push(who.say(&conversation, &format!("m{n}")).await.parse::<i64>().unwrap());
        // Ids are not consecutive within a conversation.
        john.say(&elsewhere, "x").await;
    }
    for limit in [None, Some(1), Some(50), Some(100)] {
        let limit_is = limit.map(|limit| format!("&limit={limit}")).unwrap_or_default();
        let length = limit.unwrap_or(25);

        // Backwards, while new ones arrive.
        let mut back = Vec::new();
        let mut query = format!("?markRead=false{limit_is}");
        loop {
            let page = ids(&john.messages(&conversation, &query).expect(200).await.json());
            assert!(page.len() <= length);
            let Some(oldest) = page.last() else { break };
            query = format!("?markRead=false&before={oldest}{limit_is}");
            back.extend(page);
            if back.len().is_multiple_of(3) {
                said.push(jane.say(&conversation, "meanwhile").await.parse().unwrap());
            }
        }
        assert!(back.is_sorted_by(|a, b| a > b), "newest first, none twice");
        back.reverse();
        assert_eq!(back, said[..back.len()], "no gap");

        // Forwards, until it has caught up.
        let mut forth: Vec<i64> = Vec::new();
        loop {
            let after = forth.last().copied().unwrap_or(1);
            let query = format!("?markRead=false&after={after}{limit_is}");
            let page = ids(&john.messages(&conversation, &query).expect(200).await.json());
            assert!(page.len() <= length);
            if page.is_empty() {
                break;
            }
            forth.extend(page);
            if forth.len() < 120 && forth.len().is_multiple_of(5) {
                said.push(jane.say(&conversation, "meanwhile").await.parse().unwrap());
            }
        }
        assert!(forth.is_sorted_by(|a, b| a < b), "oldest first, none twice");
        assert_eq!(forth, said[said.iter().position(|id| *id > 1).unwrap()..], "no gap");
    }
    // A window between two ids, in the direction of `after`.
    let (after, before) = (said[10], said[15]);
    let window = john.messages(&conversation, &format!("?after={after}&before={before}")).expect(200).await;
    assert_eq!(ids(&window.json()), said[11..15]);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn mine_is_relative_to_the_reader(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, jane, conversation) = app.pair(&pool).await;
    john.say(&conversation, "from john").await;
    jane.say(&conversation, "from jane").await;
    for (who, mine) in [(&john, [false, true]), (&jane, [true, false])] {
        let page = who.messages(&conversation, "").expect(200).await.json();
        let seen: Vec<_> =
            page.as_array().unwrap().iter().map(|message| message["mine"].as_bool().unwrap()).collect();
        assert_eq!(seen, mine);
        assert!(page[0].get("conversationId").is_none());
    }
    app.stop().await;
}
