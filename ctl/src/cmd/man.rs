//! `overlayctl man`: manual pages, generated from the command lines and from pages of the documentation.

mod markdown;

use std::path::{Path, PathBuf};

use clap_mangen::Man;

use super::{CommandError, Context, Outcome};
use markdown::PageMeta;

/// Documentation pages that are also manual pages.
const CONFIGURATION_MD: &str = include_str!("../../../docs/configuration.md");
const CNI_MD: &str = include_str!("../../../docs/cni.md");

const SETTINGS_PAGE: PageMeta = PageMeta {
    name: "overlayd.toml",
    section: "5",
    about: "settings of a host's agent, and the configuration of the overlay network",
    see_also: "overlayd(8), overlayctl(1), overlayctl-config(1)",
};

const PLUGIN_PAGE: PageMeta = PageMeta {
    name: "overlay-cni",
    section: "8",
    about: "CNI plugin that puts a runtime's containers on the overlay network",
    see_also: "overlayd(8), overlayctl-endpoints(1)",
};

/// Sections of overlayd(8) that its command line does not contain.
const AGENT_SECTIONS: &str = r"
.SH SIGNALS
.TP
\fBSIGTERM\fR, \fBSIGINT\fR
The agent ends; the data path forwards on. A second one ends it at once.
.TP
\fBSIGHUP\fR
Reads the settings again: the log level is taken up, other changes wait for the next start and are named in the log.
.SH FILES
.TP
\fI/etc/overlayd/overlayd.toml\fR
The settings, overlayd.toml(5).
.TP
\fI/etc/overlayd/credentials\fR
Files with secrets, which systemd hands to the service.
.TP
\fI/run/overlayd/overlayd.sock\fR
The socket that overlayctl(1) and overlay\-cni(8) speak to.
.TP
\fI/run/overlayd/subnet.env\fR
The leased subnet, for other tools.
.TP
\fI/var/lib/overlayd\fR
The host's identity, the MACs of its devices, its containers.
.SH SEE ALSO
overlayctl(1), overlayd.toml(5), overlay\-cni(8); the pages in /usr/share/doc/overlayd/docs
";

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "overlayctl man | man -l -\noverlayctl man --dir /usr/local/share/man")]
pub struct Args {
    /// Write the pages of all commands and of the agent to this directory (man1, man5, man8) instead of printing the main page
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Prints the main page, or writes all pages.
pub fn run(context: &Context, args: &Args, command: clap::Command) -> Result<Outcome, CommandError> {
    match &args.dir {
        None => {
            let mut page = Vec::new();
            Man::new(command).render(&mut page).map_err(crate::output::OutputError::from)?;
            context.printer.write_raw(&page)?;
        }
        Some(dir) => {
            write_pages(dir, command).map_err(|source| CommandError::Write { path: dir.clone(), source })?;
        }
    }
    Ok(Outcome::Ok)
}

/// Generates the programs' pages from their command lines, and the rest from the documentation's pages.
fn write_pages(dir: &Path, command: clap::Command) -> std::io::Result<()> {
    let [commands, files, daemons] = ["man1", "man5", "man8"].map(|section| dir.join(section));
    for section in [&commands, &files, &daemons] {
        std::fs::create_dir_all(section)?;
    }
    clap_mangen::generate_to(command, commands)?;
    let agent = overlay_agent::config::command();
    let cleanup = agent.find_subcommand("cleanup").cloned();
    for (name, command) in [("overlayd", Some(agent)), ("overlayd-cleanup", cleanup)] {
        let Some(command) = command else { continue };
        let mut page = Vec::new();
        let command = command.version(env!("CARGO_PKG_VERSION")).display_name(name).bin_name(name.replace('-', " "));
        Man::new(command).title(name).section("8").manual("System Administration").render(&mut page)?;
        if name == "overlayd" {
            page.extend_from_slice(AGENT_SECTIONS.as_bytes());
        }
        std::fs::write(daemons.join(format!("{name}.8")), page)?;
    }
    std::fs::write(files.join("overlayd.toml.5"), markdown::page(SETTINGS_PAGE, &CONFIGURATION_MD.replace("\n| `--", "\n| `")))?;
    std::fs::write(daemons.join("overlay-cni.8"), markdown::page(PLUGIN_PAGE, CNI_MD))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cmd::Cli;

    #[test]
    fn every_command_and_the_agent_have_a_page() {
        let dir = tempfile::tempdir().expect("a directory");
        write_pages(dir.path(), Cli::command()).expect("pages");
        for (page, wanted) in [
            ("man1/overlayctl.1", "overlayctl\\-subnets(1)"),
            ("man1/overlayctl-subnets.1", "subnets"),
            ("man8/overlayd.8", "\\-\\-etcd\\-endpoints"),
            ("man8/overlayd.8", ".SH SIGNALS"),
            ("man8/overlayd-cleanup.8", "overlayd cleanup"),
            ("man8/overlay-cni.8", "\\fBsourceCheck\\fR"),
            ("man5/overlayd.toml.5", "\n\\fBetcd\\-endpoints\\fR\n"),
            ("man5/overlayd.toml.5", "\n\\fBSubnetLen\\fR\n"),
        ] {
            let text = std::fs::read_to_string(dir.path().join(page)).expect(page);
            assert!(text.contains(wanted), "no {wanted} in {page}: {text}");
        }
    }
}
