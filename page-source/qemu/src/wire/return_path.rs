//! What the destination says to the source (QEMU migration/migration.h, `enum mig_rp_message_type`): a type and a
//! length of two bytes each, big-endian, and the payload.

use page_units::ByteLen;

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;

/// The longest payload that QEMU takes, in bytes.
const LONGEST: usize = 512;
/// What ends a bitmap.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// A message on the return path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The last message; 0 if all went well.
    Shut(u32),
    /// The answer to a PING of that number.
    Pong(u32),
    /// These bytes of a block are wanted.
    Request {
        /// The block; `None` for that of the request before.
        block: Option<String>,
        /// Where they start in the block, in bytes.
        start: u64,
        /// How many.
        length: u32,
    },
    /// Which pages of a block are there: a bit for each page of 4 KiB, the lowest first.
    Received {
        /// The block.
        block: String,
        /// The bits, padded to whole words of 8 bytes.
        bits: Vec<u8>,
    },
    /// The answer to POSTCOPY_RESUME: 1.
    ResumeAck(u32),
    /// The guest may be stopped.
    SwitchoverAck,
}

/// What is wrong with a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReturnPathError {
    /// No such type, or a type with another length.
    #[error("a message of type {kind} with {length} bytes")]
    Message {
        /// Its type.
        kind: u16,
        /// The length of its payload.
        length: u16,
    },
    /// A name that is not text, or longer than its message.
    #[error("the name of a RAM block is malformed")]
    Name,
    /// A bitmap longer than any block.
    #[error("a bitmap of {0} bytes")]
    BitmapLength(ByteLen),
    /// A bitmap without its end mark.
    #[error("a bitmap without its end mark")]
    BitmapEnd,
    /// Pages that do not exist.
    #[error("a request for {length} bytes at {start:#x} of RAM block \"{block}\", which are not pages of it")]
    Range {
        /// The block.
        block: String,
        /// The start of the request.
        start: u64,
        /// Its length.
        length: u32,
    },
    /// A block that does not exist, or "the same block" before any was named.
    #[error("a message about RAM block \"{0}\", which does not exist")]
    Block(String),
    /// A message that has no place here.
    #[error("an unexpected message: {0}")]
    Unexpected(&'static str),
}

impl Message {
    /// Appends the message to what the destination sends.
    pub fn push(&self, to: &mut Vec<u8>) {
        let mut message = |kind: u16, payload: &[u8]| {
            to.extend_from_slice(&kind.to_be_bytes());
            to.extend_from_slice(&u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes());
            to.extend_from_slice(payload);
        };
        match self {
            Message::Shut(error) => message(SHUT, &error.to_be_bytes()),
            Message::Pong(number) => message(PONG, &number.to_be_bytes()),
            Message::Request { block, start, length } => {
                let mut payload = start.to_be_bytes().to_vec();
                payload.extend_from_slice(&length.to_be_bytes());
                if let Some(block) = block {
                    push_name(&mut payload, block);
                }
                message(if block.is_some() { REQ_PAGES_ID } else { REQ_PAGES }, &payload);
            }
            Message::Received { block, bits } => {
                let mut payload = Vec::new();
                push_name(&mut payload, block);
                message(RECV_BITMAP, &payload);
                to.extend_from_slice(&(bits.len() as u64).to_be_bytes());
                to.extend_from_slice(bits);
                to.extend_from_slice(&BITMAP_END.to_be_bytes());
            }
            Message::ResumeAck(value) => message(RESUME_ACK, &value.to_be_bytes()),
            Message::SwitchoverAck => message(SWITCHOVER_ACK, &[]),
        }
    }
}

fn push_name(to: &mut Vec<u8>, name: &str) {
    let name = name.as_bytes().get(..255).unwrap_or(name.as_bytes());
    to.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    to.extend_from_slice(name);
}

/// Takes the bytes of the return path as they come, and gives messages.
#[derive(Debug)]
pub struct Decoder {
    bytes: Vec<u8>,
    taken: usize,
    longest_bitmap: ByteLen,
}

impl Decoder {
    /// A decoder at the beginning of a connection. Bitmaps longer than `longest_bitmap` are refused.
    #[must_use]
    pub fn new(longest_bitmap: ByteLen) -> Decoder {
        Decoder { bytes: Vec::new(), taken: 0, longest_bitmap }
    }

