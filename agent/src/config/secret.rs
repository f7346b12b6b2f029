//! Secrets: mode checks of the files that contain them, and redaction in messages.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Forbidden: any permission for others, and write permission for the group. Group read is allowed, because root gives a service
/// access to a file by the service's own group.
const FORBIDDEN_SECRET_MODE: u32 = 0o027;
/// Forbidden: write permission for group or others.
const FORBIDDEN_WRITE_MODE: u32 = 0o022;
/// Words in the names of secrets.
const SECRET_WORDS: [&str; 4] = ["passw", "secret", "token", "credential"];

/// A file whose mode permits too much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExposedFile {
    path: PathBuf,
    mode: u32,
    allowed: u32,
    reason: &'static str,
}

impl fmt::Display for ExposedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ExposedFile { path, mode, allowed, reason } = self;
        write!(f, "{reason} (mode {mode:04o}): chmod {allowed:o} {}", path.display())
    }
}

/// The reason why a secret was not read.
#[derive(Debug)]
pub enum SecretError {
    /// The system's error.
    File(io::Error),
    /// The file's mode permits too much.
    Exposed(ExposedFile),
}

/// Opens a file with a secret, without reading it.
///
/// # Errors
/// The file cannot be opened, users other than its owner and group may read it, or users other than its owner may write it. The
/// mode of a pipe or device is not checked, because it is not meaningful.
pub fn open(path: &Path) -> Result<File, SecretError> {
    let file = File::open(path).map_err(SecretError::File)?;
    let metadata = file.metadata().map_err(SecretError::File)?;
    let reason = "contains a secret and is accessible to other users";
    check_mode(path, &metadata, FORBIDDEN_SECRET_MODE, 0o600, reason)
        .map_or(Ok(file), |exposed| Err(SecretError::Exposed(exposed)))
}

/// Reads a file with a secret.
///
/// # Errors
/// The errors of [`open`], and read errors.
pub fn read(path: &Path) -> Result<Vec<u8>, SecretError> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(SecretError::File)?;
    Ok(bytes)
}

/// Checks the mode of a file that names secret files: a user who can write it can redirect the secrets.
pub fn writable_by_others(path: &Path) -> Option<ExposedFile> {
    let metadata = std::fs::metadata(path).ok()?;
    check_mode(path, &metadata, FORBIDDEN_WRITE_MODE, 0o644, "names files with secrets and is writable by other users")
}

fn check_mode(path: &Path, metadata: &Metadata, forbidden: u32, allowed: u32, reason: &'static str) -> Option<ExposedFile> {
    let mode = metadata.permissions().mode() & 0o7777;
    (metadata.is_file() && mode & forbidden != 0).then(|| ExposedFile { path: path.to_owned(), mode, allowed, reason })
}

/// Removes user and password from a URL, for messages.
pub fn redact_credentials(url: &str) -> String {
    let scheme = url.find("://").map_or(0, |at| at + 3);
    match url[scheme..].rsplit_once('@') {
        Some((_, host)) => format!("{}...@{host}", &url[..scheme]),
        None => url.to_owned(),
    }
}

/// Whether the name of an unknown key suggests that its value is a secret.
pub fn looks_secret(key: &str) -> bool {
    let key = key.to_lowercase();
    SECRET_WORDS.iter().any(|word| key.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exposed_modes_are_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        std::fs::write(&path, "x").unwrap();
        for (mode, secret, named) in [
            (0o600, true, true),
            (0o400, true, true),
            (0o640, true, true),
            (0o440, true, true),
            (0o644, false, true),
            (0o604, false, true),
            (0o660, false, false),
            (0o601, false, true),
            (0o602, false, false),
            (0o666, false, false),
        ] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            assert_eq!(read(&path).is_ok(), secret, "{mode:o}");
            assert_eq!(writable_by_others(&path).is_none(), named, "{mode:o}");
        }
        let Err(SecretError::Exposed(exposed)) = open(&path) else { panic!("it is open to all") };
        let text = exposed.to_string();
        assert!(text.contains("mode 0666") && text.contains(&format!("chmod 600 {}", path.display())), "{text}");
        // The mode of a device is not checked.
        assert!(open(Path::new("/dev/null")).is_ok());
        assert!(matches!(open(&dir.path().join("none")), Err(SecretError::File(_))));
    }

    #[test]
    fn url_credentials_are_redacted() {
        assert_eq!(redact_credentials("https://root:hunter2@etcd:2379"), "https://...@etcd:2379");
        assert_eq!(redact_credentials("root:hunt@er2@etcd"), "...@etcd");
        assert_eq!(redact_credentials("https://etcd:2379"), "https://etcd:2379");
        assert!(
            looks_secret("etcd-password")
                && looks_secret("ETCD_PASSWD")
                && looks_secret("auth_token")
                && !looks_secret("run-dri")
        );
    }
}
