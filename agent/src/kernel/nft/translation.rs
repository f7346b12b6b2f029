//! An address translation by a rule, as the evaluation of rules reports it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

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
