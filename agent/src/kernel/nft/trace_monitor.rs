//! Traces the packets of a flow through the rules. A private table sets `meta nftrace`, and the kernel sends trace events.
//!
//! The socket owns the table (`NFT_TABLE_F_OWNER`, since Linux 5.12). The kernel removes the table when the socket is closed,
//! also if the process is killed.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use serde::{Deserialize, Serialize};

use super::codec::{
    self, NFPROTO_BRIDGE, NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6, NLM_F_APPEND, NLM_F_CREATE, Object, Payload, Writer,
};
use super::expr::uapi::*;
use super::nfnl_socket::{NfnlSocket, io_error};
use super::snapshot::family_name;
use crate::kernel::packet::ethertype;
use crate::model::Family;
use crate::plan::OpError;

/// Prefix of the table name. The process id follows, so that two processes can trace at once.
pub const TRACE_TABLE: &str = "overlay-trace";

const NFNLGRP_NFTRACE: u32 = 9;
const NFT_MSG_TRACE: u8 = 17;
/// `NFT_TABLE_F_OWNER`.
const NFT_TABLE_F_OWNER: u32 = 2;
const NFT_META_NFTRACE: u32 = 12;
const NFTA_META_SREG: u16 = 3;
const NFTA_TRACE_TABLE: u16 = 1;
const NFTA_TRACE_CHAIN: u16 = 2;
const NFTA_TRACE_RULE_HANDLE: u16 = 3;
const NFTA_TRACE_TYPE: u16 = 4;
const NFTA_TRACE_VERDICT: u16 = 5;
const NFTA_TRACE_ID: u16 = 6;
const NFTA_TRACE_IIF: u16 = 10;
const NFTA_TRACE_OIF: u16 = 12;
const NFTA_TRACE_POLICY: u16 = 16;
/// `NFT_TRACETYPE_POLICY`.
const NFT_TRACETYPE_POLICY: u32 = 1;
/// `NFT_TRACETYPE_RULE`.
const NFT_TRACETYPE_RULE: u32 = 3;

/// Runs before all common chains: connection tracking's defragmentation is at -400 (`linux/netfilter_ipv4.h`).
const PRIORITY: i32 = -450;
/// Prerouting and output (`enum nf_inet_hooks`).
const HOOKS: [(&str, u32); 2] = [("prerouting", 0), ("output", 3)];
/// Bytes per receive. A trace event has some hundred bytes, one per datagram.
const RECEIVE_BUFFER_LEN: usize = 64 * 1024;
/// Socket receive buffer in bytes.
const SOCKET_BUFFER_LEN: usize = 1024 * 1024;

/// One step of a packet through the rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceEvent {
    /// Trace id of the packet.
    pub packet: u32,
    /// `ip`, `ip6`, `inet`, `bridge`.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The rule's handle; absent for the policy or the end of a chain.
    pub handle: Option<u64>,
    /// `accept`, `drop`, `continue`, `jump NAME`, `goto NAME`, `return`.
    pub verdict: String,
    /// Index of the input interface.
    pub input: Option<u32>,
    /// Index of the output interface.
    pub output: Option<u32>,
}

/// The result of one read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TraceRead {
    /// Steps of packets of the flow.
    Events(Vec<TraceEvent>),
    /// No event before the timeout.
    Timeout,
    /// The receive buffer overflowed; some events are lost.
    Lost,
}

/// Traces flows in the calling thread's namespace while it exists.
pub struct TraceMonitor {
    /// The socket that owns the table.
    _owner: NfnlSocket,
    socket: Socket,
    table: String,
    buffer: Vec<u8>,
}

