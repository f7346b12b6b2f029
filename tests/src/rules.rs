//! The agent's two tables of nftables: what `nft` prints of them as lines to compare, and the golden text of what there should be.
//!
//! The golden text is written here by hand, not made by the agent's code: it says what each rule has to be.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::{IpAddr, Ipv6Addr};

use overlay_agent::model::api::SubnetEntry;
use overlay_agent::model::network::Pool;
use overlay_agent::model::publish::PublishedPort;
use overlay_agent::model::{Cidr, Endpoint, Family, PerFamily, Subnet};
use overlayctl::lab::Lab;

use crate::kernel::attempt;
use crate::programs::require_program;

/// The families of the agent's tables.
const TABLE_FAMILIES: [&str; 2] = ["inet", "bridge"];

/// The agent's tables as a target has them: one line a counter, a set's kind, an element, and a chain with its rules.
pub fn actual_ruleset(lab: &Lab, target: &str) -> BTreeSet<String> {
    require_program("nft", "nftables");
    // Without the counters' values.
    TABLE_FAMILIES
        .iter()
        .flat_map(|table| lines(&attempt(lab, target, &["nft", "-s", "list", "table", table, "overlayd"]).stdout))
        .collect()
}

/// What the tables follow from.
#[derive(Debug)]
pub struct ExpectedRuleset<'a> {
    /// The VNI.
    pub vni: u64,
    /// The UDP port of the tunnel.
    pub port: u64,
    /// The pools, from whose subnets packets to elsewhere are masqueraded.
    pub pools: PerFamily<Pool>,
    /// The own subnet.
    pub subnet: Subnet,
    /// The own addresses on the underlay, that peers tunnel to.
    pub local: PerFamily<IpAddr>,
    /// The leases of peers.
    pub peers: &'a [&'a SubnetEntry],
    /// The containers of this host.
    pub endpoints: &'a [Endpoint],
}

/// Words of a family in rules.
struct FamilyTokens {
    ip: &'static str,
    digit: char,
    kind: &'static str,
    loopback: &'static str,
    multicast: &'static str,
    ethertype: &'static str,
    tunnel: &'static str,
    /// Where the inner source stands, in bits from the UDP header, and its length.
    source: &'static str,
}

fn family_tokens(family: Family) -> FamilyTokens {
    match family {
        Family::V4 => FamilyTokens {
            ip: "ip",
            digit: '4',
            kind: "ipv4_addr",
            loopback: "127.0.0.0/8",
            multicast: "224.0.0.0/4",
            ethertype: "0x800",
            tunnel: "ovx",
            source: "@th,336,32",
        },
        Family::V6 => FamilyTokens {
            ip: "ip6",
            digit: '6',
            kind: "ipv6_addr",
            loopback: "::1",
            multicast: "ff00::/8",
            ethertype: "0x86dd",
            tunnel: "ovx6",
            source: "@th,304,128",
        },
    }
}

