//! Whether a file is still the one that was opened.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

/// What `fstat` says of a file that nobody touches: while none of it changes, neither do the bytes.
///
/// Times have the granularity of the file system's clock (a few milliseconds before Linux 6.13), and stores through
/// somebody's writable mapping of the file move them only now and then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    dev: u64,
    ino: u64,
    links: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Identity {
    /// As `file` is now.
    ///
    /// # Errors
    /// If `fstat` fails, or the file is not a regular one (whose length could not be relied on).
    pub(crate) fn of(file: &File) -> io::Result<Identity> {
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Identity {
            dev: meta.dev(),
            ino: meta.ino(),
            links: meta.nlink(),
            size: meta.size(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        })
    }

    /// Length of the file in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// What is different in `now`, in words.
    pub(crate) fn difference(&self, now: &Identity) -> Option<&'static str> {
        if (self.dev, self.ino) != (now.dev, now.ino) {
            Some("the file itself (its inode)")
        } else if self.size != now.size {
            Some("its size")
        } else if now.links < self.links {
            Some("its name (it was deleted or replaced)")
        } else if self.mtime != now.mtime {
            Some("its modification time")
        } else if self.ctime != now.ctime {
            Some("its status (ctime: it was written to, renamed, linked or had its attributes set)")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn every_change_is_seen_and_none_is_invented() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        fs::write(&path, [1; 8192]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let start = Identity::of(&file).unwrap();
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, 0).unwrap();
        assert_eq!(start.difference(&Identity::of(&file).unwrap()), None);

        file.set_len(4096).unwrap();
        assert_eq!(start.difference(&Identity::of(&file).unwrap()), Some("its size"));
        file.set_len(8192).unwrap();
        let rewritten = Identity::of(&file).unwrap();
        assert!(start.difference(&rewritten).is_some());

        fs::write(dir.path().join("new"), [2; 8192]).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        let replaced = rewritten.difference(&Identity::of(&file).unwrap());
        assert_eq!(replaced, Some("its name (it was deleted or replaced)"));
        let new = Identity::of(&File::open(&path).unwrap()).unwrap();
        assert_eq!(rewritten.difference(&new), Some("the file itself (its inode)"));
        assert!(Identity::of(&File::open(dir.path()).unwrap()).is_err());
    }
}
