//! Architecture rules, checked on the sources.
//!
//! Imports point to lower layers only, foreign interfaces are named in one place each, and files are about one subject.
//! `docs/architecture.md` describes the layers.

#[path = "architecture/circles.rs"]
mod circles;
#[path = "architecture/source.rs"]
mod source;

use std::fs;
use std::path::{Path, PathBuf};

use circles::import_circles;
use source::{ImportPath, Token, paths, tokens, without_tests};

/// Allowed top-level entries of the repository, apart from dotfiles and `target`.
const TOP_LEVEL_ENTRIES: [&str; 11] =
    ["Cargo.toml", "Cargo.lock", "agent", "ctl", "deploy", "vagrant", "tests", "docs", "README.md", "LICENSE", "CHANGELOG.md"];

/// Maximum number of lines of a source file.
const MAX_LINES: usize = 500;

/// The agent's layers, from the lowest. Modules of one layer do not import each other, except helpers.
const LAYERS: [(&str, &[&str]); 5] = [
    ("model", &["model"]),
    ("plan", &["plan"]),
    ("helpers", &["config", "state", "backoff", "blocking", "allocator", "http", "metrics", "telemetry", "shutdown", "systemd"]),
    ("middle", &["store", "kernel", "endpoint", "admin", "network", "reconcile"]),
    ("wiring", &["app"]),
];
const HELPER_LAYER: usize = 2;

/// Modules of the agent that `ctl` may import: the pure layers, the command line for its manual page, the layout of the state
/// directory and its endpoints, the HTTP client, the store's one-shot functions, and functions for namespaces and links.
const CTL_ALLOWED_IMPORTS: [&[&str]; 12] = [
    &["model"],
    &["plan"],
    &["state"],
    &["http"],
    &["store"],
    &["endpoint", "read_stored"],
    &["endpoint", "StoredEndpoint"],
    &["config", "command"],
    &["kernel", "netns"],
    &["kernel", "netns_builder"],
    &["kernel", "trace"],
    &["kernel", "icmp"],
];

/// Parts of the standard library that do I/O, start a thread or process, or read a clock.
const IMPURE: [&str; 8] = ["fs", "io", "process", "env", "thread", "os", "SystemTime", "Instant"];

/// One source file, by its path from the top of the repository.
struct SourceFile {
    path: String,
    text: String,
}

impl SourceFile {
    /// The path of the module in its crate: `agent/src/plan/diff.rs` is `["plan", "diff"]`.
    fn module(&self) -> Vec<String> {
        let Some((_, module_path)) = self.path.split_once("/src/") else { return Vec::new() };
        let parts: Vec<String> = module_path.trim_end_matches(".rs").split('/').map(ToOwned::to_owned).collect();
        if parts == ["lib"] || parts == ["main"] || parts[0] == "bin" { Vec::new() } else { parts }
    }

    /// Whether the file holds only tests.
    fn is_test(&self) -> bool {
        !self.path.contains("/src/") || self.module().iter().any(|part| part == "tests")
    }

    fn is_in(&self, folder: &str) -> bool {
        self.path.starts_with(&format!("{folder}/")) || self.path == format!("{folder}.rs")
    }
}

