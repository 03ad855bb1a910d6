//! Usernames from external issuers in one normal form without invisible characters, so that names that look alike are equal.
//! Look-alike letters of two scripts stay different.

use icu_normalizer::ComposingNormalizerBorrowed;
use icu_properties::{
    CodePointMapData, CodePointSetData,
    props::{
        CanonicalCombiningClass, EmojiModifier, ExtendedPictographic, GeneralCategory, GraphemeExtend,
        JoiningType, PrependedConcatenationMark,
    },
};

use thiserror::Error;

use super::text::is_blank;

/// Code points of an external name, without the suffix that distinguishes it from a taken one.
const LONGEST: usize = 50;
/// Code points of a name that a user chose.
const LONGEST_CHOSEN: usize = 64;
/// The name of a new user whose issuer gives none that can be displayed.
const NAMELESS: &str = "user";

const ZWNJ: char = '\u{200c}';
const ZWJ: char = '\u{200d}';

/// Whether a user could have this name. Postgres cannot store U+0000 and rejects a query with it.
pub fn may_be_a_name(text: &str) -> bool {
    !text.is_empty() && !text.contains('\0')
}

/// Equal for all spellings that find the same user: normal form C (RFC 8265) in lower case.
pub fn key(name: &str) -> String {
    normal(&name.to_lowercase())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NameError {
    #[error("Username required")]
    Required,
    #[error("Username too long. {LONGEST_CHOSEN} max")]
    TooLong,
}

/// The stored form of a name that a user chose.
pub fn chosen(given: &str) -> Result<String, NameError> {
    let name = displayable(given);
    if name.is_empty() {
        return Err(NameError::Required);
    }
    if name.chars().nth(LONGEST_CHOSEN).is_some() { Err(NameError::TooLong) } else { Ok(name) }
}

/// The stored form of an external name.
pub(super) fn kept(given: &str) -> String {
    let bounded: Vec<char> = displayable(given).chars().take(LONGEST).collect();
    // The cut may have left a joiner at the end.
    let name: String = with_joiners_in_place(&bounded).into_iter().collect();
    let name = name.trim_end();
    if name.is_empty() { NAMELESS.into() } else { name.into() }
}

/// In normal form, with single spaces and without what cannot be seen.
fn displayable(given: &str) -> String {
    let visible: Vec<char> =
        given.chars().filter(|&c| !is_invisible(c)).map(|c| if is_space(c) { ' ' } else { c }).collect();
    let joined: String = with_joiners_in_place(&visible).into_iter().collect();
    let words: Vec<&str> = joined.split(' ').filter(|word| !word.is_empty()).collect();
    normal(&words.join(" "))
}

fn normal(text: &str) -> String {
    ComposingNormalizerBorrowed::new_nfc().normalize(text).into_owned()
}

/// Invisible, or changes the direction of writing. Joiners are handled by their context.
fn is_invisible(c: char) -> bool {
    if matches!(c, ZWJ | ZWNJ) {
        return false;
    }
    match category(c) {
        GeneralCategory::Control | GeneralCategory::LineSeparator | GeneralCategory::ParagraphSeparator => {
            true
        }
        GeneralCategory::Format => !CodePointSetData::new::<PrependedConcatenationMark>().contains(c),
        _ => is_blank(c),
    }
}

fn is_space(c: char) -> bool {
    category(c) == GeneralCategory::SpaceSeparator
}

fn category(c: char) -> GeneralCategory {
    CodePointMapData::<GeneralCategory>::new().get(c)
}

/// Removes joiners that have no effect in their context (RFC 5892, A.1 and A.2; UAX 29, GB11).
fn with_joiners_in_place(text: &[char]) -> Vec<char> {
    let mut kept: Vec<char> = Vec::with_capacity(text.len());
    for (index, &c) in text.iter().enumerate() {
        let after = &text[index + 1..];
        let in_place = match c {
            ZWJ => follows_virama(&kept) || joins_pictures(&kept, after),
            ZWNJ => follows_virama(&kept) || parts_letters(&kept, after),
            _ => true,
        };
        if in_place {
            kept.push(c);
        }
    }
    kept
}

/// In Indic scripts a joiner selects the form of the letters around a virama.
fn follows_virama(before: &[char]) -> bool {
    let class = CodePointMapData::<CanonicalCombiningClass>::new();
    before.last().is_some_and(|&c| class.get(c) == CanonicalCombiningClass::Virama)
}

/// Several pictographs are joined to one, as in a family; the first may have a skin tone.
fn joins_pictures(before: &[char], after: &[char]) -> bool {
    let is_picture = |c: &&char| CodePointSetData::new::<ExtendedPictographic>().contains(**c);
    let extends = |c: char| {
        CodePointSetData::new::<EmojiModifier>().contains(c)
            || CodePointSetData::new::<GraphemeExtend>().contains(c)
    };
    let base = before.iter().rev().find(|c| **c == ZWJ || !extends(**c));
    base.as_ref().is_some_and(is_picture) && after.first().as_ref().is_some_and(is_picture)
}

/// In Arabic and similar scripts it separates two letters that would join.
fn parts_letters(before: &[char], after: &[char]) -> bool {
    let joining = |c: &char| CodePointMapData::<JoiningType>::new().get(*c);
    let seen = |kind: &JoiningType| *kind != JoiningType::Transparent;
    let left = before.iter().rev().map(joining).find(seen);
    let right = after.iter().map(joining).find(seen);
    matches!(left, Some(JoiningType::LeftJoining | JoiningType::DualJoining))
        && matches!(right, Some(JoiningType::RightJoining | JoiningType::DualJoining))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn external_name_can_be_displayed() {
        let long = "é".repeat(49) + " tail";
        for (given, shown) in [
            ("octocat", "octocat"),
            ("  John Doe ", "John Doe"),
            ("a\0b\r\nc\u{7f}\u{85}d", "abcd"),
            ("\u{202e}nhoj\u{200b}", "nhoj"),
            ("Ünïcode 😀", "Ünïcode 😀"),
            ("", "user"),
            (" \t\u{feff} ", "user"),
            (&long, &long[..98]),
        ] {
            assert_eq!(kept(given), shown, "{given:?}");
        }
        assert_eq!(kept(&"😀".repeat(100_000)).chars().count(), LONGEST);
    }

    #[test]
    fn names_that_look_alike_are_equal() {
        for (given, shown) in [
            ("john\u{fe0f}", "john"),
            ("jo\u{34f}hn", "john"),
            ("jo\u{ad}hn\u{e0061}\u{180e}", "john"),
            ("jo\u{200d}hn\u{200c}", "john"),
            ("\u{fff9}john\u{fffb}", "john"),
            ("john\u{a0}\u{3000}  doe", "john doe"),
            ("john \u{200d} doe", "john doe"),
            ("Jose\u{301}", "Jos\u{e9}"),
            ("Jose\u{200d}\u{301}", "Jos\u{e9}"),
            ("\u{212b}sa", "\u{c5}sa"),
            ("\u{1112}\u{1161}\u{11ab}", "\u{d55c}"),
            ("❤\u{fe0f}", "❤"),
        ] {
            assert_eq!(kept(given), shown, "{given:?}");
        }
        for blank in
            ["\u{3164}", "\u{2800}\u{2800}", "\u{115f}\u{1160}", "\u{ffa0}", "\u{200d}", "\u{200c} \u{2028}"]
        {
            assert_eq!(kept(blank), NAMELESS, "{blank:?}");
        }
    }

    #[test]
    fn joiners_stay_where_they_have_meaning() {
        for name in [
            // A family; a technologist with a tone of skin; a heart on fire.
            "👩\u{200d}👩\u{200d}👧",
            "👩🏽\u{200d}💻",
            "❤\u{200d}🔥",
            // Persian, "houses"; with a vowel sign between.
            "خانه\u{200c}ها",
            "می\u{64e}\u{200c}خواهم",
            // Sinhala "Sri", Bengali with ya-phalaa, Malayalam chillu n, Hindi with a visible virama.
            "ශ\u{dca}\u{200d}රී",
            "র\u{9cd}\u{200d}য",
            "സുരേന\u{d4d}\u{200d}",
            "क\u{94d}\u{200c}ष",
        ] {
            assert_eq!(kept(name), name, "{name:?}");
        }
        for (given, shown) in [
            ("👩\u{200d}", "👩"),
            ("👩\u{200d}\u{200d}💻", "👩\u{200d}💻"),
            ("a\u{200d}👩", "a👩"),
            ("خانه\u{200c}", "خانه"),
            // Alef joins nothing that follows.
            ("ا\u{200c}ب", "اب"),
        ] {
            assert_eq!(kept(given), shown, "{given:?}");
        }
        // Cut between the two that a joiner joins.
        let cut = "x".repeat(LONGEST - 2) + "👩\u{200d}👧";
        assert_eq!(kept(&cut), "x".repeat(LONGEST - 2) + "👩");
    }

    #[test]
    fn chosen_name_has_the_form_of_an_external_one_and_is_not_cut() {
        for (given, name) in [
            ("  John \t Doe\n", Ok("John Doe")),
            ("Jose\u{301}\u{200b}", Ok("Jos\u{e9}")),
            (&"é".repeat(64), Ok(&*"é".repeat(64))),
            (&"é".repeat(65), Err(NameError::TooLong)),
            ("", Err(NameError::Required)),
            ("\u{3164}\u{200b} \0", Err(NameError::Required)),
        ] {
            assert_eq!(chosen(given), name.map(str::to_owned), "{given:?}");
        }
    }

    #[test]
    fn spellings_of_a_name_have_one_key() {
        assert_eq!(key("JOSE\u{301}"), key("jos\u{e9}"));
        assert_ne!(key("jose"), key("jos\u{e9}"));
    }
}
