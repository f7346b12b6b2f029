//! The fields of a network as flags, shared by `network create` and `network set`.

use overlay_agent::model::{Cidr, NetworkChange, NetworkName, PerFamily, Vni};
use overlay_agent::store::WriteKind;

/// The fields of a network.
#[derive(Debug, Default, clap::Args)]
pub struct NetworkOptions {
    /// Address space, as 10.244.0.0/16 or fd00:10:244::/56; once per family
    #[arg(long = "cidr", value_name = "CIDR")]
    cidrs: Vec<Cidr>,
    /// Prefix length of each host's IPv4 subnet [default: 24]
    #[arg(long = "subnet-len", value_name = "N")]
    subnet_length: Option<u8>,
    /// Prefix length of each host's IPv6 subnet [default: 64]
    #[arg(long = "ipv6-subnet-len", value_name = "N")]
    ipv6_subnet_length: Option<u8>,
    /// VXLAN network identifier, 1 to 16777215 [default: 1 for the default network, else the lowest free one from 2]
    #[arg(long, value_name = "N", value_parser = parse_vni)]
    vni: Option<Vni>,
    /// UDP port of the tunnel [default: 8472]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// The underlay's MTU in bytes [default: the external interface's]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1350..=65_535))]
    mtu: Option<u32>,
    /// Let the host route it, instead of a network namespace of its own
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    routed: Option<bool>,
    /// Give it no way out
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    internal: Option<bool>,
    /// Encrypt packets between hosts
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", hide = true)]
    encrypt: Option<bool>,
    /// Network to route to, if it names this one, too; repeatable
    #[arg(long = "peer", value_name = "NETWORK")]
    add_peers: Vec<NetworkName>,
    /// Network to route to no longer; repeatable
    #[arg(long = "remove-peer", value_name = "NETWORK")]
    remove_peers: Vec<NetworkName>,
    /// Domain of the endpoints' names
    #[arg(long, value_name = "DOMAIN", hide = true)]
    domain: Option<String>,
}

fn parse_vni(text: &str) -> Result<Vni, String> {
    let number: u32 = text.parse().map_err(|_| "it is not a whole number from 1 to 16777215".to_owned())?;
    Vni::try_from(number).map_err(|error| error.to_string())
}

impl NetworkOptions {
    /// The change of a network's record; an error for flags that contradict each other or the network.
    pub fn change(&self, name: &NetworkName, kind: WriteKind) -> Result<NetworkChange, String> {
        if let Some(flag) = self.named_only_flag().filter(|_| name.is_default()) {
            return Err(format!("{flag} is not for the default network, which every host routes: leave it out"));
        }
        // A network that its hosts do not encrypt must not look encrypted.
        if self.encrypt == Some(true) {
            return Err(format!(
                "network {name} cannot be encrypted: agents of this version do not encrypt; leave out --encrypt"
            ));
        }
        let mut cidrs = PerFamily::default();
        for cidr in &self.cidrs {
            if let Some(other) = cidrs.slot(cidr.family()).replace(*cidr) {
                return Err(format!("--cidr {other} and --cidr {cidr} are both {}: give one per family", cidr.family()));
            }
        }
        let created = kind == WriteKind::Create;
        if created && cidrs.is_empty() {
            return Err("a network needs --cidr, its address space: for example --cidr 10.244.0.0/16".to_owned());
        }
        Ok(NetworkChange {
            cidrs,
            subnet_lengths: PerFamily { v4: self.subnet_length, v6: self.ipv6_subnet_length },
            vni: self.vni,
            port: self.port,
            mtu: self.mtu,
            // A named network is isolated unless told otherwise.
            isolated: self.routed.or((created && !name.is_default()).then_some(false)).map(|routed| !routed),
            internal: self.internal,
            add_peers: self.add_peers.iter().cloned().collect(),
            remove_peers: self.remove_peers.iter().cloned().collect(),
            encrypted: self.encrypt,
            domain: self.domain.clone(),
        })
    }

    /// A given flag that only named networks have.
    fn named_only_flag(&self) -> Option<&'static str> {
        let flags = [
            ("--routed", self.routed.is_some()),
            ("--internal", self.internal.is_some()),
            ("--encrypt", self.encrypt.is_some()),
            ("--peer", !self.add_peers.is_empty()),
            ("--remove-peer", !self.remove_peers.is_empty()),
            ("--domain", self.domain.is_some()),
        ];
        flags.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use overlay_agent::model::NetworkRecord;

