//! Resolver file of a named network namespace: `/etc/netns/NAME/resolv.conf`, which `ip netns exec` mounts on `/etc/resolv.conf`
//! (`ip-netns(8)`).
//!
//! Its first line marks it as managed, with the endpoint's name; a file without that line is foreign and stays unchanged. `/run`
//! is lost at a reboot and `/etc` is not, so a marker elsewhere would not work.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use overlay_agent::model::endpoint::EndpointName;
use overlay_agent::state::{FileError, write_atomic};

use crate::netns::NETNS_DIR;

/// Directory in which `ip netns exec` looks for the file.
const NETNS_CONFIG_DIR: &str = "/etc/netns";
/// Resolver file of the host.
const HOST_RESOLV_CONF: &str = "/etc/resolv.conf";
/// Files with the upstream resolvers, used if the host's file only names a stub on loopback: systemd-resolved's and
/// NetworkManager's.
const UPSTREAM_RESOLV_CONFS: [&str; 2] = ["/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"];
/// Maximum number of resolvers that the C library uses (`MAXNS` in `resolv.h`).
const MAX_NAMESERVERS: usize = 3;
/// Start of a managed file.
const MARKER: &str = "# Written by overlayctl for endpoint";
/// File mode: readable by everybody, like the host's.
const FILE_MODE: u32 = 0o644;

/// Contents of the resolver file; the host's values are the defaults.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ResolverArgs {
    /// Resolver for the container instead of the host's; up to three
    #[arg(long = "dns", value_name = "ADDRESS")]
    servers: Vec<IpAddr>,
    /// Search domain instead of the host's; `.` for none
    #[arg(long = "dns-search", value_name = "DOMAIN")]
    search: Vec<String>,
    /// Option of resolv.conf(5) instead of the host's
    #[arg(long = "dns-option", value_name = "OPTION")]
    options: Vec<String>,
}

/// Failure to write the resolver file.
#[derive(Debug, thiserror::Error)]
pub enum ResolverError {
    /// A foreign file exists.
    #[error(
        "{} exists and was not written for endpoint {endpoint}: remove it, or omit --dns, --dns-search and --dns-option to keep it",
        path.display()
    )]
    Foreign {
        /// Path of the file.
        path: PathBuf,
        /// Name of the endpoint.
        endpoint: EndpointName,
    },
    /// Error of the file system.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Contents of a resolver file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct ResolvConf {
    servers: Vec<IpAddr>,
    search: Vec<String>,
    options: Vec<String>,
    /// Resolvers that a container cannot reach, and invalid ones.
    unreachable: Vec<String>,
}

impl ResolverArgs {
    /// Whether any value is given.
    pub fn is_given(&self) -> bool {
        !(self.servers.is_empty() && self.search.is_empty() && self.options.is_empty())
    }

    /// Checks the values; the error is the message.
    pub fn validate(&self) -> Result<(), String> {
        if self.servers.len() > MAX_NAMESERVERS {
            return Err(format!("{} times --dns: the C library uses the first {MAX_NAMESERVERS} only", self.servers.len()));
        }
        let lists = [("--dns-search", &self.search), ("--dns-option", &self.options)];
        for (flag, word) in lists.iter().flat_map(|(flag, words)| words.iter().map(move |word| (flag, word))) {
            if word.is_empty() || word.chars().any(|c| c.is_whitespace() || c.is_control() || c == '#' || c == ';') {
                return Err(format!("{flag} `{}` is not one word", word.escape_debug()));
            }
        }
        Ok(())
    }

    fn merge_with_host(&self, host: &ResolvConf) -> ResolvConf {
        let own_or_host = |own: &[String], host: &[String]| if own.is_empty() { host.to_vec() } else { own.to_vec() };
        let own_servers = !self.servers.is_empty();
        ResolvConf {
            servers: if own_servers { self.servers.clone() } else { host.servers.clone() },
            search: own_or_host(&self.search, &host.search).into_iter().filter(|domain| domain != ".").collect(),
            options: own_or_host(&self.options, &host.options),
            unreachable: if own_servers { Vec::new() } else { host.unreachable.clone() },
        }
    }
}

