//! Attaches classic BPF programs (`linux/filter.h`) to sockets.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Attaches a program that decides how many bytes of each packet or message a socket keeps.
pub(super) fn attach_program(socket: BorrowedFd<'_>, program: &mut [libc::sock_filter]) -> io::Result<()> {
    let filter = libc::sock_fprog { len: u16::try_from(program.len()).unwrap_or(u16::MAX), filter: program.as_mut_ptr() };
    let length = libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).unwrap_or_default();
    // SAFETY: the program and its description live until the call returns; the kernel copies both (sk_attach_filter in
    // net/core/filter.c).
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const filter).cast(), length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
