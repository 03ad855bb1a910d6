//! A panic of a service fails the test, even if the service recovers: a hook records it in this process, standard error in a
//! child.

use std::{
    io::{BufRead, BufReader, Read},
    panic,
    sync::{Mutex, MutexGuard, Once, PoisonError},
    thread,
};

static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn seen() -> MutexGuard<'static, Vec<String>> {
    SEEN.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if info.location().is_none_or(|location| is_of_a_service(location.file())) {
                seen().push(info.to_string());
            }
            usual(info);
        }));
    });
}

/// Panics of a test, and of the servers that it plays, fail the test by themselves.
fn is_of_a_service(file: &str) -> bool {
    !file.split('/').any(|part| matches!(part, "tests" | "testkit"))
}

/// Records every panic on a child's standard error, which is printed as well.
pub fn watch_child(stderr: impl Read + Send + 'static) {
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if is_said_by_one(&line) {
                seen().push(line.clone());
            }
            eprintln!("{line}");
        }
    });
}

pub fn is_said_by_one(line: &str) -> bool {
    line.contains("panicked")
}

/// Panics of other tests' services count: the output shows which test it was.
pub fn assert_none() {
    let seen = seen();
    assert!(seen.is_empty(), "services panicked: {seen:#?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_panics_are_distinguished_from_test_panics() {
        for service in ["api/src/http/mod.rs", ".cargo/registry/src/a/warp-0.4.3/src/route.rs"] {
            assert!(is_of_a_service(service), "{service}");
        }
        for test in ["api/tests/it/support.rs", "shared/testkit/src/lib.rs"] {
            assert!(!is_of_a_service(test), "{test}");
        }
        assert!(is_said_by_one("thread 'main' (7) panicked at src/main.rs:1:1:"));
    }
}
