//! Tests against a real etcd on loopback ports, and an exhaustive search of a lease protocol model.

mod contention;
mod harness;
mod history;
mod lease_keeping;
mod model;
mod networks;
mod oneshot;
mod proxy;
mod security;
mod several_networks;
mod thundering_herd;
mod watching;
