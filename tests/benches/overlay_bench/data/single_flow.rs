//! Cost of single operations: one thread on one processor holds both ends; it sends, and then reads.
//!
//! No thread is woken and none waits. The kernel delivers each packet to the other end before the call returns, so the elapsed
//! time is the cost of the path. Rules with a cost of one per cent are measurable.

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::path::{TrafficPath, UDP_PAYLOAD_LEN};

/// Packets in flight.
const PACKETS_IN_FLIGHT: usize = 32;
/// Bytes in flight: less than the buffers of a new connection.
const BLOCK_SIZE: usize = 48 << 10;

/// The operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// UDP packets of [`UDP_PAYLOAD_LEN`] bytes.
    Packet,
    /// One byte over TCP and one back.
    Request,
    /// Bulk TCP, in megabytes.
    Megabyte,
}

impl Operation {
    /// All operations.
    pub const ALL: [Operation; 3] = [Operation::Packet, Operation::Request, Operation::Megabyte];

    /// The label of its cost, and the unit.
    pub const fn label(self) -> (&'static str, &'static str) {
        match self {
            Operation::Packet => ("a UDP packet of 64 bytes", "us"),
            Operation::Request => ("one byte by TCP and one back", "us"),
            Operation::Megabyte => ("a megabyte by TCP", "us"),
        }
    }
}

/// Both ends of a path.
#[derive(Debug)]
pub struct FlowEnds {
    datagrams: (UdpSocket, UdpSocket),
    stream: (TcpStream, TcpStream),
}

impl FlowEnds {
    /// Opens both ends.
    pub fn open(path: &TrafficPath) -> anyhow::Result<FlowEnds> {
        Ok(FlowEnds { datagrams: path.datagrams()?, stream: path.connect()? })
    }

    /// Sends for some time. Returns the microseconds of one operation.
    pub fn cost(&mut self, kind: Operation, time: Duration) -> anyhow::Result<f64> {
        let start = Instant::now();
        let mut operations = 0.0;
        loop {
            operations += match kind {
                Operation::Packet => self.packets(),
                Operation::Request => self.requests(),
                Operation::Megabyte => self.block(),
            }
            .context("what was sent does not arrive")?;
            let elapsed = start.elapsed();
            if elapsed >= time {
                return Ok(elapsed.as_secs_f64() * 1e6 / operations);
            }
        }
    }

    fn packets(&mut self) -> std::io::Result<f64> {
        let (near, far) = &self.datagrams;
        let mut packet = [0x5a; UDP_PAYLOAD_LEN];
        for _ in 0..PACKETS_IN_FLIGHT {
            near.send(&packet)?;
        }
        for _ in 0..PACKETS_IN_FLIGHT {
            far.recv(&mut packet)?;
        }
        Ok(32.0)
    }

    fn requests(&mut self) -> std::io::Result<f64> {
        let (near, far) = &mut self.stream;
        let mut byte = [1];
        for _ in 0..8 {
            near.write_all(&byte)?;
            far.read_exact(&mut byte)?;
            far.write_all(&byte)?;
            near.read_exact(&mut byte)?;
        }
        Ok(8.0)
    }

    fn block(&mut self) -> std::io::Result<f64> {
        let (near, far) = &mut self.stream;
        let mut block = [0; BLOCK_SIZE];
        near.write_all(&block)?;
        far.read_exact(&mut block)?;
        Ok(49_152.0 / 1e6)
    }
}
