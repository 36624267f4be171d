//! Commands to the destination (QEMU `migration/savevm.c`, `enum qemu_vm_cmd`).

use page_units::ByteLen;

use crate::wire::Wire;
use crate::{StreamError, WriteError};
use page_units::FileOffset;

/// A command as it is in the stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RawCommand {
    /// Which.
    pub number: u16,
    /// Its arguments, at most 65535 bytes.
    pub payload: Vec<u8>,
}

/// A command with its meaning.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Command {
    /// The destination is to answer on the same connection.
    OpenReturnPath,
    /// The destination is to answer PONG with this number.
    Ping(u32),
    /// Postcopy will come. Page sizes are in bytes.
    PostcopyAdvise {
        /// All page sizes of the guest's RAM blocks, ORed.
        page_sizes: u64,
        /// The page size of the target.
        target_page_size: u64,
    },
    /// Postcopy of something other than RAM will come.
    PostcopyAdviseWithoutRam,
    /// Get ready for pages.
    PostcopyListen,
    /// Start the guest.
    PostcopyRun,
    /// Forget these ranges of a block.
    PostcopyRamDiscard {
        /// The RAM block.
        block: String,
        /// Start and length of each range.
        ranges: Vec<(ByteLen, ByteLen)>,
    },
    /// A nested stream follows.
    Packaged {
        /// Its length in bytes.
        length: u32,
    },
    /// Continuous replication: not supported by anything here.
    EnableColo,
    /// Go on after a broken connection.
    PostcopyResume,
    /// The destination is to send which pages of a block it has.
    RecvBitmap {
        /// The RAM block.
        block: String,
    },
    /// The source has stopped its guest.
    SwitchoverStart,
}

impl RawCommand {
    /// What the command means.
    ///
    /// # Errors
    /// If no such command is known, or its arguments are not what they should be; `at` is where the command is.
    pub fn decode(&self, at: FileOffset) -> Result<Command, StreamError> {
        let mut wire = Wire::new(self.payload.as_slice(), at);
        let command = match self.number {
            1 => Command::OpenReturnPath,
            2 => Command::Ping(wire.u32("PING")?),
            3 if self.payload.is_empty() => Command::PostcopyAdviseWithoutRam,
            3 => Command::PostcopyAdvise {
                page_sizes: wire.u64("POSTCOPY_ADVISE")?,
                target_page_size: wire.u64("POSTCOPY_ADVISE")?,
            },
            4 => Command::PostcopyListen,
            5 => Command::PostcopyRun,
            6 => {
                const WHAT: &str = "POSTCOPY_RAM_DISCARD";
                let version = wire.u8(WHAT)?;
                let block = wire.counted_string(WHAT)?;
                let end = wire.u8(WHAT)?;
                if version != 0 || end != 0 {
                    return Err(wire.invalid("a POSTCOPY_RAM_DISCARD of an unknown form"));
                }
                let mut ranges = Vec::new();
                while wire.peek()?.is_some() {
                    ranges.push((ByteLen(wire.u64(WHAT)?), ByteLen(wire.u64(WHAT)?)));
                }
                Command::PostcopyRamDiscard { block, ranges }
            }
            7 => Command::Packaged { length: wire.u32("PACKAGED")? },
            8 => Command::EnableColo,
            9 => Command::PostcopyResume,
            10 => Command::RecvBitmap { block: wire.counted_string("RECV_BITMAP")? },
            11 => Command::SwitchoverStart,
            other => return Err(wire.invalid(format!("unknown command {other}"))),
        };
        if wire.peek()?.is_some() {
            return Err(wire.invalid(format!(
                "command {} with {} bytes of arguments",
                self.number,
                self.payload.len()
            )));
        }
        Ok(command)
    }

    /// The name QEMU gives it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.number {
            1 => "OPEN_RETURN_PATH",
            2 => "PING",
            3 => "POSTCOPY_ADVISE",
            4 => "POSTCOPY_LISTEN",
            5 => "POSTCOPY_RUN",
            6 => "POSTCOPY_RAM_DISCARD",
            7 => "PACKAGED",
            8 => "ENABLE_COLO",
            9 => "POSTCOPY_RESUME",
            10 => "RECV_BITMAP",
            11 => "SWITCHOVER_START",
            _ => "UNKNOWN",
        }
    }
}

impl Command {
    /// The bytes of the command.
    ///
    /// # Errors
    /// If the name of a block is too long, or there are too many ranges for one command.
    pub fn encode(&self) -> Result<RawCommand, WriteError> {
        use crate::write::Put;
        let mut payload = Vec::new();
        let number = match self {
            Command::OpenReturnPath => 1,
            Command::Ping(value) => {
                payload.u32(*value)?;
                2
            }
            Command::PostcopyAdvise { page_sizes, target_page_size } => {
                payload.u64(*page_sizes)?;
                payload.u64(*target_page_size)?;
                3
            }
            Command::PostcopyAdviseWithoutRam => 3,
            Command::PostcopyListen => 4,
            Command::PostcopyRun => 5,
            Command::PostcopyRamDiscard { block, ranges } => {
                payload.u8(0)?;
                payload.counted_string(block)?;
                payload.u8(0)?;
                for (start, length) in ranges {
                    payload.u64(start.0)?;
                    payload.u64(length.0)?;
                }
                6
            }
            Command::Packaged { length } => {
                payload.u32(*length)?;
                7
            }
            Command::EnableColo => 8,
            Command::PostcopyResume => 9,
            Command::RecvBitmap { block } => {
                payload.counted_string(block)?;
                10
            }
            Command::SwitchoverStart => 11,
        };
        if payload.len() > usize::from(u16::MAX) {
            return Err(WriteError::TooLong { what: "a command", length: ByteLen::of(payload.len()) });
        }
        Ok(RawCommand { number, payload })
    }
}
