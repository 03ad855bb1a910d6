//! How often somebody may do what: asked after who they are and before what they sent is read.
//!
//! A command asks whether the session lives only in its own statement, so who is over a limit by a session that has ended
//! is told 401 by `Auth::or_unauthorized`, like everybody who is refused early.

use protocol::ids::UserId;
use service_kit::limiter::{Limiter, Over, Rule, Subject};

use super::request::Inbound;
use crate::config::RateLimits;

pub struct Limits {
    limiter: Limiter,
    login_per_address: Rule,
    login_per_name: Rule,
    search: PerUser,
    start: PerUser,
    send: PerUser,
}

/// One limit for the user, and one for all users of an address together.
struct PerUser {
    user: Rule,
    address: Rule,
}

impl Limits {
    pub fn new(limiter: Limiter, limits: &RateLimits) -> Self {
        let per_user = |name, user, address| PerUser {
            user: limiter.rule(name, user),
            address: limiter.rule(name, address),
        };
        Self {
            login_per_address: limiter.rule("login", limits.login_per_address),
            login_per_name: limiter.rule("login", limits.login_per_name),
            search: per_user("search", limits.search_per_user, limits.search_per_address),
            start: per_user("start", limits.start_per_user, limits.start_per_address),
            send: per_user("send", limits.send_per_user, limits.send_per_address),
            limiter,
        }
    }

    /// Every request that is a part of logging in, before anything else of it is looked at.
    pub(super) async fn login(&self, inbound: &Inbound) -> Result<(), Over> {
        self.limiter.check(&[(&self.login_per_address, Subject::Address(inbound.client))]).await
    }

    /// A login that names a user, once the name's key is known.
    pub(super) async fn login_as(&self, key: &str) -> Result<(), Over> {
        self.limiter.check(&[(&self.login_per_name, Subject::Name(key))]).await
    }

    pub(super) async fn search(&self, user: UserId, inbound: &Inbound) -> Result<(), Over> {
        self.check(&self.search, user, inbound).await
    }

    pub(super) async fn start(&self, user: UserId, inbound: &Inbound) -> Result<(), Over> {
        self.check(&self.start, user, inbound).await
    }

    pub(super) async fn send(&self, user: UserId, inbound: &Inbound) -> Result<(), Over> {
        self.check(&self.send, user, inbound).await
    }

    async fn check(&self, rules: &PerUser, user: UserId, inbound: &Inbound) -> Result<(), Over> {
        let charges =
            [(&rules.user, Subject::User(user)), (&rules.address, Subject::Address(inbound.client))];
        self.limiter.check(&charges).await
    }
}
