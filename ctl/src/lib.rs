//! Library behind `overlayctl` and `overlay-cni`. The binaries are a few lines each, and the test suite uses the same code.
//!
//! | module | owns |
//! | --- | --- |
//! | [`bundle`] | the support archive |
//! | [`check`] | the diagnosis of this host |
//! | [`client`] | HTTP to the agent's socket |
//! | [`cmd`] | the commands, one file each: arguments and execution |
//! | [`cni`] | the CNI plugin |
//! | [`docker`] | dockerd's options and its configuration file |
//! | [`etcd`] | the flags for access to etcd without an agent |
//! | [`graph`] | the drawing of the overlay: text, SVG, DOT |
//! | [`lab`] | several hosts on one machine |
//! | [`netns`] | the named namespaces that `overlayctl attach` creates |
//! | [`output`] | output formats: table, wide, JSON, YAML |
//! | [`resolver`] | the resolver files of named namespaces |
//! | [`trace`] | the path of a packet, from kernel queries |
//! | [`verify`] | the proof that isolated networks do not reach each other |

pub mod bundle;
pub mod check;
pub mod client;
pub mod cmd;
pub mod cni;
pub mod docker;
pub mod etcd;
pub mod graph;
pub mod lab;
pub mod netns;
pub mod output;
pub mod resolver;
pub mod trace;
pub mod verify;
