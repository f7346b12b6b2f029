//! Numbers of the kernel's interface that the `libc` crate does not have. The names are the kernel's.

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
/// `linux/netconf.h`: the setting of the whole namespace (-1).
pub const NETCONFA_IFINDEX_ALL: u32 = u32::MAX;
/// Multicast groups of `linux/rtnetlink.h`: link, neigh, IPv4 ifaddr and route, IPv6 ifaddr and route, IPv4 and IPv6 netconf, nexthop.
pub const RTNLGRP: [u32; 9] = [1, 3, 5, 7, 9, 11, 24, 25, 32];
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
/// `linux/rtnetlink.h`: the gateway is on link whatever the addresses say.
pub const RTNH_F_ONLINK: u32 = 4;
/// `linux/rtnetlink.h`.
pub const RT_TABLE_MAIN: u8 = 254;
/// `linux/rtnetlink.h`.
pub const RTN_UNICAST: u8 = 1;
/// `linux/rtnetlink.h`: to this host itself.
pub const RTN_LOCAL: u8 = 2;
/// `linux/rtnetlink.h`: routes from router advertisements.
pub const RTPROT_RA: u8 = 9;
/// `linux/rtnetlink.h`: set by whoever administers the host.
pub const RTPROT_STATIC: u8 = 4;
/// `linux/rtnetlink.h`: any scope, in a deletion.
pub const RT_SCOPE_NOWHERE: u8 = 255;
/// `linux/rtnetlink.h`: leave the counters out.
pub const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;

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

/// `linux/if_link.h`.
pub const IFLA_ADDRESS: u16 = 1;
/// `linux/if_link.h`.
pub const IFLA_IFNAME: u16 = 3;
/// `linux/if_link.h`.
pub const IFLA_MTU: u16 = 4;
/// `linux/if_link.h`: the other end of a veth pair, among others.
pub const IFLA_LINK: u16 = 5;
/// `linux/if_link.h`: the bridge of a port.
pub const IFLA_MASTER: u16 = 10;
/// `linux/if_link.h`.
pub const IFLA_LINKINFO: u16 = 18;
/// `linux/if_link.h`.
pub const IFLA_IFALIAS: u16 = 20;
/// `linux/if_link.h`.
pub const IFLA_AF_SPEC: u16 = 26;
/// `linux/if_link.h`.
pub const IFLA_GROUP: u16 = 27;
/// `linux/if_link.h`.
pub const IFLA_NET_NS_FD: u16 = 28;
/// `linux/if_link.h`.
pub const IFLA_EXT_MASK: u16 = 29;
/// `linux/if_link.h`, within [`IFLA_LINKINFO`].
pub const IFLA_INFO_KIND: u16 = 1;
/// `linux/if_link.h`, within [`IFLA_LINKINFO`].
pub const IFLA_INFO_DATA: u16 = 2;
/// `linux/if_link.h`, within IPv6's part of [`IFLA_AF_SPEC`].
pub const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// `linux/if_link.h`: the interface gets no link-local address by itself.
pub const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
/// `linux/veth.h`.
pub const VETH_INFO_PEER: u16 = 1;
/// `linux/if_link.h`.
pub const IFLA_BR_STP_STATE: u16 = 5;
/// `linux/if_link.h`.
pub const IFLA_BR_MCAST_SNOOPING: u16 = 23;
/// `linux/if_link.h`.
pub const IFLA_VXLAN_ID: u16 = 1;
/// `linux/if_link.h`: the underlay interface.
pub const IFLA_VXLAN_LINK: u16 = 3;
/// `linux/if_link.h`: the IPv4 source of outer packets.
pub const IFLA_VXLAN_LOCAL: u16 = 4;
/// `linux/if_link.h`: the TTL of outer packets.
pub const IFLA_VXLAN_TTL: u16 = 5;
/// `linux/if_link.h`.
pub const IFLA_VXLAN_LEARNING: u16 = 7;
/// `linux/if_link.h`: the destination port, in network byte order.
pub const IFLA_VXLAN_PORT: u16 = 15;
/// `linux/if_link.h`: the IPv6 source of outer packets.
pub const IFLA_VXLAN_LOCAL6: u16 = 17;

/// `linux/if_addr.h`.
pub const IFA_ADDRESS: u16 = 1;
/// `linux/if_addr.h`.
pub const IFA_LOCAL: u16 = 2;
/// `linux/if_addr.h`.
pub const IFA_FLAGS: u16 = 8;
/// `linux/if_addr.h`: no duplicate address detection.
pub const IFA_F_NODAD: u32 = 0x02;
/// `linux/if_addr.h`.
pub const IFA_F_DEPRECATED: u32 = 0x20;
/// `linux/if_addr.h`.
pub const IFA_F_PERMANENT: u32 = 0x80;
/// `linux/rtnetlink.h`.
pub const RT_SCOPE_UNIVERSE: u8 = 0;
/// `linux/rtnetlink.h`.
pub const RT_SCOPE_LINK: u8 = 253;

/// `linux/netlink.h`, in the flags of an answer: the text of the error follows as attributes.
pub const NLM_F_ACK_TLVS: u16 = 0x200;
/// `linux/netlink.h`: the request is not repeated in the answer.
pub const NLM_F_CAPPED: u16 = 0x100;
/// `linux/netlink.h`.
pub const NLMSGERR_ATTR_MSG: u16 = 1;
/// `linux/netlink.h`: what was dumped changed meanwhile.
pub const NLM_F_DUMP_INTR: u16 = 0x10;
