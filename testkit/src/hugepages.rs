//! Huge pages for a test: overcommitted while it runs, and put back.

use std::fs::{File, OpenOptions};
use std::io;

use nix::fcntl::{Flock, FlockArg};

const LIMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";

/// Room for some more 2 MiB pages, until it is dropped.
///
/// Several tests, also of several processes, may hold one at a time: each adds its own number and takes it away again,
/// under a file lock.
#[derive(Debug)]
pub struct Overcommit {
    pages: u64,
}

impl Overcommit {
    /// Raises `nr_overcommit_hugepages` by `pages`.
    ///
    /// # Errors
    /// If that is not permitted (it takes root).
    pub fn reserve(pages: u64) -> io::Result<Overcommit> {
        change(|limit| limit.saturating_add(pages))?;
        Ok(Overcommit { pages })
    }
}

impl Drop for Overcommit {
    fn drop(&mut self) {
        if let Err(error) = change(|limit| limit.saturating_sub(self.pages)) {
            eprintln!("{LIMIT} could not be put back: {error}");
        }
    }
}

fn change(new: impl FnOnce(u64) -> u64) -> io::Result<()> {
    let path = std::env::temp_dir().join("testkit-hugepages.lock");
    let lock: File = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    let _locked = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| io::Error::from(error))?;
    let limit: u64 = std::fs::read_to_string(LIMIT)?.trim().parse().map_err(io::Error::other)?;
    std::fs::write(LIMIT, new(limit).to_string())
}
