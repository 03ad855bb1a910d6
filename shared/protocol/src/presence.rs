//! Who is online: what gateways tell `api`, once a second at most, and the times that both must agree on.
//!
//! A gateway's users are in Redis under a lease that the gateway renews, so the state is forgotten with its gateway, and costs nothing for
//! each idle user. All times together keep a wrong state shorter than 30 s.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::UserId;

/// `POST`, answered by [`PresenceAnswer`].
pub const PRESENCE_PATH: &str = "/internal/presence";

/// Users in each list of a report. More is a 400.
pub const MAX_CHANGES: usize = 10_000;
/// `api` gives up a report by then, before the gateway does: otherwise an old report could undo a newer one.
pub const TAKEN_WITHIN: Duration = Duration::from_secs(3);
/// A user without a stream counts as present for so long: people reload pages, and phones change networks.
pub const LINGER: Duration = Duration::from_secs(10);
/// The longest pause between two reports of a gateway.
pub const RENEW_EVERY: Duration = Duration::from_secs(7);
/// The users of a gateway that has not reported for so long have left.
pub const LEASE: Duration = Duration::from_secs(22);

/// May be repeated: each list says how it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PresenceReport {
    /// A random name of the gateway, and of what it has reported under it.
    pub gateway: String,
    /// Nothing was reported under this name yet.
    #[serde(default)]
    pub first: bool,
    #[serde(default)]
    pub came: Vec<UserId>,
    #[serde(default)]
    pub left: Vec<UserId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PresenceAnswer {
    /// Otherwise the report was not taken, because what was reported under this name is lost, or its lease has ended: the gateway takes
    /// another name and reports all its users.
    pub known: bool,
}
