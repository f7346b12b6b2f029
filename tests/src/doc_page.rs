//! Parses a documentation page into blocks of commands with their run targets.
//!
//! A block of commands is fenced with ```` ```sh ````. The HTML comment directly above it states where the block is run:
//!
//! - `<!-- on host-1 host-2 -->`: on these [hosts](crate::doc_hosts), in order, by the test that runs the page
//!   ([`crate::doc_pages`]). The suffix `, exits 3` is the expected exit code. `, soon` retries the block for half a minute,
//!   until it has this exit code and prints the page's output. `, goes on` runs the block in the background while later blocks
//!   run.
//! - `<!-- as in tests/systemd.sh -->`: by that script, because this suite cannot run it. Either the script has a line
//!   `documented PAGE "SECTION"` and takes the commands from the page, or it contains each of the block's lines, apart from
//!   `sudo` before a command and a comment after it.
//!
//! A block ```` ```text ```` directly after it is its output.

use std::path::{Path, PathBuf};

use crate::ExpectContext;

/// A block of commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The line of its fence.
    pub line: usize,
    /// The heading above it; empty before the first heading.
    pub section: String,
    /// The run target; `None` without a marker.
    pub target: Option<RunTarget>,
    /// The commands.
    pub commands: String,
    /// The output on the page.
    pub expected_output: Option<String>,
}

/// The run target of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunTarget {
    /// On hosts.
    Hosts {
        /// The names of the hosts.
        hosts: Vec<String>,
        /// The run mode.
        mode: RunMode,
    },
    /// By a script, or by a test with the same lines.
    Script(PathBuf),
}

/// The run mode of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunMode {
    /// Once, in the host's shell: variables and the directory stay.
    Plain,
    /// Once, in a separate shell, which must exit with this code.
    ExpectExit(i32),
    /// Repeatedly, in a separate shell, until it exits with this code and prints the page's output.
    RetryUntilExit(i32),
    /// In the background.
    Background,
}

/// The top directory of the repository.
pub fn repo_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The paths of the pages below the top directory: `README.md`, and all of `docs` and `docs/decisions`.
pub fn page_paths() -> Vec<String> {
    let mut pages = vec!["README.md".to_owned()];
    for directory in ["docs", "docs/decisions"] {
        let entries = std::fs::read_dir(repo_root().join(directory)).expect_ok(directory);
        let names = entries.map(|entry| entry.expect_ok("an entry").file_name().into_string().ok().expect_ok("UTF-8"));
        pages.extend(names.filter(|name| name.ends_with(".md")).map(|name| format!("{directory}/{name}")));
    }
    pages.sort();
    pages
}

/// The text of a page.
pub fn page_text(page: &str) -> String {
    std::fs::read_to_string(repo_root().join(page)).expect_ok(page)
}

/// The blocks of commands of a page. An error names the line of a wrong marker.
pub fn blocks(page: &str) -> Result<Vec<Block>, String> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut section = String::new();
    let mut marker: Option<String> = None;
    // Whether the previous line ended a block of commands.
    let mut after_commands = false;
    let mut lines = page.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some(heading) = line.strip_prefix("## ").or_else(|| line.strip_prefix("### ")) {
            section = heading.to_owned();
        }
        let Some(kind) = line.strip_prefix("```") else {
            if line.starts_with("    ") && !line.trim().is_empty() {
                return Err(format!("{}: an indented block: fence it, commands with ```sh", number + 1));
            }
            marker = line.strip_prefix("<!-- ").and_then(|rest| rest.strip_suffix(" -->")).map(str::to_owned);
            after_commands = false;
            continue;
        };
        let text: String =
            lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").map(|l| format!("{l}\n")).collect();
        let commands = matches!(kind, "sh" | "bash" | "shell" | "console");
        match (kind, blocks.last_mut()) {
            ("text", Some(block)) if after_commands => block.expected_output = Some(text),
            _ if commands => {
                let target =
                    marker.as_deref().map(parse_target).transpose().map_err(|error| format!("{}: {error}", number + 1))?;
                let section = section.clone();
                blocks.push(Block { line: number + 1, section, target, commands: text, expected_output: None });
            }
            _ => {}
        }
        after_commands = commands;
        marker = None;
    }
    Ok(blocks)
}

fn parse_target(marker: &str) -> Result<RunTarget, String> {
    if let Some(file) = marker.strip_prefix("as in ") {
        return Ok(RunTarget::Script(PathBuf::from(file)));
    }
    let unknown = || format!("`{marker}` is neither `on MACHINE...` nor `as in FILE`");
    let (machines, words) = marker.strip_prefix("on ").ok_or_else(unknown)?.split_once(", ").map_or_else(
        || (marker.strip_prefix("on ").unwrap_or_default(), Vec::new()),
        |(machines, words)| (machines, words.split(", ").collect()),
    );
    let code = |word: &str| word.strip_prefix("exits ").and_then(|code| code.parse::<i32>().ok());
    let mode = match *words.as_slice() {
        [] => RunMode::Plain,
        ["goes on"] => RunMode::Background,
        ["soon"] => RunMode::RetryUntilExit(0),
        [exit] => RunMode::ExpectExit(code(exit).ok_or_else(unknown)?),
        [exit, "soon"] => RunMode::RetryUntilExit(code(exit).ok_or_else(unknown)?),
        _ => return Err(unknown()),
    };
    Ok(RunTarget::Hosts { hosts: machines.split(' ').map(str::to_owned).collect(), mode })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_their_run_target() {
        let page = "# P\n\n<!-- on host-1 host-2, exits 3, soon -->\n```sh\none\n```\n```text\nsays\n```\n\n## S\n\n<!-- as in tests/x.sh -->\n```sh\ntwo\n```\n\n\
                    <!-- other: comment -->\n\n```sh\nthree\n```\n```toml\nno = 1\n```\n";
        let found = blocks(page).expect("good markers");
        let hosts = vec!["host-1".to_owned(), "host-2".to_owned()];
        let first = &found[0];
        assert_eq!((first.line, first.target.clone()), (4, Some(RunTarget::Hosts { hosts, mode: RunMode::RetryUntilExit(3) })));
        assert_eq!((first.commands.as_str(), first.expected_output.as_deref()), ("one\n", Some("says\n")));
        assert_eq!((found[1].section.as_str(), found[1].target.clone()), ("S", Some(RunTarget::Script("tests/x.sh".into()))));
        assert_eq!((found.len(), found[2].target.clone()), (3, None));
        for bad in
            ["<!-- by hand -->\n```sh\nx\n```\n", "<!-- on host-1, later -->\n```sh\nx\n```\n", "words\n\n    overlayctl mesh\n"]
        {
            assert!(blocks(bad).is_err(), "{bad}");
        }
    }
}
