//! The rules one by one, then all of them against a model: a feed in Postgres, a Redis that loses, repeats and reorders,
//! answers that arrive late, a database that is pruned and restored.

use proptest::prelude::*;

use super::*;

const E: Epoch = Epoch(1);
const OTHER: Epoch = Epoch(2);

fn at(seq: Seq) -> Position {
    Position { epoch: E, seq }
}

fn answer(
    requested_at: Option<Position>,
    head: Position,
    events: impl IntoIterator<Item = Seq>,
) -> FeedAnswer<Seq> {
    let events: Vec<_> = events.into_iter().map(|seq| (seq, seq)).collect();
    FeedAnswer {
        requested_at,
        head: Some(head),
        events,
        after: requested_at.map(|head| head.seq),
        more: false,
    }
}

/// A certain sequencer whose position is `seq`.
fn positioned(seq: Seq) -> Sequencer<Seq> {
    let mut sequencer = Sequencer::default();
    assert_eq!(observed(&mut sequencer, answer(None, at(seq), []), 0), []);
    assert_eq!((sequencer.position(), sequencer.due()), (Some(at(seq)), None));
    sequencer
}

fn live(sequencer: &mut Sequencer<Seq>, seq: Seq, now: Millis) -> Vec<Step<Seq>> {
    let mut steps = Vec::new();
    sequencer.live(at(seq), seq, now, &mut steps);
    steps
}

fn tick(sequencer: &mut Sequencer<Seq>, now: Millis) -> Vec<Step<Seq>> {
    let mut steps = Vec::new();
    sequencer.tick(now, &mut steps);
    steps
}

fn answered(sequencer: &mut Sequencer<Seq>, answer: FeedAnswer<Seq>, now: Millis) -> Vec<Step<Seq>> {
    let mut steps = Vec::new();
    sequencer.answer(answer, now, &mut steps);
    steps
}

fn observed(sequencer: &mut Sequencer<Seq>, answer: FeedAnswer<Seq>, now: Millis) -> Vec<Step<Seq>> {
    let mut steps = Vec::new();
    sequencer.observe(answer, now, &mut steps);
    steps
}

fn assert_idle(sequencer: &Sequencer<Seq>) {
    assert!(sequencer.pending.is_none() && sequencer.due().is_none(), "{sequencer:?}");
}

#[test]
fn the_next_event_is_delivered_and_a_repeat_is_not() {
    let mut sequencer = positioned(5);
    assert_eq!(live(&mut sequencer, 6, 0), [Step::Deliver(6, 6)]);
    assert_eq!(live(&mut sequencer, 6, 0), []);
    assert_eq!(live(&mut sequencer, 2, 0), []);
    assert_idle(&sequencer);
}

#[test]
fn events_before_the_first_position_wait_for_it() {
    let mut sequencer = Sequencer::default();
    assert_eq!(live(&mut sequencer, 6, 0), []);
    assert_eq!(tick(&mut sequencer, REORDER_WAIT), [Step::Request { after: None }]);
    let head_only = FeedAnswer { after: None, ..answer(None, at(5), []) };
    assert_eq!(answered(&mut sequencer, head_only, 40), [Step::Deliver(6, 6)]);
    assert_eq!((sequencer.position(), sequencer.due()), (Some(at(6)), None));
}

#[test]
fn a_reordering_costs_no_request() {
    let mut sequencer = positioned(0);
    assert_eq!(live(&mut sequencer, 3, 0), []);
    assert_eq!(live(&mut sequencer, 2, 0), []);
    assert_eq!(tick(&mut sequencer, REORDER_WAIT - 1), []);
    assert_eq!(live(&mut sequencer, 1, 0), [Step::Deliver(1, 1), Step::Deliver(2, 2), Step::Deliver(3, 3)]);
    assert_idle(&sequencer);
}

