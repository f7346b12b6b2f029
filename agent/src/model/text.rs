//! Text from outside, made safe for logs and terminals.

/// Sanitises text for logs and terminals: control characters are replaced, at most 80 characters are kept.
pub fn printable(text: &str) -> String {
    text.chars().take(80).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
