//! The command line of the overlay network, as a library: the binaries are a few lines each and the test suite uses the same code.
//!
//! | module | owns |
//! | --- | --- |
//! | [`cmd`] | one file a command: its arguments and what it does |
//! | [`check`] | the doctor: what on this host stands in the way |
//! | [`bundle`] | the archive of support data |
//! | [`client`] | HTTP to the agent's socket |
//! | [`docker_share`] | dockerd's options, and its configuration file |
//! | [`etcd`] | the flags that reach etcd without an agent |
//! | [`path`] | the named namespaces that `attach_filter` makes |
//! | [`resolver`] | the resolver files of named namespaces |
//! | [`trace`] | the way of a packet, from the kernel's answers |
//! | [`wish`] | the flags that say what a container gets |
//! | [`run_command`] | table, wide, json, yaml |
//! | [`cni`] | the CNI plugin |
//! | [`graph`] | the overlay as a picture |
//! | [`start_lab`] | several hosts on one machine |

pub mod attach_args;
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
