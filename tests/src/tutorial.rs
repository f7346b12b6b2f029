//! `docs/tutorial.md` as a test: runs the commands of a section, block by block in one bash, and compares what they print with what the page shows.
//!
//! A block ```` ```sh ```` must end well; a block ```` ```text ```` right behind it is all that it printed ([`crate::shown`]). The page's subnets
//! 10.244.N.0/24 stand for those of the lab, in the order in which they first appear, each for one throughout.

use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;
use overlayctl::lab::{Lab, LabName};

use crate::programs::{Said, needs, overlayctl};
use crate::shown::matches;
use crate::story::{home, prepare};
use crate::{Must, eventually};

/// The page.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/tutorial.md");

/// The section whose commands come before each other one's.
const BEFORE: &str = "Before you begin";

/// How long a block may take; the longest brings two labs up.
const STEP: Duration = Duration::from_secs(120);

/// What reads the names of files, and runs each: with nothing to read, for the names are not for the commands.
const SHELL: &str = r#"set -eu -o pipefail; while IFS= read -r step; do . "$step" </dev/null; printf '\001%s\n' "$step"; done"#;

/// A block of commands and what the page says that they print.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    commands: String,
    shown: Option<String>,
}

/// A section that is being run.
#[derive(Debug)]
pub struct Tutorial {
    name: LabName,
    scratch: tempfile::TempDir,
    bash: Child,
    steps: VecDeque<Step>,
    /// How many steps were run.
    done: usize,
    /// The page's subnets so far, and the lab's.
    subnets: (Vec<String>, Vec<String>),
}

impl Tutorial {
    /// Begins a section: what comes before all of them is run.
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
            needs(program, package);
        }
        let page = std::fs::read_to_string(PAGE).must(PAGE);
        let name = LabName::unique();
        let scratch = tempfile::tempdir().must("a directory");
        let output = std::fs::File::create(scratch.path().join("output")).must("a file");
        let mut bash = Command::new("bash");
        for (variable, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("OVERLAY")) {
            bash.env_remove(variable);
        }
        let own = overlayctl().parent().must("its directory").to_path_buf();
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths([own].into_iter().chain(std::env::split_paths(&path))).must("a search path");
        bash.args(["-c", SHELL]).env("PATH", path).env("LC_ALL", "C.UTF-8").env("TMPDIR", scratch.path());
        bash.env("OVERLAY_LAB", name.to_string()).env("OVERLAY_LAB_DIR", home().base());
        bash.stdin(Stdio::piped()).stderr(output.try_clone().must("the file")).stdout(output);
        let bash = bash.spawn().must("bash");
        let steps = [BEFORE, section].into_iter().flat_map(|heading| steps(&page, heading)).collect();
        let mut tutorial = Tutorial { name, scratch, bash, steps, done: 0, subnets: (Vec::new(), Vec::new()) };
        for _ in self::steps(&page, BEFORE) {
            tutorial.step().await;
        }
        tutorial
    }

    /// The lab, once the section has brought it up.
    #[track_caller]
    pub fn lab(&self) -> Lab {
        Lab::open(&home(), &self.name).must("the section's lab")
    }

    /// The commands that come next; `None` at the end.
    pub fn next(&self) -> Option<&str> {
        self.steps.front().map(|step| step.commands.as_str())
    }

    /// Runs the next block. What it printed.
    pub async fn step(&mut self) -> String {
        let step = self.steps.pop_front().must("a block that is left");
        let before = self.output();
        let file = self.scratch.path().join(format!("step-{}", self.done));
        std::fs::write(&file, &step.commands).must("a file");
        writeln!(self.bash.stdin.as_mut().must("its input"), "{}", file.display()).must("bash");
        let mark = format!("\u{1}{}\n", file.display());
        let output = self.scratch.path().join("output");
        let bash = &mut self.bash;
        let printed = eventually(&format!("these commands end:\n{}", step.commands), STEP, || {
            let text = read(&output);
            let ended = bash.try_wait().must("bash").is_some();
            match text.get(before.len()..).and_then(|new| new.split_once(&mark)) {
                Some((printed, _)) => Ok(printed.to_owned()),
                None if ended => panic!("one of these commands ends badly:\n{}\n{}", step.commands, &text[before.len()..]),
                None => Err(text[before.len()..].to_owned()),
            }
        })
        .await;
        self.done += 1;
        note_subnets(&mut self.subnets.1, &printed);
        if let Some(shown) = &step.shown {
            note_subnets(&mut self.subnets.0, shown);
            let wanted = with_subnets(shown, &self.subnets.0, &self.subnets.1);
            if let Err(line) = matches(&wanted, &printed) {
                panic!("docs/tutorial.md shows\n{wanted}\nfor\n{}\nbut it prints\n{printed}\nmissing: {line}", step.commands);
            }
        }
        printed
    }

    /// Runs the blocks before the one that holds a text.
    pub async fn up_to(&mut self, text: &str) {
        while !self.next().must(&format!("a block with `{text}`")).contains(text) {
            self.step().await;
        }
    }

    /// Runs what is left; nothing of the lab is there afterwards.
    pub async fn to_the_end(mut self) {
        while self.next().is_some() {
            self.step().await;
        }
        assert!(Lab::open(&home(), &self.name).is_err(), "the section takes its lab down");
        let prefix = overlayctl::lab::layout::prefix(&self.name);
        let left: Vec<String> =
            Netns::list().must("the namespaces").into_iter().filter(|name| name.starts_with(&prefix)).collect();
        assert!(left.is_empty(), "it leaves {left:?}");
    }

    fn output(&self) -> String {
        read(&self.scratch.path().join("output"))
    }
}

