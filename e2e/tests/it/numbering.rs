//! Feeds have no gaps, whichever process dies while writing.

use std::collections::BTreeSet;

use e2e::{World, ledger::StoredFeed};

use crate::support::{Busy, assert_stored_once};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_killed_at_work_leave_no_gap_and_no_duplicate() {
    let world = World::new().await;
    let (steady, one, two) = tokio::join!(world.api().ready(), world.api().ready(), world.api().ready());
    let gateway = world.gateway(steady.internal()).env("RECONCILE_SECONDS", 1).ready().await;
    let mut busy = Busy::of(world, vec![steady, one, two], vec![gateway]).await;
    let traffic = busy.traffic();
    for _ in 0..4 {
        let [_, one, two] = &mut busy.apis[..] else { unreachable!("there are three") };
        traffic.more(100).await;
        one.kill();
        traffic.more(30).await;
        two.kill();
        tokio::join!(one.restart(), two.restart());
    }
    let accepted = traffic.stop().await;

    busy.assert_ledgers().await;
    let different: BTreeSet<&String> = accepted.iter().collect();
    assert_eq!(different.len(), accepted.len(), "each key is one message, and no other");
    let mut events = 0;
    for user in &busy.crowd.users {
        let feed = StoredFeed::read(&busy.world.sql, user.id).await;
        feed.assert_without_gaps();
        let mut ids = BTreeSet::new();
        for event in
            feed.events.iter().filter(|event| matches!(event.name.as_deref(), None | Some("message.sent")))
        {
            let id = event.data["id"].as_str().unwrap().to_owned();
            assert!(ids.insert(id), "{}'s feed has one message twice: {event:?}", user.name);
            events += 1;
        }
    }
    assert_eq!(events, 2 * (accepted.len() + busy.crowd.lines.len()), "each message is in two feeds");
    assert_stored_once(&busy.world, &accepted, busy.crowd.lines.len()).await;
}
