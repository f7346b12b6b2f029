//! VXLAN network identifiers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A VXLAN network identifier: 24 bits (RFC 7348 section 5). Never 0, because 0 has a special meaning on Linux collect-metadata
/// devices. Stored as three big-endian bytes to save space: every data path entry of every peer contains one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni([u8; 3]);

/// A number outside 1 to 16777215.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("VNI {0} is outside 1 to 16777215")]
pub struct VniError(pub u32);

impl Vni {
    /// flannel's default.
    pub const DEFAULT: Vni = Vni([0, 0, 1]);

    /// The number.
    pub const fn get(self) -> u32 {
        let [a, b, c] = self.0;
        u32::from_be_bytes([0, a, b, c])
    }
}

impl TryFrom<u32> for Vni {
    type Error = VniError;

    fn try_from(value: u32) -> Result<Self, VniError> {
        match value.to_be_bytes() {
            [0, a, b, c] if value != 0 => Ok(Vni([a, b, c])),
            _ => Err(VniError(value)),
        }
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> u32 {
        vni.get()
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}
