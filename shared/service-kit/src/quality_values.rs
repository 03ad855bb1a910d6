//! List headers whose entries have parameters: `Accept`, `Accept-Encoding`, `If-None-Match` (RFC 9110, 5.6.1, 12.4.2).

use std::ops::ControlFlow;

use http::{HeaderMap, HeaderName};

/// The quality value of a type or coding in thousandths. `None`: it is not listed. `Some(0)`: it is not acceptable.
pub fn weight(headers: &HeaderMap, name: HeaderName, wanted: &str) -> Option<u16> {
    let named = |entry: &str| {
        let mut parts = split(entry, ';');
        parts.next().filter(|name| name.eq_ignore_ascii_case(wanted))?;
        Some(parts.find_map(quality).unwrap_or(1_000))
    };
    // If it is listed twice, the higher value counts.
    entries(headers, name).filter_map(named).max()
}

/// All entries of the header, trimmed. A value that is not text is ignored.
pub fn entries(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| split(value, ',')).filter(|entry| !entry.is_empty())
}

pub fn essence(content_type: &str) -> &str {
    split(content_type, ';').next().unwrap_or_default()
}

/// Parses `q=0.5`. An invalid value is ignored.
fn quality(parameter: &str) -> Option<u16> {
    let (name, value) = parameter.split_once('=')?;
    let value: f32 = value.trim().parse().ok()?;
    let weight = name.trim().eq_ignore_ascii_case("q") && (0.0..=1.0).contains(&value);
    weight.then_some((value * 1_000.0) as u16)
}

/// Splits at separators outside of quotes.
fn split(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let (part, more) = match end_of_part(text, separator) {
            Some(end) => (&text[..end], Some(&text[end + separator.len_utf8()..])),
            None => (text, None),
        };
        rest = more;
        Some(part.trim())
    })
}

fn end_of_part(text: &str, separator: char) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    let end = text.char_indices().try_for_each(|(at, character)| {
        match character {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ if character == separator && !quoted => return ControlFlow::Break(at),
            _ => {}
        }
        ControlFlow::Continue(())
    });
    end.break_value()
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, header};

    use super::*;

    fn of(accept: &str) -> Option<u16> {
        let headers = HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_str(accept).unwrap())]);
        weight(&headers, header::ACCEPT, "text/event-stream")
    }

    #[test]
    fn quality_values_are_read_with_their_type() {
        for (accept, expected) in [
            ("text/event-stream", Some(1_000)),
            ("Text/Event-Stream", Some(1_000)),
            ("text/html, text/event-stream;q=0.9", Some(900)),
            ("text/event-stream ; charset=utf-8 ; Q=0.25", Some(250)),
            ("text/event-stream;q=0", Some(0)),
            ("text/event-stream;q=0.000", Some(0)),
            ("text/event-stream; q=0, */*", Some(0)),
            ("text/event-stream;q=0, text/event-stream", Some(1_000)),
            ("text/event-stream;q=high", Some(1_000)),
            ("text/event-stream;q=NaN", Some(1_000)),
            ("text/event-stream;q=7", Some(1_000)),
            (r#"text/html;x="a, text/event-stream";q=1"#, None),
            (r#"text/event-stream;x="a;q=1\";q=1,";q=0"#, Some(0)),
            ("text/event-streams", None),
            ("text/*", None),
            ("*/*", None),
            ("", None),
            (",,", None),
        ] {
            assert_eq!(of(accept), expected, "{accept}");
        }
        assert_eq!(weight(&HeaderMap::new(), header::ACCEPT, "text/event-stream"), None);
    }

    #[test]
    fn several_headers_are_one_list() {
        let mut headers = HeaderMap::new();
        for value in ["text/html", "a/b;q=0.5, text/event-stream;q=0.1"] {
            headers.append(header::ACCEPT, HeaderValue::from_static(value));
        }
        assert_eq!(weight(&headers, header::ACCEPT, "text/event-stream"), Some(100));
        assert_eq!(entries(&headers, header::ACCEPT).count(), 3);
    }

    #[test]
    fn media_type_is_read_without_parameters() {
        assert_eq!(essence(" application/json ; charset=utf-8"), "application/json");
        assert_eq!(essence(""), "");
    }
}