impl ExpectedRuleset<'_> {
    /// The lines of both tables.
    pub fn lines(&self) -> BTreeSet<String> {
        let mut all = lines(&self.inet());
        all.extend(lines(BRIDGE_TABLE));
        all.extend(self.elements());
        all
    }

    fn publishes(&self) -> bool {
        self.endpoints.iter().any(|endpoint| !endpoint.published.is_empty())
    }

    fn inet(&self) -> String {
        let (vni, port, bridge) = (self.vni, self.port, format!("\"ovb.{}\"", self.vni));
        let each = |text: &dyn Fn(FamilyTokens, &str, Cidr) -> String| -> String {
            let families = self.subnet.iter().filter_map(|(family, own)| Some((family, self.pools.get(family)?, own)));
            let leased = |pool: &Pool| format!("{}-{}", pool.min.base(), pool.max.last());
            families.map(|(family, pool, own)| text(family_tokens(family), &leased(pool), own)).collect()
        };
        let mut text = "table inet overlayd {\n\tcounter encapsulation {\n\t}\n\tcounter tunnel {\n\t}\n".to_owned();
        text += &each(&|FamilyTokens { digit, kind, .. }, _, _| {
            format!(
                "\tset peers{digit} {{\n\t\ttype {kind} . {kind}\n\t}}\n\tset ranges{digit} {{\n\t\ttype {kind} . {kind}\n\t\tflags interval\n\t}}\n"
            )
        });
        text += &format!(
            "\tchain incoming {{\n\t\ttype filter hook prerouting priority raw; policy accept;\n\t\tudp dport {port} jump encapsulated\n"
        );
        if self.subnet.get(Family::V4).is_some() {
            text += &format!(
                "\t\tiifname != {bridge} accept
		ip daddr 127.0.0.0/8 counter name \"loopback\" drop
		ip saddr 127.0.0.0/8 counter name \"loopback\" drop
	}}
	counter loopback {{
"
            );
        }
        text += &format!("\t}}\n\tchain encapsulated {{\n\t\tiifname {bridge} counter name \"encapsulation\" drop\n");
        for (family, address) in self.local.iter().filter(|(family, _)| self.subnet.get(*family).is_some()) {
            text += &format!("\t\t{} daddr {address} notrack accept\n", family_tokens(family).ip);
        }
        text += &format!(
            "\t}}\n\tchain outgoing {{\n\t\ttype filter hook output priority raw; policy accept;\n\t\tudp dport {port} notrack\n\t}}\n"
        );
        text += "\tchain overlay {\n";
        text += &each(&|FamilyTokens { ip, .. }, leased, _| {
            format!("\t\t{ip} saddr {leased} accept\n\t\t{ip} daddr {leased} accept\n")
        });
        text += "\t}\n";
        text += "\tchain postrouting {\n\t\ttype nat hook postrouting priority srcnat; policy accept;\n";
        if self.publishes() {
            text += &each(&|FamilyTokens { ip, loopback, .. }, _, own| {
                let rule = |source: String| {
                    format!("\t\toifname {bridge} ct status dnat {ip} saddr {source} masquerade random,fully-random\n")
                };
                rule(own.to_string()) + &rule(loopback.to_owned())
            });
        }
        text += &each(&|FamilyTokens { ip, multicast, tunnel, .. }, leased, _| {
            format!(
                "\t\t{ip} saddr {leased} oifname != {bridge} oifname != \"{tunnel}.{vni}\" {ip} daddr != {leased} {ip} daddr != {multicast} masquerade random,fully-random
\t\toifname \"{tunnel}.{vni}\" {ip} saddr != {leased} masquerade random,fully-random\n"
            )
        });
        text += &format!(
            "\t}}\n\tchain tunnel {{
		type filter hook input priority raw; policy accept;
		udp dport {port} jump vxlan
	}}
	chain vxlan {{
		iifname {bridge} counter name \"encapsulation\" drop
		@th,96,24 != {vni:#x} return\n"
        );
        text += &each(&|FamilyTokens { ip, digit, ethertype, source, .. }, _, own| {
            let pass =
                |inner: String, set: &str| format!("\t\t@th,224,16 {ethertype} {ip} saddr . {inner} @{set}{digit} accept\n");
            pass(format!("{source}{}", mask(own)), "peers") + &pass(source.to_owned(), "ranges")
        });
        text += "\t\tcounter name \"tunnel\" drop\n\t}\n";
        if self.publishes() {
            text += &self.published(each);
        }
        text + "}\n"
    }

    fn published(&self, each: impl Fn(&dyn Fn(FamilyTokens, &str, Cidr) -> String) -> String) -> String {
        let mut text = each(&|FamilyTokens { digit, kind, .. }, _, _| {
            let map = |name, key: &str| {
                format!("\tmap {name}{digit} {{\n\t\ttype {key}inet_proto . inet_service : {kind} . inet_service\n\t}}\n")
            };
            map("bound", &format!("{kind} . ")) + &map("ports", "")
        });
        let bound = each(&|FamilyTokens { ip, digit, .. }, _, _| {
            format!("\t\tdnat {ip} to {ip} daddr . meta l4proto . th dport map @bound{digit}\n")
        });
        let any = each(&|FamilyTokens { ip, digit, .. }, _, _| {
            format!("\t\tfib daddr type local dnat {ip} to meta l4proto . th dport map @ports{digit}\n")
        });
        let loopback = if self.subnet.get(Family::V4).is_some() { "\t\tip daddr 127.0.0.0/8 accept\n" } else { "" };
        for (hook, priority, first) in [("prerouting", "dstnat", loopback), ("output", "-100", "")] {
            text += &format!(
                "\tchain {hook} {{\n\t\ttype nat hook {hook} priority {priority}; policy accept;\n{first}{bound}{any}\t}}\n"
            );
        }
        text
    }

    fn elements(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        let mut add = |table: &str, set: String, element: String| all.insert(format!("nft {table} {set}: {element}"));
        for (family, own) in self.subnet.iter() {
            let digit = family_tokens(family).digit;
            for peer in self.peers {
                let (Some(range), Some(address)) = (peer.subnet.and_then(|s| s.get(family)), peer.public_ip.get(family)) else {
                    continue;
                };
                if range.length() == own.length() {
                    add("inet", format!("peers{digit}"), format!("{address} . {}", range.base()));
                } else {
                    add("inet", format!("ranges{digit}"), format!("{address} . {range}"));
                }
            }
        }
        for endpoint in self.endpoints {
            let Some(port) = &endpoint.port else { continue };
            let from = format!("\"{}\"", port.host_interface);
            if !endpoint.source_check {
                add("bridge", "unchecked".to_owned(), from.clone());
            }
            for (family, address) in port.addresses.iter() {
                let digit = family_tokens(family).digit;
                let linklocal = (family == Family::V6).then(|| link_local(port.mac.0));
                for source in [Some(*address), linklocal].into_iter().flatten().filter(|_| endpoint.source_check) {
                    add("bridge", format!("source{digit}"), format!("{from} . {} . {source}", port.mac));
                }
                for PublishedPort { address: bound, host_port, container_port, count, protocol } in &endpoint.published {
                    if bound.is_some_and(|bound| Family::of(bound) != family) {
                        continue;
                    }
                    for n in 0..*count {
                        let (from, to) = (host_port + n, container_port + n);
                        let lead = format!("{protocol} . {from} : {address} . {to}");
                        match bound.filter(|bound| !bound.is_unspecified()) {
                            Some(bound) => add("inet", format!("bound{digit}"), format!("{bound} . {lead}")),
                            None => add("inet", format!("ports{digit}"), lead),
                        };
                    }
                }
            }
        }
        all
    }
}

