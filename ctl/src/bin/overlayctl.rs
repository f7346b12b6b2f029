//! `overlayctl`: how a person sees and steers the overlay.

use std::process::ExitCode;

use clap::Parser;
use overlayctl::cmd::{self, Cli};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("overlayctl: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(cmd::run(cli));
    // What still runs is a blocked read of standard input at most: nothing to wait for.
    runtime.shutdown_background();
    cmd::finish(result)
}
