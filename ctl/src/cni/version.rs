//! Versions of the specification.

use std::fmt;

use serde_json::{Value, json};

use super::error::{CniError, Code};

/// A supported version, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.1: ADD, DEL, VERSION.
    V0_3_1,
    /// 0.4.0: adds CHECK, and the previous result for DEL.
    V0_4_0,
    /// 1.0.0: addresses without a `version` field.
    V1_0_0,
    /// 1.1.0: adds STATUS, GC, and the MTU in results.
    V1_1_0,
}

impl Version {
    /// All versions.
    pub const ALL: [Version; 4] = [Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];
    /// Version of the response if the request's is unknown.
    pub const LATEST: Version = Version::V1_1_0;

    /// The text in `cniVersion`.
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V0_3_1 => "0.3.1",
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    /// Parses `cniVersion`. The specification defines 0.1.0 as the default.
    pub fn parse(text: Option<&str>) -> Result<Version, CniError> {
        let text = text.unwrap_or("0.1.0");
        Version::ALL.into_iter().find(|version| version.as_str() == text).ok_or_else(|| {
            let truncated: String = text.chars().take(80).collect();
            CniError::new(Code::IncompatibleVersion, format!("cniVersion {truncated:?} is not supported by overlay-cni"))
                .with_details(format!("supported: {}", Version::ALL.map(Version::as_str).join(", ")))
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Builds the VERSION response: the requested version, and all supported ones.
pub fn supported(requested: Option<&str>) -> Value {
    json!({
        "cniVersion": requested.unwrap_or(Version::LATEST.as_str()),
        "supportedVersions": Version::ALL.map(Version::as_str),
    })
}
