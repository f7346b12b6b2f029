//! What the parts of the kernel layer share: the sockets for requests, and the cache.

use super::batch::BatchSocket;
use super::cache::KernelCache;
use super::ethtool::Ethtool;
use super::link::Links;
use super::netns::Netns;
use super::nft::Nft;
use super::route_socket::RouteSocket;
use super::sysctl::Sysctls;

/// State shared by the data path, the port manager and the monitor; each locks it while it works. So the monitor processes an
/// event before or after one of our changes, never during it.
pub struct Shared {
    pub socket: RouteSocket,
    pub batch: BatchSocket,
    pub ethtool: Ethtool,
    pub nft: Nft,
    pub sysctls: Sysctls,
    pub netns: Netns,
    /// The host's namespace, if `netns` is a network's.
    pub host: Option<Netns>,
    pub cache: KernelCache,
}

impl Shared {
    /// The links, with what their changes need.
    pub fn links(&mut self) -> Links<'_> {
        let Shared { socket, ethtool, sysctls, netns, host, cache, .. } = self;
        Links { socket, ethtool, sysctls, netns, host: host.as_ref(), cache }
    }
}
