//! Tells `api` who came and who left: once a second at most, and at least as often as the lease of this gateway's users demands.
//!
//! The delivery thread notes changes; everything else is done by a task on the worker threads. A user who left counts as present for
//! [`LINGER`], and is not reported if they return by then. A report that fails is repeated. The next one is sent when the last one is
//! answered or given up, so `api` works on one at a time.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    convert::Infallible,
    mem,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use protocol::{
    ids::UserId,
    presence::{
        LINGER, MAX_CHANGES, PRESENCE_PATH, PresenceAnswer, PresenceReport, RENEW_EVERY, TAKEN_WITHIN,
    },
};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{api_client::ApiClient, metrics::Metrics};

/// Between the beginnings of two reports.
const PAUSE: Duration = Duration::from_secs(1);
/// Users in each list of a report at least, however slow `api` is.
const FEWEST: usize = 100;
/// Users who have left and are not reported yet. With more, the lease ends their presence.
const MOST_LEFT: usize = 100_000;

/// Changes that the task has not taken yet. Clones share them.
#[derive(Clone, Default)]
pub struct PresenceChanges(Option<Arc<Mutex<HashMap<UserId, bool>>>>);

impl PresenceChanges {
    /// `enabled`: otherwise nothing is noted.
    pub fn new(enabled: bool) -> Self {
        Self(enabled.then(Arc::default))
    }

    /// Whether the user has a live stream here.
    pub fn note(&self, user: UserId, is_present: bool) {
        if let Some(changes) = &self.0 {
            changes.lock().unwrap_or_else(PoisonError::into_inner).insert(user, is_present);
        }
    }
}

/// What is known here, and what is still to be reported. Pure.
struct Reporter {
    /// Changes for each process that ends, and whenever `api` does not know it.
    gateway: String,
    first: bool,
    present: HashSet<UserId>,
    /// Users without a stream, by when they count as having left.
    lingering: HashMap<UserId, Instant>,
    due: VecDeque<(Instant, UserId)>,
    came: BTreeSet<UserId>,
    left: BTreeSet<UserId>,
    /// Users in each list of the next report.
    most: usize,
}

impl Reporter {
    fn new() -> Self {
        Self {
            gateway: new_name(),
            first: true,
            present: HashSet::new(),
            lingering: HashMap::new(),
            due: VecDeque::new(),
            came: BTreeSet::new(),
            left: BTreeSet::new(),
            most: MAX_CHANGES,
        }
    }

    fn note(&mut self, user: UserId, is_present: bool, now: Instant) {
        if is_present {
            self.lingering.remove(&user);
            if self.present.insert(user) {
                self.left.remove(&user);
                self.came.insert(user);
            }
        } else if self.present.contains(&user) {
            let until = now + LINGER;
            self.lingering.insert(user, until);
            self.due.push_back((until, user));
        }
    }

    /// Those who have not returned have left.
    fn end_linger(&mut self, now: Instant) {
        while let Some((until, user)) = self.due.pop_front_if(|(until, _)| *until <= now) {
            if self.lingering.get(&user) == Some(&until) {
                self.lingering.remove(&user);
                self.present.remove(&user);
                self.came.remove(&user);
                self.left.insert(user);
            }
        }
        if self.left.len() > MOST_LEFT {
            self.left.clear();
            self.take_another_name();
        }
    }

    fn has_changes(&self) -> bool {
        !self.came.is_empty() || !self.left.is_empty()
    }

    fn report(&self) -> PresenceReport {
        let some = |users: &BTreeSet<UserId>| users.iter().take(self.most).copied().collect();
        PresenceReport {
            gateway: self.gateway.clone(),
            first: self.first,
            came: some(&self.came),
            left: some(&self.left),
        }
    }

    /// `api` has answered.
    fn reported(&mut self, report: &PresenceReport, known: bool) {
        self.most = (self.most * 2).min(MAX_CHANGES);
        if known {
            self.first = false;
            report.came.iter().for_each(|user| _ = self.came.remove(user));
            report.left.iter().for_each(|user| _ = self.left.remove(user));
        } else {
            self.take_another_name();
        }
    }

    /// `api` could not take so many in time.
    fn was_slow(&mut self) {
        self.most = (self.most / 2).max(FEWEST);
    }

    /// Under which everybody is reported again. What was reported under the old one ends with its lease.
    fn take_another_name(&mut self) {
        (self.gateway, self.first) = (new_name(), true);
        self.came.extend(&self.present);
    }
}

fn new_name() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Reports until `stop`. Users of a gateway that ends are told to have left when its lease ends, unless they are elsewhere by then.
pub async fn run(changes: PresenceChanges, api: ApiClient, metrics: Arc<Metrics>, stop: CancellationToken) {
    let Some(changes) = changes.0 else { return stop.cancelled().await };
    stop.run_until_cancelled(report_changes(&changes, &api, &metrics)).await;
}