/// All rule violations of a file, each as `PATH:LINE: what`.
fn rule_violations(file: &SourceFile) -> Vec<String> {
    let all = tokens(&file.text);
    let own_tokens = if file.is_test() { Vec::new() } else { without_tests(&all) };
    let mut violations = Vec::new();
    let mut add_violation = |line: usize, violation: String| violations.push(format!("{}:{line}: {violation}", file.path));

    if file.path.ends_with("/mod.rs") {
        add_violation(1, "a module file is foo.rs next to foo/, never mod.rs".to_owned());
    }
    let lines = file.text.lines().count();
    if lines > MAX_LINES {
        add_violation(lines, format!("{lines} lines exceed {MAX_LINES}: split the file by subject"));
    }
    if !file.is_test() && !file.text.starts_with("//!") {
        add_violation(1, "a file begins with a `//!` doc that says what it owns".to_owned());
    }
    for token in &all {
        let name = token.text.as_str();
        if name == "etcd_client" && !file.is_in("agent/src/store") {
            add_violation(token.line, "etcd_client is named outside agent/src/store".to_owned());
        }
        if (name == "rtnetlink" || name.starts_with("netlink_")) && !file.is_in("agent/src/kernel") {
            add_violation(token.line, format!("{name} is named outside agent/src/kernel"));
        }
    }
    if file.path.contains("/src/") && !file.path.starts_with("tests/") {
        for (line, violation) in panicking_calls(&own_tokens) {
            add_violation(line, violation);
        }
    }
    if file.is_in("agent/src") {
        for (line, violation) in print_macros(&own_tokens, file.path == "agent/src/main.rs") {
            add_violation(line, violation);
        }
        for path in paths(&own_tokens, &file.module()) {
            if let Some(violation) = layer_violation(&file.module(), &path) {
                add_violation(path.line, violation);
            }
        }
    }
    if file.path.starts_with("ctl/") {
        for path in paths(&own_tokens, &file.module()) {
            let import = path.parts.split_first().filter(|(first, _)| *first == "overlay_agent").map(|(_, rest)| rest);
            if let Some(rest) = import
                && !CTL_ALLOWED_IMPORTS
                    .iter()
                    .any(|allowed| rest.iter().zip(*allowed).filter(|(a, b)| a == b).count() == allowed.len())
            {
                add_violation(path.line, format!("ctl imports {} from the agent", rest.join("::")));
            }
        }
    }
    violations
}

/// The reason why an import violates the layers, if it does.
fn layer_violation(module: &[String], path: &ImportPath) -> Option<String> {
    let layer_of = |name: &str| LAYERS.iter().position(|(_, modules)| modules.contains(&name));
    // main.rs and lib.rs are above all layers.
    let from = module.first()?;
    let Some(own_layer) = layer_of(from) else {
        return Some(format!("module {from} has no layer: add it here, in agent/src/lib.rs and in docs/architecture.md"));
    };
    let (first, rest) = path.parts.split_first()?;
    if own_layer < HELPER_LAYER {
        let is_impure = first == "std" && rest.iter().any(|part| IMPURE.contains(&part.as_str()));
        if first == "tokio" || is_impure {
            return Some(format!("{from} is pure and names {}", path.parts.join("::")));
        }
    }
    let to = if first == "crate" || first == "overlay_agent" { rest.first()? } else { return None };
    let target = layer_of(to)?;
    let allowed = from == to || target < own_layer || (target == own_layer && target == HELPER_LAYER);
    (!allowed).then(|| format!("{from} ({} layer) imports {to} ({} layer)", LAYERS[own_layer].0, LAYERS[target].0))
}

/// `unwrap()` and `expect(`.
fn panicking_calls(tokens: &[Token]) -> Vec<(usize, String)> {
    let calls = tokens.windows(3).filter(|w| w[0].text == "." && w[2].text == "(");
    calls
        .filter(|w| ["unwrap", "expect"].contains(&w[1].text.as_str()))
        .map(|w| (w[1].line, format!("{}( outside tests", w[1].text)))
        .collect()
}

/// Macros that write to standard output, and outside the binary also to standard error.
fn print_macros(tokens: &[Token], is_binary: bool) -> Vec<(usize, String)> {
    let forbidden: &[&str] =
        if is_binary { &["println", "print", "dbg"] } else { &["println", "print", "dbg", "eprintln", "eprint"] };
    let macros = tokens.windows(2).filter(|w| w[1].text == "!" && forbidden.contains(&w[0].text.as_str()));
    macros.map(|w| (w[0].line, format!("{}! in the agent, which logs through tracing", w[0].text))).collect()
}

fn repo_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn collect_sources(folder: &Path, prefix: &str, sources: &mut Vec<SourceFile>) {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    for entry in entries {
        let entry = entry.expect("an entry of the folder");
        let name = entry.file_name().into_string().expect("names are UTF-8");
        let path = format!("{prefix}/{name}");
        if entry.file_type().expect("a type").is_dir() {
            collect_sources(&entry.path(), &path, sources);
        } else if name.ends_with(".rs") {
            sources.push(SourceFile { path, text: fs::read_to_string(entry.path()).expect("a source is UTF-8") });
        }
    }
}

