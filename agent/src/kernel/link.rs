//! Our links: VXLAN devices and bridges are made, changed in place and removed, veth ports are changed. A link of the same name that is not ours
//! is never touched.

use std::net::IpAddr;

use super::ethtool::Ethtool;
use super::known::{Known, LINK_GROUP, is_marked};
use super::message::Message;
use super::request::{self, IFF_UP, LinkInfo, link_add, link_set};
use super::socket::{Refusal, RouteSocket};
use super::sysctl;
use super::uapi::*;
use crate::plan::OpError;
use crate::plan::state::{LINK_ALIAS, LinkKind, LinkState, Vxlan};

/// TTL of outer packets. The kernel's default is 1 for multicast and the route's for unicast; a number of our own spares us the host's setting.
/// 64 is the recommended default (RFC 1700).
const TTL: u8 = 64;

/// What link changes need.
pub struct Links<'a> {
    /// The socket of requests.
    pub socket: &'a mut RouteSocket,
    /// Offload settings.
    pub ethtool: &'a Ethtool,
    /// What is known; updated with what was done.
    pub known: &'a mut Known,
}

impl Links<'_> {
    /// Makes the link, or gives it this state. A VXLAN device whose fixed settings differ is made again.
    pub fn set(&mut self, name: &str, wanted: &LinkState) -> Result<(), OpError> {
        let result = self.set_steps(name, wanted);
        // What was reached counts as known, also where a step failed: its events are ours.
        let noted = self.note(name);
        result.and(noted)
    }

    fn set_steps(&mut self, name: &str, wanted: &LinkState) -> Result<(), OpError> {
        if let LinkKind::Foreign { .. } = wanted.kind {
            return Err(error(libc::EINVAL, format!("cannot make interface {name}: a foreign link is never wanted")));
        }
        let existing = match self.find(name)? {
            Some(link) => self.keep_or_remove(link, wanted)?,
            None => None,
        };
        let link = match existing {
            Some(link) => link,
            None => self.create(name, wanted)?,
        };
        self.mark(&link)?;
        if let LinkKind::Vxlan(vxlan) = &wanted.kind {
            self.change_vxlan(&link, vxlan)?;
        }
        self.change(&link, wanted)
    }

    /// Removes a link of ours. That it is gone already is success.
    pub fn delete(&mut self, name: &str) -> Result<(), OpError> {
        if let Some(link) = self.find(name)? {
            if !is_marked(&link) {
                return Err(foreign(&link));
            }
            match request::link_delete(self.socket, link.index) {
                Err(e) if e.errno != libc::ENODEV => return Err(e.during(format!("cannot delete interface {name}"))),
                _ => {}
            }
        }
        self.known.drop_link(name);
        Ok(())
    }

    /// Reads a link anew and notes it.
    pub fn note(&mut self, name: &str) -> Result<(), OpError> {
        match self.find(name)? {
            None => self.known.drop_link(name),
            Some(link) => {
                let ethtool = self.ethtool;
                if let Some(state) = self.known.link_state(&link, |name| ethtool.tx_checksum(name)) {
                    self.known.put_link(name, link.index, state);
                }
            }
        }
        Ok(())
    }

    fn find(&mut self, name: &str) -> Result<Option<LinkInfo>, OpError> {
        match request::link(self.socket, name) {
            Ok(link) => Ok(Some(link)),
            Err(e) if e.errno == libc::ENODEV => Ok(None),
            Err(e) => Err(e.during(format!("cannot examine interface {name}"))),
        }
    }

    /// The link that is there, if it can become the wanted one; one of ours that cannot is removed.
    fn keep_or_remove(&mut self, link: LinkInfo, wanted: &LinkState) -> Result<Option<LinkInfo>, OpError> {
        if !is_marked(&link) {
            return Err(foreign(&link));
        }
        let ethtool = self.ethtool;
        let current = self.known.link_state(&link, |name| ethtool.tx_checksum(name));
        let keep = match (current.map(|c| c.kind), &wanted.kind) {
            (Some(LinkKind::Vxlan(is)), LinkKind::Vxlan(wanted)) => is.changes_in_place(wanted),
            (Some(LinkKind::Bridge), LinkKind::Bridge) | (Some(LinkKind::Port), LinkKind::Port) => true,
            _ => false,
        };
        if keep {
            return Ok(Some(link));
        }
        self.delete(&link.name)?;
        Ok(None)
    }

    fn create(&mut self, name: &str, wanted: &LinkState) -> Result<LinkInfo, OpError> {
        let common = |m: &mut Message<'_>| {
            m.put_u32(IFLA_GROUP, LINK_GROUP);
            if let Some(mac) = wanted.mac {
                m.put(IFLA_ADDRESS, &mac.0);
            }
        };
        let made = match &wanted.kind {
            LinkKind::Vxlan(vxlan) => link_add(self.socket, name, "vxlan", common, |m| vxlan_data(m, vxlan)),
            LinkKind::Bridge => link_add(self.socket, name, "bridge", common, |m| {
                m.put_u32(IFLA_BR_STP_STATE, 0).put(IFLA_BR_MCAST_SNOOPING, &[0]);
            }),
            LinkKind::Port | LinkKind::Foreign { .. } => {
                return Err(error(
                    libc::ENODEV,
                    format!("interface {name} is gone: attach its container again, that makes a new pair"),
                ));
            }
        };
        match (made, &wanted.kind) {
            (Ok(()), _) => {}
            (Err(e), LinkKind::Vxlan(vxlan)) => return Err(self.vxlan_advice(name, vxlan, &e)),
            (Err(e), _) => return Err(e.during(format!("cannot make bridge {name}"))),
        }
        let link = request::link(self.socket, name).map_err(|e| e.during(format!("cannot find interface {name} just made")))?;
        // In force before the link is up for the first time.
        sysctl::write_if_there(&sysctl::accept_ra(name), "0")?;
        Ok(link)
    }

    /// Gives a link our alias, and takes from it what IPv6 would do by itself.
    fn mark(&mut self, link: &LinkInfo) -> Result<(), OpError> {
        if link.alias == LINK_ALIAS {
            return Ok(());
        }
        mark(self.socket, link.index, &link.name)
    }

    fn change_vxlan(&mut self, link: &LinkInfo, wanted: &Vxlan) -> Result<(), OpError> {
        let is = link.vxlan.clone().unwrap_or_default();
        if is.local != Some(wanted.local) || is.link != wanted.underlay {
            let changed = self.socket.request(libc::RTM_NEWLINK, 0, |m| {
                request::link_body(m, link.index, 0, 0);
                m.nest(IFLA_LINKINFO, |m| {
                    m.put_text(IFLA_INFO_KIND, "vxlan").nest(IFLA_INFO_DATA, |m| vxlan_way(m, wanted));
                });
            });
            changed.map_err(|e| self.vxlan_advice(&link.name, wanted, &e))?;
        }
        if self.ethtool.tx_checksum(&link.name) != wanted.tx_checksum {
            self.ethtool.set_tx_checksum(&link.name, wanted.tx_checksum)?;
        }
        Ok(())
    }

    /// MAC, MTU, bridge and state, as far as they differ.
    fn change(&mut self, link: &LinkInfo, wanted: &LinkState) -> Result<(), OpError> {
        let name = &link.name;
        let master = wanted.master.map_or(Ok(0), |bridge| {
            let gone = || error(libc::ENODEV, format!("cannot make {name} a port of {bridge}: the bridge is not there yet"));
            self.known.index(bridge).ok_or_else(gone)
        })?;
        let mac = wanted.mac.filter(|mac| link.mac != Some(*mac));
        let new_mtu = (link.mtu != wanted.mtu).then_some(wanted.mtu);
        let new_master = (link.master.unwrap_or(0) != master).then_some(master);
        let new_up = link.up() != wanted.up;
        if mac.is_none() && new_mtu.is_none() && new_master.is_none() && !new_up {
            return Ok(());
        }
        let (flags, mask) = if new_up { (if wanted.up { IFF_UP } else { 0 }, IFF_UP) } else { (0, 0) };
        let changed = link_set(self.socket, link.index, flags, mask, |m| {
            if let Some(mac) = mac {
                m.put(IFLA_ADDRESS, &mac.0);
            }
            if let Some(mtu) = new_mtu {
                m.put_u32(IFLA_MTU, mtu);
            }
            if let Some(master) = new_master {
                m.put_u32(IFLA_MASTER, master);
            }
        });
        changed.map_err(|e| change_advice(name, wanted, &e))
    }

    /// Who stands in the way of a VXLAN device.
    fn vxlan_advice(&mut self, name: &str, wanted: &Vxlan, refusal: &Refusal) -> OpError {
        let mut e = refusal.during(format!("cannot make VXLAN device {name}"));
        let remedy = match refusal.errno {
            libc::EEXIST => {
                let rival = request::links(self.socket).unwrap_or_default().into_iter().find(|l| {
                    l.name != name && l.vxlan.as_ref().is_some_and(|v| v.id == wanted.vni.get() && v.port == wanted.port)
                });
                let rival = rival.map_or_else(|| "another device".to_owned(), |l| format!("interface {}", l.name));
                format!(
                    "; VNI {} on UDP port {} is in use by {rival}: stop what made it (flanneld makes flannel.{}) and delete it, or choose another VNI or port",
                    wanted.vni, wanted.port, wanted.vni
                )
            }
            libc::EOPNOTSUPP => "; does the kernel have VXLAN? try: modprobe vxlan".to_owned(),
            libc::EAFNOSUPPORT => "; IPv6 is switched off in the kernel: switch it on or use IPv4".to_owned(),
            libc::ENODEV => format!("; the external interface (index {}) is gone", wanted.underlay),
            _ => String::new(),
        };
        e.message.push_str(&remedy);
        e
    }
}