    /// Takes bytes from the connection.
    pub fn take(&mut self, bytes: &[u8]) {
        if self.taken == self.bytes.len() {
            self.bytes.clear();
            self.taken = 0;
        } else if self.taken > 1 << 16 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message, if all of it has come.
    ///
    /// # Errors
    /// If it is not one. Nothing after it can be understood.
    pub fn next_message(&mut self) -> Result<Option<Message>, ReturnPathError> {
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some((kind, rest)) = split_u16(rest) else { return Ok(None) };
        let Some((length, rest)) = split_u16(rest) else { return Ok(None) };
        let wrong = ReturnPathError::Message { kind, length };
        let size = usize::from(length);
        let fits = match kind {
            SHUT | PONG | RESUME_ACK => size == 4,
            REQ_PAGES => size == 12,
            SWITCHOVER_ACK => size == 0,
            REQ_PAGES_ID => size > 13,
            RECV_BITMAP => size > 1,
            _ => false,
        };
        if !fits || size > LONGEST {
            return Err(wrong);
        }
        if rest.len() < size {
            return Ok(None);
        }
        let (payload, rest) = rest.split_at(size);
        let number = |at: usize| be32(payload, at);
        let mut used = 4 + size;
        let message = match kind {
            SHUT => Message::Shut(number(0)),
            PONG => Message::Pong(number(0)),
            RESUME_ACK => Message::ResumeAck(number(0)),
            SWITCHOVER_ACK => Message::SwitchoverAck,
            REQ_PAGES => Message::Request { block: None, start: be64(payload, 0), length: number(8) },
            REQ_PAGES_ID => {
                let block = Some(name(payload.get(12..).unwrap_or_default())?);
                Message::Request { block, start: be64(payload, 0), length: number(8) }
            }
            _ => {
                let block = name(payload)?;
                if rest.len() < 8 {
                    return Ok(None);
                }
                let length = be64(rest, 0);
                if length > self.longest_bitmap.0 {
                    return Err(ReturnPathError::BitmapLength(ByteLen(length)));
                }
                let length = ByteLen(length).get();
                if rest.len() < length + 16 {
                    return Ok(None);
                }
                if be64(rest, 8 + length) != BITMAP_END {
                    return Err(ReturnPathError::BitmapEnd);
                }
                used += length + 16;
                Message::Received { block, bits: rest.get(8..8 + length).unwrap_or_default().to_vec() }
            }
        };
        self.taken += used;
        Ok(Some(message))
    }
}

fn split_u16(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<2>()?;
    Some((u16::from_be_bytes(*head), rest))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()).map_or(0, |four| u32::from_be_bytes(*four))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()).map_or(0, |eight| u64::from_be_bytes(*eight))
}

/// A counted string that fills all of `bytes`.
fn name(bytes: &[u8]) -> Result<String, ReturnPathError> {
    let (length, name) = bytes.split_first().ok_or(ReturnPathError::Name)?;
    if usize::from(*length) != name.len() {
        return Err(ReturnPathError::Name);
    }
    String::from_utf8(name.to_vec()).map_err(|_| ReturnPathError::Name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_message() -> impl Strategy<Value = Message> {
        let name = "[a-z/.@]{1,40}";
        prop_oneof![
            any::<u32>().prop_map(Message::Shut),
            any::<u32>().prop_map(Message::Pong),
            (proptest::option::of(name), any::<u64>(), any::<u32>())
                .prop_map(|(block, start, length)| Message::Request { block, start, length }),
            (name, proptest::collection::vec(any::<u8>(), 0..200))
                .prop_map(|(block, bits)| Message::Received { block, bits }),
            any::<u32>().prop_map(Message::ResumeAck),
            Just(Message::SwitchoverAck),
        ]
    }

    proptest! {
        #[test]
        fn messages_come_back_however_they_are_cut(
            messages in proptest::collection::vec(any_message(), 0..20), piece in 1usize..50,
        ) {
            let mut wire = Vec::new();
            messages.iter().for_each(|message| message.push(&mut wire));
            let mut decoder = Decoder::new(ByteLen(200));
            let mut back = Vec::new();
            for bytes in wire.chunks(piece) {
                decoder.take(bytes);
                while let Some(message) = decoder.next_message().unwrap() {
                    back.push(message);
                }
            }
            prop_assert_eq!(back, messages);
        }

        #[test]
        fn anything_at_all_ends(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut decoder = Decoder::new(ByteLen(64));
            decoder.take(&bytes);
            let mut messages = 0;
            while let Ok(Some(_)) = decoder.next_message() {
                messages += 1;
            }
            prop_assert!(messages * 4 <= bytes.len());
        }
    }

    #[test]
    fn hostile_messages_are_refused() {
        let error = |bytes: &[u8]| {
            let mut decoder = Decoder::new(ByteLen(64));
            decoder.take(bytes);
            decoder.next_message().unwrap_err()
        };
        assert_eq!(error(&[0, 9, 0, 0]), ReturnPathError::Message { kind: 9, length: 0 });
        assert_eq!(error(&[0, 2, 0, 5]), ReturnPathError::Message { kind: 2, length: 5 });
        assert_eq!(error(&[0, 3, 2, 1]), ReturnPathError::Message { kind: 3, length: 513 });
        assert_eq!(error(&[0, 5, 0, 2, 9, b'a']), ReturnPathError::Name);
        let mut long = vec![0, 5, 0, 2, 1, b'a'];
        long.extend_from_slice(&u64::MAX.to_be_bytes());
        assert_eq!(error(&long), ReturnPathError::BitmapLength(ByteLen(u64::MAX)));
        let mut open = vec![0, 5, 0, 2, 1, b'a'];
        open.extend_from_slice(&[0; 16]);
        assert_eq!(error(&open), ReturnPathError::BitmapEnd);
    }
}
