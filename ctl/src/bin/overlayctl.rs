//! `overlayctl`: command line of the overlay network.

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
    // Only a blocked read of standard input can still run: do not wait for it.
    runtime.shutdown_background();
    cmd::finish(result)
}