/// Gives a link our alias, and takes from it what IPv6 would do by itself: a link-local address, router solicitations.
pub fn mark(socket: &mut RouteSocket, index: u32, name: &str) -> Result<(), OpError> {
    // Without IPv6 on the link (switched off, or an MTU below 1280) the kernel refuses the second part.
    let ipv6 = sysctl::read(&sysctl::accept_ra(name))?.is_some();
    let marked = link_set(socket, index, 0, 0, |m| {
        m.put_text(IFLA_IFALIAS, LINK_ALIAS);
        if ipv6 {
            request::no_link_local(m);
        }
    });
    marked.map_err(|e| e.during(format!("cannot mark interface {name}")))
}

/// The error for a link of our name that is not ours.
pub fn foreign(link: &LinkInfo) -> OpError {
    let LinkInfo { name, kind, .. } = link;
    let kind = if kind.is_empty() { "hardware" } else { kind };
    error(
        libc::EEXIST,
        format!(
            "interface {name} exists and is not ours (kind {kind}, no alias `{LINK_ALIAS}`): remove or rename it: ip link delete {name}"
        ),
    )
}

fn change_advice(name: &str, wanted: &LinkState, refusal: &Refusal) -> OpError {
    let mut e = refusal.during(format!("cannot change interface {name}"));
    let remedy = match (refusal.errno, &wanted.kind) {
        (libc::EADDRINUSE, LinkKind::Vxlan(v)) => {
            format!("; UDP port {} is taken by another program (ss -ulnp shows it): stop it or choose another port", v.port)
        }
        (libc::EINVAL, LinkKind::Vxlan(_)) => format!(
            "; is MTU {} more than the external interface's MTU allows? VXLAN needs 50 bytes over IPv4 and 70 over IPv6",
            wanted.mtu
        ),
        (libc::EADDRNOTAVAIL, _) => "; the MAC is no unicast address".to_owned(),
        _ => String::new(),
    };
    e.message.push_str(&remedy);
    e
}

fn error(errno: i32, message: String) -> OpError {
    OpError { errno, message }
}

fn vxlan_data(m: &mut Message<'_>, vxlan: &Vxlan) {
    m.put_u32(IFLA_VXLAN_ID, vxlan.vni.get()).put(IFLA_VXLAN_PORT, &vxlan.port.to_be_bytes());
    m.put(IFLA_VXLAN_LEARNING, &[u8::from(vxlan.learning)]).put(IFLA_VXLAN_TTL, &[TTL]);
    vxlan_way(m, vxlan);
}

fn vxlan_way(m: &mut Message<'_>, vxlan: &Vxlan) {
    m.put_u32(IFLA_VXLAN_LINK, vxlan.underlay);
    match vxlan.local {
        IpAddr::V4(a) => m.put(IFLA_VXLAN_LOCAL, &a.octets()),
        IpAddr::V6(a) => m.put(IFLA_VXLAN_LOCAL6, &a.octets()),
    };
}