#[test]
fn a_gap_is_requested_once_after_the_wait() {
    let mut sequencer = positioned(0);
    live(&mut sequencer, 3, 10);
    assert_eq!(sequencer.due(), Some(10 + REORDER_WAIT));
    assert_eq!(tick(&mut sequencer, 10 + REORDER_WAIT), [Step::Request { after: Some(0) }]);
    assert_eq!(sequencer.due(), None);
    assert_eq!(tick(&mut sequencer, 10_000), []);
    let steps = answered(&mut sequencer, answer(Some(at(0)), at(3), [1, 2, 3]), 50);
    assert_eq!(steps, [Step::Deliver(1, 1), Step::Deliver(2, 2), Step::Deliver(3, 3)]);
    assert_eq!(sequencer.due(), None);
}

#[test]
fn live_events_after_the_request_survive_its_older_answer() {
    let mut sequencer = positioned(0);
    live(&mut sequencer, 2, 0);
    tick(&mut sequencer, REORDER_WAIT);
    assert_eq!(live(&mut sequencer, 4, 40), []);
    let steps = answered(&mut sequencer, answer(Some(at(0)), at(2), [1, 2]), 50);
    assert_eq!(steps, [Step::Deliver(1, 1), Step::Deliver(2, 2)]);
    assert_eq!(sequencer.due(), Some(50 + REORDER_WAIT));
    assert_eq!(live(&mut sequencer, 3, 60), [Step::Deliver(3, 3), Step::Deliver(4, 4)]);
}

#[test]
fn a_head_below_events_that_came_after_the_request_is_old() {
    let mut sequencer = positioned(0);
    sequencer.mark_uncertain(0);
    assert_eq!(tick(&mut sequencer, REORDER_WAIT), [Step::Request { after: Some(0) }]);
    live(&mut sequencer, 1, 0);
    assert_eq!(answered(&mut sequencer, answer(Some(at(0)), at(0), []), 0), []);
    assert_eq!((sequencer.position(), sequencer.due()), (Some(at(1)), None));
}

#[test]
fn a_head_below_the_position_at_the_request_causes_a_resync() {
    let mut sequencer = positioned(5);
    assert_eq!(
        observed(&mut sequencer, answer(Some(at(5)), at(4), []), 0),
        [Step::Resync(ResyncReason::Future, at(4))]
    );
    assert_eq!(live(&mut sequencer, 5, 0), [Step::Deliver(5, 5)]);
}

#[test]
fn buffered_events_of_a_lost_history_are_not_delivered() {
    let mut sequencer = positioned(5);
    live(&mut sequencer, 8, 0);
    let steps = observed(&mut sequencer, answer(Some(at(5)), at(4), []), 0);
    assert_eq!(steps, [Step::Resync(ResyncReason::Future, at(4))]);
    assert_idle(&sequencer);
    for seq in 5..=8 {
        assert_eq!(live(&mut sequencer, seq, 0), [Step::Deliver(seq, seq)]);
    }
}

#[test]
fn buffered_events_of_another_epoch_are_dropped() {
    let other = Position { epoch: OTHER, seq: 900 };
    let mut sequencer = Sequencer::default();
    sequencer.live(other, 900, 0, &mut vec![]);
    assert_eq!(observed(&mut sequencer, answer(None, at(5), []), 0), []);
    assert_idle(&sequencer);

    let mut sequencer = Sequencer::default();
    sequencer.live(other, 900, 0, &mut vec![]);
    assert_eq!(live(&mut sequencer, 6, 0), []);
    assert_eq!(observed(&mut sequencer, answer(None, at(5), []), 0), [Step::Deliver(6, 6)]);
    assert_idle(&sequencer);
}