impl Drop for Tutorial {
    fn drop(&mut self) {
        let _ended = self.bash.kill().and_then(|()| self.bash.wait());
        if Lab::open(&home(), &self.name).is_ok() {
            // What a section that failed leaves; servers and captures of it end with its namespaces.
            let mut down = Command::new(overlayctl());
            down.args(["lab", "down", "--name", &self.name.to_string()]).env("OVERLAY_LAB_DIR", home().base());
            if let Ok(output) = down.stdin(Stdio::null()).output() {
                let said = Said::of(&["overlayctl", "lab", "down"], &output);
                if said.code != Some(0) {
                    eprintln!("{}: {}", said.command, said.err);
                }
            }
        }
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).must(&path.display().to_string())).into_owned()
}

/// The headings of the page's sections but the one that comes before all.
pub fn sections() -> Vec<String> {
    let page = read(&PathBuf::from(PAGE));
    page.lines().filter_map(|line| line.strip_prefix("## ")).filter(|name| *name != BEFORE).map(str::to_owned).collect()
}

/// The blocks of a section.
#[track_caller]
fn steps(page: &str, heading: &str) -> Vec<Step> {
    let section = page.split("\n## ").find_map(|part| part.strip_prefix(heading)?.strip_prefix('\n'));
    let mut found: Vec<Step> = Vec::new();
    let mut lines = section.must(&format!("a section `{heading}` in {PAGE}")).lines();
    let mut adjacent = false;
    while let Some(line) = lines.next() {
        let Some(kind) = line.strip_prefix("```") else {
            adjacent = false;
            continue;
        };
        let text: String = lines.by_ref().take_while(|line| *line != "```").map(|line| format!("{line}\n")).collect();
        match (kind, found.last_mut()) {
            ("sh", _) => found.push(Step { commands: text, shown: None }),
            ("text", Some(step)) if adjacent => step.shown = Some(text),
            _ => panic!("{heading}: a block `{kind}` that is neither `sh` nor right behind one: {text}"),
        }
        adjacent = true;
    }
    assert!(!found.is_empty(), "section `{heading}` has commands");
    found
}

/// The subnets of the lab's network in a text: each `N` of `10.244.N.`, with what stands before and behind it.
fn pieces(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    const NETWORK: &str = "10.244.";
    text.split_inclusive(NETWORK).scan(false, |after, part| {
        let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number = (*after && digits > 0 && part[digits..].starts_with('.')).then(|| &part[..digits]);
        *after = part.ends_with(NETWORK);
        Some((if number.is_some() { &part[digits..] } else { part }, number))
    })
}

fn note_subnets(known: &mut Vec<String>, text: &str) {
    // 10.244.0.0/16 is the network itself, and this range what of it is leased.
    let text = text.replace("10.244.1.0-10.244.255.255", "");
    for number in pieces(&text).filter_map(|(_, number)| number).filter(|number| *number != "0") {
        if !known.iter().any(|k| k == number) {
            known.push(number.to_owned());
        }
    }
}

/// A text of the page with the lab's subnets in place of its own.
fn with_subnets(text: &str, page: &[String], lab: &[String]) -> String {
    let own = |number: &str| page.iter().position(|p| p == number).and_then(|i| lab.get(i)).cloned();
    pieces(text)
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
    fn blocks_of_a_section() {
        let page =
            "# P\n\n## A\n\n```sh\none\n```\n```text\nsays\n```\n\nwords\n\n```sh\ntwo\nthree\n```\n\n## B\n\n```sh\nfour\n```\n";
        let step = |commands: &str, shown: Option<&str>| Step { commands: commands.to_owned(), shown: shown.map(str::to_owned) };
        assert_eq!(steps(page, "A"), [step("one\n", Some("says\n")), step("two\nthree\n", None)]);
        assert_eq!(steps(page, "B"), [step("four\n", None)]);
    }

    #[test]
    fn subnets_stand_for_others() {
        let page = "h1 10.244.7.0/24\nh2 10.244.9.0/24 of 10.244.0.0/16 by 10.244.7.1\n";
        let lab = "h1 10.244.200.0/24\nh2 10.244.7.0/24 of 10.244.0.0/16 by 10.244.200.1\n";
        let (mut known, mut found) = (Vec::new(), Vec::new());
        note_subnets(&mut known, page);
        note_subnets(&mut found, lab);
        assert_eq!((&known[..], &found[..]), (&["7", "9"].map(str::to_owned)[..], &["200", "7"].map(str::to_owned)[..]));
        assert_eq!(with_subnets(page, &known, &found), lab);
    }
}
