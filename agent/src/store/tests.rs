//! Stories against a real etcd on loopback ports.

mod following;
mod harness;
mod holding;
mod oneshot;
mod racing;
mod security;