#[test]
fn another_epoch_from_redis_is_checked_before_the_resync() {
    let mut sequencer = positioned(5);
    let mut steps = Vec::new();
    sequencer.live(Position { epoch: OTHER, seq: 6 }, 6, 0, &mut steps);
    assert_eq!((steps, sequencer.position()), (vec![], Some(at(5))));
    assert_eq!(tick(&mut sequencer, REORDER_WAIT), [Step::Request { after: Some(5) }]);
    let head = Position { epoch: OTHER, seq: 2 };
    assert_eq!(
        answered(&mut sequencer, answer(Some(at(5)), head, []), 40),
        [Step::Resync(ResyncReason::Unknown, head)]
    );
    assert_eq!((sequencer.position(), sequencer.due()), (Some(head), None));
}

#[test]
fn another_epoch_during_a_request_needs_another_request() {
    let mut sequencer = positioned(5);
    sequencer.mark_uncertain(0);
    let mut steps = tick(&mut sequencer, REORDER_WAIT);
    sequencer.live(Position { epoch: OTHER, seq: 1 }, 1, 1, &mut steps);
    answered(&mut sequencer, answer(Some(at(5)), at(5), []), 2);
    assert!(sequencer.due().is_some());
}

#[test]
fn an_answer_of_an_old_epoch_only_causes_a_new_request() {
    let mut sequencer = positioned(5);
    let head = Position { epoch: OTHER, seq: 9 };
    let requested_at = Some(Position { epoch: OTHER, seq: 8 });
    assert_eq!(observed(&mut sequencer, answer(requested_at, head, []), 0), []);
    assert_eq!(sequencer.position(), Some(at(5)));
    assert!(sequencer.due().is_some());
}

#[test]
fn a_head_beyond_the_position_is_a_gap() {
    let mut sequencer = positioned(5);
    assert_eq!(observed(&mut sequencer, answer(None, at(7), []), 0), []);
    assert_eq!(tick(&mut sequencer, REORDER_WAIT), [Step::Request { after: Some(5) }]);
}

#[test]
fn pruned_events_after_the_position_cause_a_resync() {
    let mut sequencer = positioned(5);
    let steps = observed(&mut sequencer, answer(Some(at(5)), at(9), [8, 9]), 0);
    assert_eq!(steps, [Step::Resync(ResyncReason::Expired, at(9))]);
    for head in [6, 9] {
        let mut sequencer = positioned(5);
        let steps = observed(&mut sequencer, answer(Some(at(5)), at(head), []), 0);
        assert_eq!(steps, [Step::Resync(ResyncReason::Expired, at(head))]);
    }
}

#[test]
fn resync_reasons_are_those_of_the_contract() {
    let names =
        [ResyncReason::Unknown, ResyncReason::Expired, ResyncReason::Future].map(ResyncReason::as_str);
    assert_eq!(names, ["unknown", "expired", "future"]);
}

#[test]
fn an_older_answer_does_not_take_back_a_newer_head() {
    let mut sequencer = positioned(5);
    sequencer.mark_uncertain(0);
    assert_eq!(tick(&mut sequencer, REORDER_WAIT), [Step::Request { after: Some(5) }]);
    let newer = FeedAnswer { after: None, ..answer(Some(at(5)), at(9), []) };
    assert_eq!(observed(&mut sequencer, newer, 40), []);
    assert_eq!(answered(&mut sequencer, answer(Some(at(5)), at(5), []), 50), []);
    let due = sequencer.due().expect("6 to 9 are known to exist");
    assert_eq!(tick(&mut sequencer, due), [Step::Request { after: Some(5) }]);
    assert_eq!(answered(&mut sequencer, answer(Some(at(5)), at(9), [6, 7, 8, 9]), due).len(), 4);
    assert_idle(&sequencer);
}

#[test]
fn live_events_beyond_an_expired_position_are_delivered() {
    let mut sequencer = positioned(5);
    live(&mut sequencer, 8, 0);
    assert_eq!(tick(&mut sequencer, REORDER_WAIT), [Step::Request { after: Some(5) }]);
    assert_eq!(live(&mut sequencer, 9, 40), []);
    let steps = answered(&mut sequencer, answer(Some(at(5)), at(8), [7, 8]), 50);
    assert_eq!(steps, [Step::Resync(ResyncReason::Expired, at(8)), Step::Deliver(9, 9)]);
    assert_idle(&sequencer);
}

