//! The round in which every user's head is requested, because Redis may have lost events. Pure.

use super::Millis;

/// Unanswered requests of a round. It continues when answers come, so that a round over every user needs little memory, and
/// nothing piles up while `api` is away.
pub const WINDOW: usize = if cfg!(test) { 3 } else { 2_000 };

#[derive(Default)]
pub struct Reconcile {
    /// When the next round begins.
    pub at: Millis,
    /// The first slot of the hub that the current round has not reached.
    round: Option<usize>,
    /// Zero between rounds.
    unanswered: usize,
    /// Events may be missing since the current round began: another one follows.
    again: bool,
}

impl Reconcile {
    /// Begins a round unless one is in progress.
    pub fn begin(&mut self, next: Millis) {
        self.at = next;
        if self.unanswered == 0 {
            self.round = Some(0);
        }
    }

    /// Events of any user may be missing: a round begins now, or after the current one, which may have asked too early.
    pub fn hasten(&mut self, now: Millis) {
        if self.unanswered > 0 {
            self.again = true;
        } else {
            self.at = now;
        }
    }

    /// The next slot of the hub to reconcile, if there is room for its requests. `slots`: how many the hub has.
    pub fn next(&mut self, slots: usize) -> Option<usize> {
        let slot = self.round.filter(|_| self.unanswered < WINDOW)?;
        self.round = (slot + 1 < slots).then_some(slot + 1);
        (slot < slots).then_some(slot)
    }

    pub fn requested(&mut self, requests: usize) {
        self.unanswered += requests;
    }

    pub fn answered(&mut self, now: Millis) {
        self.unanswered = self.unanswered.saturating_sub(1);
        if self.unanswered == 0 && self.again {
            (self.again, self.round, self.at) = (false, None, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_reaches_every_slot_within_its_window() {
        let mut reconcile = Reconcile::default();
        reconcile.begin(1_000);
        let (mut reached, mut widest) = (Vec::new(), 0);
        while reached.len() < 5_000 {
            while let Some(slot) = reconcile.next(5_000) {
                reached.push(slot);
                reconcile.requested(1);
            }
            widest = widest.max(reconcile.unanswered);
            reconcile.answered(0);
        }
        assert!(reached.into_iter().eq(0..5_000) && widest == WINDOW);
    }

    #[test]
    fn uncertainty_during_a_round_begins_another_one() {
        let mut reconcile = Reconcile::default();
        reconcile.begin(1_000);
        assert_eq!(reconcile.next(1), Some(0));
        reconcile.requested(1);
        reconcile.hasten(5);
        assert_eq!((reconcile.at, reconcile.next(1)), (1_000, None));
        reconcile.answered(9);
        assert_eq!(reconcile.at, 9);
        reconcile.begin(2_000);
        assert_eq!(reconcile.next(1), Some(0));
    }

    #[test]
    fn a_round_without_users_is_over() {
        let mut reconcile = Reconcile::default();
        reconcile.begin(1_000);
        assert_eq!(reconcile.next(0), None);
        reconcile.hasten(3);
        assert_eq!(reconcile.at, 3);
    }
}
