//! A directory for large files, which does not stay for ever if its process is killed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

/// What the directories' names begin with.
const PREFIX: &str = "fastload-scratch-";

/// A directory that goes away with this value. If its process is killed, it goes when the next one is made in the same place: an
/// owner that lives holds a lock, which ends with its process.
#[derive(Debug)]
pub struct Scratch {
    directory: TempDir,
    // Last: until the directory is gone, it is held.
    _held: Flock<File>,
}

impl Scratch {
    /// A new directory in `parent`, from which those of dead owners are removed.
    ///
    /// # Errors
    /// If it can't be made or locked.
    pub fn new_in(parent: &Path) -> io::Result<Scratch> {
        for entry in fs::read_dir(parent)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(PREFIX)
                && let Ok(Some(_dead)) = hold(&entry.path())
            {
                // Somebody else's, or busy: it stays.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        loop {
            let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
            // Somebody may have taken it for a dead owner's before it was held.
            if let Some(held) = hold(directory.path())? {
                return Ok(Scratch { directory, _held: held });
            }
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// The lock of a directory; `None` if somebody else has it, or it is gone.
fn hold(directory: &Path) -> io::Result<Option<Flock<File>>> {
    let open = File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(directory);
    let file = match open {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let Ok(held) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(None) };
    let ours = held.metadata()?;
    let there =
        fs::symlink_metadata(directory).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()));
    Ok(there.then_some(held))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_dead_left_goes_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let left = parent.path().join(format!("{PREFIX}dead"));
        fs::create_dir(&left).unwrap();
        fs::write(left.join("file"), "content").unwrap();
        let other = parent.path().join("other");
        fs::create_dir(&other).unwrap();
        let target = parent.path().join("target");
        fs::create_dir(&target).unwrap();
        std::os::unix::fs::symlink(&target, parent.path().join(format!("{PREFIX}link"))).unwrap();
        let first = Scratch::new_in(parent.path()).unwrap();
        fs::write(first.path().join("file"), "content").unwrap();
        assert!(!left.exists() && other.exists() && target.exists());
        let second = Scratch::new_in(parent.path()).unwrap();
        assert_ne!(first.path(), second.path());
        let (path, second_path) = (first.path().to_owned(), second.path().to_owned());
        assert!(path.join("file").exists(), "its owner lives");
        drop(first);
        assert!(!path.exists() && second_path.exists());
        Scratch::new_in(&other.join("missing")).unwrap_err();
    }

    #[test]
    fn many_are_made_at_once() {
        let parent = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let scratch = Scratch::new_in(parent.path()).unwrap();
                        fs::write(scratch.path().join("file"), "content").unwrap();
                        assert!(scratch.path().join("file").exists());
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
