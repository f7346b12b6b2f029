//! Runs the commands of a section of `docs/tutorial.md` and compares their output with the page.
//!
//! The blocks run in order in one bash. A block ```` ```sh ```` must succeed; a block ```` ```text ```` directly after it is its
//! complete output ([`crate::output_match`]). The page's subnets 10.244.N.0/24 stand for the lab's subnets, assigned in the order
//! of their first appearance.

use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;
use overlayctl::lab::process::TERM_GRACE;
use overlayctl::lab::{Lab, LabName};

use crate::output_match::matches;
use crate::programs::{CommandOutput, overlayctl, require_program};
use crate::test_lab::{lab_dir, prepare};
use crate::{ExpectContext, eventually};

/// The path of the page.
const PAGE_PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/tutorial.md");

/// The section whose commands run before those of every other section.
const PREREQUISITES_SECTION: &str = "Before you begin";

/// Time limit of one block; the longest one brings up two labs.
const BLOCK_TIMEOUT: Duration = Duration::from_secs(120);

/// Reads file names and runs each file, without standard input: the shell's input is the list of files.
const SHELL_LOOP: &str =
    r#"set -eu -o pipefail; while IFS= read -r step; do . "$step" </dev/null; printf '\001%s\n' "$step"; done"#;

/// A block of commands and its output on the page.
#[derive(Debug, Clone, PartialEq, Eq)]
struct TutorialBlock {
    commands: String,
    expected_output: Option<String>,
}

/// A section in progress.
#[derive(Debug)]
pub struct Tutorial {
    name: LabName,
    scratch: tempfile::TempDir,
    bash: Child,
    blocks: VecDeque<TutorialBlock>,
    /// The number of blocks run so far.
    blocks_run: usize,
    /// The page's subnets so far, and the lab's.
    subnets: (Vec<String>, Vec<String>),
}

impl Tutorial {
    /// Begins a section: runs the prerequisites first.
    pub async fn begin(section: &str) -> Tutorial {
        prepare();
        for (program, package) in [
            ("awk", "mawk"),
            ("bash", "bash"),
            ("bridge", "iproute2"),
            ("busybox", "busybox-static"),
            ("curl", "curl"),
            ("nft", "nftables"),
            ("ping", "iputils-ping"),
            ("ss", "iproute2"),
            ("sysctl", "procps"),
            ("tcpdump", "tcpdump"),
        ] {
            require_program(program, package);
        }
        let page = std::fs::read_to_string(PAGE_PATH).expect_ok(PAGE_PATH);
        let name = LabName::unique();
        let scratch = tempfile::tempdir().expect_ok("a directory");
        let output = std::fs::File::create(scratch.path().join("output")).expect_ok("a file");
        let mut bash = Command::new("bash");
        for (variable, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("OVERLAY")) {
            bash.env_remove(variable);
        }
        let own = overlayctl().parent().expect_ok("overlayctl's directory").to_path_buf();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths([own].into_iter().chain(std::env::split_paths(&path))).expect_ok("a search path");
        bash.args(["-c", SHELL_LOOP]).env("PATH", path).env("LC_ALL", "C.UTF-8").env("TMPDIR", scratch.path());
        bash.env("OVERLAY_LAB", name.to_string()).env("OVERLAY_LAB_DIR", lab_dir().base());
        bash.stdin(Stdio::piped()).stderr(output.try_clone().expect_ok("the file")).stdout(output);
        let bash = bash.spawn().expect_ok("bash");
        let steps = [PREREQUISITES_SECTION, section].into_iter().flat_map(|heading| section_blocks(&page, heading)).collect();
        let mut tutorial = Tutorial { name, scratch, bash, blocks: steps, blocks_run: 0, subnets: (Vec::new(), Vec::new()) };
        for _ in self::section_blocks(&page, PREREQUISITES_SECTION) {
            tutorial.run_block().await;
        }
        tutorial
    }

    /// The lab, once the section has brought it up.
    #[track_caller]
    pub fn lab(&self) -> Lab {
        Lab::open(&lab_dir(), &self.name).expect_ok("the section's lab")
    }

    /// The next commands; `None` at the end.
    pub fn next_commands(&self) -> Option<&str> {
        self.blocks.front().map(|step| step.commands.as_str())
    }

