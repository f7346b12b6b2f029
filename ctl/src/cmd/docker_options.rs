//! `overlayctl docker-options`: the dockerd options that put its containers on the overlay.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use overlay_agent::model::api::NetworkKind;
use overlay_agent::model::{Family, NetworkName, PerFamily};
use overlay_agent::state::write_atomic;
use serde::Serialize;

use super::{CommandError, Context, Outcome};
use crate::docker::{DockerOptions, read_config};
use crate::output::{Style, View};

/// File mode of a new configuration file; it contains no secrets.
const DEFAULT_MODE: u32 = 0o644;

/// The arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "overlayctl docker-options --write /etc/docker/daemon.json && systemctl restart docker")]
pub struct Args {
    /// Network whose bridge Docker uses; a routed one [default: default]
    #[arg(long, value_name = "NAME")]
    network: Option<NetworkName>,
    /// Merge the options into this file, dockerd's configuration
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// Print the options as dockerd flags
    #[arg(long, conflicts_with = "write")]
    flags: bool,
}

/// Prints or writes the options.
pub async fn run(context: &Context, args: &Args) -> Result<Outcome, CommandError> {
    if let Some(name) = &args.network
        && context
            .client
            .networks()
            .await?
            .networks
            .iter()
            .any(|entry| entry.name == *name && entry.kind == NetworkKind::Isolated)
    {
        let message = format!(
            "network {name} is isolated: its bridge is in a network namespace of its own, where dockerd cannot use it; choose a \
             routed network"
        );
        return Err(CommandError::Usage { message });
    }
    let network = context.client.of_network(args.network.as_ref()).network().await?;
    let options = DockerOptions::from_network(&network)?;
    let subnets: PerFamily<_> = network.ipam.map(|_, ipam| ipam.subnet);
    if let (Some(subnet), None) = (subnets.get(Family::V6), options.fixed_cidr_v6) {
        eprintln!("overlayctl: Docker containers get no IPv6: {subnet} is longer than /80");
    }
    let Some(path) = &args.write else {
        if args.flags {
            context.printer.print_line(&options.flags())?;
        } else {
            context.printer.print(&OptionsView(&options))?;
        }
        return Ok(Outcome::Ok);
    };
    let changed = write(path, &options)?;
    context.printer.print(&WrittenView { file: path, changed, options: &options })?;
    Ok(Outcome::Ok)
}

/// Merges the options into the file atomically and keeps its mode. Returns whether the file changed.
fn write(path: &Path, options: &DockerOptions) -> Result<bool, CommandError> {
    let failed = |source: io::Error| CommandError::Write { path: path.to_owned(), source };
    // Replaces the target of a symbolic link and keeps the link.
    let target = match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::path::absolute(path).map_err(failed)?,
        other => other.map_err(failed)?,
    };
    let config = read_config(&target)?;
    let merged = options.merged(path, config.clone())?;
    if merged == config {
        return Ok(false);
    }
    let text = format!("{:#}\n", serde_json::Value::Object(merged));
    let mode = match std::fs::metadata(&target) {
        Ok(metadata) => metadata.permissions().mode() & 0o7777,
        Err(_) => DEFAULT_MODE,
    };
    if let Some(directory) = target.parent() {
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    write_atomic(&target, text.as_bytes(), mode).map_err(|error| failed(error.source))?;
    Ok(true)
}

#[derive(Serialize)]
#[serde(transparent)]
struct OptionsView<'a>(&'a DockerOptions);

impl View for OptionsView<'_> {
    fn text(&self, _style: Style, _wide: bool) -> String {
        format!("{:#}", serde_json::Value::Object(self.0.keys()))
    }
}

#[derive(Serialize)]
struct WrittenView<'a> {
    file: &'a Path,
    changed: bool,
    options: &'a DockerOptions,
}

impl View for WrittenView<'_> {
    fn text(&self, _style: Style, _wide: bool) -> String {
        let file = self.file.display();
        if self.changed {
            format!("{file}: written; restart dockerd to apply it: systemctl restart docker")
        } else {
            format!("{file}: unchanged")
        }
    }
}
