//! A page of the documentation as blocks of commands, each with where it is run.
//!
//! A block of commands is fenced with ```` ```sh ````. The comment right above it, which readers do not see, says where the block is run:
//!
//! - `<!-- on host-1 host-2 -->`: on these [machines](crate::machines), one after the other, by the story that runs the page ([`crate::pages`]).
//!   `, assert_code 3` behind it is the exit code that the block has to end with; `, soon` means that it is tried for half a minute, until it
//!   ends so and prints what the page shows; `, is_removed on` that it runs on while the blocks behind it are run.
//! - `<!-- as in tests/systemd.sh -->`: by that script, where this suite cannot: it has a line `documented PAGE "SECTION"`, and takes the commands from the
//!   page; or each of the block's lines stands in it, `sudo` before a command and a remark behind it aside.
//!
//! A block ```` ```text ```` right behind it is what it prints.

use std::path::{Path, PathBuf};

use crate::ExpectContext;

/// A block of commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The line of its fence.
    pub line: usize,
    /// The heading that it stands under; empty before the first one.
    pub section: String,
    /// Where it is run; `None` where nothing says so.
    pub target: Option<RunTarget>,
    /// The commands.
    pub commands: String,
    /// What the page says that they print.
    pub expected_output: Option<String>,
}

/// Where a block is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunTarget {
    /// On machines.
    Hosts {
        /// Their names.
        hosts: Vec<String>,
        /// How it is run there.
        mode: RunMode,
    },
    /// By a script, or a story that holds the same lines.
    Script(PathBuf),
}

/// How a block is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunMode {
    /// Once, in the machine's shell: variables and the directory stay.
    Plain,
    /// Once, in a shell of its own, which has to end with this code.
    ExpectExit(i32),
    /// Again and again, in a shell of its own, until it ends with this code and prints what is shown.
    RetryUntilExit(i32),
    /// In the background.
    Background,
}

/// The directory of the sources.
pub fn repo_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The pages: `README.md` and all of `docs`, as paths from the top.
pub fn page_paths() -> Vec<String> {
    let docs = std::fs::read_dir(repo_root().join("docs")).expect_ok("docs");
    let names = docs.map(|entry| entry.expect_ok("an entry").file_name().into_string().ok().expect_ok("UTF-8"));
    let mut pages: Vec<String> = names.filter(|name| name.ends_with(".md")).map(|name| format!("docs/{name}")).collect();
    pages.push("README.md".to_owned());
    pages.sort();
    pages
}

/// The text of a page.
pub fn page_text(page: &str) -> String {
    std::fs::read_to_string(repo_root().join(page)).expect_ok(page)
}

/// The blocks of commands of a page. What is wrong with its markers is told with the line.
pub fn blocks(page: &str) -> Result<Vec<Block>, String> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut section = String::new();
    let mut marker: Option<String> = None;
    // Whether the line before ended a block of commands.
    let mut behind = false;
    let mut lines = page.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some(heading) = line.strip_prefix("## ").or_else(|| line.strip_prefix("### ")) {
            section = heading.to_owned();
        }
        let Some(kind) = line.strip_prefix("```") else {
            if line.starts_with("    ") && !line.trim().is_empty() {
                return Err(format!("{}: an indented block: fence it, with ```sh where it is commands", number + 1));
            }
            marker = line.strip_prefix("<!-- ").and_then(|rest| rest.strip_suffix(" -->")).map(str::to_owned);
            behind = false;
            continue;
        };
        let text: String =
            lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").map(|l| format!("{l}\n")).collect();
        let commands = matches!(kind, "sh" | "bash" | "shell" | "console");
        match (kind, blocks.last_mut()) {
            ("text", Some(block)) if behind => block.expected_output = Some(text),
            _ if commands => {
                let place =
                    marker.as_deref().map(parse_target).transpose().map_err(|error| format!("{}: {error}", number + 1))?;
                let section = section.clone();
                blocks.push(Block { line: number + 1, section, target: place, commands: text, expected_output: None });
            }
            _ => {}
        }
        behind = commands;
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
    let way = match *words.as_slice() {
        [] => RunMode::Plain,
        ["goes on"] => RunMode::Background,
        ["soon"] => RunMode::RetryUntilExit(0),
        [one] => RunMode::ExpectExit(code(one).ok_or_else(unknown)?),
        [one, "soon"] => RunMode::RetryUntilExit(code(one).ok_or_else(unknown)?),
        _ => return Err(unknown()),
    };
    Ok(RunTarget::Hosts { hosts: machines.split(' ').map(str::to_owned).collect(), mode: way })
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
