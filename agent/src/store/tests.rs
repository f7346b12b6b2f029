//! Stories against a real etcd on loopback ports, and a model of the lease protocol that is searched through.

mod following;
mod harness;
mod history;
mod holding;
mod link;
mod model;
mod oneshot;
mod racing;
mod security;
mod stampede;
