//! Tests over the real kernel, each in network namespaces that it makes itself. They need root.

mod container;
mod links;
mod monitor;
mod netns;
mod peers;
mod rtnl;
mod support;
