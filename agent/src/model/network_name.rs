//! Names of overlay networks.

use std::fmt;
use std::sync::Arc;

/// The name of an overlay network.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkName(Arc<str>);

impl Default for NetworkName {
    /// The network whose configuration is under `<prefix>/config`.
    fn default() -> Self {
        NetworkName("default".into())
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