    /// Runs the next block; returns its output.
    pub async fn run_block(&mut self) -> String {
        let step = self.blocks.pop_front().expect_ok("a remaining block");
        let before = self.output();
        let file = self.scratch.path().join(format!("step-{}", self.blocks_run));
        std::fs::write(&file, &step.commands).expect_ok("a file");
        writeln!(self.bash.stdin.as_mut().expect_ok("the shell's input"), "{}", file.display()).expect_ok("bash");
        let end_marker = format!("\u{1}{}\n", file.display());
        let output = self.scratch.path().join("output");
        let bash = &mut self.bash;
        let output_text = eventually(&format!("these commands end:\n{}", step.commands), BLOCK_TIMEOUT, || {
            let text = read(&output);
            let ended = bash.try_wait().expect_ok("bash").is_some();
            match text.get(before.len()..).and_then(|new| new.split_once(&end_marker)) {
                Some((output_text, _)) => Ok(output_text.to_owned()),
                None if ended => panic!("one of these commands failed:\n{}\n{}", step.commands, &text[before.len()..]),
                None => Err(text[before.len()..].to_owned()),
            }
        })
        .await;
        self.blocks_run += 1;
        collect_subnets(&mut self.subnets.1, &output_text);
        if let Some(expected) = &step.expected_output {
            collect_subnets(&mut self.subnets.0, expected);
            let wanted = replace_subnets(expected, &self.subnets.0, &self.subnets.1);
            if let Err(line) = matches(&wanted, &output_text) {
                panic!("docs/tutorial.md shows\n{wanted}\nfor\n{}\nbut it prints\n{output_text}\nmissing: {line}", step.commands);
            }
        }
        output_text
    }

    /// Runs the blocks before the one that contains a text.
    pub async fn run_until(&mut self, text: &str) {
        while !self.next_commands().expect_ok(&format!("a block with `{text}`")).contains(text) {
            self.run_block().await;
        }
    }

    /// Runs the remaining blocks, and checks that the lab is completely removed.
    pub async fn run_to_end(mut self) {
        while self.next_commands().is_some() {
            self.run_block().await;
        }
        assert!(Lab::open(&lab_dir(), &self.name).is_err(), "the section takes its lab down");
        let prefix = overlayctl::lab::layout::prefix(&self.name);
        let leftovers: Vec<String> =
            Netns::list().expect_ok("the namespaces").into_iter().filter(|name| name.starts_with(&prefix)).collect();
        assert!(leftovers.is_empty(), "namespaces left behind: {leftovers:?}");
        eventually("no process is left behind", TERM_GRACE, || match self.processes() {
            left if left.is_empty() => Ok(()),
            left => Err(left.join(", ")),
        })
        .await;
    }

    /// The section's processes besides its shell, by their environment.
    fn processes(&self) -> Vec<String> {
        let own = format!("OVERLAY_LAB={}", self.name);
        let all = std::fs::read_dir("/proc").expect_ok("/proc").flatten().map(|entry| entry.path());
        // Those that end meanwhile have no files any more.
        let is_own = |path: &PathBuf| {
            let environment = std::fs::read(path.join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == own.as_bytes())
        };
        let others = all.filter(|path| !path.ends_with(self.bash.id().to_string())).filter(is_own);
        others.map(|path| format!("{} {:?}", path.display(), std::fs::read_link(path.join("exe")).unwrap_or_default())).collect()
    }

    fn output(&self) -> String {
        read(&self.scratch.path().join("output"))
    }
}

impl Drop for Tutorial {
    fn drop(&mut self) {
        let _ended = self.bash.kill().and_then(|()| self.bash.wait());
        if Lab::open(&lab_dir(), &self.name).is_ok() {
            // The leftovers of a failed section; its servers and captures end with their namespaces.
            let mut lab_down = Command::new(overlayctl());
            lab_down.args(["lab", "down", "--name", &self.name.to_string()]).env("OVERLAY_LAB_DIR", lab_dir().base());
            if let Ok(output) = lab_down.stdin(Stdio::null()).output() {
                let result = CommandOutput::from_output(&["overlayctl", "lab", "down"], &output);
                if result.code != Some(0) {
                    eprintln!("{}: {}", result.command, result.stderr);
                }
            }
        }
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).expect_ok(&path.display().to_string())).into_owned()
}

