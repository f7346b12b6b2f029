//! The socket filter that keeps the agent's own changes from its monitors.

use std::io;
use std::os::fd::BorrowedFd;

use super::peer_messages::AF_BRIDGE;
use super::socket_filter::attach_program;

/// Number of our sockets that cause events.
pub(super) const OWN_SOCKETS: usize = 2;

/// Attaches a filter that drops messages whose `nlmsg_pid` is one of ours, and FDB events unless `with_fdb`. The kernel runs this
/// classic BPF program (`linux/filter.h`) on each message before it is queued.
pub(super) fn attach_filter(socket: BorrowedFd<'_>, own_ports: [u32; OWN_SOCKETS], with_fdb: bool) -> io::Result<()> {
    /// Offsets of `nlmsg_type` and `nlmsg_pid` in `struct nlmsghdr`, and of `ndm_family` behind it.
    const TYPE: u32 = 4;
    const PORT: u32 = 12;
    const FAMILY: u32 = 16;
    /// `BPF_LD | BPF_ABS` of a word, of half of one (both in network byte order) and of a byte.
    const LOAD: u16 = 0x20;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    /// `BPF_JMP | BPF_JEQ | BPF_K`.
    const JUMP_IF_EQUAL: u16 = 0x15;
    /// `BPF_RET | BPF_K`: how many bytes of the message are kept.
    const RETURN: u16 = 0x06;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let loaded = |port: u32| u32::from_be_bytes(port.to_ne_bytes());
    let loaded_half = |kind: u16| u32::from(u16::from_be_bytes(kind.to_ne_bytes()));
    let family = if with_fdb { u32::MAX } else { AF_BRIDGE.into() };
    let mut program = [
        step(LOAD, 0, 0, PORT),
        step(JUMP_IF_EQUAL, 7, 0, loaded(own_ports[0])),
        step(JUMP_IF_EQUAL, 6, 0, loaded(own_ports[1])),
        step(LOAD_BYTE, 0, 0, FAMILY),
        // Link messages have a family at the same offset, AF_BRIDGE in those of bridges about their ports: so the type is checked
        // too.
        step(JUMP_IF_EQUAL, 0, 3, family),
        step(LOAD_HALF, 0, 0, TYPE),
        step(JUMP_IF_EQUAL, 2, 0, loaded_half(libc::RTM_NEWNEIGH)),
        step(JUMP_IF_EQUAL, 1, 0, loaded_half(libc::RTM_DELNEIGH)),
        step(RETURN, 0, 0, u32::MAX),
        step(RETURN, 0, 0, 0),
    ];
    attach_program(socket, &mut program)
}
