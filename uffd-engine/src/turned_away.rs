//! Memory of another process for which no engine could be made: its owner goes on when the descriptor is closed, and must
//! not find zeros where content belongs.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use page_source::ByteLen;

use crate::Region;
use crate::descriptor::Descriptor;
use crate::sys::abi::Message;
use crate::sys::ops::{self, Done};

/// A second hold on a descriptor that was handed over, while an engine is being made of it. Dropped before there is one,
/// also by a panic of the source, it poisons what is not there: nobody knows any more what of it is zero.
#[derive(Debug)]
pub(crate) struct Hold {
    descriptor: Arc<OwnedFd>,
    regions: Vec<Region>,
}

impl Hold {
    /// `None` for a descriptor made here: its memory is let go as it was.
    pub(crate) fn on(descriptor: Option<&Descriptor>, regions: &[Region]) -> Option<Hold> {
        let descriptor = descriptor.filter(|descriptor| descriptor.foreign())?;
        match descriptor.fd().try_clone_to_owned() {
            Ok(descriptor) => Some(Hold { descriptor: Arc::new(descriptor), regions: regions.to_vec() }),
            Err(error) => {
                log::warn!("a second descriptor of memory that was handed over can't be had: {error}");
                None
            }
        }
    }

    /// There is an engine, which sees to everything.
    pub(crate) fn let_go(mut self) {
        self.regions.clear();
    }

    /// Whether nothing is missing any more.
    fn poison_region(&self, region: &Region) -> bool {
        let fd = self.descriptor.as_fd();
        let (end, granule) = (region.range().end, region.backing.granule().bytes());
        let mut at = region.start;
        while at < end {
            match ops::poison(fd, at.0, (end - at).0) {
                Done::All => break,
                Done::Part(bytes) => at += ByteLen(bytes),
                Done::Failed(Errno::EEXIST) => at += granule,
                // A discard is not read yet. Faults that are read here are woken by being poisoned.
                Done::Failed(Errno::EAGAIN) => {
                    let _ = ops::read(fd, &mut [Message::default(); 16]);
                }
                // It is not registered (any more), or its owner is gone.
                Done::Failed(Errno::ENOENT | Errno::ESRCH) => break,
                Done::Failed(errno) => {
                    log::error!("poisoning {} failed: {errno}", region.run);
                    return false;
                }
            }
        }
        true
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.regions.iter().all(|region| self.poison_region(region)) {
            log::error!(
                "memory that was handed over can't be poisoned: its descriptor stays open, and what is missing blocked"
            );
            std::mem::forget(Arc::clone(&self.descriptor));
        }
    }
}
