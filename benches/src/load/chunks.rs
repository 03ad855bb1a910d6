//! HTTP/1.1's chunked bodies, as proxies send streams: `<hexadecimal length>\r\n<bytes>\r\n`, again and again. Pure.

const DIGITS: u32 = 8;

#[derive(Debug, Default)]
pub struct ChunkReader {
    within: Within,
}

#[derive(Debug, Clone, Copy)]
enum Within {
    Length { so_far: usize, digits: u32 },
    LengthEnd(usize),
    Bytes(usize),
    BytesEnd(&'static [u8]),
    LastEnd(&'static [u8]),
    Over,
}

impl Default for Within {
    fn default() -> Self {
        Self::Length { so_far: 0, digits: 0 }
    }
}

impl ChunkReader {
    /// Appends to `body`. `true` at the end of the body; after that, or an error, nothing more is read.
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
