//! A blocking nfnetlink socket: requests with an answer, dumps and transactions. The kernel does the work inside `send`, so the
//! answers are ready when it returns.

use std::fmt::Display;
use std::io;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::codec::{self, Object, Payload, Writer};
use crate::kernel::receive_buffer;
use crate::plan::OpError;

/// Maximum number of dump attempts while other processes change nf_tables. A dump takes some hundred microseconds.
const MAX_DUMP_RETRIES: u32 = 32;

/// Timeout for an answer of the kernel. It is far longer than any real wait, including that for another process's nf_tables lock.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Socket buffers in bytes. A transaction is one datagram; with set elements it grows with the number of peers.
const SOCKET_BUFFER_LEN: usize = 4 * 1024 * 1024;

/// "Interrupted system call should be restarted", `include/linux/errno.h`: the generation is outdated.
pub(super) const ERESTART: i32 = 85;

/// A request socket.
pub(super) struct NfnlSocket {
    socket: Socket,
    subsystem: u8,
    port_id: u32,
    sequence: u32,
    /// Number of successful transactions of this socket.
    commits: u32,
}

/// The error of a refused transaction. Nothing of it is in force.
pub(super) struct TransactionError {
    /// The index of the refused change; `None` if the error concerns no particular change.
    pub(super) index: Option<u32>,
    /// The reason.
    pub(super) error: OpError,
}

/// The changes of a transaction.
pub(super) struct Transaction {
    writer: Writer,
    first: u32,
    count: u32,
    total: u32,
}

