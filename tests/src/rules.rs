//! The agent's tables in a host's kernel, as `nft` prints them: their text in one piece, each element of their sets as a line of its own.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use overlay_agent::model::api::SubnetEntry;
use overlay_agent::model::{Endpoint, Family, Mac, Subnet};
use overlayctl::lab::Lab;

use crate::kernel::{attempt, port, vni};
use crate::programs::needs;

/// What is in force: the tables without their elements, and the elements. An empty text for a table that is not there.
pub fn actual(lab: &Lab, target: &str) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for family in ["inet", "bridge"] {
        let (text, elements) = without_elements(&table(lab, target, family));
        all.insert(format!("nft {family}\n{text}"));
        all.extend(elements);
    }
    all
}

/// A table as `nft -s` prints it; empty where there is none.
pub fn table(lab: &Lab, target: &str, family: &str) -> String {
    needs("nft", "nftables");
    attempt(lab, target, &["nft", "-s", "list", "table", family, "overlayd"]).out
}

/// Takes the elements out of a table's text.
fn without_elements(table: &str) -> (String, Vec<String>) {
    let (mut text, mut elements, mut set, mut inside) = (String::new(), Vec::new(), "", false);
    for line in table.lines() {
        let words = line.trim();
        if let Some(name) = words.strip_suffix(" {").and_then(|w| w.strip_prefix("set ").or(w.strip_prefix("map "))) {
            set = name;
        }
        let listed = words.strip_prefix("elements = {");
        inside |= listed.is_some();
        if !inside {
            text += &format!("{line}\n");
            continue;
        }
        let list = listed.unwrap_or(words);
        for element in list.trim_end_matches('}').split(',').map(str::trim).filter(|element| !element.is_empty()) {
            elements.push(format!("element {set} {element}"));
        }
        inside = !list.ends_with('}');
    }
    (text, elements)
}

/// What a host has that publishes no port and masquerades, from the leases and its endpoints.
pub fn expected(lab: &Lab, own: &Subnet, peers: &[&SubnetEntry], endpoints: &[Endpoint]) -> BTreeSet<String> {
    let mut all = BTreeSet::from([format!("nft inet\n{}", inet(lab, own)), format!("nft bridge\n{BRIDGE}")]);
    for peer in peers {
        for (family, range) in peer.subnet.iter().flat_map(Subnet::iter) {
            let Some(host) = peer.public_ip.get(family) else { continue };
            // Ranges of the own subnet's size are found by their base, others by looking through intervals.
            let (set, inner) = if own.get(family).is_some_and(|own| own.length() == range.length()) {
                ("peers", range.base().to_string())
            } else {
                ("ranges", range.to_string())
            };
            all.insert(format!("element {set}{} {host} . {inner}", number(family)));
        }
    }
    for endpoint in endpoints {
        let Some(wire) = &endpoint.port else { continue };
        let interface = &wire.host_interface;
        if !endpoint.source_check {
            all.insert(format!("element unchecked \"{interface}\""));
            continue;
        }
        let own = wire.addresses.iter().map(|(_, address)| *address);
        let own = own.chain(wire.addresses.get(Family::V6).map(|_| link_local(wire.mac)));
        for address in own {
            let family = number(Family::of(address));
            all.insert(format!("element source{family} \"{interface}\" . {} . {address}", wire.mac));
        }
    }
    all
}

/// The digit in the names of a family's sets.
fn number(family: Family) -> u8 {
    if family == Family::V4 { 4 } else { 6 }
}

/// The link-local address that the kernel makes from a MAC (RFC 4291 appendix A).
fn link_local(mac: Mac) -> IpAddr {
    let [a, b, c, d, e, f] = mac.0;
    let two = |high, low| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, two(a ^ 2, b), two(c, 0xff), two(0xfe, d), two(e, f)).into()
}

/// A list of lines with the indentation that `nft` has.
fn block(head: &str, lines: &[String]) -> String {
    format!("\t{head} {{\n{}\t}}\n", lines.iter().map(|line| format!("\t\t{line}\n")).collect::<String>())
}

