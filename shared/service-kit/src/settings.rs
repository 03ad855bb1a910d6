//! Settings. The line that reads a setting declares it: its name, default, bounds and help. Flags, `--help`, `.env.example` and
//! docs/settings.md are made from what a service reads. All problems are reported together, so that an operator corrects a
//! deployment once, and no value is repeated: it may be a secret in the wrong place.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fmt::{self, Display},
    fs::File,
    io::{self, Read},
    ops::RangeInclusive,
    str::FromStr,
    time::Duration,
};

use clap::{Arg, CommandFactory, FromArgMatches};
use thiserror::Error;

const LARGEST_SECRET_BYTES: u64 = 64 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub name: String,
    pub initial: Initial,
    pub values: String,
    pub help: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initial {
    Default(&'static str),
    /// It must be given; this is an example.
    Required(&'static str),
}

pub use Initial::Required;

impl From<&'static str> for Initial {
    fn from(default: &'static str) -> Self {
        Self::Default(default)
    }
}

impl Setting {
    fn arg(&self) -> Arg {
        let arg = Arg::new(self.name.clone())
            .long(self.name.to_lowercase().replace('_', "-"))
            .env(self.name.clone())
            .hide_env_values(true)
            .value_name("VALUE")
            .help(self.help.clone())
            .global(true);
        let arg = match self.initial {
            Initial::Default(default) if !default.is_empty() => arg.default_value(default),
            _ => arg,
        };
        if self.values == BOOL { arg.num_args(0..=1).default_missing_value("true") } else { arg }
    }
}

const BOOL: &str = "true or false";

/// The values of flags and environment variables by name. Not `Debug`: some are secrets.
#[derive(Clone, Default)]
pub struct Given(BTreeMap<String, String>);

impl<const N: usize> From<[(&str, &str); N]> for Given {
    fn from(values: [(&str, &str); N]) -> Self {
        Self(values.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }
}

impl Given {
    /// The commands `C` of a service, and its settings `rows` by flag or environment variable.
    pub fn parse<C: CommandFactory + FromArgMatches>(
        rows: &[Setting],
        args: impl IntoIterator<Item: Into<OsString> + Clone>,
    ) -> Result<(C, Self), clap::Error> {
        let matches = C::command().args(rows.iter().map(Setting::arg)).try_get_matches_from(args)?;
        let given = |row: &Setting| Some((row.name.clone(), matches.get_one::<String>(&row.name)?.clone()));
        Ok((C::from_arg_matches(&matches)?, Self(rows.iter().filter_map(given).collect())))
    }
}

/// Reads settings and collects their problems.
///
/// A setting that cannot be used is a problem, and reads as its default or example, so that the others are still checked.
pub struct Settings<'a> {
    given: &'a Given,
    rows: Vec<Setting>,
    problems: Vec<String>,
    invalid: BTreeSet<String>,
}

impl<'a> Settings<'a> {
    pub fn new(given: &'a Given) -> Self {
        Self { given, rows: Vec::new(), problems: Vec::new(), invalid: BTreeSet::new() }
    }

    pub fn rows<T>(read: impl FnOnce(&mut Settings<'_>) -> T) -> Vec<Setting> {
        let nothing = Given::default();
        let mut settings = Settings::new(&nothing);
        read(&mut settings);
        settings.rows
    }

    fn declare(&mut self, name: &str, initial: Initial, values: &str, help: &str) {
        let (name, values, help) = (name.to_owned(), values.to_owned(), help.to_owned());
        self.rows.push(Setting { name, initial, values, help });
    }

    fn given(&self, name: &str) -> Option<&'a str> {
        self.given.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// A setting with a parser of its own, whose errors do not repeat the value.
    pub fn with<T, E: Display>(
        &mut self,
        name: &str,
        initial: impl Into<Initial>,
        help: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> T {
        self.read(name, initial.into(), "", help, parse)
    }

    fn read<T, E: Display>(
        &mut self,
        name: &str,
        initial: Initial,
        values: &str,
        help: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> T {
        self.declare(name, initial, values, help);
        let (Initial::Default(fallback) | Required(fallback)) = initial;
        match (self.given(name).map(&parse), initial) {
            (Some(Ok(value)), _) => return value,
            (Some(Err(error)), _) => self.problem(&[name], format!("{name} is invalid: {error}")),
            (None, Required(_)) => self.problem(&[name], format!("{name} is not set")),
            (None, Initial::Default(_)) => {}
        }
        parse(fallback).unwrap_or_else(|error| panic!("the default or example of {name}: {error}"))
    }

    pub fn parse<T: FromStr<Err: Display>>(
        &mut self,
        name: &str,
        initial: impl Into<Initial>,
        help: &str,
    ) -> T {
        self.with(name, initial, help, str::parse)
    }

    pub fn list<T: FromStr<Err: Display>>(&mut self, name: &str, help: &str) -> Vec<T> {
        let entries =
            |text: &str| text.split(',').map(str::trim).filter(|t| !t.is_empty()).map(str::parse).collect();
        self.read::<_, T::Err>(name, "".into(), "comma-separated", help, entries)
    }

    pub fn flag(&mut self, name: &str, initial: &'static str, help: &str) -> bool {
        self.read(name, initial.into(), BOOL, help, |text| text.parse::<bool>().map_err(|_| BOOL))
    }

    pub fn number<T: TryFrom<u64>>(
        &mut self,
        name: &str,
        initial: &'static str,
        bounds: RangeInclusive<u64>,
        help: &str,
    ) -> T {
        let values = format!("{} to {}", bounds.start(), bounds.end());
        let must = format!("it must be a whole number from {values}");
        self.read(name, initial.into(), &values, help, |text| {
            let number = text.parse().ok().filter(|number| bounds.contains(number));
            number.and_then(|number| T::try_from(number).ok()).ok_or(&must)
        })
    }

    pub fn seconds(
        &mut self,
        name: &str,
        initial: &'static str,
        bounds: RangeInclusive<u64>,
        help: &str,
    ) -> Duration {
        Duration::from_secs(self.number(name, initial, bounds, help))
    }

    /// A secret: its value, or the content of the file that `<name>_FILE` names. The line break at the end of the file, which
    /// editors and `echo` leave there, is not part of it. `None`: a problem was reported.
    pub fn secret<T, E: Display>(
        &mut self,
        name: &str,
        initial: impl Into<Initial>,
        help: &str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let (initial, name_of_file) = (initial.into(), format!("{name}_FILE"));
        self.declare(name, initial, "", help);
        self.declare(
            &name_of_file,
            "".into(),
            "",
            &format!("File that contains {name}; set only one of them"),
        );
        let value = match (self.given(name), self.given(&name_of_file)) {
            (Some(_), Some(_)) => Err(format!("{name} and {name_of_file} are both set; set only one")),
            (None, Some(file)) => {
                read_secret(file).map_err(|error| format!("{name_of_file}: {file}: {error}"))
            }
            (Some(value), None) => Ok(value.to_owned()),
            (None, None) if matches!(initial, Required(_)) => {
                Err(format!("{name} is not set; set it or {name_of_file}"))
            }
            (None, None) => Ok(String::new()),
        };
        let parsed =
            value.and_then(|value| parse(&value).map_err(|error| format!("{name} is invalid: {error}")));
        parsed.map_err(|problem| self.problem(&[name], problem)).ok()
    }

    /// Reports a problem with these settings, unless one of them is already reported.
    pub fn problem(&mut self, names: &[&str], sentence: impl Into<String>) {
        if names.iter().any(|name| self.invalid.contains(*name)) {
            return;
        }
        self.invalid.extend(names.iter().map(|name| (*name).to_owned()));
        self.problems.push(sentence.into());
    }

    /// For a setting that must be given because of others.
    pub fn require(&mut self, name: &str, value: &str) {
        if value.is_empty() {
            self.problem(&[name], format!("{name} is not set"));
        }
    }

    /// Reads `TERMINATION_GRACE_SECONDS`, into which an orderly end must fit: these parts, and `rest` for what no setting names.
    pub fn termination_grace(&mut self, parts: [(&str, Duration); 2], rest: Duration) {
        let name = "TERMINATION_GRACE_SECONDS";
        let help = "Time from SIGTERM until the platform kills the process (terminationGracePeriodSeconds); 0: not known. \
                    An orderly shutdown must fit into it";
        let grace = self.seconds(name, "0", 0..=7_200, help);
        let needed = parts.iter().map(|(_, part)| *part).sum::<Duration>() + rest;
        if !grace.is_zero() && grace < needed {
            let [(one, _), (other, _)] = parts;
            self.problem(
                &[name, one, other],
                format!(
                    "{name} is {}, but an orderly shutdown takes up to {} s: {one}, {other} and {} s for the rest; \
                     raise it or lower the others",
                    grace.as_secs(),
                    needed.as_secs(),
                    rest.as_secs(),
                ),
            );
        }
    }

    /// Returns what `build` makes of the settings, or the problems.
    pub fn finish<T>(&mut self, build: impl FnOnce() -> Option<T>) -> Result<T, Problems> {
        if !self.problems.is_empty() {
            return Err(Problems(std::mem::take(&mut self.problems)));
        }
        Ok(build().expect("a value is missing only after a problem was reported"))
    }
}

#[derive(Debug, Error)]
pub struct Problems(Vec<String>);

impl Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} problem(s) with the settings", self.0.len())?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  - {problem}"))
    }
}

