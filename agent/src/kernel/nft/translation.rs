//! Address translations of rules.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::snapshot::RuleRef;

/// An address translation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Translation {
    /// The destination changes.
    Destination {
        /// The new address; absent if unchanged.
        address: Option<IpAddr>,
        /// The new port; absent if unchanged.
        port: Option<u16>,
    },
    /// The source changes.
    Source {
        /// The new address; absent if unchanged.
        address: Option<IpAddr>,
    },
    /// The source becomes the address of the output interface.
    Masquerade,
    /// The destination becomes this host.
    Redirect,
    /// A translation that this program cannot decode.
    Unknown,
}

/// A translation that may apply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PossibleTranslation {
    /// The translation.
    pub translation: Translation,
    /// Its rule.
    pub rule: RuleRef,
    /// Protocol and destination port of the packets, if it is an element of a map of published ports.
    pub published: Option<(u8, u16)>,
}
