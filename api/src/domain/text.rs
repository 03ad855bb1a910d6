//! Which characters can be seen.

use icu_properties::{CodePointSetData, props::DefaultIgnorableCodePoint};

/// Braille without a dot: no Unicode property marks it as blank.
const BRAILLE_BLANK: char = '\u{2800}';

/// Whether nothing is displayed for it, with any font: white space is not meant. Hangul's fillers are among `Default_Ignorable_Code_Point`.
pub(super) fn is_blank(c: char) -> bool {
    c == BRAILLE_BLANK || CodePointSetData::new::<DefaultIgnorableCodePoint>().contains(c)
}

/// Whether a reader sees anything of it.
pub(super) fn is_visible(text: &str) -> bool {
    text.chars().any(|c| !c.is_whitespace() && !is_blank(c))
}