pub fn text(text: &str) -> Result<String, &'static str> {
    Ok(text.to_owned())
}

fn read_secret(file: &str) -> io::Result<String> {
    let mut secret = String::new();
    let read = File::open(file)?.take(LARGEST_SECRET_BYTES + 1).read_to_string(&mut secret)?;
    if u64::try_from(read).is_ok_and(|read| read > LARGEST_SECRET_BYTES) {
        return Err(io::Error::other(format!("the file is larger than {LARGEST_SECRET_BYTES} bytes")));
    }
    secret.truncate(secret.trim_end_matches(['\r', '\n']).len());
    if secret.is_empty() {
        return Err(io::Error::other("the file is empty"));
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_problems_are_reported_together_and_no_value_is_repeated() {
        let given =
            Given::from([("PORT", "hunter2"), ("COUNT", "0"), ("SECRET", "hunter2"), ("ON", "hunter2")]);
        let mut settings = Settings::new(&given);
        assert_eq!(settings.parse::<u16>("PORT", "80", ""), 80);
        assert_eq!(settings.number::<u8>("COUNT", "3", 1..=9, ""), 3);
        assert_eq!(settings.secret("SECRET", "", "", str::parse::<u16>), None);
        assert!(!settings.flag("ON", "false", ""));
        settings.with("URL", Required("http://x"), "", text);
        settings.problem(&["PORT", "URL"], "they do not fit together");
        let problems = settings.finish(|| Some(())).unwrap_err().to_string();
        assert!(problems.starts_with("5 problem(s)"), "{problems}");
        for problem in
            ["PORT is invalid", "from 1 to 9", "SECRET is invalid", "ON is invalid", "URL is not set"]
        {
            assert!(problems.contains(problem), "{problem} is missing in {problems}");
        }
        assert!(!problems.contains("hunter2"), "{problems}");
    }

    #[test]
    fn secret_is_given_by_value_or_by_file_and_not_by_both() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path.display().to_string()
        };
        let read = |value: &str, file: &str| {
            let given = Given::from([("SECRET", value), ("SECRET_FILE", file)]);
            let mut settings = Settings::new(&given);
            let secret = settings.secret("SECRET", Required(""), "", text);
            settings.finish(|| secret).map_err(|problems| problems.to_string())
        };
        let (kept, empty) = (file("kept", "hunter2 \r\n"), file("empty", "\n"));
        let large = file("large", &"x".repeat(70_000));
        let missing = folder.path().join("missing").display().to_string();
        assert_eq!(read("hunter2", "").unwrap(), "hunter2");
        assert_eq!(read("", &kept).unwrap(), "hunter2 ", "the line break alone is left out");
        for (value, file, problem) in [
            ("", "", "SECRET is not set"),
            ("hunter2", &*kept, "SECRET and SECRET_FILE are both set"),
            ("", &empty, "SECRET_FILE: /"),
            ("", &large, "SECRET_FILE: /"),
            ("", &missing, "SECRET_FILE: /"),
        ] {
            let problems = read(value, file).unwrap_err();
            assert!(problems.contains(problem), "{problems}");
            assert!(problems.starts_with("1 problem(s)") && !problems.contains("hunter2"), "{problems}");
        }
    }

    #[test]
    fn shutdown_that_would_be_cut_short_is_a_problem() {
        let reported = |grace: &str, wait| {
            let given = Given::from([("TERMINATION_GRACE_SECONDS", grace)]);
            let mut settings = Settings::new(&given);
            let parts = [("WAIT", Duration::from_secs(wait)), ("WINDOW", Duration::from_secs(20))];
            settings.termination_grace(parts, Duration::from_secs(15));
            settings.finish(|| Some(())).err().map(|problems| problems.to_string())
        };
        assert_eq!(reported("40", 5), None);
        assert_eq!(reported("0", 5), None, "not known");
        let problem = reported("39", 5).unwrap();
        assert!(
            problem.contains("39") && problem.contains("40 s") && problem.contains("WAIT, WINDOW"),
            "{problem}"
        );
    }
}