#[test]
fn events_that_postgres_does_not_have_are_dropped() {
    let mut sequencer = positioned(5);
    live(&mut sequencer, 900, 0);
    tick(&mut sequencer, REORDER_WAIT);
    live(&mut sequencer, 8, 35);
    assert_eq!(answered(&mut sequencer, answer(Some(at(5)), at(5), []), 40), []);
    // 8 is below 900, which was buffered at the request, so it is dropped too; a real 8 is found by its head.
    assert_idle(&sequencer);
}

#[test]
fn a_cut_range_continues_immediately() {
    let mut sequencer = positioned(0);
    observed(&mut sequencer, answer(None, at(4), []), 0);
    tick(&mut sequencer, REORDER_WAIT);
    let cut = FeedAnswer { more: true, ..answer(Some(at(0)), at(4), [1, 2]) };
    let steps = answered(&mut sequencer, cut, 40);
    assert_eq!(steps, [Step::Deliver(1, 1), Step::Deliver(2, 2), Step::Request { after: Some(2) }]);
}

#[test]
fn requests_that_bring_nothing_back_off() {
    let mut sequencer = positioned(0);
    let mut waits = Vec::new();
    let mut now = 0;
    for _ in 0..10 {
        let mut steps = Vec::new();
        sequencer.live(Position { epoch: OTHER, seq: 1 }, 1, now, &mut steps);
        let due = sequencer.due().unwrap();
        tick(&mut sequencer, due);
        sequencer.live(Position { epoch: OTHER, seq: 1 }, 1, now, &mut steps);
        answered(&mut sequencer, answer(Some(at(0)), at(0), []), now);
        waits.push(sequencer.due().unwrap() - now);
        now += 100_000;
    }
    assert!(waits.is_sorted() && waits[0] > REORDER_WAIT, "{waits:?}");
    assert_eq!(waits[9], REORDER_WAIT << MAX_BACKOFF);
}

#[test]
fn buffered_events_are_bounded_and_the_rest_is_requested() {
    let mut sequencer = positioned(0);
    for seq in 2..1_000 {
        live(&mut sequencer, seq, 0);
    }
    assert_eq!(sequencer.pending.as_ref().unwrap().buffered.len(), MAX_BUFFERED);
    assert_eq!(tick(&mut sequencer, REORDER_WAIT), [Step::Request { after: Some(0) }]);
    let cut = FeedAnswer { more: true, ..answer(Some(at(0)), at(999), [1]) };
    let steps = answered(&mut sequencer, cut, 40);
    assert_eq!(steps.len(), 1 + MAX_BUFFERED + 1);
    assert_eq!(steps.last(), Some(&Step::Request { after: Some(1 + MAX_BUFFERED as Seq) }));
}

#[test]
fn a_deleted_user_is_gone() {
    let mut sequencer = positioned(3);
    let gone = FeedAnswer { requested_at: Some(at(3)), head: None, events: vec![], after: None, more: false };
    assert_eq!(observed(&mut sequencer, gone, 0), [Step::Gone]);
}

#[test]
fn a_cursor_is_judged_by_epoch_head_and_first_event() {
    use Verdict::{Follows, Gone, Resync as L};
    for (head, first, verdict) in [
        (None, None, Gone),
        (Some(Position { epoch: OTHER, seq: 5 }), None, L(ResyncReason::Unknown)),
        (Some(Position { epoch: OTHER, seq: 9 }), Some(6), L(ResyncReason::Unknown)),
        (Some(at(4)), None, L(ResyncReason::Future)),
        (Some(at(5)), None, Follows),
        (Some(at(9)), Some(6), Follows),
        (Some(at(9)), Some(7), L(ResyncReason::Expired)),
        (Some(at(9)), None, L(ResyncReason::Expired)),
    ] {
        assert_eq!(judge(at(5), head, first), verdict, "{head:?} {first:?}");
    }
}

