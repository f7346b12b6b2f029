//! Compares a page's output with the actual output, line by line.
//!
//! `...` in a line matches any text, a line `...` matches any lines, and consecutive blanks count as one.

/// Compares expected and actual output. An error is the first line that only one of them has.
pub fn matches(expected: &str, actual: &str) -> Result<(), String> {
    let squeeze_blanks = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    // bash's message about a background server that ended with its lab; it may come at any time.
    let mut actual_lines = actual.lines().filter(|line| !matches!(*line, "Terminated" | "Killed")).map(squeeze_blanks);
    let mut any = false;
    for line in expected.lines().map(squeeze_blanks) {
        if line == "..." {
            any = true;
            continue;
        }
        let found = if any {
            actual_lines.any(|other| line_matches(&line, &other))
        } else {
            actual_lines.next().is_some_and(|other| line_matches(&line, &other))
        };
        if !found {
            return Err(line);
        }
        any = false;
    }
    match actual_lines.next() {
        Some(line) if !any => Err(format!("`{line}` of the page")),
        _ => Ok(()),
    }
}

/// Whether a line matches a pattern in which `...` is any text.
fn line_matches(pattern: &str, line: &str) -> bool {
    let Some((start, rest)) = pattern.split_once("...") else { return pattern == line };
    let Some(mut line) = line.strip_prefix(start) else { return false };
    let mut parts = rest.split("...").peekable();
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return line.ends_with(part);
        }
        let Some(at) = line.find(part) else { return false };
        line = &line[at + part.len()..];
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ellipsis_matches_any_output() {
        for (pattern, output, is_match) in [
            ("a\nb\n", "a\nb\n", true),
            ("a  b\n", "a b  \n", true),
            ("a\n", "a\nb\n", false),
            ("a\n...\n", "a\nb\n", true),
            ("...\nb\n", "a\na\nb\n", true),
            ("...\nb\n", "a\n", false),
            ("a\nb\n", "b\na\n", false),
            ("time=... ms\n", "time=0.1 ms\n", true),
            ("time=... ms\n", "time=0.1 s\n", false),
            ("1 sent, 1 received, ...\n", "1 sent, 0 received, 100% loss\n", false),
            ("a...b...c\n", "a1b2c\n", true),
            ("a...b...c\n", "a1c\n", false),
            ("a\nb\n", "a\nTerminated\nb\n", true),
        ] {
            assert_eq!(matches(pattern, output).is_ok(), is_match, "{pattern:?} {output:?}");
        }
    }
}
