//! Pure functions from what is known to what the kernel should do. No tokio, no I/O: [`desired`] says what the kernel should hold,
//! [`diff`] what has to change, [`mesh`] which peer is probed next and what that says, [`roster`] which leases count, [`underlay`] which interface is the external one.

pub mod bulk;
pub mod contribution;
pub mod desired;
pub mod diff;
pub mod lease_table;
pub mod mesh;
pub mod nexthop_ids;
pub mod ops;
pub mod ruleset;
pub mod shared;
pub mod state;
pub mod underlay;
pub mod union;

pub use ops::{
    ApplyReport, Batch, DataPath, HostPorts, HostSocket, KernelEvent, Op, OpError, PortDriver, PortSpec, SourceFilter,
};
pub use ruleset::Ruleset;
pub use state::{Key, LinkKind, LinkState, State, Value};