/// One step of the model. Numbers select among the messages and events that exist.
#[derive(Debug, Clone)]
enum SequencerAction {
    /// An event commits, and is published or lost.
    Commit {
        published: bool,
    },
    /// Redis delivers one of the messages in flight, and will repeat it if `again`.
    Arrive {
        which: usize,
        again: bool,
    },
    Pass {
        ms: Millis,
    },
    /// Postgres answers the open request; the answer is in flight.
    Serve,
    /// That answer arrives.
    Answered,
    /// The reconcile requests a head.
    Reconcile,
    /// Its answer arrives.
    Reconciled,
    Prune {
        kept: usize,
    },
    /// A backup is restored, and `new-epoch` is run.
    Restore {
        back: usize,
    },
}

fn action() -> impl Strategy<Value = SequencerAction> {
    use SequencerAction::*;
    prop_oneof![
        6 => any::<bool>().prop_map(|published| Commit { published }),
        6 => (any::<usize>(), any::<bool>()).prop_map(|(which, again)| Arrive { which, again }),
        3 => (0..200u64).prop_map(|ms| Pass { ms }),
        3 => Just(Serve),
        3 => Just(Answered),
        1 => Just(Reconcile),
        1 => Just(Reconciled),
        1 => (0..6usize).prop_map(|kept| Prune { kept }),
        1 => (0..6usize).prop_map(|back| Restore { back }),
    ]
}

/// Its own identity, so that a wrong event is noticed.
type LiveEvent = (Epoch, Seq);

struct Model {
    now: Millis,
    head: Position,
    first_kept: Seq,
    in_flight: Vec<LiveEvent>,
    /// The open request.
    request: Option<(Option<Position>, Option<Seq>)>,
    served: Option<FeedAnswer<LiveEvent>>,
    reconcile: Option<FeedAnswer<LiveEvent>>,
    sequencer: Sequencer<LiveEvent>,
    /// A client's position, by the delivered events.
    client: Option<Position>,
    requests: usize,
}

impl Model {
    fn new() -> Self {
        Self {
            now: 0,
            head: Position { epoch: Epoch(7), seq: 3 },
            first_kept: 1,
            in_flight: vec![],
            request: None,
            served: None,
            reconcile: None,
            sequencer: Sequencer::default(),
            client: None,
            requests: 0,
        }
    }

    fn act(&mut self, act: impl FnOnce(&mut Sequencer<LiveEvent>, Millis, &mut Vec<Step<LiveEvent>>)) {
        let mut steps = Vec::new();
        let before = self.sequencer.position();
        act(&mut self.sequencer, self.now, &mut steps);
        if before.is_none() {
            let delivered = steps.iter().filter(|step| matches!(step, Step::Deliver(..))).count() as Seq;
            self.client = self
                .sequencer
                .position()
                .map(|position| Position { epoch: position.epoch, seq: position.seq - delivered });
        }
        for step in steps {
            match step {
                Step::Deliver(seq, event) => {
                    let client = self.client.as_mut().expect("delivered before the position was known");
                    assert_eq!((client.epoch, client.seq + 1), event, "not the next event");
                    assert_eq!(seq, event.1);
                    client.seq = seq;
                }
                Step::Request { after } => {
                    assert!(self.request.is_none(), "requested while a request is open");
                    self.request = Some((self.sequencer.position(), after));
                    self.requests += 1;
                }
                Step::Resync(_, head) => self.client = Some(head),
                Step::Gone => panic!("no user was deleted"),
            }
        }
        assert_eq!(self.client, self.sequencer.position(), "the position is the last delivered event");
    }

