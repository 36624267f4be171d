//! Whether a file is still the one that was opened.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

/// What must not change while a guest runs from a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Device and inode.
    pub inode: (u64, u64),
    /// Length in bytes.
    pub size: u64,
    /// Last change of the content: seconds and nanoseconds.
    pub modified: (i64, i64),
    /// Last change of content or attributes: seconds and nanoseconds.
    pub changed: (i64, i64),
}

impl Identity {
    /// Of an open file.
    ///
    /// # Errors
    /// If the system can't tell.
    pub fn of(file: &File) -> io::Result<Identity> {
        Ok(Identity::from_metadata(&file.metadata()?))
    }

    pub(crate) fn from_metadata(metadata: &Metadata) -> Identity {
        Identity {
            inode: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// What is different now, if anything is. (A change of the number of links alters the time of change only; a
    /// snapshot that is in use should not be linked or renamed either.)
    #[must_use]
    pub fn difference(&self, now: &Identity) -> Option<&'static str> {
        if self.inode != now.inode {
            Some("the file itself")
        } else if self.size != now.size {
            Some("its size")
        } else if self.modified != now.modified {
            Some("its modification time")
        } else if self.changed != now.changed {
            Some("its change time")
        } else {
            None
        }
    }
}
