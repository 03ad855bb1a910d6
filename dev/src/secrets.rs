//! Secrets of the dev instance: made once, readable by their owner only.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use testkit::secrets::random;

pub(crate) fn random_password() -> Result<String> {
    Ok(format!("{:032x}", u128::from_ne_bytes(random()?)))
}

/// The content of `file`, made by `make` the first time.
pub(crate) fn kept(file: &Path, make: impl FnOnce() -> Result<String>) -> Result<String> {
    match fs::read_to_string(file) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let secret = make()?;
            // Renamed when complete, so that an existing file is whole.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

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
