//! A model of the delivery protocol, explored completely: every order of its steps within the bounds below.
//!
//! The promise, for one user with one client, whatever fails in between:
//!
//! 1. The client receives every event of its feed after its start, each once and in order, unless a resync makes it reload.
//! 2. No event is written before the session is confirmed, or to a stream that was opened after the session ended.
//! 3. A resync happens only if the feed cannot follow from the client's cursor.
//! 4. While the subscription is confirmed and the newest event was published, no client waits for the reconcile.
//! 5. When nothing is left to happen, the client is at the head of its feed, or knows that its session has ended.
//!
//! Each [`Rule`] is necessary: without it, the checker finds a counterexample.
//!
//! `gateway.rs` is a model of the gateway's sequencer and engine. It does not call them, because rules inside the sequencer must
//! be removable. It has what decides which event is written next. It leaves out several streams of a user, slow sockets,
//! bounds of buffers and pages, and time; other tests cover those.
//! `system.rs` has everything around the gateway, and the faults.
//!
//! [stateright](https://docs.rs/stateright) explores breadth first: each [`Action`] leads from one [`State`] to the next.

mod gateway;
mod rules;
mod system;

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    hash::{BuildHasher, RandomState},
    time::Instant,
};

use gateway::Subscription;
use rules::{ProtocolRule, ProtocolRules};
use stateright::{Checker, HasDiscoveries, Model, Property};
use system::{ModelAction, ModelState, Violation};

const IN_ORDER: &str = "each event once and in order";
const CONFIRMED: &str = "no event without a confirmed session";
const NEEDED: &str = "no resync without need";
const PROMPT: &str = "published events do not wait for the reconcile";
const WHOLE: &str = "in the end the client is at the head";

/// The bounds of one exploration.
#[derive(Debug, Clone, Copy)]
struct DeliveryModel {
    rules: ProtocolRules,
    events: u8,
    /// How many faults of different kinds may happen, in any combination.
    faults: usize,
    /// A reconcile may begin at any time, not only when nothing else is left to do.
    reconcile_any_time: bool,
}

/// All together: 617,000 states, 8 s of CPU.
const BOUNDS: [DeliveryModel; 3] = [
    DeliveryModel { rules: ProtocolRules::ALL, events: 2, faults: 1, reconcile_any_time: false },
    DeliveryModel { rules: ProtocolRules::ALL, events: 1, faults: 2, reconcile_any_time: false },
    DeliveryModel { rules: ProtocolRules::ALL, events: 2, faults: 0, reconcile_any_time: true },
];

impl Model for DeliveryModel {
    type State = ModelState;
    type Action = ModelAction;

    fn init_states(&self) -> Vec<ModelState> {
        vec![ModelState::new(self.rules)]
    }

    fn actions(&self, state: &ModelState, actions: &mut Vec<ModelAction>) {
        if state.violation.is_some() {
            return;
        }
        state.steps(actions);
        if (actions.is_empty() || self.reconcile_any_time) && state.is_reconcile_due() {
            actions.push(ModelAction::Reconcile);
        }
        state.choices(self.events, self.faults, actions);
    }

    fn next_state(&self, state: &ModelState, action: ModelAction) -> Option<ModelState> {
        let mut next = state.clone();
        next.apply(action);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(IN_ORDER, |_, state: &ModelState| state.violation != Some(Violation::Order)),
            Property::always(CONFIRMED, |_, state: &ModelState| state.violation != Some(Violation::Session)),
            Property::always(NEEDED, |_, state: &ModelState| {
                state.violation != Some(Violation::NeedlessResync)
            }),
            Property::always(PROMPT, |_, state: &ModelState| {
                let applies = state.head_published
                    && !state.feed.session_ended
                    && state.gateway.subscription == Subscription::Confirmed;
                !applies || !has_no_steps(state) || state.is_whole()
            }),
            Property::always(WHOLE, |_, state: &ModelState| {
                !has_no_steps(state) || state.is_reconcile_due() || state.is_whole()
            }),
        ]
    }
}

