//! Stories against a real etcd on loopback ports, and a model of the lease protocol that is searched through.

mod contention;
mod harness;
mod history;
mod lease_keeping;
mod model;
mod oneshot;
mod proxy;
mod security;
mod thundering_herd;
mod watching;
