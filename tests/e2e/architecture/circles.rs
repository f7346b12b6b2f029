//! Import circles between the modules of a crate.
//!
//! A folder's nodes are its modules, each with all files below it, and the parent file. The parent's re-exports stand for what
//! they name. A file with an `impl` block of a type of the parent is a part of the parent, so that its imports from it count not.

use std::collections::{BTreeMap, BTreeSet};

use super::SourceFile;
use super::source::{ImportPath, Token, paths, tokens, without_tests};

/// The node of a folder's parent file.
const PARENT: &str = "(parent)";

/// Imports between the nodes of each folder: folder, importer, imported, with a place for the message.
type Edges = BTreeMap<(Vec<String>, String, String), String>;

/// All circles in the sources of one crate, each import of a circle as one line.
pub fn import_circles(files: &[&SourceFile]) -> Vec<String> {
    let sources = files.iter().filter(|file| !file.is_test()).map(|file| {
        let own_tokens = without_tests(&tokens(&file.text));
        (file.module(), (*file, paths(&own_tokens, &file.module()), extended_types(&own_tokens)))
    });
    let sources: BTreeMap<Vec<String>, _> = sources.collect();
    let mut edges = Edges::new();
    let is_module = |parts: &[String]| sources.contains_key(parts);
    // The path from the crate's root; `None` for other crates and local names.
    let absolute = |path: &ImportPath, module: &[String]| match path.parts.split_first()? {
        (first, rest) if first == "crate" => Some(rest.to_vec()),
        (first, _) => is_module(&[module, std::slice::from_ref(first)].concat()).then(|| [module, &path.parts].concat()),
    };
    for (module, (file, paths, extended)) in &sources {
        let absolute_paths = || paths.iter().filter_map(|path| Some((path, absolute(path, module)?)));
        for (path, mut parts) in absolute_paths() {
            let mut common = common_length(module, &parts);
            if let Some(item) = parts.get(common)
                && !is_module(&parts[..=common])
                && let Some((_, paths, _)) = sources.get(&parts[..common])
                && let Some(import) = paths.iter().find(|path| path.is_import && path.parts.last() == Some(item))
            {
                let Some(import) = absolute(import, &parts[..common]) else { continue };
                parts = import;
                common = common_length(module, &parts);
            }
            if common == parts.len() || (path.is_reexport && common == module.len()) {
                continue;
            }
            let from = module.get(common).map_or(PARENT, String::as_str);
            let to = if is_module(&parts[..=common]) { &parts[common] } else { PARENT };
            let parent = &module[..common];
            let is_extension = || {
                absolute_paths()
                    .any(|(_, parts)| parts.len() > common && parts.starts_with(parent) && extended.contains(&parts[common]))
            };
            if from != to && !(to == PARENT && is_extension()) {
                let place = format!("{}:{}: {}", file.path, path.line, parts.join("::"));
                edges.entry((parent.to_vec(), from.to_owned(), to.to_owned())).or_insert(place);
            }
        }
    }
    // Only circles are left once every node without an import, and every node that nobody imports, is removed.
    loop {
        let from: BTreeSet<_> = edges.keys().map(|(folder, from, _)| (folder.clone(), from.clone())).collect();
        let to: BTreeSet<_> = edges.keys().map(|(folder, _, to)| (folder.clone(), to.clone())).collect();
        let before = edges.len();
        edges
            .retain(|(folder, a, b), _| to.contains(&(folder.clone(), a.clone())) && from.contains(&(folder.clone(), b.clone())));
        if edges.len() == before {
            return edges.into_iter().map(|((_, from, to), place)| format!("{place}: {from} and {to} are in a circle")).collect();
        }
    }
}

/// How many parts two paths have in common.
fn common_length(a: &[String], b: &[String]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// The types that have an `impl` block in the file, apart from those of traits.
fn extended_types(tokens: &[Token]) -> BTreeSet<String> {
    let blocks = tokens.iter().enumerate().filter(|(_, token)| token.text == "impl");
    let names = blocks.filter_map(|(at, _)| {
        let header: Vec<&str> =
            tokens[at + 1..].iter().map(|token| token.text.as_str()).take_while(|text| *text != "{").collect();
        let mut depth = 0;
        let name = header.iter().find(|text| {
            depth += i32::from(**text == "<") - i32::from(**text == ">");
            depth == 0 && **text != ">"
        });
        name.filter(|_| !header.contains(&"for")).map(|name| (*name).to_owned())
    });
    names.collect()
}
