//! Memory that an engine can serve without a promise by its owner.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use page_units::{ByteLen, HostAddr};

use super::backing::Backing;
use crate::sys::owned::Map;

/// Memory of this process, mapped here and unmapped when it and the regions of it are dropped, for an engine to fill: see
/// [`Region::of`](crate::Region::of).
///
/// ```
/// # use page_units::ByteLen;
/// let memory = uffd_engine::Mapping::anonymous(ByteLen(1 << 20))?;
/// let mut byte = [1];
/// memory.read(ByteLen(4096), &mut byte);
/// assert_eq!(byte, [0]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Mapping {
    map: Map,
    backing: Backing,
    file: Option<Arc<File>>,
}

const NAME: &CStr = c"uffd-engine";

impl Mapping {
    /// Private anonymous memory. The kernel rounds the length up to whole pages.
    ///
    /// # Errors
    /// If the length is 0, or there is no space for it.
    pub fn anonymous(len: ByteLen) -> io::Result<Mapping> {
        Ok(Mapping { map: Map::anonymous(len)?, backing: Backing::Anonymous, file: None })
    }

    /// A shared mapping of a file without a name (memfd).
    ///
    /// # Errors
    /// If the length is 0, or there is no space for it.
    pub fn memfd(len: ByteLen) -> io::Result<Mapping> {
        Mapping::shared(len, MFdFlags::MFD_CLOEXEC, Backing::Memfd)
    }

    /// The same, of huge pages (2 MiB), of which it takes as many from the system's pool as are touched.
    ///
    /// # Errors
    /// If the length is 0 or no multiple of 2 MiB, or there is no space for it.
    pub fn hugetlb(len: ByteLen) -> io::Result<Mapping> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        Mapping::shared(len, flags, Backing::Hugetlb)
    }

    fn shared(len: ByteLen, flags: MFdFlags, backing: Backing) -> io::Result<Mapping> {
        let file = File::from(memfd_create(NAME, flags)?);
        file.set_len(len.0)?;
        Ok(Mapping { map: Map::shared(&file, len)?, backing, file: Some(Arc::new(file)) })
    }

    /// Where it begins.
    #[must_use]
    pub fn addr(&self) -> HostAddr {
        self.map.addr()
    }

    /// Its length, in bytes.
    #[must_use]
    pub fn len(&self) -> ByteLen {
        self.map.len()
    }

    /// What it is made of.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The file behind it, if there is one: for a second process that is to map it.
    #[must_use]
    pub fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }

    /// Copies from it. Waits for pages that an engine has not brought yet; a page that is poisoned ends the process with
    /// SIGBUS, as any access to it does.
    ///
    /// # Panics
    /// If that is not inside.
    pub fn read(&self, at: ByteLen, to: &mut [u8]) {
        self.map.read(at, to);
    }

    /// Copies into it.
    ///
    /// # Panics
    /// If that is not inside.
    pub fn write(&self, at: ByteLen, from: &[u8]) {
        self.map.write(at, from);
    }
}