impl NfnlSocket {
    /// Opens a socket for a subsystem in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or the process has no file descriptors left.
    pub(super) fn open(subsystem: u8) -> Result<NfnlSocket, OpError> {
        let open = || -> io::Result<(Socket, SocketAddr)> {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            let address = socket.bind_auto()?;
            socket.set_cap_ack(true)?;
            socket.set_ext_ack(true)?;
            let seconds = i64::try_from(ANSWER_TIMEOUT.as_secs()).unwrap_or(i64::MAX);
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(seconds, 0))?;
            // Forced sizes need CAP_NET_ADMIN. Without it the system limits apply, and every other call fails too.
            if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER_LEN).is_err() {
                setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER_LEN)?;
            }
            if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER_LEN).is_err() {
                setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER_LEN)?;
            }
            Ok((socket, address))
        };
        let (socket, address) = open().map_err(|error| io_error("opening an nfnetlink socket", &error))?;
        Ok(NfnlSocket { socket, subsystem, port_id: address.port_number(), sequence: 0, commits: 0 })
    }

    /// The port id that events of this socket's changes carry.
    pub(super) fn port_id(&self) -> u32 {
        self.port_id
    }

    /// Gets one object; `None` if it does not exist.
    pub(super) fn get<T>(
        &mut self,
        message: u8,
        family: u8,
        body: impl FnOnce(&mut Writer),
        mut read: impl FnMut(Object<'_>) -> T,
    ) -> Result<Option<T>, OpError> {
        let mut found = None;
        match self.request(message, 0, family, body, |object| found = Some(read(object))) {
            Ok(()) => Ok(found),
            Err(error) if error.errno == libc::ENOENT => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Dumps all objects of a kind in a family, filtered by the attributes from `body`.
    pub(super) fn dump(
        &mut self,
        message: u8,
        family: u8,
        body: impl FnOnce(&mut Writer),
        read: impl FnMut(Object<'_>),
    ) -> Result<(), OpError> {
        self.request(message, codec::NLM_F_DUMP, family, body, read)
    }

    /// Reads several objects at one moment, and returns their generation. `read` is called again if another process changed
    /// nf_tables meanwhile.
    pub(super) fn read_consistent<T>(
        &mut self,
        mut read: impl FnMut(&mut NfnlSocket) -> Result<T, OpError>,
    ) -> Result<(T, u32), OpError> {
        for attempt in 0..MAX_DUMP_RETRIES {
            let generation = self.generation()?;
            // The kernel increments the generation before it commits. The number alone therefore does not prove a complete
            // commit.
            if self.wait_for_generation(generation)? {
                let outcome = read(self);
                // A dump resumes by position in a list. A transaction in preparation already has its rules in that list, before
                // its generation has a number. A dump can therefore return an object twice (`__nf_tables_dump_rules` in
                // net/netfilter/nf_tables_api.c).
                let is_unchanged = self.wait_for_generation(generation)?;
                match outcome {
                    // The objects may have changed or disappeared meanwhile.
                    _ if !is_unchanged => {}
                    Ok(value) => return Ok((value, generation)),
                    Err(error) if matches!(error.errno, libc::EINTR | libc::ENOBUFS) => {}
                    Err(error) => return Err(error),
                }
            }
            std::thread::sleep(Duration::from_micros(50) * attempt);
        }
        let message = format!(
            "nf_tables changed during each of {MAX_DUMP_RETRIES} dumps: find the process that rewrites it with `nft monitor`"
        );
        Err(OpError { errno: libc::EINTR, message })
    }

    /// Waits for a running commit, and returns whether the generation is still current. It sends a transaction without changes:
    /// the kernel takes its nf_tables lock and compares the generation, but creates no new one (`nf_tables_valid_genid` and
    /// `nf_tables_commit` in net/netfilter/nf_tables_api.c).
    fn wait_for_generation(&mut self, generation: u32) -> Result<bool, OpError> {
        let begin = self.allocate_sequence(2);
        let mut writer = Writer::default();
        begin_batch(&mut writer, begin, Some(generation));
        end_batch(&mut writer, begin.wrapping_add(1));
        self.send(&writer)?;
        // The kernel only answers errors, and the answer is ready when `send` returns.
        receive_buffer::with(|buffer| {
            loop {
                buffer.clear();
                match self.socket.recv(buffer, libc::MSG_DONTWAIT) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                    Err(error) => return Err(io_error("reading the answer of nf_tables", &error)),
                }
                for received in codec::messages(buffer) {
                    match received.payload {
                        Payload::Ack { errno: ERESTART, .. } if received.sequence == begin => return Ok(false),
                        Payload::Ack { errno, text } if received.sequence == begin && errno != 0 => {
                            return Err(kernel_error(codec::NFNL_SUBSYS_NFTABLES, errno, text));
                        }
                        _ => {}
                    }
                }
            }
        })
    }

    /// Commits `total` changes together, or none of them. With a generation, only if it is still current (`ERESTART` otherwise).
    pub(super) fn commit(
        &mut self,
        generation: Option<u32>,
        total: u32,
        changes: impl FnOnce(&mut Transaction),
    ) -> Result<(), TransactionError> {
        let begin = self.allocate_sequence(total + 2);
        let mut writer = Writer::default();
        begin_batch(&mut writer, begin, generation);
        let mut transaction = Transaction { writer, first: begin.wrapping_add(1), count: 0, total };
        changes(&mut transaction);
        let Transaction { mut writer, count, .. } = transaction;
        debug_assert_eq!(count, total, "the announced number of changes");
        end_batch(&mut writer, begin.wrapping_add(1).wrapping_add(count));

        let mut failure: Option<TransactionError> = None;
        let outcome = self.send(&writer).and_then(|()| {
            self.receive(|received| {
                let index = received.sequence.wrapping_sub(begin);
                let Payload::Ack { errno, text } = received.payload else { return ReadControl::Continue };
                if index > count {
                    // An answer to an earlier transaction.
                    return ReadControl::Continue;
                }
                if errno != 0 && failure.is_none() {
                    failure = Some(TransactionError {
                        index: index.checked_sub(1),
                        error: kernel_error(codec::NFNL_SUBSYS_NFTABLES, errno, text),
                    });
                }
                // The begin message is answered only if the whole transaction was refused, the last change always.
                if index == 0 || index == count { ReadControl::Stop } else { ReadControl::Continue }
            })
        });
        match (outcome, failure) {
            (Err(error), _) => Err(TransactionError { index: None, error }),
            (Ok(()), Some(failure)) => Err(failure),
            (Ok(()), None) => {
                self.commits = self.commits.wrapping_add(1);
                Ok(())
            }
        }
    }

    /// The number of transactions by other sockets in this namespace, plus a constant.
    pub(super) fn foreign_generation(&mut self) -> Result<u32, OpError> {
        // Our own transaction without changes creates no generation. The result is then one less, which only looks like a foreign
        // change.
        Ok(self.generation()?.wrapping_sub(self.commits))
    }

    /// The number of nf_tables transactions in this namespace.
    fn generation(&mut self) -> Result<u32, OpError> {
        let read = |object: Object<'_>| codec::attribute_u32(object.attributes, codec::NFTA_GEN_ID);
        self.get(codec::NFT_MSG_GETGEN, 0, |_| {}, read)?
            .flatten()
            .ok_or_else(|| OpError { errno: 0, message: "the kernel did not report the nf_tables generation".to_owned() })
    }

    fn request(
        &mut self,
        message: u8,
        flags: u16,
        family: u8,
        body: impl FnOnce(&mut Writer),
        mut read: impl FnMut(Object<'_>),
    ) -> Result<(), OpError> {
        let sequence = self.allocate_sequence(1);
        let dump = flags & codec::NLM_F_DUMP != 0;
        // A dump ends with a done message, other requests with the acknowledgement.
        let flags = flags | codec::NLM_F_REQUEST | if dump { 0 } else { codec::NLM_F_ACK };
        let mut writer = Writer::default();
        writer.message(codec::message_type(self.subsystem, message), flags, sequence, family, 0, body);
        self.send(&writer)?;
        let subsystem = self.subsystem;
        let mut interrupted = false;
        let mut failure = None;
        self.receive(|received| {
            if received.sequence != sequence {
                return ReadControl::Continue;
            }
            interrupted |= received.interrupted;
            match received.payload {
                Payload::Object(object) => read(object),
                Payload::Done { errno: 0 } | Payload::Ack { errno: 0, .. } => return ReadControl::Stop,
                Payload::Done { errno } => {
                    failure = Some(kernel_error(subsystem, errno, None));
                    return ReadControl::Stop;
                }
                Payload::Ack { errno, text } => {
                    failure = Some(kernel_error(subsystem, errno, text));
                    return ReadControl::Stop;
                }
                Payload::Other => {}
            }
            ReadControl::Continue
        })?;
        match failure {
            Some(error) => Err(error),
            None if interrupted => Err(kernel_error(subsystem, libc::EINTR, None)),
            None => Ok(()),
        }
    }

    /// Reserves sequence numbers for several messages; returns the first.
    fn allocate_sequence(&mut self, messages: u32) -> u32 {
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(messages);
        first
    }

    fn send(&mut self, writer: &Writer) -> Result<(), OpError> {
        let Some(bytes) = writer.finish() else {
            return Err(OpError {
                errno: libc::EMSGSIZE,
                message: "a rule is too long for a netlink attribute (64 KiB)".to_owned(),
            });
        };
        match self.socket.send(bytes, 0) {
            Ok(_) => Ok(()),
            Err(error) => Err(io_error(format_args!("sending {} bytes to nf_tables", bytes.len()), &error)),
        }
    }

    /// Passes received messages to `handle` until it returns `Stop`. The rest of that datagram is passed on too.
    fn receive(&mut self, mut handle: impl FnMut(codec::ReceivedMessage<'_>) -> ReadControl) -> Result<(), OpError> {
        receive_buffer::with(|buffer| {
            loop {
                buffer.clear();
                match self.socket.recv(buffer, 0) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        let message = format!("no answer from nf_tables within {} s", ANSWER_TIMEOUT.as_secs());
                        return Err(OpError { errno: libc::ETIMEDOUT, message });
                    }
                    Err(error) => return Err(io_error("reading the answer of nf_tables", &error)),
                }
                let mut stopped = false;
                for received in codec::messages(buffer) {
                    stopped |= matches!(handle(received), ReadControl::Stop);
                }
                if stopped {
                    return Ok(());
                }
            }
        })
    }
}

impl Transaction {
    /// Adds a change.
    pub(super) fn push_message(&mut self, message: u8, flags: u16, family: u8, body: impl FnOnce(&mut Writer)) {
        let sequence = self.first.wrapping_add(self.count);
        self.count += 1;
        // Errors are always answered. One acknowledgement at the end confirms that all changes were processed.
        let last = if self.count == self.total { codec::NLM_F_ACK } else { 0 };
        self.writer.message(codec::nft_message_type(message), flags | last | codec::NLM_F_REQUEST, sequence, family, 0, body);
    }
}

fn begin_batch(writer: &mut Writer, sequence: u32, generation: Option<u32>) {
    let resource = u16::from(codec::NFNL_SUBSYS_NFTABLES);
    writer.message(codec::NFNL_MSG_BATCH_BEGIN, codec::NLM_F_REQUEST, sequence, 0, resource, |w| {
        if let Some(generation) = generation {
            w.u32(codec::NFNL_BATCH_GENID, generation);
        }
    });
}

fn end_batch(writer: &mut Writer, sequence: u32) {
    let resource = u16::from(codec::NFNL_SUBSYS_NFTABLES);
    writer.message(codec::NFNL_MSG_BATCH_END, codec::NLM_F_REQUEST, sequence, 0, resource, |_| {});
}

enum ReadControl {
    Continue,
    Stop,
}

/// An error from the kernel, with the remedy if one is known.
fn kernel_error(subsystem: u8, errno: i32, text: Option<String>) -> OpError {
    let mut message = text.unwrap_or_else(|| io::Error::from_raw_os_error(errno).to_string());
    let advice = match errno {
        libc::EPERM if subsystem == codec::NFNL_SUBSYS_CTNETLINK => {
            "conntrack needs CAP_NET_ADMIN in the network namespace's user namespace"
        }
        libc::EINVAL | libc::EOPNOTSUPP if subsystem == codec::NFNL_SUBSYS_CTNETLINK => {
            "the kernel may lack ctnetlink, try `modprobe nf_conntrack_netlink`"
        }
        libc::EPERM => {
            "nf_tables needs CAP_NET_ADMIN in the network namespace's user namespace, and only its owner can change a table with the owner flag"
        }
        libc::ENOENT | libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT => {
            "the kernel may lack nf_tables or its NAT support, try `modprobe nf_tables nft_chain_nat nft_masq`"
        }
        _ => "",
    };
    if !advice.is_empty() {
        message.push_str(": ");
        message.push_str(advice);
    }
    OpError { errno, message }
}

/// A failed system call.
pub(super) fn io_error(context: impl Display, error: &io::Error) -> OpError {
    let advice = match error.raw_os_error() {
        Some(libc::EPROTONOSUPPORT) => ": the kernel has no nfnetlink, try `modprobe nfnetlink nf_tables`",
        Some(libc::EMSGSIZE) => ": the message exceeds the send buffer, raise the sysctl net.core.wmem_max",
        _ => "",
    };
    let message = format!("{context}: {error}{advice}");
    OpError { errno: error.raw_os_error().unwrap_or(0), message }
}