    fn answer(&self, requested_at: Option<Position>, after: Option<Seq>) -> FeedAnswer<LiveEvent> {
        const PAGE: usize = 4;
        let all: Vec<_> = match after {
            Some(after) => (after + 1..=self.head.seq).filter(|seq| *seq >= self.first_kept).collect(),
            None => vec![],
        };
        let events = all.iter().take(PAGE).map(|seq| (*seq, (self.head.epoch, *seq))).collect();
        FeedAnswer { requested_at, head: Some(self.head), events, after, more: all.len() > PAGE }
    }

    fn run(&mut self, action: &SequencerAction) {
        match *action {
            SequencerAction::Commit { published } => {
                self.head.seq += 1;
                if published {
                    self.in_flight.push((self.head.epoch, self.head.seq));
                }
            }
            SequencerAction::Arrive { which, again } => {
                if self.in_flight.is_empty() {
                    return;
                }
                let which = which % self.in_flight.len();
                let (epoch, seq) = self.in_flight[which];
                if !again {
                    self.in_flight.remove(which);
                }
                self.act(|sequencer, now, steps| {
                    sequencer.live(Position { epoch, seq }, (epoch, seq), now, steps);
                });
            }
            SequencerAction::Pass { ms } => {
                self.now += ms;
                self.act(Sequencer::tick);
            }
            SequencerAction::Serve => {
                if let (Some((requested_at, after)), None) = (self.request, &self.served) {
                    self.served = Some(self.answer(requested_at, after));
                }
            }
            SequencerAction::Answered => {
                if let Some(answer) = self.served.take() {
                    self.request = None;
                    self.act(|sequencer, now, steps| sequencer.answer(answer, now, steps));
                }
            }
            SequencerAction::Reconcile => self.reconcile = Some(self.answer(self.sequencer.position(), None)),
            SequencerAction::Reconciled => {
                if let Some(answer) = self.reconcile.take() {
                    self.act(|sequencer, now, steps| sequencer.observe(answer, now, steps));
                }
            }
            SequencerAction::Prune { kept } => {
                self.first_kept = self.first_kept.max((self.head.seq + 1).saturating_sub(kept as Seq));
            }
            SequencerAction::Restore { back } => {
                self.head = Position {
                    epoch: Epoch(self.head.epoch.0 + 1),
                    seq: self.head.seq.saturating_sub(back as Seq).max(1),
                };
                self.first_kept = self.first_kept.min(self.head.seq + 1);
            }
        }
    }

    /// Everything in flight arrives, requests are answered, and one reconcile runs.
    fn settle(&mut self) {
        while !self.in_flight.is_empty() {
            self.run(&SequencerAction::Arrive { which: 0, again: false });
        }
        self.run(&SequencerAction::Reconciled);
        self.run(&SequencerAction::Serve);
        self.run(&SequencerAction::Answered);
        for action in [SequencerAction::Reconcile, SequencerAction::Reconciled] {
            self.run(&action);
        }
        for _ in 0..200 {
            self.run(&SequencerAction::Pass { ms: 5_000 });
            self.run(&SequencerAction::Serve);
            self.run(&SequencerAction::Answered);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3_000, ..ProptestConfig::default() })]

    #[test]
    fn all_events_are_delivered_once_in_order_whatever_happens(
        actions in proptest::collection::vec(action(), 0..120),
    ) {
        let mut model = Model::new();
        for action in &actions {
            model.run(action);
        }
        model.settle();
        prop_assert_eq!(model.client, Some(model.head));
        prop_assert_eq!(model.sequencer.due(), None, "still uncertain: {:?}", model.sequencer);
        prop_assert!(model.sequencer.pending.is_none(), "an idle sequencer has nothing pending: {:?}", model.sequencer);
        let before = model.requests;
        model.run(&SequencerAction::Pass { ms: 60_000 });
        prop_assert_eq!(model.requests, before, "requests although nothing is open");
    }
}