#[test]
fn sources_follow_architecture_rules() {
    let mut files = Vec::new();
    for member in ["agent", "ctl", "tests"] {
        collect_sources(&repo_root().join(member), member, &mut files);
    }
    assert!(files.len() > 20, "the sources are found: {}", files.len());
    let violations: Vec<String> = files.iter().flat_map(rule_violations).collect();
    assert!(violations.is_empty(), "{} violations:\n{}", violations.len(), violations.join("\n"));
}

#[test]
fn modules_have_no_import_circles() {
    for member in ["agent", "ctl"] {
        let mut files = Vec::new();
        collect_sources(&repo_root().join(member).join("src"), &format!("{member}/src"), &mut files);
        let circles = import_circles(&files.iter().collect::<Vec<_>>());
        assert!(circles.is_empty(), "import circles in {member}:\n{}", circles.join("\n"));
    }
}

#[test]
fn import_circles_are_detected() {
    for (sources, wanted) in [
        // Siblings, directly and by the parent's re-export.
        (&[("a", "use crate::b::B;"), ("b", "fn f() { crate::a::f() }")][..], 2),
        (&[("x", "pub use a::A;"), ("x/a", "use super::B;"), ("x/b", "use super::A;")], 0),
        (&[("x", "pub use a::A; pub use b::B;"), ("x/a", "use super::B;"), ("x/b", "use super::A;")], 2),
        // Files below them.
        (&[("a", ""), ("a/x", "use crate::b::y::Y;"), ("b", ""), ("b/y", ""), ("b/z", "use crate::a::x::X;")], 2),
        // The parent's own items.
        (&[("x", "use a::A; pub struct X;"), ("x/a", "use super::X;")], 2),
        (&[("x", "fn f() { a::f() }"), ("x/a", "use super::X;")], 2),
        (&[("x", "pub use a::A; pub struct X;"), ("x/a", "use super::X;")], 0),
        (&[("x", "use a::A; pub struct X<T>;"), ("x/a", "use super::X; impl<T: Fn(u8)> X<T> {}")], 0),
        (&[("a", "use crate::b::B; mod tests { use crate::c::C; }"), ("b", "use crate::c::C;"), ("c", "")], 0),
        (&[("a", "use crate::b::B;"), ("b", "#[cfg(test)] mod tests { use crate::a::A; }")], 0),
    ] {
        let file = |(path, text): &(&str, &str)| SourceFile { path: format!("ctl/src/{path}.rs"), text: (*text).to_owned() };
        let files: Vec<SourceFile> = sources.iter().map(file).collect();
        let circles = import_circles(&files.iter().collect::<Vec<_>>());
        assert_eq!(circles.len(), wanted, "{sources:?}: {circles:?}");
    }
}

#[test]
fn top_level_has_only_allowed_entries() {
    let names = fs::read_dir(repo_root())
        .expect("the repository")
        .map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8"));
    let unexpected: Vec<String> =
        names.filter(|name| !name.starts_with('.') && name != "target" && !TOP_LEVEL_ENTRIES.contains(&name.as_str())).collect();
    assert!(unexpected.is_empty(), "{unexpected:?} at the top level: only {TOP_LEVEL_ENTRIES:?} and dotfiles are allowed");
}

