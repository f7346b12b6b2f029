//! Resolves bare file names to systemd credentials (`systemd.exec(5)`, `LoadCredential=`).
//!
//! `overlayd.service` loads all files of `/etc/overlayd/credentials` with the ID `overlayd`, so the file `client.key` there
//! becomes `$CREDENTIALS_DIRECTORY/overlayd_client.key`. A bare name means the same file in the service and in a root shell.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// Directory of the secrets that the service loads.
const CREDENTIALS_DIR: &str = "/etc/overlayd/credentials";
/// The credential ID of that directory in the service.
const CREDENTIAL_ID: &str = "overlayd";

/// The file of a setting: a path is used unchanged, a bare name is looked up among the credentials.
pub(super) fn resolve(text: &str) -> PathBuf {
    resolve_in(text, std::env::var_os("CREDENTIALS_DIRECTORY"), Path::new(CREDENTIALS_DIR))
}

/// The remedy for an unreadable file; empty if the system's error text suffices.
pub(super) fn advice(text: &str, error: &io::Error) -> String {
    advice_in(text, error.kind(), std::env::var_os("CREDENTIALS_DIRECTORY").is_some())
}

fn advice_in(text: &str, kind: io::ErrorKind, service: bool) -> String {
    match (text.contains('/'), kind) {
        (false, _) if service => {
            format!(
                "; systemd has loaded no {text} from {CREDENTIALS_DIR}: put it there under this name, then `systemctl restart overlayd`"
            )
        }
        (false, io::ErrorKind::NotFound) => {
            format!("; a bare name is a file in {CREDENTIALS_DIR}: put it there, or give a full path")
        }
        (true, io::ErrorKind::PermissionDenied) => {
            format!(
                "; the agent's user has no permission: put the file into {CREDENTIALS_DIR} and give its bare name, `{}`",
                file_name(text)
            )
        }
        _ => String::new(),
    }
}

fn file_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

fn resolve_in(text: &str, loaded: Option<OsString>, directory: &Path) -> PathBuf {
    if text.contains('/') || text == "." || text == ".." {
        return PathBuf::from(text);
    }
    let loaded = loaded.map(PathBuf::from);
    let candidates = loaded.iter().flat_map(|loaded| [loaded.join(format!("{CREDENTIAL_ID}_{text}")), loaded.join(text)]);
    candidates.into_iter().find(|path| path.exists()).unwrap_or_else(|| directory.join(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_file_advice_names_remedy() {
        use io::ErrorKind::{NotFound, PermissionDenied};
        for (text, kind, service, words) in [
            // The service's user cannot search the directory.
            ("ca.crt", PermissionDenied, true, "systemd has loaded no ca.crt from /etc/overlayd/credentials"),
            ("ca.crt", NotFound, false, "a bare name is a file in /etc/overlayd/credentials"),
            ("/etc/ssl/private/a.key", PermissionDenied, true, "give its bare name, `a.key`"),
        ] {
            assert!(advice_in(text, kind, service).contains(words), "{text}");
        }
        assert_eq!(advice_in("/etc/ca.crt", NotFound, true), "");
    }

    #[test]
    fn bare_name_resolves_to_credential() {
        let dir = tempfile::tempdir().unwrap();
        let loaded = dir.path().join("loaded");
        let kept = dir.path().join("kept");
        std::fs::create_dir_all(&loaded).unwrap();
        std::fs::write(loaded.join("overlayd_ca.crt"), "").unwrap();
        std::fs::write(loaded.join("password"), "").unwrap();
        let with = |text: &str| resolve_in(text, Some(loaded.clone().into()), &kept);
        assert_eq!(with("ca.crt"), loaded.join("overlayd_ca.crt"));
        assert_eq!(with("password"), loaded.join("password"));
        assert_eq!(with("none"), kept.join("none"));
        assert_eq!(with("/a/b"), Path::new("/a/b"));
        assert_eq!(with("./ca.crt"), Path::new("./ca.crt"));
        assert_eq!(resolve_in("ca.crt", None, &kept), kept.join("ca.crt"));
    }
}
