//! Guest memory: allocated or adopted, given back, as a source of pages and as a sink.

mod bitmap;
mod discard;
mod guest_ram;
mod map;
mod sink;
mod source;
mod spec;

pub use self::bitmap::OwnersBitmap;
pub use self::discard::Discard;
pub(crate) use self::discard::FreezeClaim;
pub use self::guest_ram::{GuestRam, Memory, Piece};
pub(crate) use self::sink::RamSink;
pub use self::source::RamSource;
pub use self::spec::{MemoryError, RamSpec};
