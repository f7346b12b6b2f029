//! Constants of the kernel's UAPI that the `libc` crate lacks, under the kernel's names.

/// `linux/rtnetlink.h`.
pub const RTM_NEWNEXTHOP: u16 = 104;
/// `linux/rtnetlink.h`.
pub const RTM_DELNEXTHOP: u16 = 105;
/// `linux/rtnetlink.h`.
pub const RTM_GETNEXTHOP: u16 = 106;
/// `linux/rtnetlink.h`.
pub const RTM_NEWNETCONF: u16 = 80;
/// `linux/netconf.h`.
pub const NETCONFA_IFINDEX: u16 = 1;
/// `linux/netconf.h`.
pub const NETCONFA_FORWARDING: u16 = 2;
/// `linux/netconf.h`.
pub const NETCONFA_RP_FILTER: u16 = 3;
/// `linux/netconf.h`: `proxy_arp` or `proxy_ndp`.
pub const NETCONFA_PROXY_NEIGH: u16 = 5;
/// `linux/netconf.h`: the setting of the whole namespace (-1).
pub const NETCONFA_IFINDEX_ALL: u32 = u32::MAX;
/// Multicast groups of `linux/rtnetlink.h`: link, neigh, IPv4 ifaddr and route, IPv6 ifaddr and route, IPv4 and IPv6 netconf,
/// nexthop.
pub const MONITORED_GROUPS: [u32; 9] = [1, 3, 5, 7, 9, 11, 24, 25, 32];
/// Those of them that carry peers' entries: neigh, IPv4 and IPv6 route, nexthop.
pub const PEER_ENTRY_GROUPS: [u32; 4] = [3, 7, 11, 32];
/// `linux/rtnetlink.h`.
pub const RTA_DST: u16 = 1;
/// `linux/rtnetlink.h`: output interface.
pub const RTA_OIF: u16 = 4;
/// `linux/rtnetlink.h`.
pub const RTA_GATEWAY: u16 = 5;
/// `linux/rtnetlink.h`: metric.
pub const RTA_PRIORITY: u16 = 6;
/// `linux/rtnetlink.h`.
pub const RTA_MULTIPATH: u16 = 9;
/// `linux/rtnetlink.h`.
pub const RTA_TABLE: u16 = 15;
/// `linux/rtnetlink.h`: id of a next-hop object.
pub const RTA_NH_ID: u16 = 30;
/// `linux/rtnetlink.h`: the gateway is on link, regardless of the addresses.
pub const RTNH_F_ONLINK: u32 = 4;
/// `linux/rtnetlink.h`.
pub const RT_TABLE_MAIN: u8 = 254;
/// `linux/rtnetlink.h`.
pub const RTN_UNICAST: u8 = 1;
pub const RTN_LOCAL: u8 = 2;
pub const RTN_UNREACHABLE: u8 = 7;
/// `linux/rtnetlink.h`: any scope, in a deletion.
pub const RT_SCOPE_NOWHERE: u8 = 255;

/// `linux/neighbour.h`: the address that is mapped.
pub const NDA_DST: u16 = 1;
/// `linux/neighbour.h`.
pub const NDA_LLADDR: u16 = 2;
/// `linux/neighbour.h`: in an FDB entry, another UDP port than the device's.
pub const NDA_PORT: u16 = 6;
/// `linux/neighbour.h`: in an FDB entry, another VNI than the device's.
pub const NDA_VNI: u16 = 7;
/// `linux/neighbour.h`: filter of a dump.
pub const NDA_IFINDEX: u16 = 8;
/// `linux/neighbour.h`.
pub const NDA_PROTOCOL: u16 = 12;
/// `linux/neighbour.h`.
pub const NUD_PERMANENT: u16 = 0x80;
/// `linux/neighbour.h`: the entry is the device's own, not its bridge's.
pub const NTF_SELF: u8 = 0x02;

/// `linux/nexthop.h`.
pub const NHA_ID: u16 = 1;
/// `linux/nexthop.h`.
pub const NHA_OIF: u16 = 5;
/// `linux/nexthop.h`.
pub const NHA_GATEWAY: u16 = 6;

/// `linux/rtnetlink.h`.
pub const RT_SCOPE_UNIVERSE: u8 = 0;
pub const RT_SCOPE_HOST: u8 = 254;

/// `linux/if_link.h`: the array of an interface's settings.
pub const IFLA_INET6_CONF: u16 = 2;
/// `linux/ipv6.h`: indices in that array.
pub const DEVCONF_FORWARDING: usize = 0;
pub const DEVCONF_ACCEPT_RA: usize = 3;
pub const DEVCONF_DISABLE_IPV6: usize = 26;

/// `linux/netlink.h`.
pub const NLMSGERR_ATTR_MSG: u16 = 1;
