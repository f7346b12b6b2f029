//! Every command of the pages: our programs accept it, and a test runs it.

use std::collections::BTreeSet;
use std::fs;

use clap::{Command, CommandFactory};
use overlay_tests::doc_page::{self, Block, RunTarget};
use overlay_tests::shell;
use overlayctl::cmd::Cli;

/// The page whose sections the `tutorial_*` tests run.
const TUTORIAL: &str = "docs/tutorial.md";

/// A placeholder for omitted words.
const PLACEHOLDER: &str = "...";

fn blocks(page: &str) -> Vec<Block> {
    doc_page::blocks(&doc_page::page_text(page)).unwrap_or_else(|error| panic!("{page}:{error}"))
}

/// The error of one of our command lines; `None` for a valid one, or another program's.
fn command_error(words: &[String]) -> Option<String> {
    let program = words.first()?.rsplit('/').next()?;
    // A function's arguments are unknown here.
    if words.iter().any(|word| word.starts_with("$1") || word.starts_with("$2")) {
        return inline_command_error(&words.iter().map(String::as_str).collect::<Vec<_>>());
    }
    let parse = |command: Command, words: &[String]| match command.try_get_matches_from(words) {
        Err(error) if error.use_stderr() => Some(error.to_string()),
        _ => None,
    };
    match program {
        "overlayctl" => {
            // The inner command is a command line of its own.
            let inner = words.iter().position(|word| word == "--").and_then(|at| command_error(&words[at + 1..]));
            inner.or_else(|| parse(Cli::command(), words))
        }
        "overlayd" => parse(overlay_agent::config::command(), words),
        "overlay-cni" => (!matches!(words[1..], [ref one] if ["--version", "--help"].contains(&one.as_str())))
            .then(|| "it has no such argument".to_owned()),
        "cargo" if words.get(1).is_some_and(|word| word == "test") => {
            let target = words.iter().position(|word| word == "--test").and_then(|at| words.get(at + 1))?;
            let targets = fs::read_to_string(doc_page::repo_root().join("tests/Cargo.toml")).expect("tests/Cargo.toml");
            (!targets.contains(&format!("[[test]]\nname = \"{target}\""))).then(|| format!("no test {target}"))
        }
        _ => None,
    }
}

#[test]
fn documented_command_lines_parse() {
    let mut count = 0;
    let mut errors = Vec::new();
    for page in doc_page::page_paths() {
        for block in blocks(&page) {
            for words in shell::commands(&block.commands) {
                count += usize::from(words[0].starts_with("overlay"));
                if let Some(error) = command_error(&words) {
                    errors.push(format!("{page}:{}: {}: {error}", block.line, words.join(" ")));
                }
            }
        }
    }
    assert!(errors.is_empty(), "{}", errors.join("\n"));
    assert!(count > 100, "{count} command lines");
}

/// The error of one of our command lines within a sentence. It may lack arguments, and capital words stand for values.
fn inline_command_error(words: &[&str]) -> Option<String> {
    let mut command = match words.first()?.rsplit('/').next()? {
        "overlayctl" => Cli::command(),
        "overlayd" => overlay_agent::config::command(),
        _ => return None,
    };
    let mut flags: BTreeSet<String> = ["help", "version"].map(str::to_owned).into();
    let mut add_flags = |command: &Command| flags.extend(command.get_arguments().filter_map(|a| a.get_long()).map(str::to_owned));
    add_flags(&command);
    let mut at = 1;
    // Options may precede the subcommand.
    while let Some(word) = words.get(at) {
        if let Some(subcommand) = command.find_subcommand(word).cloned() {
            command = subcommand;
            add_flags(&command);
        } else if word.starts_with('-') {
            at += usize::from(matches!(*word, "-o" | "--socket" | "--name" | "--dir"));
        } else if command.has_subcommands() && *word != PLACEHOLDER && word.starts_with(|c: char| c.is_ascii_lowercase()) {
            return Some(format!("no subcommand {word}"));
        } else {
            break;
        }
        at += 1;
    }
    let own_words = words.iter().take_while(|word| **word != "--");
    let flag_words = own_words.filter_map(|word| word.trim_start_matches('[').strip_prefix("--")).filter(|flag| !flag.is_empty());
    let name = |flag: &str| flag.split(['=', ']']).next().unwrap_or_default().to_owned();
    flag_words.map(name).find(|flag| !flags.contains(flag)).map(|flag| format!("no flag --{flag}"))
}

