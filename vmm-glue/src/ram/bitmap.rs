//! Where writes are noted: the dirty bitmap of the VMM that memory was adopted from.

use std::fmt;
use std::sync::Arc;

use vm_memory::MmapRegion;
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

/// A mapping with a bitmap of whatever type.
trait Owner: Send + Sync {
    fn mark_dirty(&self, offset: usize, len: usize);
    fn dirty_at(&self, offset: usize) -> bool;
}

impl<B: Bitmap + Send + Sync> Owner for MmapRegion<B> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap().mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap().dirty_at(offset)
    }
}

/// The bitmap of the mapping that memory was [adopted](crate::GuestRam::adopt) from, which it also keeps mapped. Of
/// memory that this crate has allocated: none.
#[derive(Clone, Default)]
pub struct OwnersBitmap {
    owner: Option<Arc<dyn Owner>>,
    /// Where this slice of it begins.
    base: usize,
}

impl OwnersBitmap {
    pub(crate) fn of<B: Bitmap + Send + Sync + 'static>(owner: Arc<MmapRegion<B>>) -> OwnersBitmap {
        OwnersBitmap { owner: Some(owner), base: 0 }
    }
}

impl fmt::Debug for OwnersBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnersBitmap").field("base", &self.base).finish_non_exhaustive()
    }
}

impl WithBitmapSlice<'_> for OwnersBitmap {
    type S = OwnersBitmap;
}

impl BitmapSlice for OwnersBitmap {}

impl Bitmap for OwnersBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(owner) = &self.owner {
            owner.mark_dirty(self.base + offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.owner.as_ref().is_some_and(|owner| owner.dirty_at(self.base + offset))
    }

    fn slice_at(&self, offset: usize) -> OwnersBitmap {
        OwnersBitmap { owner: self.owner.clone(), base: self.base + offset }
    }
}

impl NewBitmap for OwnersBitmap {
    /// None: nothing was adopted yet.
    fn with_len(_: usize) -> OwnersBitmap {
        OwnersBitmap::default()
    }
}
