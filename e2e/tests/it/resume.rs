//! A stream resumes exactly at its cursor, or its client gets a resync.

use e2e::{
    Service, World,
    ledger::{StoredFeed, assert_exact},
};
use protocol::position::{Epoch, Position};
use testkit::sse::{Stream, StreamRequest};

use crate::support::{Two, browser, ready, start};

struct ResumeFixture {
    world: World,
    api: Service,
    gateways: [Service; 2],
    two: Two,
}

impl ResumeFixture {
    async fn new() -> Self {
        let (world, api, first, two) = start().await;
        let second = world.gateway(api.internal()).env("RECONCILE_SECONDS", 1).ready().await;
        two.say(&world, &api, 10).await;
        Self { world, api, gateways: [first, second], two }
    }

    fn jane(&self, gateway: usize) -> StreamRequest {
        self.gateways[gateway].stream(&self.two.jane)
    }

    async fn feed(&self) -> StoredFeed {
        StoredFeed::read(&self.world.sql, self.two.jane.id).await
    }

    /// `ready` with the client's cursor, then everything after it, then new events.
    async fn assert_resumes(&self, mut stream: Stream, after: u64) {
        let feed = self.feed().await;
        let ready = stream.named("ready").await;
        assert_eq!(ready.id, Some(feed.cursor(after)));
        assert_eq!(ready.json()["cursor"], feed.cursor(after));
        assert_eq!(ready.json()["resumed"], true);
        self.assert_continues(stream, after, "jane").await;
    }

    async fn assert_continues(&self, mut stream: Stream, after: u64, what: &str) {
        self.two.say(&self.world, &self.api, 1).await;
        let feed = self.feed().await;
        let mut seen = Vec::new();
        for _ in after..feed.head {
            seen.push(stream.next().await);
        }
        feed.assert_is(what, &seen, after);
    }