/// How a subnet's part of an address is cut out of it; nothing where it is all of it.
fn mask(subnet: Cidr) -> String {
    let (bits, length) = (if subnet.family() == Family::V4 { 32 } else { 128 }, u32::from(subnet.length()));
    if length == bits {
        return String::new();
    }
    let host_part = (1u128 << (bits - length)) - 1;
    let whole = if bits == 32 { u128::from(u32::MAX) } else { u128::MAX };
    format!(" & {:#x}", whole & !host_part)
}

/// The address that the kernel makes of a MAC (RFC 4291, appendix A).
pub fn link_local(mac: [u8; 6]) -> IpAddr {
    let [a, b, c, d, e, f] = mac.map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f).into()
}

/// What `nft` prints of tables, as lines that can be compared whatever the order in which sets and chains were made.
fn lines(text: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let (mut table, mut block, mut body, mut elements) = (String::new(), String::new(), String::new(), None::<String>);
    for line in text.lines() {
        let bare = line.trim();
        if let Some(name) = line.strip_prefix("table ") {
            table = name.split_whitespace().next().unwrap_or_default().to_owned();
        } else if let Some(found) = &mut elements {
            *found += bare;
        } else if let Some(first) = bare.strip_prefix("elements = {") {
            elements = Some(first.to_owned());
        } else if line == "\t}" {
            all.insert(format!("nft {table} {block}{body}"));
        } else if line.starts_with("\t\t") {
            let _written = write!(body, "\n    {bare}");
        } else if let Some(name) = bare.strip_suffix(" {") {
            block = name.to_owned();
            body.clear();
        }
        if let Some(found) = elements.take_if(|found| found.ends_with('}')) {
            let set = block.split_whitespace().last().unwrap_or_default();
            all.extend(found.trim_end_matches('}').split(',').map(|element| format!("nft {table} {set}: {}", element.trim())));
        }
    }
    all
}

/// The table that looks at what containers send: the same on every host.
const BRIDGE_TABLE: &str = r#"table bridge overlayd {
	counter dhcp {
	}
	counter router {
	}
	counter source {
	}
	set source4 {
		type ifname . ether_addr . ipv4_addr
	}
	set source6 {
		type ifname . ether_addr . ipv6_addr
	}
	set unchecked {
		type ifname
	}
	chain advertisement {
		ip6 nexthdr != ipv6-icmp counter name "source" drop
		ip6 length 24 iifname . ether saddr . ip6 saddr @source6 iifname . ether saddr . @th,64,128 @source6 accept
		ip6 length 32 @th,192,8 0x2 iifname . ether saddr . ip6 saddr @source6 iifname . @th,208,48 . @th,64,128 @source6 accept
		counter name "source" drop
	}
	chain guard {
		type filter hook prerouting priority dstnat; policy accept;
		iifname != "ove*" accept
		meta protocol ip udp dport 68 counter name "dhcp" drop
		iifname . ether saddr . ip saddr @source4 accept
		meta l4proto ipv6-icmp jump nd
		meta protocol ip6 udp dport 546 counter name "dhcp" drop
		iifname . ether saddr . ip6 saddr @source6 accept
		iifname @unchecked accept
		iifname . ether saddr . arp saddr ip @source4 iifname . arp saddr ether . arp saddr ip @source4 accept
		counter name "source" drop
	}
	chain nd {
		@th,0,8 0x85 counter name "router" drop
		@th,0,8 0x86 counter name "router" drop
		@th,0,8 0x89 counter name "router" drop
		iifname @unchecked accept
		@th,0,8 0x8f ip6 saddr :: drop
		@th,0,8 0x87 jump solicitation
		@th,0,8 0x88 jump advertisement
	}
	chain solicitation {
		ip6 nexthdr != ipv6-icmp counter name "source" drop
		ip6 saddr :: iifname . ether saddr . @th,64,128 @source6 accept
		ip6 length 24 iifname . ether saddr . ip6 saddr @source6 accept
		ip6 length 32 @th,192,8 0x1 iifname . ether saddr . ip6 saddr @source6 iifname . @th,208,48 . ip6 saddr @source6 accept
		counter name "source" drop
	}
}
"#;
