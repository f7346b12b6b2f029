//! What the parts of the kernel layer share: the sockets for single requests, and the cache.

use super::cache::KernelCache;
use super::ethtool::Ethtool;
use super::link::Links;
use super::nft::Nft;
use super::route_socket::RouteSocket;
use super::rtnl::Rtnl;
use super::sysctl::Ipv6ConfDir;

/// State shared by the data path, the port manager and the monitor; each locks it while it works. So the monitor processes an
/// event before or after one of our changes, never during it.
pub struct Shared {
    pub rtnl: Rtnl,
    pub socket: RouteSocket,
    pub ethtool: Ethtool,
    pub nft: Nft,
    pub ipv6_conf_dir: Ipv6ConfDir,
    pub cache: KernelCache,
}

impl Shared {
    /// The links, with what their changes need.
    pub fn links(&mut self) -> Links<'_> {
        Links { rtnl: &self.rtnl, socket: &mut self.socket, ethtool: &self.ethtool, cache: &mut self.cache }
    }
}