impl ResolvConf {
    /// Parses a file as in resolv.conf(5). `domain` is an older word for `search`, and the last one applies.
    fn parse(text: &str) -> ResolvConf {
        let mut all = ResolvConf::default();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => match words.next().map(|word| (word, word.parse::<IpAddr>())) {
                    Some((_, Ok(server))) if !is_host_local(server) => all.servers.push(server),
                    // Loopback differs in each namespace; an address with a zone (`fe80::1%eth0`) needs an interface that the
                    // namespace lacks.
                    Some((word, _)) => all.unreachable.push(word.to_owned()),
                    None => {}
                },
                Some("search" | "domain") => all.search = words.map(str::to_owned).collect(),
                Some("options") => all.options.extend(words.map(str::to_owned)),
                _ => {}
            }
        }
        all.servers.truncate(MAX_NAMESERVERS);
        all
    }

    /// Reads the host's resolvers; replaces a stub on loopback by its upstream resolvers.
    fn from_host(read: impl Fn(&Path) -> io::Result<String>) -> ResolvConf {
        let host = ResolvConf::parse(&read(Path::new(HOST_RESOLV_CONF)).unwrap_or_default());
        if !host.servers.is_empty() || host.unreachable.is_empty() {
            return host;
        }
        let upstream =
            UPSTREAM_RESOLV_CONFS.iter().filter_map(|path| read(Path::new(path)).ok()).map(|text| ResolvConf::parse(&text));
        match upstream.into_iter().find(|text| !text.servers.is_empty()) {
            // The options next to the stub's address apply to the stub only.
            Some(upstream_conf) => ResolvConf {
                search: if upstream_conf.search.is_empty() { host.search } else { upstream_conf.search },
                ..upstream_conf
            },
            None => host,
        }
    }

    fn render(&self, endpoint: &EndpointName) -> String {
        let mut text = marker_line(endpoint);
        let servers = self.servers.iter().map(|server| format!("nameserver {server}\n"));
        text.extend(servers);
        for (word, values) in [("search", &self.search), ("options", &self.options)] {
            if !values.is_empty() {
                text.push_str(&format!("{word} {}\n", values.join(" ")));
            }
        }
        text
    }
}

