//! Pure functions that compute kernel changes from the agent's inputs. No tokio, no I/O.
//!
//! [`desired`] computes desired kernel state, by the network's [`backend`], [`diff`] the changes to reach it, [`lease_table`] the
//! accepted leases, [`underlay`] the external interface, and [`mesh`] the schedule and the results of probes.

pub mod actual;
pub mod backend;
pub mod bulk;
pub mod contribution;
pub mod desired;
pub mod diff;
pub mod host_spec;
pub mod isolation;
pub mod lease_table;
pub mod mesh;
pub mod nexthop_ids;
pub mod ops;
pub mod ruleset;
pub mod shared;
pub mod state;
pub mod sysctls;
pub mod underlay;
pub mod union;

pub use ops::{
    ApplyReport, Batch, DataPath, Dump, HostPorts, HostSocket, KernelEvent, Op, OpError, PortDriver, PortSpec, SourceFilter,
};
pub use ruleset::Ruleset;
pub use state::{Key, LinkKind, LinkState, State, Value};
