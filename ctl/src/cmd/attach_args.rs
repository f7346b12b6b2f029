//! Flags of an attachment, shared by `overlayctl attach` and `overlayctl run`.

use std::net::IpAddr;
use std::path::PathBuf;

use overlay_agent::model::api::AttachRequest;
use overlay_agent::model::{Family, Mac, Mode, PerFamily, PublishedPort};

use super::CommandError;
use crate::netns::PrefixArg;
use crate::resolver::ResolverArgs;

/// Flags of an attachment.
#[derive(Debug, clap::Args)]
pub struct AttachArgs {
    /// Mode: overlay (an interface with addresses of this host's subnet), none (loopback only), host (the host's network),
    /// container:NAME (the namespace of another endpoint)
    #[arg(long, value_name = "MODE", default_value_t = Mode::Overlay)]
    pub mode: Mode,
    /// Requested address of this host's subnet; once per family
    #[arg(long = "ip", value_name = "ADDRESS")]
    ips: Vec<IpAddr>,
    /// Requested MAC of the interface
    #[arg(long, value_name = "MAC")]
    mac: Option<Mac>,
    /// Name of the interface in the namespace [default: eth0]
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,
    /// Port of the host to forward to the container: [ADDRESS:]HOST[-LAST]:CONTAINER[-LAST][/tcp|udp|sctp]
    #[arg(short, long, value_name = "PORTS")]
    publish: Vec<PublishedPort>,
    /// Let the container send with foreign addresses and MACs: for routers and virtual addresses
    #[arg(long)]
    no_source_check: bool,
    /// Create no default route, only one to the overlay network: for a container with a default route to another network
    #[arg(long)]
    no_default_route: bool,
    /// Owner, shown by `endpoints`
    #[arg(long, value_name = "TEXT", hide = true)]
    owner: Option<String>,
    /// Resolver settings
    #[command(flatten)]
    pub resolver: ResolverArgs,
    /// Namespace prefix, for labs
    #[command(flatten)]
    pub prefix: PrefixArg,
}

impl AttachArgs {
    /// Whether the mode has its own network namespace.
    pub fn has_namespace(&self) -> bool {
        matches!(self.mode, Mode::Overlay | Mode::None)
    }

    /// Builds the request for a namespace. Conflicting flags are a usage error.
    pub fn request(&self, netns: Option<PathBuf>) -> Result<AttachRequest, CommandError> {
        self.resolver.validate().map_err(|message| CommandError::Usage { message })?;
        let mode = &self.mode;
        if *mode != Mode::Overlay && self.resolver.is_given() {
            let message =
                format!("--dns, --dns-search and --dns-option are for mode overlay: mode {mode} has no network of its own");
            return Err(CommandError::Usage { message });
        }
        Ok(AttachRequest {
            mode: mode.clone(),
            netns,
            interface: self.interface.clone(),
            addresses: addresses_by_family(&self.ips)?,
            mac: self.mac,
            publish: self.publish.clone(),
            source_check: self.no_source_check.then_some(false),
            default_route: self.no_default_route.then_some(false),
            owner: self.owner.clone(),
        })
    }
}

/// Sorts the requested addresses by family.
fn addresses_by_family(ips: &[IpAddr]) -> Result<PerFamily<IpAddr>, CommandError> {
    let mut addresses = PerFamily::default();
    for ip in ips {
        let family = Family::of(*ip);
        if let Some(before) = addresses.slot(family).replace(*ip) {
            let message = format!("--ip {before} and --ip {ip}: an endpoint has one {family} address");
            return Err(CommandError::Usage { message });
        }
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_per_family() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let both = addresses_by_family(&[ip("10.0.0.2"), ip("fd00::2")]).expect("one each");
        assert_eq!((both.v4, both.v6), (Some(ip("10.0.0.2")), Some(ip("fd00::2"))));
        assert!(matches!(addresses_by_family(&[ip("10.0.0.2"), ip("10.0.0.3")]), Err(CommandError::Usage { .. })));
    }
}
