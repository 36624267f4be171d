//! A guest, and what happens to its VMM.
#![expect(unsafe_code, reason = "what happens to a VMM's memory is done with system calls")]

use std::ffi::c_void;
use std::fs::{self, File, Permissions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;

use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;
use page_units::{BlockId, PageCount, PageIndex, PageRun};
use rand::RngExt;
use rand::rngs::StdRng;
use testkit::oracle::Oracle;
use uffd_engine::{DiscardError, Engine};

use crate::common::{HUGE, Kind, Memory, PAGE};

/// A guest of one block and one vCPU, and a model of its memory. It accesses memory as the kernel does for it, so that
/// what is refused is an error, and not the end of the test.
pub(crate) struct Guest<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) model: Vec<u8>,
    /// Something happened that may cost it pages.
    pub(crate) harmed: bool,
    /// It gave pages back.
    pub(crate) discarded: bool,
    /// Pages that are locked can't be given back.
    locked: bool,
    path: PathBuf,
    file: File,
}

impl<'a> Guest<'a> {
    pub(crate) fn new(memory: &'a Memory, oracle: &Oracle, path: PathBuf) -> Guest<'a> {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let model = oracle.block(BlockId(0)).to_vec();
        Guest { memory, model, harmed: false, discarded: false, locked: false, path, file }
    }

    fn pages(&self) -> u64 {
        (self.model.len() / PAGE) as u64
    }

    fn granule(&self) -> u64 {
        if matches!(self.memory.kind, Kind::HugetlbPrivate | Kind::HugetlbAlias) { (HUGE / PAGE) as u64 } else { 1 }
    }

    fn base(&self, page: u64) -> usize {
        usize::try_from(self.memory.addr(BlockId(0)).0).unwrap() + usize::try_from(page).unwrap() * PAGE
    }

    /// Some granules of it.
    fn any(&self, random: &mut StdRng) -> PageRun {
        let granules = self.pages() / self.granule();
        let first = random.random_range(0..granules);
        let count = random.random_range(1..=(granules - first).min(40));
        PageRun::new(BlockId(0), PageIndex(first * self.granule()), PageCount(count * self.granule()))
    }

    /// Reads or writes somewhere.
    pub(crate) fn access(&mut self, random: &mut StdRng) {
        let page = random.random_range(0..self.pages());
        let at = usize::try_from(page).unwrap() * PAGE;
        if random.random() {
            match self.memory.read(BlockId(0), PageIndex(page)) {
                Ok(bytes) => assert!(bytes == self.model[at..at + PAGE], "page {page} is wrong"),
                Err(error) => self.refused(page, &error),
            }
            return;
        }
        let value: [u8; 8] = random.random::<u64>().to_le_bytes();
        let remote = [RemoteIoVec { base: self.base(page), len: 8 }];
        match process_vm_writev(Pid::this(), &[IoSlice::new(&value)], &remote) {
            Ok(8) => self.model[at..at + 8].copy_from_slice(&value),
            Ok(_) => panic!("page {page} was written in part"),
            Err(errno) => self.refused(page, &errno.into()),
        }
    }

    fn refused(&self, page: u64, error: &io::Error) {
        assert!(self.harmed && error.raw_os_error() == Some(libc::EFAULT), "page {page}: {error}");
    }

    /// Every page is as it should be, or an error if that is to be expected.
    pub(crate) fn assert_memory(&self, given_up: bool) {
        for page in 0..self.pages() {
            let at = usize::try_from(page).unwrap() * PAGE;
            match self.memory.read(BlockId(0), PageIndex(page)) {
                Ok(bytes) => assert!(bytes == self.model[at..at + PAGE], "page {page} is wrong at the end"),
                Err(error) => {
                    assert!(given_up || self.harmed, "page {page}: {error}");
                    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
                }
            }
        }
    }

    fn pointer(&self, run: PageRun) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.base(run.first.0))
    }
}

/// Something that happens.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Happening {
    /// To the file's names and attributes.
    Link,
    Unlink,
    Rename,
    Chmod,
    /// To the file's bytes.
    Truncate,
    Write,
    /// To a part of the memory.
    Advice,
    Lock,
    Bind,
    Discard,
}

impl Happening {
    pub(crate) fn any(random: &mut StdRng) -> Happening {
        use Happening::*;
        // What harms the guest ends most of what could happen to it.
        if random.random_range(0..30) == 0 {
            return if random.random() { Truncate } else { Write };
        }
        [Link, Unlink, Rename, Chmod, Advice, Lock, Bind, Discard, Discard][random.random_range(0..9)]
    }

    pub(crate) fn comes(self, guest: &mut Guest<'_>, engine: &Engine, random: &mut StdRng) {
        let run = guest.any(random);
        let (at, len) = (guest.pointer(run), run.len().get());
        let named = guest.path.exists();
        match self {
            Happening::Link if named => {
                let link = guest.path.with_file_name(format!("link{}", random.random::<u64>()));
                fs::hard_link(&guest.path, &link).unwrap();
                if random.random() {
                    fs::remove_file(link).unwrap();
                }
            }
            Happening::Unlink if named && random.random_range(0..5) == 0 => fs::remove_file(&guest.path).unwrap(),
            Happening::Rename if named => {
                let new = guest.path.with_file_name(format!("snapshot{}", random.random::<u64>()));
                fs::rename(&guest.path, &new).unwrap();
                guest.path = new;
            }
            Happening::Chmod if named => fs::set_permissions(&guest.path, Permissions::from_mode(0o600)).unwrap(),
            Happening::Truncate => {
                guest.harmed = true;
                let size = guest.file.metadata().unwrap().len();
                guest.file.set_len(random.random_range(0..size.max(1))).unwrap();
            }
            Happening::Write => {
                guest.harmed = true;
                guest.file.write_all_at(&[0x55; 64], random.random_range(0..1 << 20)).unwrap();
            }
            Happening::Advice => {
                let advice = [libc::MADV_DONTDUMP, libc::MADV_DODUMP, libc::MADV_RANDOM, libc::MADV_NORMAL];
                // SAFETY: pages of the test's own mapping; none of these changes what they hold.
                let done = unsafe { libc::madvise(at, len, advice[random.random_range(0..advice.len())]) };
                assert!(done == 0 || guest.granule() > 1, "{}", io::Error::last_os_error());
            }
            Happening::Lock => {
                guest.locked = true;
                // SAFETY: pages of the test's own mapping. What is missing is not brought in.
                unsafe { libc::syscall(libc::SYS_mlock2, at, len, libc::MLOCK_ONFAULT) };
                if random.random() {
                    // SAFETY: as above.
                    unsafe { libc::munlock(at, len) };
                }
            }
            Happening::Bind => {
                // Node 0, preferred: MPOL_PREFERRED of linux/mempolicy.h.
                let nodes: u64 = 1;
                // SAFETY: pages of the test's own mapping; where they come from is no matter of what they hold.
                unsafe { libc::syscall(libc::SYS_mbind, at, len, 1, &raw const nodes, 64, 0) };
            }
            Happening::Discard if !guest.locked => match engine.discard(run) {
                Ok(()) => {
                    guest.discarded = true;
                    let from = run.first.byte_offset().get();
                    guest.model[from..from + len].fill(0);
                }
                Err(DiscardError::Frozen(_)) => {}
                Err(error) => assert!(engine.outcome().is_some(), "{error}"),
            },
            _ => {}
        }
    }
}