/// Whether an address is local to the host: loopback, or unspecified, which resolvers treat as loopback.
fn is_host_local(server: IpAddr) -> bool {
    server.is_loopback() || server.is_unspecified() || matches!(server, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

/// Removes the managed files of all namespaces whose name starts with a prefix: those of a lab.
pub fn remove_managed(prefix: &str) -> Result<(), ResolverError> {
    for entry in fs::read_dir(NETNS_CONFIG_DIR).into_iter().flatten().flatten() {
        if !entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()) {
            continue;
        }
        let path = entry.path().join("resolv.conf");
        if !fs::read(&path).is_ok_and(|bytes| bytes.starts_with(MARKER.as_bytes())) {
            continue;
        }
        fs::remove_file(&path).map_err(|source| FileError::new("remove", &path, source))?;
        // Foreign files in the directory stay.
        let _ignored = fs::remove_dir(entry.path());
    }
    Ok(())
}

/// First line of a managed file.
fn marker_line(endpoint: &EndpointName) -> String {
    format!("{MARKER} {endpoint}, removed when it is detached; without this line it is left alone.\n")
}

/// Resolver file of a named namespace.
#[derive(Debug, Clone)]
pub struct ResolverFile {
    path: PathBuf,
    endpoint: EndpointName,
}

/// A written file; restored to its previous state on drop, unless kept.
#[derive(Debug)]
pub struct WriteGuard {
    file: ResolverFile,
    previous: Option<Vec<u8>>,
    kept: bool,
}

impl ResolverFile {
    /// Resolver file for a namespace's path; `None` without a name: nothing would read the file.
    pub fn for_namespace(netns: &Path, endpoint: &EndpointName) -> Option<ResolverFile> {
        let name = netns.strip_prefix(NETNS_DIR).ok().filter(|name| name.components().count() == 1)?;
        Some(ResolverFile { path: Path::new(NETNS_CONFIG_DIR).join(name).join("resolv.conf"), endpoint: endpoint.clone() })
    }

    /// Path of the file, if it exists.
    pub fn existing(&self) -> Option<&Path> {
        self.path.exists().then_some(&self.path)
    }

    /// Writes the file. A managed file of an existing namespace (`new_namespace` is false) comes from an earlier attach, and
    /// stays unless values are given. `None` if nothing was written.
    pub fn write(&self, args: &ResolverArgs, new_namespace: bool) -> Result<Option<WriteGuard>, ResolverError> {
        let previous = match fs::read(&self.path) {
            Ok(bytes) => Some(bytes),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(FileError::new("read", &self.path, source).into()),
        };
        match &previous {
            Some(bytes) if !bytes.starts_with(marker_line(&self.endpoint).as_bytes()) => {
                if args.is_given() {
                    return Err(ResolverError::Foreign { path: self.path.clone(), endpoint: self.endpoint.clone() });
                }
                return Ok(None);
            }
            Some(_) if !new_namespace && !args.is_given() => return Ok(None),
            _ => {}
        }
        let text = args.merge_with_host(&ResolvConf::from_host(|path| fs::read_to_string(path)));
        if text.servers.is_empty() && !text.unreachable.is_empty() {
            let unreachable = text.unreachable.join(", ");
            warn(&format!("the container can reach no resolver of this host ({unreachable}): set one with --dns"));
        }
        match self.write_atomically(text.render(&self.endpoint).as_bytes()) {
            Ok(()) => Ok(Some(WriteGuard { file: self.clone(), previous, kept: false })),
            // For example in a user namespace, where /etc is the machine's.
            Err(error) if !args.is_given() => {
                warn(&format!("the container has no resolver file of its own: {error}"));
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn write_atomically(&self, bytes: &[u8]) -> Result<(), FileError> {
        let directory = self.path.parent().unwrap_or(&self.path);
        fs::create_dir_all(directory).map_err(|source| FileError::new("make the directory", directory, source))?;
        let written = write_atomic(&self.path, bytes, FILE_MODE);
        if written.is_err() {
            self.remove_empty_dir();
        }
        written
    }

    /// Removes a managed file, and its directory if it is empty.
    pub fn remove(&self) -> Result<(), ResolverError> {
        let is_managed = fs::read(&self.path).is_ok_and(|bytes| bytes.starts_with(marker_line(&self.endpoint).as_bytes()));
        if is_managed && let Err(source) = fs::remove_file(&self.path) {
            return Err(FileError::new("remove", &self.path, source).into());
        }
        if is_managed {
            self.remove_empty_dir();
        }
        Ok(())
    }

    fn remove_empty_dir(&self) {
        // Foreign files in the directory stay.
        let _ignored = self.path.parent().map(fs::remove_dir);
    }
}

impl WriteGuard {
    /// Keeps the file.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for WriteGuard {
    fn drop(&mut self) {
        let restored = match &self.previous {
            _ if self.kept => return,
            Some(bytes) => self.file.write_atomically(bytes).map_err(ResolverError::from),
            None => self.file.remove(),
        };
        if let Err(error) = restored {
            warn(&error.to_string());
        }
    }
}

fn warn(text: &str) {
    // A closed standard error must not stop the command.
    let _ = writeln!(io::stderr(), "overlayctl: {text}");
}

#[cfg(test)]
mod tests;
