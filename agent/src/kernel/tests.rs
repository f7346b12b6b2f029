//! Tests against the real kernel. Each creates its own network namespaces. They need root.

mod container;
mod links;
mod monitor;
mod handle;
mod netns;
mod peers;
mod rtnl;
mod support;
