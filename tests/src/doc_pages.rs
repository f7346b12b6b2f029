//! Runs a page's commands on [hosts](crate::doc_hosts) and compares the output with the page.
//!
//! [`crate::doc_page`] describes how a block states its run target.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::doc_hosts::DocHosts;
use crate::doc_page::{Block, RunMode, RunTarget, blocks, page_text};
use crate::output_match::matches;
use crate::{ExpectContext, eventually};

/// Time limit of one block.
const BLOCK_TIMEOUT: Duration = Duration::from_secs(120);

/// Time limit for the retries of a `soon` block.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads run modes and file names, and runs each file. The commands have no standard input, because the shell's input is the list
/// of files. A background block ends with its host; it is read first, because the page that ends removes its files.
const SHELL_LOOP: &str = r#"set -eu -o pipefail
while read -r __way __step; do
    case $__way in
    plain) . "$__step" </dev/null; __code=0 ;;
    on) __commands=$(<"$__step"); ( eval "$__commands" ) </dev/null & __code=0 ;;
    own) set +e; ( set -e; . "$__step" ) </dev/null; __code=$?; set -e ;;
    esac
    printf '\001%s %s\n' "$__step" "$__code"
done"#;

/// A page in progress.
#[derive(Debug)]
pub struct DocPage<'a> {
    name: String,
    hosts: &'a DocHosts,
    blocks: VecDeque<Block>,
    shells: BTreeMap<String, Shell>,
    scratch: tempfile::TempDir,
    blocks_run: usize,
}

#[derive(Debug)]
struct Shell {
    bash: Child,
    output: std::path::PathBuf,
}

impl<'a> DocPage<'a> {
    /// Opens a page, without the blocks of other scripts.
    pub fn open(name: &str, hosts: &'a DocHosts) -> DocPage<'a> {
        let all = blocks(&page_text(name)).unwrap_or_else(|error| panic!("{name}:{error}"));
        let blocks: VecDeque<Block> =
            all.into_iter().filter(|block| matches!(block.target, Some(RunTarget::Hosts { .. }))).collect();
        assert!(!blocks.is_empty(), "{name} has blocks `on` machines");
        let scratch = tempfile::tempdir().expect_ok("a directory");
        DocPage { name: name.to_owned(), hosts, blocks, shells: BTreeMap::new(), scratch, blocks_run: 0 }
    }

    /// The section of the next block; `None` at the end.
    pub fn next_section(&self) -> Option<&str> {
        self.blocks.front().map(|block| block.section.as_str())
    }

    /// Runs the blocks before a section.
    pub async fn run_until_section(&mut self, section: &str) {
        while self.next_section().expect_ok(&format!("a section `{section}`")) != section {
            self.run_block().await;
        }
    }

    /// Runs the remaining blocks.
    pub async fn run_to_end(mut self) {
        while self.next_section().is_some() {
            self.run_block().await;
        }
    }

    /// Runs the next block, on each of its machines.
    pub async fn run_block(&mut self) {
        let block = self.blocks.pop_front().expect_ok("a remaining block");
        let Some(RunTarget::Hosts { hosts: machines, mode }) = &block.target else { return };
        for machine in machines {
            let end = Instant::now() + RETRY_TIMEOUT;
            loop {
                let outcome = self.run_on_host(machine, &block, *mode).await;
                match outcome {
                    Ok(()) => break,
                    Err(_) if matches!(mode, RunMode::RetryUntilExit(_)) && Instant::now() < end => {
                        tokio::time::sleep(Duration::from_millis(200)).await
                    }
                    Err(error) => panic!("{}:{}: on {machine}:\n{}{error}", self.name, block.line, block.commands),
                }
            }
        }
    }

    /// Runs a block on one host; the error describes the difference from the page.
    async fn run_on_host(&mut self, host: &str, block: &Block, mode: RunMode) -> Result<(), String> {
        let file = self.scratch.path().join(format!("step-{}", self.blocks_run));
        self.blocks_run += 1;
        std::fs::write(&file, &block.commands).expect_ok("a file");
        let (mode_name, expected_code) = match mode {
            RunMode::Plain => ("plain", 0),
            RunMode::Background => ("on", 0),
            RunMode::ExpectExit(code) | RunMode::RetryUntilExit(code) => ("own", code),
        };
        let (machines, scratch) = (self.hosts, self.scratch.path());
        let shell = self.shells.entry(host.to_owned()).or_insert_with(|| Shell::start(machines, host, scratch));
        let before = shell.read_output().len();
        writeln!(shell.bash.stdin.as_mut().expect_ok("the shell's input"), "{mode_name} {}", file.display()).expect_ok("bash");
        let end_marker = format!("\u{1}{} ", file.display());
        let context = format!("{}:{} ends on {host}", self.name, block.line);
        let (output, code) = eventually(&context, BLOCK_TIMEOUT, || {
            let text = shell.read_output();
            let ended = shell.bash.try_wait().expect_ok("bash");
            match text[before..].split_once(&end_marker) {
                // Commands in the background may print after the mark.
                Some((output, rest)) if rest.contains('\n') => {
                    Ok((output.to_owned(), rest.lines().next().and_then(|code| code.parse::<i32>().ok())))
                }
                _ if ended.is_some() => Ok((text[before..].to_owned(), None)),
                _ => Err(text[before..].to_owned()),
            }
        })
        .await;
        if code != Some(expected_code) {
            let code = code.map_or_else(|| "a command that failed".to_owned(), |code| format!("exit code {code}"));
            return Err(format!("ends with {code} and prints\n{output}"));
        }
        match &block.expected_output {
            Some(expected) => matches(expected, &output)
                .map_err(|line| format!("the page shows\n{expected}but it prints\n{output}missing: {line}")),
            None => Ok(()),
        }
    }
}

impl Shell {
    fn start(hosts: &DocHosts, host: &str, scratch: &std::path::Path) -> Shell {
        let output = scratch.join(format!("{host}.output"));
        let file = std::fs::File::create(&output).expect_ok("a file");
        let mut command = hosts.command(host, "bash", &["-c", SHELL_LOOP]);
        command.stdin(Stdio::piped()).stderr(file.try_clone().expect_ok("the file")).stdout(file);
        Shell { bash: command.spawn().expect_ok("nsenter"), output }
    }

    fn read_output(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.output).expect_ok("what it printed")).into_owned()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // Its other processes end with the host.
        let _ended = self.bash.kill().and_then(|()| self.bash.wait());
    }
}
