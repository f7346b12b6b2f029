//! Tokenises a Rust source for the architecture rules: tokens without comments, strings and tests, and the paths in them.

/// A token: an identifier, or one punctuation character.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The text.
    pub text: String,
    /// The line, from 1.
    pub line: usize,
}

/// A path as the compiler would resolve it: `["crate", "plan", "state"]`, `["tokio", "net"]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportPath {
    /// Its parts; a leading `super` or `self` is resolved to `crate` and the module's path.
    pub parts: Vec<String>,
    /// The line, from 1.
    pub line: usize,
    /// Whether it is part of a `use` declaration.
    pub is_import: bool,
    /// Whether that declaration is public.
    pub is_reexport: bool,
}

/// The tokens of a source. Comments, strings, characters and numbers are left out.
pub fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let mut tokens = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < chars.len() {
        let start = at;
        let next = |offset: usize| chars.get(start + offset).copied().unwrap_or('\0');
        match chars[at] {
            '/' if next(1) == '/' => at = end_of_line(&chars, at),
            '/' if next(1) == '*' => at = end_of_comment(&chars, at),
            '"' => at = end_of_string(&chars, at + 1),
            'r' | 'b' | 'c' if string_prefix_len(&chars[at..]) > 0 => {
                let prefix = string_prefix_len(&chars[at..]);
                at = if chars[at..at + prefix].contains(&'r') {
                    end_of_raw(&chars, at + prefix)
                } else {
                    end_of_string(&chars, at + prefix + 1)
                };
            }
            'b' if next(1) == '\'' => at = end_of_char(&chars, at + 1),
            '\'' if next(1) == '\\' || next(2) == '\'' => at = end_of_char(&chars, at),
            c if c.is_alphabetic() || c == '_' => {
                while at < chars.len() && (chars[at].is_alphanumeric() || chars[at] == '_') {
                    at += 1;
                }
                tokens.push(Token { text: chars[start..at].iter().collect(), line });
            }
            c if c.is_ascii_digit() => {
                while at < chars.len() && (chars[at].is_alphanumeric() || chars[at] == '_') {
                    at += 1;
                }
            }
            c if c.is_whitespace() => at += 1,
            c => {
                tokens.push(Token { text: c.to_string(), line });
                at += 1;
            }
        }
        line += chars[start..at.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

fn end_of_line(chars: &[char], at: usize) -> usize {
    chars[at..].iter().position(|c| *c == '\n').map_or(chars.len(), |n| at + n)
}

fn end_of_comment(chars: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// The index after the closing quote of a string whose first character is at `at`.
fn end_of_string(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

fn end_of_char(chars: &[char], at: usize) -> usize {
    let mut end = at + 1;
    while end < chars.len() && chars[end] != '\'' {
        end += if chars[end] == '\\' { 2 } else { 1 };
    }
    end + 1
}

/// The length of a string's prefix (`r`, `br`, `b`, `c`, `cr`); 0 without one. The quote or the first `#` follows it.
fn string_prefix_len(chars: &[char]) -> usize {
    ["br", "cr", "r", "b", "c"]
        .into_iter()
        .find(|prefix| {
            let length = prefix.len();
            let rest = chars.get(length..).unwrap_or_default();
            let hashes = rest.iter().take_while(|c| **c == '#').count();
            chars.iter().take(length).copied().eq(prefix.chars())
                && rest.get(hashes) == Some(&'"')
                && (hashes == 0 || prefix.contains('r'))
        })
        .map_or(0, str::len)
}

/// The index after a raw string whose hashes and quote begin at `at`.
fn end_of_raw(chars: &[char], at: usize) -> usize {
    let hashes = chars[at..].iter().take_while(|c| **c == '#').count();
    let mut end = at + hashes + 1;
    while end < chars.len() {
        if chars[end] == '"' && chars[end + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes {
            return end + 1 + hashes;
        }
        end += 1;
    }
    end
}

/// The tokens without test items: those after `#[cfg(test)]` and `#[test]`.
pub fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let mut outside_tests = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let is = |texts: &[&str]| texts.iter().enumerate().all(|(i, text)| tokens.get(at + i).is_some_and(|t| t.text == *text));
        if is(&["#", "[", "cfg", "(", "test", ")", "]"]) || is(&["#", "[", "test", "]"]) {
            at = end_of_item(tokens, at);
        } else {
            outside_tests.push(tokens[at].clone());
            at += 1;
        }
    }
    outside_tests
}

/// The index after the item at `at`: its `;`, or the closing brace of its body.
fn end_of_item(tokens: &[Token], mut at: usize) -> usize {
    let mut depth = 0usize;
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth = depth.saturating_sub(1);
                if depth == 0 && tokens[at].text == "}" {
                    return at + 1;
                }
            }
            ";" if depth == 0 => return at + 1,
            _ => {}
        }
        at += 1;
    }
    at
}

