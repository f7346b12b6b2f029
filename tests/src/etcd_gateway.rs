//! etcd's JSON gateway over one persistent HTTP/1.1 connection, with the times of each request and response.
//!
//! Paths and fields: etcd's `rpc.swagger.json`; keys and values are base64 there.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

/// Time limit of etcd's response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of operations of one transaction; etcd's default limit is 128.
const MAX_OPS_PER_TXN: usize = 100;

/// A connection to etcd.
#[derive(Debug)]
pub struct EtcdGateway {
    host: String,
    stream: BufReader<TcpStream>,
}

/// The times of a request and its response.
#[derive(Debug, Clone, Copy)]
pub struct RequestTiming {
    /// Directly before the request was written.
    pub sent: Instant,
    /// Directly after the response was read.
    pub acknowledged: Instant,
}

impl EtcdGateway {
    /// Connects from the calling thread's namespace.
    pub fn connect(address: SocketAddr) -> anyhow::Result<EtcdGateway> {
        let connect = || -> io::Result<TcpStream> {
            let stream = TcpStream::connect_timeout(&address, RESPONSE_TIMEOUT)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
            Ok(stream)
        };
        let stream = connect().with_context(|| format!("cannot connect to etcd at {address}"))?;
        Ok(EtcdGateway { host: address.to_string(), stream: BufReader::new(stream) })
    }

    /// Writes a key.
    pub fn put(&mut self, key: &str, value: &str) -> anyhow::Result<RequestTiming> {
        self.request("/v3/kv/put", &put_request(key.as_bytes(), value.as_bytes())).map(|(exchange, _)| exchange)
    }

    /// Deletes a key.
    pub fn delete(&mut self, key: &str) -> anyhow::Result<RequestTiming> {
        self.request("/v3/kv/deleterange", &json!({ "key": base64(key.as_bytes()) })).map(|(exchange, _)| exchange)
    }

    /// Deletes a range of keys, `to` excluded. Returns the number of deleted keys.
    pub fn delete_range(&mut self, from: &str, to: &str) -> anyhow::Result<u64> {
        let request = json!({ "key": base64(from.as_bytes()), "range_end": base64(to.as_bytes()) });
        let (_, answer) = self.request("/v3/kv/deleterange", &request)?;
        Ok(answer["deleted"].as_str().and_then(|count| count.parse().ok()).unwrap_or(0))
    }

    /// Writes many keys, in transactions of several keys.
    pub fn put_all<K: AsRef<[u8]>, V: AsRef<[u8]>>(&mut self, pairs: &[(K, V)]) -> anyhow::Result<()> {
        for chunk in pairs.chunks(MAX_OPS_PER_TXN) {
            let put = |(key, value): &(K, V)| json!({ "requestPut": put_request(key.as_ref(), value.as_ref()) });
            let operations: Vec<Value> = chunk.iter().map(put).collect();
            let (_, answer) = self.request("/v3/kv/txn", &json!({ "success": operations }))?;
            ensure!(answer["succeeded"] == true, "etcd did not take {} leases: {answer}", chunk.len());
        }
        Ok(())
    }

    fn request(&mut self, path: &str, body: &Value) -> anyhow::Result<(RequestTiming, Value)> {
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            self.host,
            body.len()
        );
        let request = head + &body;
        let sent = Instant::now();
        self.stream.get_mut().write_all(request.as_bytes())?;
        let (status, answer) = self.read_response().with_context(|| format!("cannot read etcd's response to {path}"))?;
        let acknowledged = Instant::now();
        if status != 200 {
            bail!("etcd answers {path} with {status}: {}", String::from_utf8_lossy(&answer));
        }
        Ok((RequestTiming { sent, acknowledged }, serde_json::from_slice(&answer)?))
    }

    /// Reads a response of known length or in chunks (RFC 9112 sections 6.3 and 7.1).
    fn read_response(&mut self) -> anyhow::Result<(u16, Vec<u8>)> {
        let status = self.read_line()?;
        let code = status.split(' ').nth(1).and_then(|code| code.parse().ok()).with_context(|| format!("`{status}`"))?;
        let (mut length, mut chunked) = (0, false);
        loop {
            let line = self.read_line()?.to_ascii_lowercase();
            match line.split_once(':') {
                Some(("content-length", value)) => length = value.trim().parse()?,
                Some(("transfer-encoding", value)) => chunked = value.trim() == "chunked",
                Some(_) => {}
                None => break,
            }
        }
        let mut body = Vec::new();
        loop {
            if chunked {
                length = usize::from_str_radix(self.read_line()?.trim(), 16)?;
            }
            let start = body.len();
            body.resize(start + length, 0);
            self.stream.read_exact(&mut body[start..])?;
            if !chunked {
                return Ok((code, body));
            }
            self.read_line()?;
            if length == 0 {
                return Ok((code, body));
            }
        }
    }

    fn read_line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}

fn put_request(key: &[u8], value: &[u8]) -> Value {
    json!({ "key": base64(key), "value": base64(value) })
}

/// Base64 (RFC 4648 section 4).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let index = bits >> (18 - 6 * digit) & 0x3f;
            text.push(if digit <= group.len() { char::from(DIGITS[index as usize]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn base64_as_in_rfc_4648() {
        for (text, wanted) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(text.as_bytes()), wanted);
        }
    }

    #[test]
    fn chunked_and_sized_responses_are_read() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let answers = [
                "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n",
                "HTTP/1.1 500 Oh\r\nContent-Length: 3\r\n\r\nbad",
            ];
            let mut request = [0; 4096];
            for answer in answers {
                assert!(stream.read(&mut request).expect("a request") > 0);
                stream.write_all(answer.as_bytes()).expect("writable");
            }
        });
        let mut gateway = EtcdGateway::connect(address).expect("connected");
        let exchange = gateway.put("k", "v").expect("an answer");
        assert!(exchange.acknowledged >= exchange.sent);
        gateway.delete("k").expect("an answer in chunks");
        assert!(gateway.delete("k").expect_err("an error").to_string().contains("500: bad"));
        server.join().expect("the server ends");
    }
}
