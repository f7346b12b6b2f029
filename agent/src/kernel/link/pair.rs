//! The veth pairs between an isolated network's namespace and another one.
//!
//! One side creates both ends; each side sets the alias of its own end and changes it. Both ends have our group from the start, so
//! that the other side knows its end as ours. The deletion of one end deletes the other.

use std::os::fd::{AsFd, AsRawFd};

use rtnetlink::LinkUnspec;

use super::{Links, build_with_defaults, foreign_link_error, is_own_link};
use crate::kernel::cache::LINK_GROUP;
use crate::kernel::netns::Netns;
use crate::kernel::objects::{self, LinkInfo};
use crate::kernel::route_socket::RouteSocket;
use crate::kernel::rtnl::veth;
use crate::plan::OpError;
use crate::plan::state::{LinkState, PairTarget};

/// The other end of a pair: its namespace, how messages name that, a socket there, and its name.
struct OtherEnd {
    netns: Netns,
    place: String,
    socket: RouteSocket,
    name: String,
}

impl OtherEnd {
    /// The link that has its name.
    fn find(&mut self) -> Result<Option<LinkInfo>, OpError> {
        match objects::link(&mut self.socket, &self.name) {
            Ok(link) => Ok(Some(link)),
            Err(e) if e.errno == libc::ENODEV => Ok(None),
            Err(e) => Err(self.error(e.context(format!("cannot examine interface {}", self.name)))),
        }
    }

    /// Names the namespace in an error.
    fn error(&self, error: OpError) -> OpError {
        OpError { message: format!("in {}: {}", self.place, error.message), ..error }
    }
}

impl Links<'_> {
    /// Creates a pair. A link of ours that has the other end's name is the end of an earlier pair, and is replaced.
    pub(super) fn create_pair(&mut self, name: &str, target: &PairTarget, wanted: &LinkState) -> Result<(), OpError> {
        let mut other = self.other_end(name, target)?;
        match other.find()? {
            Some(link) if !is_own_link(&link) => return Err(other.error(foreign_link_error(&link))),
            Some(link) => {
                let deleted = other.socket.delete_link(link.index);
                deleted.map_err(|e| other.error(e.context(format!("cannot delete interface {}", other.name))))?;
            }
            None => {}
        }
        let end = LinkUnspec::new_with_name(&other.name).setns_by_fd(other.netns.as_fd().as_raw_fd()).link_group(LINK_GROUP);
        let created = self.socket.add_link(build_with_defaults(veth(name, end.build()), wanted));
        created.map_err(|e| e.context(format!("cannot create veth pair {name} with {} in {}", other.name, other.place)))
    }

    /// Whether a link's other end is there.
    pub(super) fn leads_to(&mut self, link: &LinkInfo, target: &PairTarget) -> Result<bool, OpError> {
        let found = self.other_end(&link.name, target)?.find()?;
        Ok(found.is_some_and(|other| other.peer == Some(link.index) && link.peer == Some(other.index)))
    }

    fn other_end(&self, name: &str, target: &PairTarget) -> Result<OtherEnd, OpError> {
        let (netns, place, name) = match target {
            PairTarget::Host => {
                (self.host.unwrap_or(self.netns).clone(), "the host's network namespace".to_owned(), name.to_owned())
            }
            PairTarget::Namespace(other, device) => {
                let netns = Netns::named(other)
                    .map_err(|e| OpError { message: format!("cannot create veth pair {name}: {e}"), ..OpError::from(&e) })?;
                (netns, format!("network namespace {other}"), device.name())
            }
        };
        let socket = netns.route_socket()?;
        Ok(OtherEnd { netns, place, socket, name })
    }
}