/// The headings of the page's sections, without the prerequisites.
pub fn sections() -> Vec<String> {
    let page = read(&PathBuf::from(PAGE_PATH));
    page.lines()
        .filter_map(|line| line.strip_prefix("## "))
        .filter(|name| *name != PREREQUISITES_SECTION)
        .map(str::to_owned)
        .collect()
}

/// The blocks of a section.
#[track_caller]
fn section_blocks(page: &str, heading: &str) -> Vec<TutorialBlock> {
    let section = page.split("\n## ").find_map(|part| part.strip_prefix(heading)?.strip_prefix('\n'));
    let mut found: Vec<TutorialBlock> = Vec::new();
    let mut lines = section.expect_ok(&format!("a section `{heading}` in {PAGE_PATH}")).lines();
    let mut adjacent = false;
    while let Some(line) = lines.next() {
        let Some(kind) = line.strip_prefix("```") else {
            adjacent = false;
            continue;
        };
        let text: String = lines.by_ref().take_while(|line| *line != "```").map(|line| format!("{line}\n")).collect();
        match (kind, found.last_mut()) {
            ("sh", _) => found.push(TutorialBlock { commands: text, expected_output: None }),
            ("text", Some(step)) if adjacent => step.expected_output = Some(text),
            _ => panic!("{heading}: a block `{kind}` is neither `sh` nor directly after one: {text}"),
        }
        adjacent = true;
    }
    assert!(!found.is_empty(), "section `{heading}` has commands");
    found
}

/// The subnets of the lab's network in a text: each `N` of `10.244.N.`, with the text before and after it.
fn split_at_subnets(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    const NETWORK: &str = "10.244.";
    text.split_inclusive(NETWORK).scan(false, |after, part| {
        let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number = (*after && digits > 0 && part[digits..].starts_with('.')).then(|| &part[..digits]);
        *after = part.ends_with(NETWORK);
        Some((if number.is_some() { &part[digits..] } else { part }, number))
    })
}

fn collect_subnets(known: &mut Vec<String>, text: &str) {
    // 10.244.0.0/16 is the network itself, and this range its leasable part.
    let text = text.replace("10.244.1.0-10.244.255.255", "");
    for number in split_at_subnets(&text).filter_map(|(_, number)| number).filter(|number| *number != "0") {
        if !known.iter().any(|k| k == number) {
            known.push(number.to_owned());
        }
    }
}

/// A text of the page with the lab's subnets instead of the page's.
fn replace_subnets(text: &str, page: &[String], lab: &[String]) -> String {
    let own = |number: &str| page.iter().position(|p| p == number).and_then(|i| lab.get(i)).cloned();
    split_at_subnets(text)
        .map(|(rest, number)| match number {
            Some(number) => own(number).unwrap_or_else(|| number.to_owned()) + rest,
            None => rest.to_owned(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn section_blocks_keep_their_output() {
        let page =
            "# P\n\n## A\n\n```sh\none\n```\n```text\nsays\n```\n\nwords\n\n```sh\ntwo\nthree\n```\n\n## B\n\n```sh\nfour\n```\n";
        let step = |commands: &str, expected_output: Option<&str>| TutorialBlock {
            commands: commands.to_owned(),
            expected_output: expected_output.map(str::to_owned),
        };
        assert_eq!(section_blocks(page, "A"), [step("one\n", Some("says\n")), step("two\nthree\n", None)]);
        assert_eq!(section_blocks(page, "B"), [step("four\n", None)]);
    }

    #[test]
    fn page_subnets_are_replaced_by_lab_subnets() {
        let page = "h1 10.244.7.0/24\nh2 10.244.9.0/24 of 10.244.0.0/16 by 10.244.7.1\n";
        let lab = "h1 10.244.200.0/24\nh2 10.244.7.0/24 of 10.244.0.0/16 by 10.244.200.1\n";
        let (mut known, mut found) = (Vec::new(), Vec::new());
        collect_subnets(&mut known, page);
        collect_subnets(&mut found, lab);
        assert_eq!((&known[..], &found[..]), (&["7", "9"].map(str::to_owned)[..], &["200", "7"].map(str::to_owned)[..]));
        assert_eq!(replace_subnets(page, &known, &found), lab);
    }
}
