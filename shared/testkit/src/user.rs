//! A logged-in user of a test.

use protocol::ids::UserId;

#[derive(Debug, Clone)]
pub struct TestUser {
    pub id: UserId,
    pub name: String,
    pub token: String,
    pub cookie: String,
}
