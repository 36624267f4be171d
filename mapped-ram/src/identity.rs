//! Whether a file is still the one that was opened.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

/// What `fstat` says of a file. While what is watched of it does not change, neither do the bytes.
///
/// The modification time has the granularity of the file system's clock (a few milliseconds before Linux 6.13), and
/// stores through somebody's writable mapping of the file move it only now and then.
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

/// By what a change of a file that is in use is noticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Watch {
    /// Its size and its modification time: what changes when its bytes do. A link, a new name, other rights or another
    /// owner, and the removal of its name, leave the bytes alone, and disturb nobody.
    #[default]
    Content,
    /// Besides, its inode's change time (`ctime`), which any of those moves, and which no user can put back: against
    /// somebody who writes to the file and then sets its modification time to what it was.
    Strict,
    /// Its size alone: for file systems that move times by themselves, as network file systems and FUSE may. Bytes that
    /// change in place are not noticed then.
    Size,
}

impl Identity {
    /// Of an open file.
    ///
    /// # Errors
    /// If the system can't tell.
    pub fn of(file: &File) -> io::Result<Identity> {
        Ok(Identity::from_metadata(&file.metadata()?))
    }

    /// Of a file whose metadata is known.
    #[must_use]
    pub fn from_metadata(metadata: &Metadata) -> Identity {
        Identity {
            inode: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether both are the same file, whatever has become of its content.
    #[must_use]
    pub fn same_file(&self, other: &Identity) -> bool {
        self.inode == other.inode
    }

    /// What is different now among what is watched, if anything is: its name.
    #[must_use]
    pub fn difference(&self, now: &Identity, watch: Watch) -> Option<&'static str> {
        let times = watch != Watch::Size;
        if times && self.inode != now.inode {
            Some("the file itself (its inode)")
        } else if self.size != now.size {
            Some("its size")
        } else if times && self.modified != now.modified {
            Some("its modification time")
        } else if watch == Watch::Strict && self.changed != now.changed {
            Some("its change time (ctime)")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{FileExt, PermissionsExt};
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    use super::*;

    /// Something that is done to a file that is open.
    type Operation = (&'static str, fn(&Path, &File));

    /// They leave the bytes alone.
    const HARMLESS: [Operation; 8] = [
        ("hard link", |path, _| fs::hard_link(path, path.with_extension("link")).unwrap()),
        ("hard link and unlink", |path, _| {
            fs::hard_link(path, path.with_extension("link")).unwrap();
            fs::remove_file(path.with_extension("link")).unwrap();
        }),
        ("chmod", |path, _| fs::set_permissions(path, Permissions::from_mode(0o400)).unwrap()),
        ("chown", |path, file| {
            let of = file.metadata().unwrap();
            std::os::unix::fs::chown(path, Some(of.uid()), Some(of.gid())).unwrap();
        }),
        ("rename", |path, _| fs::rename(path, path.with_extension("moved")).unwrap()),
        ("unlink", |path, _| fs::remove_file(path).unwrap()),
        ("replace", |path, _| {
            fs::write(path.with_extension("new"), [2; 8192]).unwrap();
            fs::rename(path.with_extension("new"), path).unwrap();
        }),
        ("read", |_, file| file.read_exact_at(&mut [0; 8192], 0).unwrap()),
    ];

    /// They don't.
    const HARMFUL: [Operation; 5] = [
        ("write", |_, file| file.write_all_at(b"x", 4000).unwrap()),
        ("truncate", |_, file| file.set_len(4096).unwrap()),
        ("extend", |_, file| file.set_len(16384).unwrap()),
        ("truncate and extend", |_, file| {
            file.set_len(4096).unwrap();
            file.set_len(8192).unwrap();
        }),
        ("touch", |_, file| file.set_modified(SystemTime::now()).unwrap()),
    ];

    fn made(directory: &Path) -> (std::path::PathBuf, File, Identity) {
        let path = directory.join("ram");
        fs::write(&path, [1; 8192]).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        // In the past, so that the clock's granularity hides nothing.
        file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        let identity = Identity::of(&file).unwrap();
        (path, file, identity)
    }

    #[test]
    fn what_leaves_the_bytes_alone_is_no_change_and_the_rest_is() {
        for root in [std::env::temp_dir(), "/dev/shm".into()] {
            for (name, operation) in HARMLESS {
                let directory = tempfile::tempdir_in(&root).unwrap();
                let (path, file, opened) = made(directory.path());
                operation(&path, &file);
                let now = Identity::of(&file).unwrap();
                assert_eq!(opened.difference(&now, Watch::Content), None, "{name} in {}", root.display());
                assert_eq!(opened.difference(&now, Watch::Size), None, "{name} in {}", root.display());
            }
            for (name, operation) in HARMFUL {
                let directory = tempfile::tempdir_in(&root).unwrap();
                let (path, file, opened) = made(directory.path());
                operation(&path, &file);
                let now = Identity::of(&file).unwrap();
                let differs = |watch| opened.difference(&now, watch).is_some();
                assert!(differs(Watch::Content) && differs(Watch::Strict), "{name} in {}", root.display());
                assert_eq!(differs(Watch::Size), ["truncate", "extend"].contains(&name), "{name}");
            }
        }
    }

    #[test]
    fn the_strict_watch_sees_a_modification_time_that_was_put_back() {
        let directory = tempfile::tempdir().unwrap();
        let (_, file, opened) = made(directory.path());
        let modified = file.metadata().unwrap().modified().unwrap();
        let changed = || Identity::of(&file).unwrap().changed != opened.changed;
        while !changed() {
            file.write_all_at(b"x", 4000).unwrap();
            file.set_modified(modified).unwrap();
        }
        let now = Identity::of(&file).unwrap();
        assert_eq!(opened.difference(&now, Watch::Content), None);
        assert!(opened.difference(&now, Watch::Strict).unwrap().starts_with("its change time"));
    }

    #[test]
    fn another_file_of_the_same_name_is_another() {
        let directory = tempfile::tempdir().unwrap();
        let (path, _file, opened) = made(directory.path());
        fs::write(directory.path().join("new"), [1; 8192]).unwrap();
        fs::rename(directory.path().join("new"), &path).unwrap();
        let other = Identity::of(&File::open(&path).unwrap()).unwrap();
        assert!(!opened.same_file(&other));
        assert_eq!(opened.difference(&other, Watch::Content), Some("the file itself (its inode)"));
    }
}
