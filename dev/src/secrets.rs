//! Secrets of the dev instance: made once, readable by their owner only.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

/// The DER of a PKCS#8 Ed25519 private key is this and the 32 bytes of the key (RFC 8410, section 7).
const ED25519_PKCS8: [u8; 16] = *b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";

pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// 192 random bits that need no escaping in a URL.
pub(crate) fn random_password() -> Result<String> {
    Ok(URL_SAFE_NO_PAD.encode(random::<24>()?))
}

/// The content of `file`; made by `make` when there is none yet.
pub(crate) fn kept(file: &Path, make: impl FnOnce() -> Result<String>) -> Result<String> {
    match fs::read_to_string(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let secret = make()?;
            // Written aside first, so that a file that exists is whole.
            let begun = file.with_extension("unfinished");
            let mut options = OpenOptions::new();
            options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&begun)?
                .write_all(secret.as_bytes())?;
            fs::rename(begun, file)?;
            Ok(secret)
        }
        read => read.with_context(|| format!("cannot read {}", file.display())),
    }
}

/// A new Ed25519 signing key as PKCS#8 PEM.
pub(crate) fn signing_key() -> Result<String> {
    Ok(signing_key_pem(random()?))
}

fn signing_key_pem(seed: [u8; 32]) -> String {
    let der = [ED25519_PKCS8.as_slice(), seed.as_slice()].concat();
    format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", STANDARD.encode(der))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_signing_key_is_written_as_in_rfc_8410() {
        let seed = STANDARD.decode("1O5y2/kTWErVttjx92n4rTr+fCjL8dT74Jeoj0R1WEI=").unwrap();
        let expected = "-----BEGIN PRIVATE KEY-----\n\
                        MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n\
                        -----END PRIVATE KEY-----\n";
        assert_eq!(signing_key_pem(seed.try_into().unwrap()), expected);
    }

    #[test]
    fn a_secret_is_made_once_and_private() {
        let file = std::env::temp_dir().join(format!("secret-{}", std::process::id()));
        let first = kept(&file, random_password).unwrap();
        let second = kept(&file, random_password).unwrap();
        let mode = file.metadata().unwrap().mode() & 0o777;
        fs::remove_file(&file).unwrap();
        assert!(first.len() >= 32);
        assert_eq!(first, second);
        assert_eq!(mode, 0o600);
    }
}
