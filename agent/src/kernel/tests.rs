//! Tests against the real kernel. Each creates its own network namespaces. They need root.

mod container;
mod handle;
mod isolated;
mod isolated_cost;
mod links;
mod monitor;
mod netns;
mod peers;
mod rtnl;
mod support;
mod tables;
