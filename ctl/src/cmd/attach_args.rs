//! Flags of an attachment, shared by `overlayctl attach` and `overlayctl run`.

use std::net::IpAddr;
use std::path::PathBuf;

use overlay_agent::model::api::AttachRequest;
use overlay_agent::model::{Family, Mac, Mode, NetworkName, PerFamily, PublishedPort};

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
    /// Network [default: default]. If repeated, the container gets interfaces eth0, eth1 and so on in this order; the first
    /// network has its default route and its published ports
    #[arg(long = "network", value_name = "NAME")]
    networks: Vec<NetworkName>,
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

    /// Builds the request to each network for a namespace, in the order given. Conflicting flags are a usage error.
    pub fn requests(&self, netns: Option<PathBuf>) -> Result<Vec<(NetworkName, AttachRequest)>, CommandError> {
        let first = self.request(netns)?;
        let (network, others) = match self.networks.split_first() {
            None => return Ok(vec![(NetworkName::default(), first)]),
            Some((network, [])) => return Ok(vec![(network.clone(), first)]),
            Some((network, others)) => (network, others),
        };
        if let Some(twice) = self.networks.iter().enumerate().find(|(n, name)| self.networks.iter().take(*n).any(|e| e == *name))
        {
            return Err(CommandError::Usage { message: format!("--network {} is given twice", twice.1) });
        }
        let of_one = [("--interface", self.interface.is_some()), ("--ip", !self.ips.is_empty()), ("--mac", self.mac.is_some())];
        if let Some((flag, _)) = of_one.into_iter().find(|(_, is_given)| *is_given) {
            let message = format!("{flag} is for one network: leave it out, or attach the container to each network by itself");
            return Err(CommandError::Usage { message });
        }
        let on = |index: usize, request: AttachRequest| AttachRequest { interface: Some(format!("eth{index}")), ..request };
        let mut requests = vec![(network.clone(), on(0, first.clone()))];
        for (n, network) in others.iter().enumerate() {
            let further = AttachRequest { publish: Vec::new(), default_route: Some(false), ..first.clone() };
            requests.push((network.clone(), on(n + 1, further)));
        }
        Ok(requests)
    }

    /// Builds the request to one network.
    fn request(&self, netns: Option<PathBuf>) -> Result<AttachRequest, CommandError> {
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
    use clap::Parser;

    use super::*;

    /// The flags as a command line of their own.
    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        attach: AttachArgs,
    }

    fn requests(line: &str) -> Result<Vec<(NetworkName, AttachRequest)>, String> {
        let words = ["x"].into_iter().chain(line.split_ascii_whitespace());
        let parsed = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        parsed.attach.requests(Some("/run/netns/web".into())).map_err(|error| error.to_string())
    }

    #[test]
    fn each_network_has_a_request() {
        let plain = requests("").expect("a request");
        assert_eq!(
            (plain.len(), &plain[0].0, &plain[0].1.interface, plain[0].1.default_route),
            (1, &NetworkName::default(), &None, None)
        );
        let one = requests("--network blue --interface net0 --no-default-route --publish 80:80").expect("a request");
        assert_eq!(
            (one[0].0.as_str(), one[0].1.interface.as_deref(), one[0].1.default_route),
            ("blue", Some("net0"), Some(false))
        );
        let several =
            requests("--network blue --network default --network red --publish 80:80 --no-source-check").expect("requests");
        let shown: Vec<_> = several
            .iter()
            .map(|(network, r)| (network.as_str(), r.interface.as_deref(), r.default_route, r.publish.len(), r.source_check))
            .collect();
        assert_eq!(
            shown,
            [
                ("blue", Some("eth0"), None, 1, Some(false)),
                ("default", Some("eth1"), Some(false), 0, Some(false)),
                ("red", Some("eth2"), Some(false), 0, Some(false)),
            ]
        );
    }

    #[test]
    fn flag_of_one_network_is_refused_with_several() {
        for (line, expected) in [
            ("--network blue --network red --network blue", "--network blue is given twice"),
            ("--network blue --network red --interface net0", "--interface is for one network"),
            ("--network blue --network red --ip 10.0.0.2", "--ip is for one network"),
            ("--network blue --network red --mac 02:00:5e:10:00:01", "--mac is for one network"),
            ("--network Blue", "`Blue` is not a DNS label"),
        ] {
            let error = requests(line).expect_err(line);
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn one_address_per_family() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let both = addresses_by_family(&[ip("10.0.0.2"), ip("fd00::2")]).expect("one each");
        assert_eq!((both.v4, both.v6), (Some(ip("10.0.0.2")), Some(ip("fd00::2"))));
        assert!(matches!(addresses_by_family(&[ip("10.0.0.2"), ip("10.0.0.3")]), Err(CommandError::Usage { .. })));
    }
}
