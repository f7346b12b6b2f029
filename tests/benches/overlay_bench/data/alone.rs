//! One thread on one processor that holds both ends: it sends, and then reads what has come. Nobody is woken and nobody waits, the kernel carries each packet to
//! the other end before the call returns, so the time that passes is what the way costs. Rules that cost one part in a hundred show.

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::way::{PAYLOAD, Way};

/// Packets under way at once.
const PACKETS: usize = 32;
/// Bytes under way at once: less than the buffers of a connection that has just begun.
const BLOCK: usize = 48 << 10;

/// What is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// UDP packets of [`PAYLOAD`] bytes.
    Packet,
    /// One byte by TCP and one back.
    Request,
    /// Much by TCP, in megabytes.
    Megabyte,
}

impl Kind {
    /// Each.
    pub const ALL: [Kind; 3] = [Kind::Packet, Kind::Request, Kind::Megabyte];

    /// What its cost is the cost of, and the unit.
    pub const fn words(self) -> (&'static str, &'static str) {
        match self {
            Kind::Packet => ("a UDP packet of 64 bytes", "us"),
            Kind::Request => ("one byte by TCP and one back", "us"),
            Kind::Megabyte => ("a megabyte by TCP", "us"),
        }
    }
}

/// Both ends of a way.
#[derive(Debug)]
pub struct Ends {
    datagrams: (UdpSocket, UdpSocket),
    stream: (TcpStream, TcpStream),
}

impl Ends {
    /// Opens them.
    pub fn open(way: &Way) -> anyhow::Result<Ends> {
        Ok(Ends { datagrams: way.datagrams()?, stream: way.connect()? })
    }

    /// Sends for a time. Microseconds for one.
    pub fn cost(&mut self, kind: Kind, time: Duration) -> anyhow::Result<f64> {
        let begin = Instant::now();
        let mut done = 0.0;
        loop {
            done += match kind {
                Kind::Packet => self.packets(),
                Kind::Request => self.requests(),
                Kind::Megabyte => self.block(),
            }
            .context("what was sent does not arrive")?;
            let passed = begin.elapsed();
            if passed >= time {
                return Ok(passed.as_secs_f64() * 1e6 / done);
            }
        }
    }

    fn packets(&mut self) -> std::io::Result<f64> {
        let (near, far) = &self.datagrams;
        let mut packet = [0x5a; PAYLOAD];
        for _ in 0..PACKETS {
            near.send(&packet)?;
        }
        for _ in 0..PACKETS {
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
        let mut block = [0; BLOCK];
        near.write_all(&block)?;
        far.read_exact(&mut block)?;
        Ok(49_152.0 / 1e6)
    }
}
