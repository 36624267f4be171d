//! Where the RAM blocks are in guest-physical memory, as a device section: a snapshot file itself knows only their
//! names and lengths.

use mapped_ram::Snapshot;
use page_units::{ByteLen, GuestAddr, PageSize};
use vmstate::Section;

use crate::ram::{GuestRam, RamSpec};
use crate::state::StateError;

pub(crate) const NAME: &str = "vm-memory";
const VERSION: u32 = 1;

impl GuestRam {
    /// The device section that says where the blocks are: `vm-memory` in `docs/device-sections.md`. Every snapshot of this
    /// crate has it.
    ///
    /// # Errors
    /// If it can't be encoded.
    pub fn section(&self) -> Result<Section, StateError> {
        let mut numbers = Vec::new();
        let mut pieces: Vec<_> = self.pieces().iter().collect();
        // In the order of the blocks' pages: so a specification is read again piece by piece.
        pieces.sort_by_key(|piece| (piece.run.block, piece.run.first));
        for piece in pieces {
            numbers.extend([u64::from(piece.run.block.0), piece.guest.0, piece.run.len().0]);
        }
        Ok(Section::builder(NAME, 0, VERSION).u64s("pieces", &numbers).build()?)
    }
}

/// The memory that the guest of a snapshot had.
pub(crate) fn load(snapshot: &Snapshot) -> Result<Vec<RamSpec>, StateError> {
    let invalid = |reason: String| StateError::Invalid(format!("section \"{NAME}\": {reason}"));
    let device = snapshot.device(NAME, 0).map_err(|error| invalid(error.to_string()))?;
    let device = device.ok_or_else(|| {
        let machine = &snapshot.configuration().machine;
        let what = format!("a snapshot with KVM state (sections \"{NAME}\" and \"kvm-vm\")");
        StateError::Unsupported(format!("{what}; this is of a \"{machine}\""))
    })?;
    let value = device.decode()?;
    crate::state::check(&value, NAME, &[])?;
    let numbers = value.field("pieces")?.as_u64s()?;
    let (pieces, rest) = numbers.as_chunks::<3>();
    let blocks = snapshot.layout().blocks();
    let mut specs: Vec<RamSpec> = blocks.iter().map(|block| RamSpec::new(block.name())).collect();
    for &[block, guest, length] in pieces {
        let spec = usize::try_from(block).ok().and_then(|block| specs.get_mut(block));
        let spec = spec.ok_or_else(|| invalid(format!("a piece of block {block}, of {}", blocks.len())))?;
        if length == 0 || !(guest | length).is_multiple_of(PageSize::SMALL.bytes().0) {
            return Err(invalid(format!("{length} bytes at guest-physical {guest:#x} are not whole pages")));
        }
        *spec = std::mem::replace(spec, RamSpec::new("")).at(GuestAddr(guest), ByteLen(length));
    }
    let whole = |(spec, block): (&RamSpec, &page_units::RamBlock)| spec.length() == Some(block.length());
    if !rest.is_empty() || !specs.iter().zip(blocks).all(whole) {
        return Err(invalid("its pieces are not the RAM blocks of the file".into()));
    }
    Ok(specs)
}
