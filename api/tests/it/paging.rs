//! Paging: every entry once, in order, also while new ones arrive.

use std::collections::HashSet;

use serde_json::Value;
use sqlx::PgPool;

use crate::support::{ApiUser, App, add_users, text};

fn ids(page: &Value) -> Vec<i64> {
    page.as_array().unwrap().iter().map(|item| text(&item["id"]).parse().unwrap()).collect()
}

/// Conversations of john with 31 other users.
async fn start_many(app: &App, pool: &PgPool) -> (ApiUser, Vec<i64>) {
    let john = app.user(pool, "john").await;
    let mut conversations = Vec::new();
    for n in 0..31 {
        let name = format!("user{n}");
        add_users(pool, [&name]).await;
        conversations.push(john.start(&name).await.parse().unwrap());
    }
    (john, conversations)
}

/// Pages until an empty one; `next` is the query after an id. Returns all ids.
async fn all_pages(longest: usize, mut page_after: impl AsyncFnMut(Option<i64>) -> Value) -> Vec<i64> {
    let mut all = Vec::new();
    loop {
        let page = ids(&page_after(all.last().copied()).await);
        assert!(page.len() <= longest);
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn paging_lists_each_conversation_once_newest_first(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, conversations) = start_many(&app, &pool).await;
    // A conversation without messages is not listed.
    app.user(&pool, "silent").await;
    john.start("silent").await;
    // The order of last messages is neither that of ids nor its reverse.
    let order: Vec<usize> = (0..31).map(|n| n * 7 % 31).collect();
    let again = [3, 1, 4];
    for n in order.iter().chain(&again) {
        john.say(&conversations[*n].to_string(), "hi").await;
    }
    let listed = all_pages(25, async |last| {
        let query = last.map(|last| format!("?before={last}")).unwrap_or_default();
        john.conversations(&query).expect(200).await.json()
    });
    let earlier = order.iter().rev().filter(|n| !again.contains(n));
    let expected: Vec<_> = again.iter().rev().chain(earlier).map(|n| conversations[*n]).collect();
    assert_eq!(listed.await, expected);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn message_during_paging_leaves_no_gap_in_the_list(pool: PgPool) {
    let app = App::start(&pool).await;
    let (john, conversations) = start_many(&app, &pool).await;
    for conversation in conversations {
        john.say(&conversation.to_string(), "hi").await;
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
    for (limit, length) in [("", 25), ("&limit=1", 1), ("&limit=50", 50), ("&limit=100", 100)] {
        let page = async |query: String| {
            john.messages(&conversation, &format!("?markRead=false{query}{limit}")).expect(200).await.json()
        };
        // Backwards, while new ones arrive.
        let mut back = all_pages(length, async |last| {
            if last.is_some_and(|last| last % 3 == 0) {
                said.push(jane.say(&conversation, "meanwhile").await.parse().unwrap());
            }
            page(last.map(|last| format!("&before={last}")).unwrap_or_default()).await
        })
        .await;
        assert!(back.is_sorted_by(|a, b| a > b), "newest first, none twice");
        back.reverse();
        assert_eq!(back, said[..back.len()], "no gap");

        // Forwards, until it has caught up.
        let mut arriving = 10;
        let forth = all_pages(length, async |last| {
            if arriving > 0 {
                arriving -= 1;
                said.push(jane.say(&conversation, "meanwhile").await.parse().unwrap());
            }
            page(format!("&after={}", last.unwrap_or(1))).await
        })
        .await;
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
        assert_eq!([&page[0]["mine"], &page[1]["mine"]], mine);
        assert!(page[0].get("conversationId").is_none());
    }
    app.stop().await;
}
