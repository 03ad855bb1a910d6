//! The limit of open files of this process. Every connection needs a file descriptor.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// The hard limit.
pub fn allowed() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard)
}

/// Raises the soft limit to the hard one.
pub fn raise() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_raised_to_the_hard_one() {
        let limit = || getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let (_, hard) = limit();
        setrlimit(Resource::RLIMIT_NOFILE, hard - 1, hard).unwrap();
        raise().unwrap();
        assert_eq!((limit(), allowed()), ((hard, hard), hard));
    }
}
