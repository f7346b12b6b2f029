//! The agent of the overlay network, as a library.
//!
//! One agent per host leases a subnet from etcd, builds the host's bridge and VXLAN device and keeps one forwarding, neighbour,
//! next-hop and route entry per peer in the kernel. The floors, from the top; imports point down only:
//!
//! | floor | modules |
//! | --- | --- |
//! | wiring | [`app`] |
//! | middle (siblings do not import each other) | [`reconcile`], [`inject_store_fault`], [`fake_kernel`], [`endpoint`], [`admin`] |
//! | helpers of the middle floor | [`config`], [`state`], [`backoff`], [`allocator`], [`metrics`], [`telemetry`], [`shutdown`], [`systemd`] |
//! | pure | [`plan`], and below it [`model`] |

pub mod model;
pub mod plan;

pub mod admin;
pub mod allocator;
pub mod app;
pub mod backoff;
pub mod blocking;
pub mod config;
pub mod endpoint;
pub mod kernel;
pub mod metrics;
pub mod reconcile;
pub mod shutdown;
pub mod state;
pub mod store;
pub mod systemd;
pub mod telemetry;