    use super::*;
    use crate::cmd::network::Args;
    use crate::cmd::{Cli, Command};

    fn parse(line: &str) -> Result<(NetworkName, NetworkOptions, WriteKind), String> {
        let words = ["overlayctl", "network"].into_iter().chain(line.split(' '));
        match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Command::Network(Args::Create { name, options, .. }) => Ok((name, options, WriteKind::Create)),
            Command::Network(Args::Set { name, options, .. }) => Ok((name, options, WriteKind::Change)),
            other => panic!("{other:?}"),
        }
    }

    fn change(line: &str) -> Result<NetworkChange, String> {
        let (name, options, kind) = parse(line)?;
        options.change(&name, kind)
    }

    #[test]
    fn flags_become_record_fields() {
        let text = change("create default --cidr 10.244.0.0/16").expect("a change").apply("");
        assert_eq!(text, r#"{"Backend":{"Type":"vxlan"},"Network":"10.244.0.0/16"}"#);
        let line = "create default --cidr 10.0.0.0/8 --cidr fd00::/48 --subnet-len 22 --ipv6-subnet-len 80 --vni 7 --port 4789 --mtu 9000";
        assert_eq!(
            change(line).expect("a change").apply(""),
            r#"{"Backend":{"MTU":9000,"Port":4789,"Type":"vxlan","VNI":7},"EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetLen":80,"Network":"10.0.0.0/8","SubnetLen":22}"#
        );
        assert_eq!(
            change("set default --mtu 9000").expect("a change").apply(r#"{"X":1}"#),
            r#"{"Backend":{"MTU":9000,"Type":"vxlan"},"X":1}"#
        );
    }

    #[test]
    fn named_networks_are_isolated_by_default() {
        let record = |line: &str| {
            let (name, options, kind) = parse(line).expect(line);
            NetworkRecord::parse(&options.change(&name, kind).expect(line).apply("")).expect(line)
        };
        assert!(record("create blue --cidr 10.1.0.0/16").isolated);
        assert!(!record("create blue --cidr 10.1.0.0/16 --routed").isolated);
        assert!(!record("create default --cidr 10.1.0.0/16").isolated);
        assert!(!record("set blue --cidr 10.1.0.0/16").isolated);
        let all = record("create blue --cidr 10.1.0.0/16 --internal --peer green --peer red --domain blue.example");
        assert!(all.internal && all.peers.len() == 2 && all.domain.is_some());
        assert!(!record("create blue --cidr 10.1.0.0/16 --internal=false").internal);
    }

    #[test]
    fn each_wrong_value_is_named_with_its_rule() {
        for (line, wanted) in [
            ("create Blue --cidr 10.1.0.0/16", "`Blue` is not a DNS label of 1 to 32 characters"),
            ("create default", "a network needs --cidr"),
            ("create default --cidr 10.244.0.0", "`10.244.0.0` is not a CIDR"),
            ("create default --cidr 10.244.1.0/16", "host bits set: the network of that length is 10.244.0.0/16"),
            ("create default --cidr 10.1.0.0/16 --cidr 10.2.0.0/16", "--cidr 10.1.0.0/16 and --cidr 10.2.0.0/16 are both IPv4"),
            ("create default --cidr 10.1.0.0/16 --vni 0", "VNI 0 is outside 1 to 16777215"),
            ("create default --cidr 10.1.0.0/16 --vni 16777216", "VNI 16777216 is outside 1 to 16777215"),
            ("create default --cidr 10.1.0.0/16 --vni x", "it is not a whole number"),
            ("create default --cidr 10.1.0.0/16 --mtu 1000", "1000 is not in 1350..=65535"),
            ("create default --cidr 10.1.0.0/16 --internal", "--internal is not for the default network"),
            ("set default --peer blue", "--peer is not for the default network"),
            ("create blue --cidr 10.1.0.0/16 --encrypt", "network blue cannot be encrypted: agents of this version do not"),
            ("set blue --encrypt", "network blue cannot be encrypted"),
        ] {
            let error = change(line).expect_err(line);
            assert!(error.contains(wanted), "{line}: {error}");
        }
    }
}
