//! Files that are given by a bare name: credentials, which systemd hands to the service (`systemd.exec(5)`, `LoadCredential=`).
//!
//! `overlayd.service` loads all of `/etc/overlayd/credentials` under the id `overlayd`, so the file `client.key` there is
//! `$CREDENTIALS_DIRECTORY/overlayd_client.key`. A name alone means the same file in the service and for root at the shell.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Where secrets are kept that the service loads.
const DIRECTORY: &str = "/etc/overlayd/credentials";
/// The id under which the service loads that directory.
const ID: &str = "overlayd";

/// The file that a setting means: a path as it stands, a bare name among the credentials.
pub(super) fn resolve(text: &str) -> PathBuf {
    resolve_in(text, std::env::var_os("CREDENTIALS_DIRECTORY"), Path::new(DIRECTORY))
}

fn resolve_in(text: &str, loaded: Option<OsString>, directory: &Path) -> PathBuf {
    if text.contains('/') || text == "." || text == ".." {
        return PathBuf::from(text);
    }
    let loaded = loaded.map(PathBuf::from);
    let candidates = loaded.iter().flat_map(|loaded| [loaded.join(format!("{ID}_{text}")), loaded.join(text)]);
    candidates.into_iter().find(|path| path.exists()).unwrap_or_else(|| directory.join(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_a_credential() {
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