/// Every path of two or more parts, with `use` trees expanded. `module` is the path of the file's module in its crate.
pub fn paths(tokens: &[Token], module: &[String]) -> Vec<ImportPath> {
    let mut found = Vec::new();
    // Open inline modules, with their brace depth.
    let mut inline: Vec<(String, usize)> = Vec::new();
    let (mut at, mut depth) = (0, 0usize);
    while at < tokens.len() {
        let text = tokens[at].text.as_str();
        match text {
            "{" => depth += 1,
            "}" => {
                depth = depth.saturating_sub(1);
                inline.retain(|(_, opened)| *opened < depth);
            }
            "mod" if tokens.get(at + 2).is_some_and(|t| t.text == "{") => inline.push((tokens[at + 1].text.clone(), depth)),
            _ => {}
        }
        let current_module: Vec<String> = module.iter().cloned().chain(inline.iter().map(|(name, _)| name.clone())).collect();
        let begins = is_name(text) && !(at >= 2 && tokens[at - 1].text == ":" && tokens[at - 2].text == ":");
        if begins && is_separator(tokens, at + 1) {
            let first = found.len();
            let is_import = at >= 1 && tokens[at - 1].text == "use";
            let is_reexport = is_import && at >= 2 && ["pub", ")"].contains(&tokens[at - 2].text.as_str());
            at = expand_use_tree(tokens, at, &[], &current_module, &mut found);
            found[first..].iter_mut().for_each(|path| (path.is_import, path.is_reexport) = (is_import, is_reexport));
        } else {
            at += 1;
        }
    }
    found
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

fn is_separator(tokens: &[Token], at: usize) -> bool {
    [at, at + 1].iter().all(|i| tokens.get(*i).is_some_and(|t| t.text == ":"))
}

/// Expands the path or `use` tree at `at` after `prefix` into `found`; returns the index after it.
fn expand_use_tree(tokens: &[Token], mut at: usize, prefix: &[String], module: &[String], found: &mut Vec<ImportPath>) -> usize {
    let mut parts = prefix.to_vec();
    let line = tokens[at].line;
    loop {
        match tokens.get(at).map(|t| t.text.as_str()) {
            Some("{") => {
                at += 1;
                while at < tokens.len() && tokens[at].text != "}" {
                    if is_name(&tokens[at].text) {
                        at = expand_use_tree(tokens, at, &parts, module, found);
                    } else {
                        at += 1;
                    }
                }
                return at + 1;
            }
            Some(name) if is_name(name) => {
                parts.push(name.to_owned());
                at += 1;
                if is_separator(tokens, at) {
                    at += 2;
                    continue;
                }
                if tokens.get(at).is_some_and(|t| t.text == "as") {
                    at += 2;
                }
            }
            _ => {}
        }
        found.push(ImportPath { parts: resolve(&parts, module), line, is_import: false, is_reexport: false });
        return at;
    }
}

/// Resolves `super` and `self` in the module `module`.
fn resolve(parts: &[String], module: &[String]) -> Vec<String> {
    let super_count = parts.iter().take_while(|part| *part == "super" || *part == "self").count();
    if super_count == 0 {
        return parts.to_vec();
    }
    let supers = parts[..super_count].iter().filter(|part| *part == "super").count();
    let base = module.len().saturating_sub(supers);
    std::iter::once("crate".to_owned())
        .chain(module[..base].iter().cloned())
        .chain(parts[super_count..].iter().cloned())
        .collect()
}