    /// `ready` without a position, `resync` with one that the gateway knows, then everything after it.
    async fn assert_resync(&self, mut stream: Stream, reason: &str, what: &str) {
        let before = self.feed().await;
        let ready = stream.named("ready").await;
        assert_eq!(ready.id, None, "{what}: a resync follows");
        assert_eq!(ready.json()["resumed"], false, "{what}");
        let resync = stream.named("resync").await;
        assert_eq!(resync.json()["cursor"].as_str(), resync.id.as_deref(), "{what}");
        assert_eq!(resync.json()["reason"], reason, "{what}");
        let position: Position = resync.id.unwrap().parse().unwrap();
        // An event posted a moment ago may still be on its way to the gateway.
        let newest = [before.cursor(before.head - 1), before.head_cursor()];
        assert!(newest.contains(&position.to_string()), "{what}: {position}, not one of {newest:?}");
        self.assert_continues(stream, position.seq, what).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reconnecting_client_gets_exactly_what_it_missed() {
    let setting = ResumeFixture::new().await;
    let feed = setting.feed().await;
    let at = |seq| feed.cursor(seq);
    for gateway in [0, 1] {
        let jane = || setting.jane(gateway);
        setting.assert_resumes(jane().last_event_id(at(4)).stream().await, 4).await;
        setting.assert_resumes(jane().last_event_id_in_query(&at(5)).stream().await, 5).await;
        // The header wins: in a reconnecting browser the query is stale.
        let both = jane().last_event_id(at(6)).last_event_id_in_query(&at(2));
        setting.assert_resumes(both.stream().await, 6).await;
        let both = jane().last_event_id(at(7)).last_event_id_in_query("invalid");
        setting.assert_resumes(both.stream().await, 7).await;
        let empty = jane().last_event_id("").last_event_id_in_query(&at(3));
        setting.assert_resumes(empty.stream().await, 3).await;
        // The last of a repeated parameter counts.
        let repeated = format!("{}?lastEventId={}", setting.gateways[gateway].url("/api/messages"), at(2));
        let repeated =
            StreamRequest::new(repeated).bearer(&setting.two.jane.token).last_event_id_in_query(&at(5));
        setting.assert_resumes(repeated.stream().await, 5).await;
        setting.assert_resumes(jane().last_event_id(at(0)).stream().await, 0).await;
        let head = setting.feed().await.head;
        setting.assert_resumes(jane().last_event_id(at(head)).stream().await, head).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_that_is_none_is_a_resync_and_never_an_error() {
    let setting = ResumeFixture::new().await;
    let feed = setting.feed().await;
    let john = StoredFeed::read(&setting.world.sql, setting.two.john.id).await;
    let other_epoch = Position { epoch: Epoch(feed.epoch.0 ^ 1), seq: 3 }.to_string();
    let good = feed.cursor(3);
    let texts =
        [&"a".repeat(2_000), "1-2-3", &format!("{good}x"), &format!("{}-18446744073709551615", feed.epoch)];
    for text in texts {
        let stream = setting.jane(0).last_event_id(text).stream().await;
        setting.assert_resync(stream, "unknown", text).await;
        let stream = setting.jane(1).last_event_id_in_query(text).stream().await;
        setting.assert_resync(stream, "unknown", text).await;
    }
    let injected = "x\r\nid: 7\r\n\r\ndata: injected\r\n\r\n";
    for text in [injected, "\n\n", "\0", "\u{2028}é😀", &format!("{good}\n"), &format!("{good} ")] {
        let stream = setting.jane(0).last_event_id_in_query(text).stream().await;
        setting.assert_resync(stream, "unknown", text).await;
    }
    let stream = setting.jane(0).last_event_id(b"\xff\xfe-3").stream().await;
    setting.assert_resync(stream, "unknown", "not UTF-8").await;
    let broken_escape = format!("{}?lastEventId=%f", setting.gateways[0].url("/api/messages"));
    let stream = StreamRequest::new(broken_escape).bearer(&setting.two.jane.token).stream().await;
    setting.assert_resync(stream, "unknown", "a broken escape").await;

    for (cursor, what) in [(other_epoch, "another epoch"), (john.head_cursor(), "another's cursor")] {
        for gateway in [0, 1] {
            let stream = setting.jane(gateway).last_event_id(&cursor).stream().await;
            setting.assert_resync(stream, "unknown", what).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cursor_older_than_the_oldest_kept_event_is_a_resync() {
    let setting = ResumeFixture::new().await;
    let feed = setting.feed().await;
    let delete =
        sqlx::query("DELETE FROM messenger.feed WHERE user_id = $1 AND seq <= 5").bind(setting.two.jane.id.0);
    delete.execute(&setting.world.sql).await.unwrap();
    for after in [0, 4] {
        let stream = setting.jane(0).last_event_id(feed.cursor(after)).stream().await;
        setting.assert_resync(stream, "expired", "before the oldest").await;
    }
    setting.assert_resumes(setting.jane(1).last_event_id(feed.cursor(5)).stream().await, 5).await;

    let delete = sqlx::query("DELETE FROM messenger.feed WHERE user_id = $1").bind(setting.two.jane.id.0);
    delete.execute(&setting.world.sql).await.unwrap();
    let feed = setting.feed().await;
    let mut stream = setting.jane(0).last_event_id(feed.cursor(feed.head - 1)).stream().await;
    assert_eq!(stream.named("ready").await.id, None);
    assert_eq!(stream.named("resync").await.json()["reason"], "expired");
    let mut stream = setting.jane(1).last_event_id(feed.head_cursor()).stream().await;
    assert_eq!(stream.named("ready").await.id, Some(feed.head_cursor()), "the head needs no rows");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_epoch_makes_a_live_stream_resync_and_continue() {
    let setting = ResumeFixture::new().await;
    let (mut quiet, mut busy) = (ready(setting.jane(1)).await, ready(setting.jane(0)).await);

    let before = setting.feed().await.epoch;
    setting.world.api().run(&["new-epoch"]).await;
    let epoch = setting.feed().await.epoch;
    assert_ne!(epoch, before);

    // One gateway finds it by reconcile, the other by the first event of the new epoch.
    let head = setting.feed().await.head_cursor();
    let resync = quiet.named("resync").await;
    assert_eq!(resync.id.as_ref(), Some(&head));
    assert_eq!(resync.json()["reason"], "unknown");
    setting.two.say(&setting.world, &setting.api, 2).await;
    let feed = setting.feed().await;
    assert_eq!(quiet.next().await.id, Some(feed.cursor(feed.head - 1)));
    assert_eq!(quiet.next().await.id, Some(feed.head_cursor()));
    let resync = busy.named("resync").await;
    let mut last: Position = resync.id.unwrap().parse().unwrap();
    assert_eq!(last.epoch, epoch);
    while last.to_string() != feed.head_cursor() {
        let next: Position = busy.next().await.id.unwrap().parse().unwrap();
        assert_eq!((next.epoch, next.seq), (last.epoch, last.seq + 1));
        last = next;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restored_database_resyncs_live_streams() {
    let setting = ResumeFixture::new().await;
    let mut jane = ready(setting.jane(1)).await;
    let jane_id = setting.two.jane.id.0;
    let mut back = setting.world.sql.begin().await.unwrap();
    for sql in [
        "DELETE FROM messenger.feed WHERE user_id = $1 AND seq > 6",
        "UPDATE messenger.feed_heads SET head_seq = 6 WHERE user_id = $1",
    ] {
        sqlx::query(sql).bind(jane_id).execute(&mut *back).await.unwrap();
    }
    back.commit().await.unwrap();

    let resync = jane.named("resync").await;
    assert_eq!(resync.id, Some(setting.feed().await.cursor(6)));
    setting.two.say(&setting.world, &setting.api, 3).await;
    let feed = setting.feed().await;
    assert_eq!(feed.head, 9);
    let seen = [jane.next().await, jane.next().await, jane.next().await];
    feed.assert_is("jane", &seen, 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_absence_is_replayed_whole() {
    let setting = ResumeFixture::new().await;
    let cursor = setting.feed().await.head_cursor();
    // More than one answer of the internal listener can carry.
    let append = "WITH message AS (
            INSERT INTO messenger.messages (conversation_id, number, sender_id, content) SELECT 0, n, 0, n::text FROM generate_series(1, 3000) n
            RETURNING id
        )
        SELECT messenger.append_to_feed($1, id, 1) FROM message";
    sqlx::query(append).bind(setting.two.jane.id.0).execute(&setting.world.sql).await.unwrap();
    let back = browser(setting.jane(0).last_event_id(&cursor));
    assert_exact(&setting.world.sql, setting.two.jane.id, "jane", &back).await;
    assert_eq!(back.record().ledger().count(), 3_000);
    assert_eq!(back.record().opened, 1);
}
