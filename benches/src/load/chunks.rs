//! HTTP/1.1's chunked bodies, as proxies send streams: `<hexadecimal length>\r\n<bytes>\r\n`, again and again. Pure.

/// A length has at most so many digits.
const DIGITS: u32 = 8;

/// Where in a body the reader is, to the byte.
#[derive(Debug, Default)]
pub struct Chunks {
    within: Within,
}

#[derive(Debug, Clone, Copy)]
enum Within {
    Length {
        so_far: usize,
        digits: u32,
    },
    /// The line feed behind a length.
    LengthEnd(usize),
    Bytes(usize),
    /// What is left of the line break behind bytes.
    BytesEnd(&'static [u8]),
    /// The same behind the last chunk, which is empty.
    LastEnd(&'static [u8]),
    Over,
}

impl Default for Within {
    fn default() -> Self {
        Self::Length { so_far: 0, digits: 0 }
    }
}

impl Chunks {
    /// Adds to `body` what these bytes hold of it. `true` when they hold its end; after that, or an error, nothing is read any
    /// more.
    pub fn read(&mut self, mut bytes: &[u8], body: &mut Vec<u8>) -> Result<bool, &'static str> {
        while let Some((&byte, rest)) = bytes.split_first() {
            if let Within::Bytes(left) = self.within {
                let some = left.min(bytes.len());
                body.extend_from_slice(&bytes[..some]);
                bytes = &bytes[some..];
                self.within =
                    if left == some { Within::BytesEnd(b"\r\n") } else { Within::Bytes(left - some) };
                continue;
            }
            bytes = rest;
            self.within = match (self.within, byte) {
                (Within::Length { so_far, digits: 1.. }, b'\r') => Within::LengthEnd(so_far),
                (Within::Length { so_far, digits: digits @ 0..DIGITS }, digit)
                    if digit.is_ascii_hexdigit() =>
                {
                    let value = char::from(digit).to_digit(16).unwrap_or_default() as usize;
                    Within::Length { so_far: so_far * 16 + value, digits: digits + 1 }
                }
                (Within::LengthEnd(0), b'\n') => Within::LastEnd(b"\r\n"),
                (Within::LengthEnd(length), b'\n') => Within::Bytes(length),
                (Within::BytesEnd([wanted, rest @ ..]), byte) if byte == *wanted => match rest {
                    [] => Within::default(),
                    rest => Within::BytesEnd(rest),
                },
                (Within::LastEnd([wanted, rest @ ..]), byte) if byte == *wanted => match rest {
                    [] => {
                        self.within = Within::Over;
                        return Ok(true);
                    }
                    rest => Within::LastEnd(rest),
                },
                (Within::Over, _) => return Ok(false),
                _ => {
                    self.within = Within::Over;
                    return Err("a body whose chunks are broken");
                }
            };
        }
        Ok(false)
    }
}