async fn report_changes(
    changes: &Mutex<HashMap<UserId, bool>>,
    api: &ApiClient,
    metrics: &Metrics,
) -> Infallible {
    let mut reporter = Reporter::new();
    let mut renew_at = Instant::now();
    let mut logged = false;
    let mut ticks = interval(PAUSE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = Instant::now();
        let taken = mem::take(&mut *changes.lock().unwrap_or_else(PoisonError::into_inner));
        taken.into_iter().for_each(|(user, is_present)| reporter.note(user, is_present, now));
        reporter.end_linger(now);
        if !reporter.has_changes() && now < renew_at {
            continue;
        }
        let report = reporter.report();
        match api.post::<PresenceAnswer>(PRESENCE_PATH, &report).await {
            Ok(PresenceAnswer { known }) => {
                metrics.presence_reports.inc();
                if !known {
                    tracing::info!(
                        users = reporter.present.len(),
                        "api has lost who is present here; reporting all of them again"
                    );
                }
                reporter.reported(&report, known);
                renew_at = now + RENEW_EVERY;
                logged = false;
            }
            Err(error) => {
                metrics.presence_reports_failed.inc();
                if now.elapsed() >= TAKEN_WITHIN {
                    reporter.was_slow();
                }
                if !mem::replace(&mut logged, true) {
                    let error = format!("{error:#}");
                    tracing::warn!(error, "presence could not be reported; it is repeated every second");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(ids: impl IntoIterator<Item = i64>) -> Vec<UserId> {
        ids.into_iter().map(UserId).collect()
    }

    #[test]
    fn return_within_the_linger_is_not_reported() {
        let (mut reporter, start) = (Reporter::new(), Instant::now());
        reporter.note(UserId(1), true, start);
        let report = reporter.report();
        assert_eq!((report.first, report.came.clone(), report.left.clone()), (true, users([1]), users([])));
        reporter.reported(&report, true);
        assert!(!reporter.has_changes());
        reporter.note(UserId(1), false, start);
        reporter.end_linger(start + LINGER - Duration::from_millis(1));
        reporter.note(UserId(1), true, start + LINGER);
        reporter.end_linger(start + LINGER);
        assert!(!reporter.has_changes() && reporter.present.len() == 1);
        // The linger begins with the last stream's end.
        reporter.note(UserId(1), false, start + 2 * LINGER);
        reporter.end_linger(start + 2 * LINGER + LINGER / 2);
        assert!(!reporter.has_changes());
        reporter.end_linger(start + 3 * LINGER);
        let report = reporter.report();
        assert_eq!((report.first, report.came, report.left), (false, users([]), users([1])));
    }

    #[test]
    fn unknown_gateway_reports_everybody_under_another_name() {
        let (mut reporter, start) = (Reporter::new(), Instant::now());
        (1..=3).for_each(|id| reporter.note(UserId(id), true, start));
        let report = reporter.report();
        reporter.reported(&report, true);
        reporter.note(UserId(3), false, start);
        reporter.end_linger(start + LINGER);
        let report = reporter.report();
        assert_eq!((report.came.len(), report.left.clone()), (0, users([3])));
        reporter.reported(&report, false);
        let again = reporter.report();
        assert_ne!(again.gateway, report.gateway);
        assert_eq!((again.first, again.came, again.left), (true, users([1, 2]), users([3])));
    }

    #[test]
    fn report_is_bounded_and_the_rest_follows() {
        let (mut reporter, start) = (Reporter::new(), Instant::now());
        let all = MAX_CHANGES as i64 + 5;
        (1..=all).for_each(|id| reporter.note(UserId(id), true, start));
        let report = reporter.report();
        assert_eq!(report.came.len(), MAX_CHANGES);
        reporter.reported(&report, true);
        assert_eq!(reporter.report().came.len(), 5);
    }

    #[test]
    fn reports_that_take_too_long_become_smaller() {
        let (mut reporter, start) = (Reporter::new(), Instant::now());
        (1..=MAX_CHANGES as i64).for_each(|id| reporter.note(UserId(id), true, start));
        reporter.was_slow();
        let report = reporter.report();
        assert_eq!((report.first, report.came.len()), (true, MAX_CHANGES / 2));
        (0..20).for_each(|_| reporter.was_slow());
        assert_eq!(reporter.report().came.len(), FEWEST);
        let report = reporter.report();
        reporter.reported(&report, true);
        assert_eq!(reporter.report().came.len(), 2 * FEWEST);
        assert_eq!(reporter.came.len(), MAX_CHANGES - FEWEST);
    }

    #[test]
    fn too_many_who_left_unreported_are_left_to_the_lease() {
        let (mut reporter, start) = (Reporter::new(), Instant::now());
        let all = MOST_LEFT as i64 + 1;
        (0..=all).for_each(|id| reporter.note(UserId(id), true, start));
        reporter.first = false;
        reporter.came.clear();
        let name = reporter.gateway.clone();
        (1..all).for_each(|id| reporter.note(UserId(id), false, start));
        reporter.end_linger(start + LINGER);
        assert_eq!((reporter.left.len(), &reporter.gateway), (MOST_LEFT, &name));
        reporter.note(UserId(all), false, start);
        reporter.end_linger(start + LINGER);
        let report = reporter.report();
        assert_ne!(report.gateway, name);
        assert_eq!((report.first, report.came, report.left), (true, users([0]), users([])));
    }
}
