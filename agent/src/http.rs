//! HTTP/1.0 for small clients: one request per connection, whose end ends the response. Pure: the caller has the connection.

use std::fmt::Display;
use std::io::{self, ErrorKind};

/// A complete response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Status line and headers.
    pub head: String,
    /// Body.
    pub body: Vec<u8>,
}

/// Formats a request; an empty body is none.
pub fn request(method: &str, path: &str, host: impl Display, json: &[u8]) -> Vec<u8> {
    let length = json.len();
    let content = format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
    let content = if json.is_empty() { "" } else { &content };
    [format!("{method} {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n{content}\r\n").as_bytes(), json].concat()
}

impl Response {
    /// Parses all bytes up to the end of the connection.
    ///
    /// # Errors
    /// `UnexpectedEof` if the head or the body is incomplete, `InvalidData` if it is not HTTP.
    pub fn parse(mut bytes: Vec<u8>) -> io::Result<Response> {
        let head = bytes.windows(4).position(|window| window == b"\r\n\r\n").ok_or(ErrorKind::UnexpectedEof)?;
        let mut body = bytes.split_off(head + 4);
        let head = String::from_utf8_lossy(&bytes).into_owned();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "not an HTTP response"))?;
        let response = Response { status, head, body: Vec::new() };
        if let Some(length) = response.header("content-length").and_then(|length| length.parse().ok()) {
            if body.len() < length {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            body.truncate(length);
        }
        Ok(Response { body, ..response })
    }

    /// The value of the first header with that name.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn response_ends_by_length_or_connection() {
        let parse = |text: &str| Response::parse(text.as_bytes().to_vec());
        let read = parse("HTTP/1.0 200 OK\r\nDate: now\r\n\r\n{}\r\nDate: later\r\n").unwrap();
        assert_eq!((read.status, read.header("date"), read.body.len()), (200, Some("now"), 17));
        let read = parse("HTTP/1.1 409 Conflict\r\ncontent-length:2\r\n\r\n{}\r\nDate: later\r\n").unwrap();
        assert_eq!((read.status, read.header("date"), read.body.as_slice()), (409, None, &b"{}"[..]));
        for (text, kind) in [
            ("HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n{}", ErrorKind::UnexpectedEof),
            ("HTTP/1.0 200 OK\r\n", ErrorKind::UnexpectedEof),
            ("", ErrorKind::UnexpectedEof),
            ("SSH-2.0\r\n\r\n", ErrorKind::InvalidData),
        ] {
            assert_eq!(parse(text).unwrap_err().kind(), kind, "{text}");
        }
    }

    #[test]
    fn only_body_has_content_headers() {
        let text = |body: &[u8]| String::from_utf8(request("PUT", "/a", "h:1", body)).unwrap();
        assert_eq!(text(b""), "PUT /a HTTP/1.0\r\nHost: h:1\r\nConnection: close\r\n\r\n");
        assert!(text(b"{}").ends_with("close\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"));
    }
}
