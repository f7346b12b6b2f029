//! `overlay-cni`: the CNI plugin, run by a container runtime once for each verb.

use std::process::ExitCode;

fn main() -> ExitCode {
    overlayctl::cni::run()
}