impl TraceMonitor {
    /// Starts tracing packets from the first address of a pair to the second. The chains at the prerouting and output hooks mark
    /// them.
    ///
    /// # Errors
    /// No permission, no nf_tables, or a kernel older than 5.12.
    pub fn open(pairs: &[(IpAddr, IpAddr)], timeout: Duration) -> Result<TraceMonitor, OpError> {
        let socket = open_trace_socket(timeout).map_err(|error| io_error("subscribing to nf_tables trace events", &error))?;
        let table = format!("{TRACE_TABLE}-{}", std::process::id());
        let mut owner = NfnlSocket::open(codec::NFNL_SUBSYS_NFTABLES)?;
        let families: Vec<Family> =
            Family::ALL.into_iter().filter(|family| pairs.iter().any(|(source, _)| Family::of(*source) == *family)).collect();
        if families.is_empty() {
            return Err(OpError { errno: libc::EINVAL, message: "no addresses to trace".to_owned() });
        }
        let count = 1 + HOOKS.len() + HOOKS.len() * pairs.len();
        let total = u32::try_from(2 * count).unwrap_or(u32::MAX);
        let outcome = owner.commit(None, total, |transaction| {
            for family in [NFPROTO_INET, NFPROTO_BRIDGE] {
                transaction.push_message(codec::NFT_MSG_NEWTABLE, NLM_F_CREATE, family, |w| {
                    w.text(codec::NFTA_TABLE_NAME, &table);
                    w.u32(codec::NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER);
                });
                for (name, hook) in HOOKS {
                    transaction.push_message(codec::NFT_MSG_NEWCHAIN, NLM_F_CREATE, family, |w| {
                        w.text(codec::NFTA_CHAIN_TABLE, &table);
                        w.text(codec::NFTA_CHAIN_NAME, name);
                        w.nest(codec::NFTA_CHAIN_HOOK, |w| {
                            w.u32(codec::NFTA_HOOK_HOOKNUM, hook);
                            w.u32(codec::NFTA_HOOK_PRIORITY, PRIORITY.cast_unsigned());
                        });
                        w.text(codec::NFTA_CHAIN_TYPE, "filter");
                    });
                    for pair in pairs {
                        transaction.push_message(codec::NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, family, |w| {
                            w.text(codec::NFTA_RULE_TABLE, &table);
                            w.text(codec::NFTA_RULE_CHAIN, name);
                            w.nest(codec::NFTA_RULE_EXPRESSIONS, |w| write_nftrace_match(w, *pair, family));
                        });
                    }
                }
            }
        });
        outcome.map_err(|failure| {
            let hint = if failure.error.errno == libc::EOPNOTSUPP { "; tracing needs Linux 5.12" } else { "" };
            let message = format!("cannot create the trace tables {table}: {}{hint}", failure.error.message);
            OpError { errno: failure.error.errno, message }
        })?;
        Ok(TraceMonitor { _owner: owner, socket, table, buffer: Vec::with_capacity(RECEIVE_BUFFER_LEN) })
    }

    /// Waits for the next events, at most for the timeout given to [`TraceMonitor::open`].
    ///
    /// # Errors
    /// The socket failed.
    pub fn wait(&mut self) -> Result<TraceRead, OpError> {
        self.buffer.clear();
        match self.socket.recv(&mut self.buffer, 0) {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(TraceRead::Timeout);
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(TraceRead::Lost),
            Err(error) => return Err(io_error("reading nf_tables trace events", &error)),
        }
        let mut events = Vec::new();
        for received in codec::messages(&self.buffer) {
            if let Payload::Object(object) = received.payload
                && object.kind == NFT_MSG_TRACE
            {
                events.extend(read_trace_event(object).filter(|event| event.table != self.table));
            }
        }
        Ok(TraceRead::Events(events))
    }
}

fn open_trace_socket(timeout: Duration) -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_LEN).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_LEN)?;
    }
    let micros = i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX);
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(micros / 1_000_000, micros % 1_000_000))?;
    socket.add_membership(NFNLGRP_NFTRACE)?;
    Ok(socket)
}

