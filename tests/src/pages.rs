//! Runs the commands of a page on [machines](crate::machines), block by block, and compares what they print with what the page shows
//! ([`crate::page`] says how a block tells where it is run).

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::machines::Machines;
use crate::page::{Block, Place, Way, blocks, text};
use crate::shown::matches;
use crate::{Must, eventually};

/// How long a block may take.
const STEP: Duration = Duration::from_secs(120);

/// How long a block may be tried again that is to hold soon.
const SOON: Duration = Duration::from_secs(30);

/// What reads how a block is run and the file that it is in, and runs each: with nothing to read, for the names are not for the commands. A block in the
/// background ends with its machine.
const SHELL: &str = r#"set -eu -o pipefail
while read -r __way __step; do
    case $__way in
    plain) . "$__step" </dev/null; __code=0 ;;
    on) ( . "$__step" ) </dev/null & __code=0 ;;
    own) set +e; ( set -e; . "$__step" ) </dev/null; __code=$?; set -e ;;
    esac
    printf '\001%s %s\n' "$__step" "$__code"
done"#;

/// A page that is being run.
#[derive(Debug)]
pub struct Page<'a> {
    name: String,
    machines: &'a Machines,
    blocks: VecDeque<Block>,
    shells: BTreeMap<String, Shell>,
    scratch: tempfile::TempDir,
    done: usize,
}

#[derive(Debug)]
struct Shell {
    bash: Child,
    output: std::path::PathBuf,
}

impl<'a> Page<'a> {
    /// Opens a page. Blocks that another script runs are left out.
    pub fn open(name: &str, machines: &'a Machines) -> Page<'a> {
        let all = blocks(&text(name)).unwrap_or_else(|error| panic!("{name}:{error}"));
        let blocks: VecDeque<Block> = all.into_iter().filter(|block| matches!(block.place, Some(Place::On { .. }))).collect();
        assert!(!blocks.is_empty(), "{name} has blocks `on` machines");
        let scratch = tempfile::tempdir().must("a directory");
        Page { name: name.to_owned(), machines, blocks, shells: BTreeMap::new(), scratch, done: 0 }
    }

    /// The section of the next block; `None` at the end.
    pub fn section(&self) -> Option<&str> {
        self.blocks.front().map(|block| block.section.as_str())
    }

    /// Runs the blocks before a section.
    pub async fn up_to(&mut self, section: &str) {
        while self.section().must(&format!("a section `{section}`")) != section {
            self.step().await;
        }
    }

    /// Runs what is left.
    pub async fn to_the_end(mut self) {
        while self.section().is_some() {
            self.step().await;
        }
    }

    /// Runs the next block, on each of its machines.
    pub async fn step(&mut self) {
        let block = self.blocks.pop_front().must("a block that is left");
        let Some(Place::On { machines, way }) = &block.place else { return };
        for machine in machines {
            let end = Instant::now() + SOON;
            loop {
                let outcome = self.run(machine, &block, *way).await;
                match outcome {
                    Ok(()) => break,
                    Err(_) if matches!(way, Way::Soon(_)) && Instant::now() < end => {
                        tokio::time::sleep(Duration::from_millis(200)).await
                    }
                    Err(error) => panic!("{}:{}: on {machine}:\n{}{error}", self.name, block.line, block.commands),
                }
            }
        }
    }

    /// Runs a block on one machine; the error says how it ended otherwise than the page has it.
    async fn run(&mut self, machine: &str, block: &Block, way: Way) -> Result<(), String> {
        let file = self.scratch.path().join(format!("step-{}", self.done));
        self.done += 1;
        std::fs::write(&file, &block.commands).must("a file");
        let (word, wanted) = match way {
            Way::Plain => ("plain", 0),
            Way::GoesOn => ("on", 0),
            Way::Exits(code) | Way::Soon(code) => ("own", code),
        };
        let (machines, scratch) = (self.machines, self.scratch.path());
        let shell = self.shells.entry(machine.to_owned()).or_insert_with(|| Shell::start(machines, machine, scratch));
        let before = shell.read().len();
        writeln!(shell.bash.stdin.as_mut().must("its input"), "{word} {}", file.display()).must("bash");
        let mark = format!("\u{1}{} ", file.display());
        let place = format!("{}:{} ends on {machine}", self.name, block.line);
        let (printed, code) = eventually(&place, STEP, || {
            let text = shell.read();
            let ended = shell.bash.try_wait().must("bash");
            match text[before..].split_once(&mark) {
                // What runs on in the background may print behind it.
                Some((printed, rest)) if rest.contains('\n') => {
                    Ok((printed.to_owned(), rest.lines().next().and_then(|code| code.parse::<i32>().ok())))
                }
                _ if ended.is_some() => Ok((text[before..].to_owned(), None)),
                _ => Err(text[before..].to_owned()),
            }
        })
        .await;
        if code != Some(wanted) {
            let code = code.map_or_else(|| "a command that failed".to_owned(), |code| format!("exit code {code}"));
            return Err(format!("ends with {code} and prints\n{printed}"));
        }
        match &block.shown {
            Some(shown) => matches(shown, &printed)
                .map_err(|line| format!("the page shows\n{shown}but it prints\n{printed}what is missing: {line}")),
            None => Ok(()),
        }
    }
}

impl Shell {
    fn start(machines: &Machines, machine: &str, scratch: &std::path::Path) -> Shell {
        let output = scratch.join(format!("{machine}.output"));
        let file = std::fs::File::create(&output).must("a file");
        let mut command = machines.command(machine, "bash", &["-c", SHELL]);
        command.stdin(Stdio::piped()).stderr(file.try_clone().must("the file")).stdout(file);
        Shell { bash: command.spawn().must("nsenter"), output }
    }

    fn read(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.output).must("what it printed")).into_owned()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // What it started ends with the machine.
        let _ended = self.bash.kill().and_then(|()| self.bash.wait());
    }
}