#[test]
fn inline_commands_parse() {
    let mut count = 0;
    let mut errors = Vec::new();
    for page in doc_page::page_paths() {
        let text = doc_page::page_text(&page);
        let mut fenced = false;
        for (number, line) in text.lines().enumerate() {
            if line.starts_with("```") {
                fenced = !fenced;
            }
            let spans = line.split('`').skip(1).step_by(2).filter(|_| !fenced);
            for span in spans {
                let command = span.replace("\\|", "|");
                let command = command.split(['|', '>', ';']).next().unwrap_or_default();
                let words: Vec<&str> = command.split_whitespace().skip_while(|word| *word == "sudo").collect();
                count += usize::from(words.first().is_some_and(|word| ["overlayctl", "overlayd"].contains(word)));
                if let Some(error) = inline_command_error(&words) {
                    errors.push(format!("{page}:{}: {span}: {error}", number + 1));
                }
            }
        }
    }
    assert!(errors.is_empty(), "{}", errors.join("\n"));
    assert!(count > 60, "{count} command lines");
}

/// The lines of a block in a script's form: complete, without `sudo` and trailing comments.
fn normalized_lines(commands: &str) -> Vec<String> {
    let joined = commands.replace("\\\n", " ");
    let lines = joined.lines().map(|line| line.split_once("  #").map_or(line, |(line, _)| line));
    let lines = lines.map(|line| line.trim().trim_start_matches("sudo ").split_whitespace().collect::<Vec<_>>().join(" "));
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

/// The first line of a block that a script lacks, although the page says that it runs the block.
fn missing_line(script: &str, page: &str, block: &Block) -> Option<String> {
    let text = script.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.contains(&format!("documented {page} \"{}\"", block.section)) {
        return None;
    }
    normalized_lines(&block.commands).into_iter().find(|line| !text.contains(line.as_str()))
}

/// The sources in `tests/e2e`, for the search for `DocPage::open("PAGE"`.
fn e2e_sources() -> String {
    let entries = fs::read_dir(doc_page::repo_root().join("tests/e2e")).expect("tests/e2e");
    let paths = entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file());
    paths.map(|path| fs::read_to_string(path).expect("a readable source")).collect()
}

#[test]
fn every_command_block_is_run() {
    let sources = e2e_sources();
    let mut errors = Vec::new();
    let mut count = 0;
    for page in doc_page::page_paths().iter().filter(|page| *page != TUTORIAL) {
        for block in blocks(page) {
            count += 1;
            let location = format!("{page}:{}", block.line);
            let runs_tests = shell::commands(&block.commands)
                .iter()
                .all(|words| matches!(words.as_slice(), [cargo, test, ..] if cargo == "cargo" && test == "test"));
            match &block.target {
                // Commands that run tests: their existence is checked above.
                None if runs_tests => {}
                None => {
                    errors.push(format!("{location}: no run target: put `<!-- on MACHINE -->` or `<!-- as in FILE -->` above it"))
                }
                Some(RunTarget::Hosts { .. }) if !sources.contains(&format!("Page::open(\"{page}\"")) => {
                    errors.push(format!("{location}: no test has DocPage::open(\"{page}\""));
                }
                Some(RunTarget::Hosts { .. }) => {}
                Some(RunTarget::Script(file)) => match fs::read_to_string(doc_page::repo_root().join(file)) {
                    Err(error) => errors.push(format!("{location}: {}: {error}", file.display())),
                    Ok(script) => {
                        errors.extend(
                            missing_line(&script, page, &block)
                                .map(|line| format!("{location}: {} does not have: {line}", file.display())),
                        );
                    }
                },
            }
        }
    }
    assert!(errors.is_empty(), "{}", errors.join("\n"));
    assert!(count > 30, "{count} blocks");
}

#[test]
fn command_errors_are_detected() {
    let words = |line: &str| shell::commands(line).remove(0);
    for line in [
        "overlayctl subnet",
        "overlayctl lab exec h1 -- overlayctl peer",
        "overlayd --etcd-endpoint x",
        "overlay-cni ADD",
        "cargo test --test nothing",
    ] {
        assert!(command_error(&words(line)).is_some(), "{line}");
    }
    for line in [
        "overlayctl -o json subnets --watch",
        "sudo overlayd cleanup --state-dir=/x",
        "overlay-cni --version",
        "overlayctl attach web --publish 8080:80",
        "true",
    ] {
        assert_eq!(command_error(&words(line)), None, "{line}");
    }
    let inline_error = |line: &str| inline_command_error(&line.split(' ').collect::<Vec<_>>());
    assert!(
        inline_error("overlayctl stats").is_some()
            && inline_error("overlayctl attach --no-check").is_some()
            && inline_error("overlayd clean").is_some()
    );
    assert_eq!(
        (inline_error("overlayctl attach --no-source-check"), inline_error("overlayctl -o json config set FILE")),
        (None, None)
    );
    let block = |commands: &str| Block {
        line: 1,
        section: "S".to_owned(),
        target: None,
        commands: commands.to_owned(),
        expected_output: None,
    };
    let script = "on 1 systemctl stop x\ndocumented docs/p.md \"S\"\n";
    assert_eq!(missing_line(script, "docs/q.md", &block("sudo systemctl   stop x   # it stops\n")), None);
    assert!(missing_line(script, "docs/q.md", &block("systemctl start x\n")).is_some());
    assert_eq!(missing_line(script, "docs/p.md", &block("systemctl start x\n")), None);
}
