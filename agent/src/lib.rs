//! The overlay network agent, as a library.
//!
//! One agent per host leases a subnet from etcd and creates the host's bridge and VXLAN device. It keeps one forwarding,
//! neighbour, next-hop and route entry per peer in the kernel. The layers, from the top; imports point down only:
//!
//! | layer | modules |
//! | --- | --- |
//! | wiring | [`app`] |
//! | middle (siblings do not import each other) | [`network`], [`reconcile`], [`store`], [`kernel`], [`endpoint`], [`admin`] |
//! | helpers | [`config`], [`state`], [`backoff`], [`allocator`], [`http`], [`metrics`], [`telemetry`], [`shutdown`], [`systemd`] |
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
pub mod http;
pub mod kernel;
pub mod metrics;
pub mod network;
pub mod reconcile;
pub mod shutdown;
pub mod state;
pub mod store;
pub mod systemd;
pub mod telemetry;
