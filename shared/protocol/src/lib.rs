//! The contract between `api`, `stream-gateway` and their clients: ids, positions, events, tokens, channel names, internal
//! requests, and the form of errors. It does no I/O.

/// In JSON a string: the text of `Display`, read by `FromStr`.
macro_rules! as_json_string {
    ($name:ident, $expected:literal) => {
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl serde::de::Visitor<'_> for Text {
                    type Value = $name;
                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str($expected)
                    }
                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_str(Text)
            }
        }
    };
}

pub mod channels;
pub mod claims;
pub mod event;
pub mod external;
pub mod feed;
pub mod ids;
pub mod jose;
pub mod keys_version;
pub mod position;
pub mod presence;
pub mod problem;
pub mod problem_types;
