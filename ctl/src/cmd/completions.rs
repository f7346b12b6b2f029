//! `overlayctl completions SHELL`: shell completions.

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Cli, CommandError, Context, Outcome};

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "overlayctl completions bash > /etc/bash_completion.d/overlayctl")]
pub struct Args {
    /// Shell to complete for
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the completions.
pub fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "overlayctl", &mut text);
    context.printer.write_raw(&text)?;
    Ok(Outcome::Ok)
}
