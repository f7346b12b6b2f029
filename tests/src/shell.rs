//! Parses shell text into simple commands, as far as the pages use the language.
//!
//! Supported: quotes, continued lines, comments, substitutions, pipes, lists, redirections and here-documents. Nothing is
//! expanded: variables stay as written.

/// The simple commands of a text as words; commands of substitutions follow the containing command.
pub fn commands(text: &str) -> Vec<Vec<String>> {
    let mut lexer = Lexer { chars: text.chars().collect(), at: 0, found: Vec::new(), inner: Vec::new(), documents: Vec::new() };
    lexer.run();
    let inner = std::mem::take(&mut lexer.inner);
    let mut found: Vec<Vec<String>> = lexer.found.into_iter().map(strip).filter(|words| !words.is_empty()).collect();
    found.extend(inner.iter().flat_map(|text| commands(text)));
    found
}

/// The words of a command without its prefix: assignments, keywords, and wrapper programs.
fn strip(mut words: Vec<String>) -> Vec<String> {
    const KEYWORDS: [&str; 14] =
        ["if", "then", "elif", "else", "fi", "while", "until", "do", "done", "!", "{", "}", "time", "exec"];
    loop {
        let assignment = |word: &str| {
            word.split_once('=').is_some_and(|(name, _)| {
                !name.is_empty()
                    && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
                    && !name.starts_with(|c: char| c.is_ascii_digit())
            })
        };
        let prefix_len = match words.first().map(String::as_str) {
            Some(word) if KEYWORDS.contains(&word) || assignment(word) || matches!(word, "sudo" | "env") => 1,
            // The tutorials' form: on HOST COMMAND.
            Some("on") => 2,
            Some("ip") if words.len() > 4 && words[1..3] == ["netns", "exec"] => 4,
            _ => return words,
        };
        words.drain(..prefix_len.min(words.len()));
    }
}

struct Lexer {
    chars: Vec<char>,
    at: usize,
    found: Vec<Vec<String>>,
    /// The texts of substitutions.
    inner: Vec<String>,
    /// The delimiters of here-documents that begin on the next line.
    documents: Vec<String>,
}

impl Lexer {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek();
        self.at += 1;
        next
    }

    fn run(&mut self) {
        let mut words = Vec::new();
        while let Some(c) = self.peek() {
            match c {
                '\n' => {
                    self.at += 1;
                    self.end(&mut words);
                    self.skip_documents();
                }
                '\\' if self.chars.get(self.at + 1) == Some(&'\n') => self.at += 2,
                c if c.is_whitespace() => self.at += 1,
                '#' => {
                    while self.peek().is_some_and(|c| c != '\n') {
                        self.at += 1;
                    }
                }
                ';' | '|' | '&' | '(' | ')' => {
                    self.at += 1;
                    self.end(&mut words);
                }
                '<' | '>' => self.redirection(),
                _ => {
                    let word = self.word();
                    // A redirection's file descriptor.
                    let number = word.chars().all(|c| c.is_ascii_digit()) && matches!(self.peek(), Some('<' | '>'));
                    if !number {
                        words.push(word);
                    }
                }
            }
        }
        self.end(&mut words);
    }

    fn end(&mut self, words: &mut Vec<String>) {
        if !words.is_empty() {
            self.found.push(std::mem::take(words));
        }
    }

    fn redirection(&mut self) {
        let start = self.at;
        while matches!(self.peek(), Some('<' | '>' | '&')) {
            self.at += 1;
        }
        let operator: String = self.chars[start..self.at].iter().collect();
        while self.peek().is_some_and(|c| c == ' ') {
            self.at += 1;
        }
        let target = self.word();
        if operator == "<<" {
            self.documents.push(target);
        }
    }

    fn skip_documents(&mut self) {
        for end in std::mem::take(&mut self.documents) {
            loop {
                let start = self.at;
                while self.peek().is_some_and(|c| c != '\n') {
                    self.at += 1;
                }
                let line: String = self.chars[start..self.at.min(self.chars.len())].iter().collect();
                self.at += 1;
                if line == end || self.at >= self.chars.len() {
                    break;
                }
            }
        }
    }

    fn word(&mut self) -> String {
        let mut word = String::new();
        while let Some(c) = self.peek() {
            match c {
                c if c.is_whitespace() || matches!(c, ';' | '|' | '&' | '(' | ')' | '<' | '>') => break,
                '\'' => {
                    self.at += 1;
                    while let Some(c) = self.next().filter(|c| *c != '\'') {
                        word.push(c);
                    }
                }
                '"' => {
                    self.at += 1;
                    while let Some(c) = self.next().filter(|c| *c != '"') {
                        match c {
                            '\\' => word.extend(self.next()),
                            '$' => self.dollar(&mut word),
                            c => word.push(c),
                        }
                    }
                }
                '\\' => {
                    self.at += 1;
                    word.extend(self.next());
                }
                '$' => {
                    self.at += 1;
                    self.dollar(&mut word);
                }
                c => {
                    self.at += 1;
                    word.push(c);
                }
            }
        }
        word
    }

    /// Parses the text after a `$`. A substitution is also stored separately, all other text stays in the word.
    fn dollar(&mut self, word: &mut String) {
        word.push('$');
        if self.peek() != Some('(') {
            return;
        }
        let start = self.at + 1;
        let mut depth = 0;
        while let Some(c) = self.next() {
            depth += i32::from(c == '(') - i32::from(c == ')');
            if depth == 0 {
                break;
            }
        }
        let text: String = self.chars[start..(self.at - 1).max(start)].iter().collect();
        word.push_str(&format!("({text})"));
        if !text.starts_with('(') {
            self.inner.push(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simple_commands() {
        for (text, wanted) in [
            ("a b # c\nd", vec!["a b", "d"]),
            ("a \\\n  b", vec!["a b"]),
            ("X=1 sudo a 'b c' \"d $e\" | f && g; h &", vec!["a b c d $e", "f", "g", "h"]),
            ("until a; do sleep 1; done", vec!["a", "sleep 1"]),
            ("a >x 2>&1 <<END\nb c\nEND\nd", vec!["a", "d"]),
            ("a \"$(b c)\"", vec!["a $(b c)", "b c"]),
            ("on h1 overlayctl attach one", vec!["overlayctl attach one"]),
            ("ip netns exec web ping x", vec!["ping x"]),
            ("f() { a; }", vec!["f", "a"]),
        ] {
            let found: Vec<String> = commands(text).iter().map(|words| words.join(" ")).collect();
            assert_eq!(found, wanted, "{text}");
        }
    }
}