/// Only a reconcile or a choice can change this state.
fn has_no_steps(state: &ModelState) -> bool {
    let mut steps = vec![];
    state.steps(&mut steps);
    steps.is_empty() && state.violation.is_none()
}

#[test]
fn no_schedule_breaks_the_promise() {
    for bounds in BOUNDS {
        let started = Instant::now();
        let checker = bounds.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        checker.assert_properties();
        let (states, seconds) = (checker.unique_state_count(), started.elapsed().as_secs_f32());
        println!("{} events, {} faults: {states} states, {seconds:.1} s", bounds.events, bounds.faults);
    }
}

/// The last two properties look at states without steps. A schedule that never reaches one would escape them.
#[test]
fn every_schedule_ends() {
    let model = BOUNDS[0];
    let hasher = RandomState::new();
    // Whether all that follows a state has been visited.
    let mut visited = HashMap::new();
    let mut path: Vec<(u64, Vec<ModelState>)> = vec![];
    let mut next = Some(ModelState::new(model.rules));
    loop {
        if let Some(state) = next {
            let key = hasher.hash_one(&state);
            match visited.entry(key) {
                Entry::Vacant(entry) => {
                    entry.insert(false);
                    path.push((key, model.next_states(&state)));
                }
                Entry::Occupied(entry) => {
                    assert!(entry.get(), "an endless schedule leads through {state:#?}");
                }
            }
        }
        let Some((key, following)) = path.last_mut() else { break };
        next = following.pop();
        if next.is_none() {
            visited.insert(*key, true);
            path.pop();
        }
    }
}

#[test]
fn no_rule_can_be_removed() {
    let rules = [
        (ProtocolRule::NumberUnderLock, NEEDED),
        (ProtocolRule::CommitBeforePublish, IN_ORDER),
        (ProtocolRule::OneSnapshot, NEEDED),
        (ProtocolRule::SubscribeBeforeRequest, PROMPT),
        (ProtocolRule::RequestAfterReconnect, PROMPT),
        (ProtocolRule::ConfirmSessionFirst, CONFIRMED),
        (ProtocolRule::ConfirmByLaterAnswer, CONFIRMED),
        (ProtocolRule::JudgeByLaterAnswer, NEEDED),
        (ProtocolRule::DropOldEvents, IN_ORDER),
        (ProtocolRule::BufferBeyondGap, IN_ORDER),
        (ProtocolRule::RequestGap, PROMPT),
        (ProtocolRule::CheckOtherEpoch, PROMPT),
        (ProtocolRule::CompareHeadAtRequest, NEEDED),
        (ProtocolRule::CompareEpochAtRequest, NEEDED),
        (ProtocolRule::RangeFollowsCursor, IN_ORDER),
        (ProtocolRule::ResyncMovesCursor, NEEDED),
        (ProtocolRule::ResyncOnlyLostStreams, NEEDED),
        (ProtocolRule::JudgeOtherEpochAgain, WHOLE),
        (ProtocolRule::RepeatRequests, WHOLE),
        (ProtocolRule::Reconcile, WHOLE),
        (ProtocolRule::ReconcileSessions, WHOLE),
        (ProtocolRule::ReconnectWithCursor, IN_ORDER),
    ];
    for (rule, property) in rules {
        let counterexample = BOUNDS.iter().find_map(|bounds| {
            let model = DeliveryModel { rules: ProtocolRules { removed: Some(rule) }, ..*bounds };
            let until = HasDiscoveries::AnyOf(BTreeSet::from([property]));
            model.checker().finish_when(until).spawn_bfs().join().discovery(property)
        });
        let Some(counterexample) = counterexample else {
            panic!(
                "without {rule:?} there is still {property:?}: the rule is not needed, or the model too small"
            );
        };
        println!("without {rule:?}, not {property:?}: {:?}", counterexample.into_actions());
    }
}
