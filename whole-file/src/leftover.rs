//! Temporary names that a killed process left behind.
//!
//! A living process holds a lock (flock(2)) on its own temporary file: a file that can be locked is left over.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

/// How many random letters and digits a temporary name has.
pub(crate) const RANDOM: usize = 12;
/// What it ends in.
pub(crate) const SUFFIX: &str = ".part";

/// The longest name of a file, in bytes (`NAME_MAX` of limits.h).
const LONGEST: usize = 255;

/// What the temporary names of a file begin with: its own name, cut where it would be too long.
pub(crate) fn prefix(name: &OsStr) -> OsString {
    let longest = LONGEST - 2 - RANDOM - SUFFIX.len();
    let name = name.as_bytes();
    let mut prefix = OsString::from(".");
    prefix.push(OsStr::from_bytes(&name[..name.len().min(longest)]));
    prefix.push(".");
    prefix
}

/// A file that nobody takes for a leftover. Where the file system has no locks, it has no leftovers that could be told.
#[derive(Debug)]
pub(crate) enum Held {
    Locked(Flock<File>),
    Unlocked(File),
}

impl Held {
    /// Takes hold of a new file.
    pub(crate) fn new(file: File) -> Held {
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(file) => Held::Locked(file),
            Err((file, _)) => Held::Unlocked(file),
        }
    }

    pub(crate) fn file(&self) -> &File {
        match self {
            Held::Locked(file) => file,
            Held::Unlocked(file) => file,
        }
    }

    /// Whether it was taken for a leftover before it was held.
    pub(crate) fn is_removed(&self) -> io::Result<bool> {
        Ok(self.file().metadata()?.nlink() == 0)
    }
}

/// Removes leftovers in `directory` whose names begin with `prefix`. One that can't be removed stays.
pub(crate) fn remove(directory: &Path, prefix: &OsStr) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if is_temporary(&entry.file_name(), prefix) {
            // Somebody else may do the same.
            let _ = remove_unless_held(&entry.path());
        }
    }
}

fn is_temporary(name: &OsStr, prefix: &OsStr) -> bool {
    let random = name.as_bytes().strip_prefix(prefix.as_bytes()).and_then(|rest| rest.strip_suffix(SUFFIX.as_bytes()));
    random.is_some_and(|random| random.len() == RANDOM && random.iter().all(u8::is_ascii_alphanumeric))
}

fn remove_unless_held(path: &Path) -> io::Result<()> {
    let careful = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(careful).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(());
    }
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        // It may have been given its real name meanwhile, and another may have this one: a lock is of a file.
        Ok(file) => {
            let (opened, named) = (file.metadata()?, fs::symlink_metadata(path)?);
            if (opened.dev(), opened.ino()) == (named.dev(), named.ino()) { fs::remove_file(path) } else { Ok(()) }
        }
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_are_told_from_others() {
        let is = |name: &str| is_temporary(name.as_ref(), ".vm.snap.".as_ref());
        assert!(is(".vm.snap.aB3dE6gH9jK2.part"));
        for other in [".vm.snap.backup.part", ".vm.snap.old.aB3dE6g.part", ".vm.snap.aB3dE6gH9jK2", ".vm.snap.part"] {
            assert!(!is(other), "{other}");
        }
    }
}
