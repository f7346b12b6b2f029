//! `overlayctl completions SHELL`: shell completions.

use clap_complete::Shell;

use super::{CommandError, Context, Outcome};

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "overlayctl completions bash > /etc/bash_completion.d/overlayctl")]
pub struct Args {
    /// Shell to complete for
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the completions of the command line.
pub fn run(context: &Context, args: &Args, mut command: clap::Command) -> Result<Outcome, CommandError> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut command, "overlayctl", &mut text);
    context.printer.write_raw(&text)?;
    Ok(Outcome::Ok)
}
