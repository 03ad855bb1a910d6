//! The names of Redis channels and keys. The prefix is a setting, the same in both services; it separates installations and tests
//! that share one Redis.

use std::fmt::Display;

use crate::ids::UserId;

#[derive(Debug, Clone, Default)]
pub struct Channels {
    prefix: String,
}

impl Channels {
    pub fn new(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into() }
    }

    pub fn user(&self, user: UserId) -> String {
        format!("{}user:{user}", self.prefix)
    }

    pub fn user_of(&self, channel: &[u8]) -> Option<UserId> {
        let id = channel.strip_prefix(self.prefix.as_bytes())?.strip_prefix(b"user:")?;
        std::str::from_utf8(id).ok()?.parse().ok()
    }

    /// The channel of the public keys' version: the first of these names that a node owns. They begin as users' names do, so they
    /// need no rights of their own.
    pub fn keys(&self) -> impl Iterator<Item = String> {
        (0..).map(|turn| format!("{}user:keys-{turn}", self.prefix))
    }

    /// The key of all gateways that report presence.
    pub fn gateways(&self) -> String {
        format!("{}presence:gateways", self.prefix)
    }

    /// The key of the users of one of them.
    pub fn gateway(&self, name: &str) -> String {
        format!("{}presence:gateway:{name}", self.prefix)
    }

    pub fn probe(&self, instance: &str) -> String {
        format!("{}probe:{instance}", self.prefix)
    }

    pub fn limit(&self, rule: &str, by: &str, subject: impl Display) -> String {
        format!("{}limit:{rule}:{by}:{subject}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_names_its_user_and_no_other() {
        let channels = Channels::new("t1:");
        assert_eq!(channels.user(UserId(7)), "t1:user:7");
        assert_eq!(channels.user_of(b"t1:user:7"), Some(UserId(7)));
        assert_eq!(channels.limit("send", "user", UserId(7)), "t1:limit:send:user:7");
        assert_eq!(channels.keys().next().as_deref(), Some("t1:user:keys-0"));
        for other in
            ["user:7", "t1:user:", "t1:user:07", "t1:probe:7", "t2:user:7", "t1:user:7x", "t1:user:keys-0"]
        {
            assert_eq!(channels.user_of(other.as_bytes()), None, "{other}");
        }
    }
}