/// A violation of each rule, and valid code that resembles one.
#[test]
fn rule_violations_are_detected() {
    for (path, text, wanted) in [
        ("agent/src/plan/x.rs", "use crate::store::Key;", Some("plan (plan layer) imports store (middle layer)")),
        ("agent/src/plan/x.rs", "fn f() { super::super::kernel::dump() }", Some("plan (plan layer) imports kernel")),
        ("agent/src/model/x.rs", "use crate::{plan::{Key, State as S}, model::Mac};", Some("model (model layer) imports plan")),
        ("agent/src/model/x.rs", "use tokio::net::UnixStream;", Some("model is pure and names tokio::net::UnixStream")),
        ("agent/src/plan/x.rs", "fn f() { std::fs::read(p) }", Some("plan is pure and names std::fs::read")),
        ("agent/src/plan/x.rs", "use std::time::{Duration, Instant};", Some("plan is pure and names std::time::Instant")),
        ("agent/src/store/x.rs", "use crate::kernel::Batch;", Some("store (middle layer) imports kernel (middle layer)")),
        ("agent/src/admin.rs", "use super::reconcile::Command;", Some("admin (middle layer) imports reconcile")),
        ("agent/src/config.rs", "use crate::store::Tls;", Some("config (helpers layer) imports store")),
        ("agent/src/kernel/x.rs", "use crate::app::App;", Some("kernel (middle layer) imports app")),
        ("agent/src/extra.rs", "use std::net::IpAddr;", Some("module extra has no layer")),
        ("agent/src/reconcile.rs", "use etcd_client::Client;", Some("etcd_client is named outside")),
        ("ctl/src/lab.rs", "fn f() -> rtnetlink::Handle {}", Some("rtnetlink is named outside")),
        ("ctl/src/lab.rs", "use netlink_sys::Socket;", Some("netlink_sys is named outside")),
        ("ctl/src/cmd/x.rs", "use overlay_agent::reconcile::Core;", Some("ctl imports reconcile::Core from the agent")),
        (
            "ctl/src/cmd/x.rs",
            "use overlay_agent::kernel::{netns::enter, batch::Writer};",
            Some("ctl imports kernel::batch::Writer"),
        ),
        ("agent/src/endpoint.rs", "fn f() { x.unwrap() }", Some("unwrap( outside tests")),
        ("ctl/src/lab.rs", "fn f() { x\n.expect(\"y\") }", Some(":3: expect( outside tests")),
        ("agent/src/endpoint.rs", "fn f() { println!(\"x\") }", Some("println! in the agent")),
        ("agent/src/endpoint.rs", "fn f() { eprintln!(\"x\") }", Some("eprintln! in the agent")),
        ("agent/src/kernel/mod.rs", "", Some("never mod.rs")),
        // Valid code.
        ("agent/src/main.rs", "use overlay_agent::app;\nfn main() { eprintln!(\"x\") }", None),
        ("agent/src/app.rs", "use crate::{store, kernel, reconcile, plan, model};", None),
        ("agent/src/store/x.rs", "use etcd_client::Client; use super::keys; use crate::backoff::Backoff;", None),
        ("agent/src/plan/x.rs", "use std::fmt; use super::state::Key; use crate::model::Mac; use std::time::Duration;", None),
        (
            "agent/src/admin.rs",
            "#[cfg(test)]\nmod tests { use super::*; fn f() { x.unwrap(); println!(\"\") } }\nfn g() {}",
            None,
        ),
        (
            "agent/src/admin.rs",
            "// x.unwrap() println!\n/* use crate::store; */ fn f() { \"\\\"a.unwrap()\"; r#\"println!(\"x\")\"#; '\"'; }",
            None,
        ),
        (
            "agent/src/admin.rs",
            "fn f<'a>(x: &'a str) { x.unwrap_or_default(); #[expect(dead_code, reason = \"x\")] let y = 1; }",
            None,
        ),
        ("agent/src/kernel/tests/x.rs", "use crate::store::Key; fn f() { x.unwrap() }", None),
        ("ctl/src/cmd/x.rs", "use overlay_agent::model::api::{Status, Peers}; use overlay_agent::kernel::netns;", None),
    ] {
        let found = rule_violations(&SourceFile { path: path.to_owned(), text: format!("//! What it owns.\n{text}") });
        match wanted {
            None => assert!(found.is_empty(), "{path}: {text}: {found:?}"),
            Some(wanted) => assert!(found.iter().any(|f| f.contains(wanted)), "{path}: {text}: {found:?} lacks {wanted}"),
        }
    }
    let long = SourceFile { path: "ctl/src/x.rs".to_owned(), text: format!("//! x\n{}", "fn f() {}\n".repeat(MAX_LINES)) };
    assert!(rule_violations(&long)[0].contains("501 lines"));
    let without_doc = SourceFile { path: "ctl/src/x.rs".to_owned(), text: "fn f() {}\n".to_owned() };
    assert!(rule_violations(&without_doc)[0].contains("begins with a `//!` doc"));
}