/// The table `inet overlayd` in golden text.
fn inet(lab: &Lab, own: &Subnet) -> String {
    let (networks, vni, port) = (&lab.layout().networks, vni(lab), port(lab));
    let families: Vec<Family> = networks.iter().map(|(family, _)| family).collect();
    let with_v4 = families.contains(&Family::V4);
    let mut blocks = Vec::new();
    for counter in ["encapsulation", "loopback", "tunnel"] {
        if counter != "loopback" || with_v4 {
            blocks.push(block(&format!("counter {counter}"), &[]));
        }
    }
    for (set, flags) in [("peers", None), ("ranges", Some("flags interval"))] {
        for family in &families {
            let number = number(*family);
            let mut lines = vec![format!("type ipv{number}_addr . ipv{number}_addr")];
            lines.extend(flags.map(str::to_owned));
            blocks.push(block(&format!("set {set}{number}"), &lines));
        }
    }
    let chain = |name: &str, hook: &str, lines: Vec<String>| {
        let head: Vec<String> = if hook.is_empty() { vec![] } else { vec![format!("type {hook}; policy accept;")] };
        block(&format!("chain {name}"), &[head, lines].concat())
    };
    let ip = |family: Family| if family == Family::V4 { "ip" } else { "ip6" };
    let mut forward = vec![format!("iifname \"ovb.{vni}\" udp dport {port} counter name \"encapsulation\" drop")];
    let mut postrouting = Vec::new();
    let mut vxlan =
        vec![format!("iifname \"ovb.{vni}\" counter name \"encapsulation\" drop"), format!("@th,96,24 != {vni:#x} return")];
    for (family, network) in networks.iter() {
        let ip = ip(family);
        forward.extend([format!("{ip} saddr {network} accept"), format!("{ip} daddr {network} accept")]);
        let (multicast, ethertype, source, bits) = match family {
            Family::V4 => ("224.0.0.0/4", "0x800", 336, 32),
            Family::V6 => ("ff00::/8", "0x86dd", 304, 128),
        };
        postrouting.push(format!(
            "{ip} saddr {network} oifname != \"ovb.{vni}\" {ip} daddr != {network} {ip} daddr != {multicast} masquerade random,fully-random"
        ));
        let length = own.get(family).map_or(bits, |own| usize::from(own.length()));
        let mask = "f".repeat(length / 4) + ["", "8", "c", "e"][length % 4];
        let mask = format!("0x{mask:0<width$}", width = bits / 4);
        let number = number(family);
        vxlan.push(format!("@th,224,16 {ethertype} {ip} saddr . @th,{source},{bits} & {mask} @peers{number} accept"));
        vxlan.push(format!("@th,224,16 {ethertype} {ip} saddr . @th,{source},{bits} @ranges{number} accept"));
    }
    vxlan.push("counter name \"tunnel\" drop".to_owned());
    blocks.push(chain("forward", "filter hook forward priority filter", forward));
    if with_v4 {
        let drop = |direction: &str| format!("iifname \"ovb.{vni}\" ip {direction} 127.0.0.0/8 counter name \"loopback\" drop");
        blocks.push(chain("loopback", "filter hook prerouting priority raw", vec![drop("daddr"), drop("saddr")]));
    }
    blocks.push(chain("postrouting", "nat hook postrouting priority srcnat", postrouting));
    blocks.push(chain("tunnel", "filter hook input priority raw", vec![format!("udp dport {port} jump vxlan")]));
    blocks.push(chain("vxlan", "", vxlan));
    format!("table inet overlayd {{\n{}}}\n", blocks.join("\n"))
}

/// The table `bridge overlayd` in golden text.
const BRIDGE: &str = r#"table bridge overlayd {
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
		meta l4proto ipv6-icmp jump nd
		udp dport 68 counter name "dhcp" drop
		udp dport 546 counter name "dhcp" drop
		iifname @unchecked accept
		iifname . ether saddr . ip saddr @source4 accept
		iifname . ether saddr . ip6 saddr @source6 accept
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
