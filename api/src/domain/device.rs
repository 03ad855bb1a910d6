//! Labels of devices in the list of sessions, made from the `User-Agent`: "Firefox on Linux".
//!
//! Clients send any `User-Agent`, so none of its text is repeated: it only chooses among the words below.

pub const UNKNOWN: &str = "Unknown device";

/// Bytes of a `User-Agent` that are searched; real ones are shorter.
const SEARCHED: usize = 512;

/// Texts in a `User-Agent` and their labels; the first match counts. Derived browsers also name the ones that they derive from,
/// so they come first.
const PROGRAMS: &[(&str, &str)] = &[
    ("Edg/", "Edge"),
    ("EdgA/", "Edge"),
    ("EdgiOS/", "Edge"),
    ("OPR/", "Opera"),
    ("OPiOS/", "Opera"),
    ("Opera", "Opera"),
    ("Vivaldi/", "Vivaldi"),
    ("YaBrowser/", "Yandex Browser"),
    ("SamsungBrowser/", "Samsung Internet"),
    ("DuckDuckGo/", "DuckDuckGo"),
    ("Ddg/", "DuckDuckGo"),
    ("Brave/", "Brave"),
    ("FxiOS/", "Firefox"),
    ("Firefox/", "Firefox"),
    ("CriOS/", "Chrome"),
    ("Chrome/", "Chrome"),
    ("Chromium/", "Chrome"),
    // After all browsers that add their own name to it.
    ("Version/", "Safari"),
    ("curl/", "curl"),
    ("Wget/", "Wget"),
    ("HTTPie/", "HTTPie"),
    ("PostmanRuntime/", "Postman"),
    ("python-requests/", "Python"),
    ("Go-http-client/", "Go"),
    ("okhttp/", "an Android app"),
    ("CFNetwork/", "an Apple app"),
];

/// Phones also name the system that theirs derives from, so they come first.
const SYSTEMS: &[(&str, &str)] = &[
    ("iPhone", "iPhone"),
    ("iPad", "iPad"),
    ("Android", "Android"),
    ("CrOS", "ChromeOS"),
    ("Windows", "Windows"),
    ("Macintosh", "macOS"),
    ("Linux", "Linux"),
];

pub fn label(user_agent: &[u8]) -> String {
    let searched = &user_agent[..user_agent.len().min(SEARCHED)];
    let known_by = |names: &[(&str, &'static str)]| {
        let says = |word: &str| searched.windows(word.len()).any(|part| part == word.as_bytes());
        names.iter().find(|(word, _)| says(word)).map(|(_, name)| *name)
    };
    match (known_by(PROGRAMS), known_by(SYSTEMS)) {
        (Some(program), Some(system)) => format!("{program} on {system}"),
        (Some(name), None) | (None, Some(name)) => name.to_owned(),
        (None, None) => UNKNOWN.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn common_devices_are_recognised() {
        for (user_agent, expected) in [
            ("Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0", "Firefox on Linux"),
            (
                "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36",
                "Chrome on Windows",
            ),
            (
                "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36 Edg/138.0.0.0",
                "Edge on Windows",
            ),
            (
                "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.5 Safari/605.1.15",
                "Safari on macOS",
            ),
            (
                "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.5 Mobile/15E148 Safari/604.1",
                "Safari on iPhone",
            ),
            (
                "Mozilla/5.0 (iPad; CPU OS 18_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) CriOS/138.0.7204.53 Mobile/15E148 Safari/604.1",
                "Chrome on iPad",
            ),
            (
                "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Mobile Safari/537.36",
                "Chrome on Android",
            ),
            (
                "Mozilla/5.0 (Linux; Android 10; K) AppleWebKit/537.36 (KHTML, like Gecko) SamsungBrowser/28.0 Chrome/130.0.0.0 Mobile Safari/537.36",
                "Samsung Internet on Android",
            ),
            (
                "Mozilla/5.0 (X11; CrOS x86_64 14541.0.0) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/138.0.0.0 Safari/537.36 OPR/122.0.0.0",
                "Opera on ChromeOS",
            ),
            ("curl/8.5.0", "curl"),
            ("Mozilla/5.0 (Windows NT 6.1)", "Windows"),
            ("", UNKNOWN),
            ("Mozilla/5.0", UNKNOWN),
            ("firefox", UNKNOWN),
        ] {
            assert_eq!(label(user_agent.as_bytes()), expected, "{user_agent}");
        }
    }

    proptest! {
        #[test]
        fn any_user_agent_gets_a_short_plain_label(
            junk in proptest::collection::vec(any::<u8>(), 0..600),
            word in 0..PROGRAMS.len(),
            system in 0..SYSTEMS.len(),
        ) {
            let agent = [&junk, PROGRAMS[word].0.as_bytes(), &junk, SYSTEMS[system].0.as_bytes(), &junk].concat();
            for agent in [&junk, &agent] {
                let label = label(agent);
                prop_assert!((1..=64).contains(&label.len()));
                prop_assert!(label.bytes().all(|b| b.is_ascii_alphabetic() || b == b' '));
            }
        }
    }
}
