//! `overlayctl man`: the manual pages, made from the command line itself.

use std::path::PathBuf;

use clap::CommandFactory;

use super::{Cli, CommandError, Context, Outcome};

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "overlayctl man | man -l -\noverlayctl man --dir /usr/local/share/man/man1")]
pub struct Args {
    /// Write a page for every command into this directory instead of printing the main page
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Prints the page, or writes all of them.
pub fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let command = Cli::command();
    match &args.dir {
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page).map_err(crate::output::OutputError::from)?;
            context.printer.raw(&page)?;
        }
        Some(dir) => {
            let error = |source| CommandError::Write { path: dir.clone(), source };
            std::fs::create_dir_all(dir).map_err(error)?;
            clap_mangen::generate_to(command, dir).map_err(error)?;
        }
    }
    Ok(Outcome::Well)
}
