//! Servers that answer each caller with its source address, and calls to them.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use overlay_agent::kernel::netns::Netns;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tokio::task::JoinSet;

use crate::{ExpectContext, bind};

/// Time limit of a call: a lost SYN is retransmitted after one and three seconds (RFC 6298).
const CALL_TIMEOUT: Duration = Duration::from_secs(8);

/// The protocol of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// A connection.
    Tcp,
    /// A datagram.
    Udp,
}

/// Serves ports on every address of a namespace until dropped.
pub fn serve(netns: &Netns, ports: &[(Protocol, u16)]) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for (protocol, port) in ports {
        let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
        let what = format!("serve {protocol:?} {port}");
        match protocol {
            Protocol::Tcp => {
                tasks.spawn(serve_tcp(TcpListener::from_std(bind::tcp(netns, at)).expect_ok(&what)));
            }
            Protocol::Udp => {
                tasks.spawn(serve_udp(UdpSocket::from_std(bind::udp(netns, at)).expect_ok(&what)));
            }
        }
    }
    tasks
}

/// Answers each line of a caller, so that a test can check that its connection still works.
async fn serve_tcp(listener: TcpListener) {
    let mut callers = JoinSet::new();
    loop {
        let Ok((mut stream, caller)) = listener.accept().await else { continue };
        callers.spawn(async move {
            let output = format!("{}\n", caller.ip().to_canonical());
            let mut buffer = [0; 64];
            while let Ok(1..) = stream.read(&mut buffer).await {
                if stream.write_all(output.as_bytes()).await.is_err() {
                    break;
                }
            }
        });
    }
}

async fn serve_udp(socket: UdpSocket) {
    let mut buffer = [0; 64];
    loop {
        // An error belongs to an earlier packet.
        if let Ok((_, caller)) = socket.recv_from(&mut buffer).await {
            let output = format!("{}\n", caller.ip().to_canonical());
            let _sent = socket.send_to(output.as_bytes(), caller).await;
        }
    }
}

/// A TCP connection.
#[derive(Debug)]
pub struct Connection(tokio::net::TcpStream);

impl Connection {
    /// Connects from a namespace.
    pub async fn open(from: &Netns, to: SocketAddr) -> Result<Connection, String> {
        Connection::open_from(from, 0, to).await
    }

    /// Connects from a port of a namespace.
    pub async fn open_from(from: &Netns, port: u16, to: SocketAddr) -> Result<Connection, String> {
        let open = || {
            let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            if port != 0 {
                let any: IpAddr = if to.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
                socket.bind(SocketAddr::new(any, port))?;
            }
            Ok::<_, io::Error>(socket)
        };
        let socket = from.run(open).expect_ok("enter").expect_ok("a socket");
        Ok(Connection(socket.connect(to).await.map_err(|error| error.to_string())?))
    }

    /// Sends a line; returns the source address that the server sees.
    pub async fn ask(&mut self) -> Result<IpAddr, String> {
        let mut buffer = [0; 64];
        let exchange = async {
            self.0.write_all(b"?\n").await?;
            self.0.read(&mut buffer).await
        };
        let length = tokio::time::timeout(CALL_TIMEOUT, exchange)
            .await
            .map_err(|_| "no answer".to_owned())?
            .map_err(|error| error.to_string())?;
        parse_address(&buffer[..length])
    }
}

fn parse_address(reply: &[u8]) -> Result<IpAddr, String> {
    let text = String::from_utf8_lossy(reply);
    text.trim().parse().map_err(|error| format!("`{text}`: {error}"))
}

/// Calls from a namespace; returns the source address that the server sees. A UDP answer must come from the called address.
pub async fn observe_source(from: &Netns, to: SocketAddr, protocol: Protocol) -> Result<IpAddr, String> {
    observe_source_within(from, to, protocol, CALL_TIMEOUT).await
}

/// The same with another time limit.
pub async fn observe_source_within(from: &Netns, to: SocketAddr, protocol: Protocol, limit: Duration) -> Result<IpAddr, String> {
    let called = async {
        match protocol {
            Protocol::Tcp => Connection::open(from, to).await?.ask().await,
            Protocol::Udp => observe_source_udp(from, to).await,
        }
    };
    tokio::time::timeout(limit, called).await.unwrap_or_else(|_| Err("no answer".to_owned()))
}

async fn observe_source_udp(from: &Netns, to: SocketAddr) -> Result<IpAddr, String> {
    let any: IpAddr = if to.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::from_std(bind::udp(from, (any, 0).into())).expect_ok("a socket");
    let exchange = async {
        socket.connect(to).await?;
        socket.send(b"?").await?;
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).await?;
        Ok::<_, io::Error>(buffer[..length].to_vec())
    };
    parse_address(&exchange.await.map_err(|error| error.to_string())?)
}
