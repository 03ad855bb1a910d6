//! Random bytes and signing keys.

use std::{
    fs::File,
    io::{self, Read},
};

use base64::{Engine, engine::general_purpose::STANDARD};

/// The DER of a PKCS#8 Ed25519 private key is this and the 32 bytes of the key (RFC 8410, section 7).
const ED25519_PKCS8: [u8; 16] = *b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";

pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

pub fn signing_key() -> io::Result<String> {
    Ok(signing_key_of(random()?))
}

pub fn signing_key_of(seed: [u8; 32]) -> String {
    let der = [ED25519_PKCS8.as_slice(), seed.as_slice()].concat();
    format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", STANDARD.encode(der))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signing_key_is_written_as_in_rfc_8410() {
        let seed = STANDARD.decode("1O5y2/kTWErVttjx92n4rTr+fCjL8dT74Jeoj0R1WEI=").unwrap();
        let expected = "-----BEGIN PRIVATE KEY-----\n\
                        MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
                        -----END PRIVATE KEY-----\n";
        assert_eq!(signing_key_of(seed.try_into().unwrap()), expected);
    }
}