/// Writes `PROTOCOL ip saddr SOURCE ip daddr DESTINATION meta nftrace set 1`.
fn write_nftrace_match(w: &mut Writer, (source, destination): (IpAddr, IpAddr), table: u8) {
    let family = Family::of(source);
    let expression = |w: &mut Writer, name: &str, data: &dyn Fn(&mut Writer)| {
        w.nest(NFTA_LIST_ELEM, |w| {
            w.text(NFTA_EXPR_NAME, name);
            w.nest(NFTA_EXPR_DATA, data);
        });
    };
    let compare = |w: &mut Writer, value: &[u8]| {
        expression(w, "cmp", &|w| {
            w.u32(NFTA_CMP_SREG, NFT_REG_1);
            w.u32(NFTA_CMP_OP, NFT_CMP_EQ);
            w.nest(NFTA_CMP_DATA, |w| w.bytes(NFTA_DATA_VALUE, value));
        });
    };
    let (key, protocol) = match (table, family) {
        (NFPROTO_BRIDGE, family) => (NFT_META_PROTOCOL, ethertype(family).to_vec()),
        (_, Family::V4) => (NFT_META_NFPROTO, vec![NFPROTO_IPV4]),
        (_, Family::V6) => (NFT_META_NFPROTO, vec![NFPROTO_IPV6]),
    };
    expression(w, "meta", &|w| {
        w.u32(NFTA_META_DREG, NFT_REG_1);
        w.u32(NFTA_META_KEY, key);
    });
    compare(w, &protocol);
    let (source_offset, length) = match family {
        Family::V4 => (12, 4),
        Family::V6 => (8, 16),
    };
    for (offset, address) in [(source_offset, source), (source_offset + length, destination)] {
        expression(w, "payload", &|w| {
            w.u32(NFTA_PAYLOAD_DREG, NFT_REG_1);
            w.u32(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER);
            w.u32(NFTA_PAYLOAD_OFFSET, offset);
            w.u32(NFTA_PAYLOAD_LEN, length);
        });
        match address {
            IpAddr::V4(address) => compare(w, &address.octets()),
            IpAddr::V6(address) => compare(w, &address.octets()),
        }
    }
    expression(w, "immediate", &|w| {
        w.u32(NFTA_IMMEDIATE_DREG, NFT_REG_1);
        w.nest(NFTA_IMMEDIATE_DATA, |w| w.bytes(NFTA_DATA_VALUE, &[1]));
    });
    expression(w, "meta", &|w| {
        w.u32(NFTA_META_KEY, NFT_META_NFTRACE);
        w.u32(NFTA_META_SREG, NFT_REG_1);
    });
}

fn read_trace_event(object: Object<'_>) -> Option<TraceEvent> {
    let attributes = object.attributes;
    let text = |kind| {
        let name = codec::attribute(attributes, kind).map(codec::strip_nul).unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    };
    let kind = codec::attribute_u32(attributes, NFTA_TRACE_TYPE)?;
    let verdict = match kind {
        NFT_TRACETYPE_POLICY => codec::attribute_u32(attributes, NFTA_TRACE_POLICY).map(|code| verdict_name(code, "")),
        NFT_TRACETYPE_RULE => codec::attribute(attributes, NFTA_TRACE_VERDICT).and_then(|verdict| {
            let chain = codec::attribute(verdict, NFTA_VERDICT_CHAIN).map(codec::strip_nul).unwrap_or_default();
            Some(verdict_name(codec::attribute_u32(verdict, NFTA_VERDICT_CODE)?, &String::from_utf8_lossy(chain)))
        }),
        _ => Some("return".to_owned()),
    };
    Some(TraceEvent {
        packet: codec::attribute_u32(attributes, NFTA_TRACE_ID)?,
        family: family_name(object.family).to_owned(),
        table: text(NFTA_TRACE_TABLE),
        chain: text(NFTA_TRACE_CHAIN),
        handle: codec::attribute(attributes, NFTA_TRACE_RULE_HANDLE).and_then(codec::be64).filter(|_| kind == NFT_TRACETYPE_RULE),
        verdict: verdict.unwrap_or_default(),
        input: codec::attribute_u32(attributes, NFTA_TRACE_IIF),
        output: codec::attribute_u32(attributes, NFTA_TRACE_OIF),
    })
}

/// The `nft` keyword of a verdict.
fn verdict_name(code: u32, chain: &str) -> String {
    const NFT_GOTO: u32 = (-4_i32).cast_unsigned();
    match code {
        codec::NF_DROP => "drop".to_owned(),
        codec::NF_ACCEPT => "accept".to_owned(),
        NFT_JUMP => format!("jump {chain}"),
        NFT_GOTO => format!("goto {chain}"),
        NFT_RETURN => "return".to_owned(),
        _ => "continue".to_owned(),
    }
}
