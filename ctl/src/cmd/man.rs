//! `overlayctl man`: the manual pages, made from the command lines themselves.

use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_mangen::Man;

use super::{Cli, CommandError, Context, Outcome};

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "overlayctl man | man -l -\noverlayctl man --dir /usr/local/share/man")]
pub struct Args {
    /// Write a page for every command, and the agent's, below this directory (man1, man8) instead of printing the main page
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Prints the page, or writes all of them.
pub fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    let command = Cli::command();
    match &args.dir {
        None => {
            let mut page = Vec::new();
            Man::new(command).render(&mut page).map_err(crate::output::OutputError::from)?;
            context.printer.raw(&page)?;
        }
        Some(dir) => {
            write(dir, command).map_err(|source| CommandError::Write { path: dir.clone(), source })?;
        }
    }
    Ok(Outcome::Well)
}

fn write(dir: &Path, command: clap::Command) -> std::io::Result<()> {
    let (commands, daemons) = (dir.join("man1"), dir.join("man8"));
    std::fs::create_dir_all(&commands)?;
    std::fs::create_dir_all(&daemons)?;
    clap_mangen::generate_to(command, commands)?;
    // Its settings are many and short: one page holds them and the one subcommand.
    let mut page = Vec::new();
    Man::new(overlay_agent::config::command()).section("8").manual("System Administration").render(&mut page)?;
    std::fs::write(daemons.join("overlayd.8"), page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cmd::Cli;

    #[test]
    fn every_command_and_the_agent_have_a_page() {
        let dir = tempfile::tempdir().expect("a directory");
        write(dir.path(), Cli::command()).expect("pages");
        for (page, wanted) in [
            ("man1/overlayctl.1", "overlayctl\\-subnets(1)"),
            ("man1/overlayctl-subnets.1", "subnets"),
            ("man8/overlayd.8", "\\-\\-etcd\\-endpoints"),
        ] {
            let text = std::fs::read_to_string(dir.path().join(page)).expect(page);
            assert!(text.contains(wanted), "no {wanted} in {page}: {text}");
        }
    }
}
