//! An address of the host, and its flaws as an underlay address.

use std::fmt;
use std::net::IpAddr;

/// An address of a link that is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostAddress {
    /// The address.
    pub address: IpAddr,
    /// Its prefix length.
    pub length: u8,
    /// Whether the kernel has another address of the same subnet before it (IPv4 only).
    pub secondary: bool,
    /// Why it is a bad source address.
    pub flaw: Option<Flaw>,
}

/// Flaws of an address as a source, the least severe first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flaw {
    /// A privacy address (RFC 8981), which the kernel replaces within hours.
    Temporary,
    /// Its preferred lifetime is over.
    Deprecated,
    /// It is in the overlay's leasable range: outer packets would be routed into the tunnel.
    Leased,
    /// Duplicate address detection is not complete.
    Tentative,
    /// Duplicate address detection found it on another host.
    Duplicate,
    /// It is in 169.254.0.0/16, which is not routed.
    LinkLocal,
}

impl Flaw {
    /// Whether the kernel can send from such an address. It is then selected if there is no better one.
    pub(super) const fn is_usable(self) -> bool {
        matches!(self, Flaw::Temporary | Flaw::Deprecated | Flaw::Leased)
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Flaw::Temporary => "temporary",
            Flaw::Deprecated => "deprecated",
            Flaw::Leased => "in the overlay",
            Flaw::Tentative => "tentative",
            Flaw::Duplicate => "duplicate",
            Flaw::LinkLocal => "link-local",
        })
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        self.flaw.map_or(Ok(()), |flaw| write!(f, " {flaw}"))
    }
}
