//! Rate limits of requests, checked after the caller is known and before the body is read.

use std::{net::IpAddr, time::Duration};

use protocol::ids::{ConversationId, UserId};
use service_kit::limiter::{Limit, Limiter, Over, RateLimitRule, Subject};

use crate::config::RateLimits;

#[derive(Debug, Clone, Copy)]
pub(super) enum Rate {
    LogIn,
    Search,
    Start,
    Send,
    /// Clients repeat it while their user types: a rule of its own, so that an eager one is not kept from changes.
    Typing,
    /// Whatever else changes something.
    Change,
}

pub struct RequestLimits {
    limiter: Limiter,
    log_in: Rules,
    log_in_as: RateLimitRule,
    search: Rules,
    start: Rules,
    send: Rules,
    typing: Rules,
    typing_told: RateLimitRule,
    change: Rules,
    service: RateLimitRule,
}

/// That a user types is told at most once in so long, however often their clients say so.
const TYPING_TOLD_EVERY: Duration = Duration::from_secs(3);

/// One limit per user, if users are known, and one per address.
struct Rules {
    user: Option<RateLimitRule>,
    address: RateLimitRule,
}

impl RequestLimits {
    pub fn new(limiter: Limiter, limits: &RateLimits) -> Self {
        let rules = |name, user, address| Rules {
            user: Some(limiter.rule(name, user)),
            address: limiter.rule(name, address),
        };
        Self {
            log_in: Rules { user: None, address: limiter.rule("login", limits.login_per_address) },
            log_in_as: limiter.rule("login", limits.login_per_name),
            search: rules("search", limits.search_per_user, limits.search_per_address),
            start: rules("start", limits.start_per_user, limits.start_per_address),
            send: rules("send", limits.send_per_user, limits.send_per_address),
            typing: rules("typing", limits.typing_per_user, limits.typing_per_address),
            typing_told: limiter.minor_rule("typing_told", Limit::new(1, TYPING_TOLD_EVERY)),
            change: rules("change", limits.change_per_user, limits.change_per_address),
            service: limiter.rule("service", limits.requests_per_service),
            limiter,
        }
    }

    pub(super) async fn check(
        &self,
        rate: Option<Rate>,
        client: IpAddr,
        user: Option<UserId>,
    ) -> Result<(), Over> {
        let rules = match rate {
            None => return Ok(()),
            Some(Rate::LogIn) => &self.log_in,
            Some(Rate::Search) => &self.search,
            Some(Rate::Start) => &self.start,
            Some(Rate::Send) => &self.send,
            Some(Rate::Typing) => &self.typing,
            Some(Rate::Change) => &self.change,
        };
        let by_user = rules.user.as_ref().zip(user).map(|(rule, user)| (rule, Subject::User(user)));
        let charges: Vec<_> =
            by_user.into_iter().chain([(&rules.address, Subject::Address(client))]).collect();
        self.limiter.check(&charges).await
    }

    /// A request of another back end, by the id of its token.
    pub(super) async fn check_service(&self, token: i64) -> Result<(), Over> {
        self.limiter.check(&[(&self.service, Subject::Service(token))]).await
    }

    /// Whether to tell others that this user types: not again so soon.
    pub(super) async fn may_tell_typing(&self, user: UserId, conversation: ConversationId) -> bool {
        self.limiter.allows(&self.typing_told, Subject::Participant(user, conversation)).await
    }

    /// A login that names a user, by the name's key.
    pub(super) async fn check_login_as(&self, key: &str) -> Result<(), Over> {
        self.limiter.check(&[(&self.log_in_as, Subject::Name(key))]).await
    }
}
