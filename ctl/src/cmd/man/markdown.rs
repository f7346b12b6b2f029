//! Converts documentation pages to manual pages: from the Markdown subset that they use to `man(7)`.

/// Header and footer of a manual page.
#[derive(Debug, Clone, Copy)]
pub struct PageMeta {
    /// Name of the page.
    pub name: &'static str,
    /// Section of the manual.
    pub section: &'static str,
    /// Summary on one line.
    pub about: &'static str,
    /// Related pages, as `overlayd(8)`.
    pub see_also: &'static str,
}

/// Converts a page to `man(7)`. The page's title is dropped: NAME replaces it.
pub fn page(meta: PageMeta, text: &str) -> String {
    let PageMeta { name, section, about, see_also } = meta;
    let version = env!("CARGO_PKG_VERSION");
    let mut page = Writer { out: String::new(), header: None, paragraph: true };
    page.line(&format!(".TH {} {section} \"\" \"overlayd {version}\" \"System Administration\"", escape(name)));
    page.line(&format!(".SH NAME\n{} \\- {}\n.SH DESCRIPTION", escape(name), escape(about)));
    let mut lines = text.lines().skip_while(|line| !line.starts_with("# ")).skip(1);
    while let Some(line) = lines.next() {
        match line.strip_prefix("```") {
            Some(_) => {
                page.line(".PP\n.RS 4\n.EX");
                for line in lines.by_ref().take_while(|line| *line != "```") {
                    page.text(&escape(line));
                }
                page.line(".EE\n.RE");
                page.paragraph = true;
            }
            None => page.convert(line),
        }
    }
    page.line(&format!(".SH SEE ALSO\n{}", escape(see_also)));
    page.out
}

struct Writer {
    out: String,
    /// Header of the current table.
    header: Option<Vec<String>>,
    /// Whether the next text starts a paragraph.
    paragraph: bool,
}

impl Writer {
    fn line(&mut self, line: &str) {
        self.out += line;
        self.out.push('\n');
    }

    /// Writes text; escapes a leading `.` or `'`, which roff would read as a request.
    fn text(&mut self, text: &str) {
        let prefix = if text.starts_with(['.', '\'']) { "\\&" } else { "" };
        self.line(&format!("{prefix}{text}"));
    }

    fn convert(&mut self, line: &str) {
        if let Some(cells) = line.strip_prefix("| ") {
            return self.row(cells);
        }
        self.header = None;
        if line.starts_with("<!-- ") {
        } else if line.is_empty() {
            self.paragraph = true;
        } else if let Some(heading) = line.strip_prefix("### ") {
            self.line(&format!(".SS {}", render_inline(heading)));
            self.paragraph = false;
        } else if let Some(heading) = line.strip_prefix("## ") {
            self.line(&format!(".SH {}", render_inline(heading).to_uppercase()));
            self.paragraph = false;
        } else if let Some((number, words)) = list_item(line) {
            self.line(&format!(".IP \"{number}\" 4"));
            self.text(&render_inline(words));
            self.paragraph = false;
        } else if let Some(words) = line.strip_prefix("- ") {
            self.line(".IP \\(bu 2");
            self.text(&render_inline(words));
            self.paragraph = false;
        } else {
            if std::mem::take(&mut self.paragraph) {
                self.line(".PP");
            }
            self.text(&render_inline(line.trim_start()));
        }
    }

    /// Writes a table row: the first cell as a term, the last as its description, the cells between with their column headers.
    fn row(&mut self, row: &str) {
        let unescaped = row.replace("\\|", "\u{1}");
        let cells: Vec<String> =
            unescaped.trim_end().trim_end_matches('|').split(" |").map(|cell| cell.trim().replace('\u{1}', "|")).collect();
        let Some(header) = &self.header else {
            self.header = Some(cells);
            return;
        };
        if cells.iter().all(|cell| cell.chars().all(|c| c == '-')) {
            return;
        }
        let last = cells.len().saturating_sub(1);
        let mut description = String::new();
        for (number, cell) in cells.iter().enumerate().skip(1).filter(|(_, cell)| !cell.is_empty()) {
            let head = header.get(number).filter(|head| number < last && !head.is_empty());
            description +=
                &head.map_or_else(|| render_inline(cell), |head| format!("{}: {}. ", render_inline(head), render_inline(cell)));
        }
        let term = render_inline(cells.first().map_or("", String::as_str));
        self.line(&format!(".TP\n\\fB{}\\fR", term.replace("\\fB", "").replace("\\fR", "")));
        self.text(description.trim_end());
        self.paragraph = true;
    }
}

fn list_item(line: &str) -> Option<(&str, &str)> {
    let (number, text) = line.split_once(". ")?;
    number.chars().all(|c| c.is_ascii_digit()).then_some((&line[..=number.len()], text))
}

/// Escapes roff's special characters. A hyphen stays an ASCII hyphen, so that flags can be copied.
fn escape(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

/// Renders code and strong text in bold, and a link as its text.
fn render_inline(text: &str) -> String {
    let mut out = String::new();
    for (number, part) in text.split('`').enumerate() {
        if number % 2 == 1 {
            out += &format!("\\fB{}\\fR", escape(part));
            continue;
        }
        let part = escape(&strip_links(part).replace("\\<", "<"));
        for (number, part) in part.split("**").enumerate() {
            out += &if number % 2 == 1 { format!("\\fB{part}\\fR") } else { part.to_owned() };
        }
    }
    out
}

/// Replaces each link by its text.
fn strip_links(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, label, after)) = rest.split_once("](").and_then(|(left, right)| {
        let (before, label) = left.rsplit_once('[')?;
        Some((before, label, right.split_once(')')?.1))
    }) {
        out += before;
        out += label;
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE_META: PageMeta = PageMeta { name: "overlay-x", section: "8", about: "does x", see_also: "overlayd(8)" };

    #[test]
    fn markdown_converts_to_man() {
        let text = "# X\n\nSee [this page](x.md#y) and `a-b`,\n.not a request.\n\n## Keys\n\n| key | value | default |\n| --- | --- | --- |\n\
                    | `a` | a\\|b | none |\n\n1. one\n2. two\n   more\n\n```toml\n.x = 1\n```\n";
        let page = page(PAGE_META, text);
        let (_, body) = page.split_once(".SH DESCRIPTION\n").expect("a description");
        assert_eq!(
            body,
            ".PP\nSee this page and \\fBa\\-b\\fR,\n\\&.not a request.\n.SH KEYS\n.TP\n\\fBa\\fR\nvalue: a|b. none\n.IP \"1.\" 4\none\n.IP \"2.\" 4\n\
             two\nmore\n.PP\n.RS 4\n.EX\n\\&.x = 1\n.EE\n.RE\n.SH SEE ALSO\noverlayd(8)\n"
        );
    }
}
