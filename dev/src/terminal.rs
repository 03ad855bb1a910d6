//! Output: progress on stderr in cargo's format, results on stdout. Failed writes are ignored: `cargo dev up | head` must not stop
//! the servers.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::LazyLock;

static COLOURS: LazyLock<bool> =
    LazyLock::new(|| io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()));

pub(crate) fn has_colours() -> bool {
    *COLOURS
}

#[derive(Clone, Copy)]
pub(crate) enum Colour {
    Red = 31,
    Green = 32,
    Yellow = 33,
    Magenta = 35,
    Cyan = 36,
}

fn paint(text: &str, colour: Colour) -> String {
    if *COLOURS { format!("\x1b[1;{}m{text}\x1b[0m", colour as u8) } else { text.to_owned() }
}

/// One step: a verb, right-aligned like cargo's, and its object.
pub(crate) fn step(verb: &str, what: impl Display) {
    let verb = paint(&format!("{verb:>12}"), Colour::Green);
    let _ = writeln!(io::stderr().lock(), "{verb} {what}");
}

pub(crate) fn warn(what: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{} {what}", paint("     warning:", Colour::Yellow));
}

pub(crate) fn fail(what: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{} {what}", paint("error:", Colour::Red));
}

pub(crate) fn answer(what: impl Display) {
    let _ = writeln!(io::stdout().lock(), "{what}");
}

pub(crate) fn log_line(name: &str, colour: Colour, line: &str) {
    let name = paint(&format!("{name:>12}"), colour);
    let _ = writeln!(io::stderr().lock(), "{name} | {line}");
}
