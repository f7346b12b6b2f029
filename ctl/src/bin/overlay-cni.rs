//! `overlay-cni`: the CNI plugin. The container runtime runs it once per CNI verb.

use std::process::ExitCode;

fn main() -> ExitCode {
    overlayctl::cni::run()
}
