//! The file while nobody sees it.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;
use tempfile::TempPath;

use crate::leftover::{self, Held};
use crate::{WholeFileError, target};

/// How often a temporary file is made anew that was taken for a leftover.
const ATTEMPTS: usize = 16;

/// A file without a name, or with a temporary one, which goes away with this value.
#[derive(Debug)]
pub struct WholeFile {
    /// Its temporary name, where the file system has no files without. Those go away even if the process is killed.
    name: Option<TempPath>,
    file: Held,
    /// What a temporary name begins with.
    prefix: OsString,
    directory: PathBuf,
    /// The name as it was given, for messages.
    path: PathBuf,
    /// The name it will have.
    target: PathBuf,
}

impl WholeFile {
    /// Creates a file that can become `path`, in the same directory. What killed processes left of it there goes away.
    ///
    /// # Errors
    /// If something else than a regular file has the name, or none can be made.
    pub fn create(path: &Path) -> Result<WholeFile, WholeFileError> {
        WholeFile::create_by(path, nameless)
    }

    fn create_by(path: &Path, nameless: impl FnOnce(&Path) -> Option<File>) -> Result<WholeFile, WholeFileError> {
        let failed = |error| WholeFileError::io(path, "creating a temporary file next to it", error);
        let target = target(path)?;
        // `new/` and `new/.` can only be directories: told now, and not when all is written.
        let is_last = |name: &&OsStr| target.as_os_str().as_bytes().ends_with(name.as_bytes());
        let Some(name) = target.file_name().filter(is_last) else {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        };
        let directory = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let prefix = leftover::prefix(name);
        leftover::remove(&directory, &prefix);
        let (file, name) = match nameless(&directory) {
            // It will have a temporary name for a moment, and be held then.
            Some(file) => (Held::new(file), None),
            None => named(&directory, &prefix).map_err(failed)?,
        };
        Ok(WholeFile { name, file, prefix, directory, path: path.to_owned(), target })
    }

    /// The file, to be written.
    #[must_use]
    pub fn file(&self) -> &File {
        self.file.file()
    }

    /// A name under which this process can open it.
    #[must_use]
    pub fn temporary_path(&self) -> PathBuf {
        match &self.name {
            Some(name) => name.to_path_buf(),
            None => by_number(self.file()),
        }
    }

    /// Makes the content durable, gives the file its name, and makes the name durable.
    ///
    /// # Errors
    /// The system's. What had the name still has it then, unless only the last step failed.
    pub fn publish(mut self) -> Result<(), WholeFileError> {
        let failed = |what| {
            let path = self.path.clone();
            move |error| WholeFileError::Io { path, what, error }
        };
        self.file().sync_all().map_err(failed("making it durable"))?;
        let name = match self.name.take() {
            Some(name) => name,
            None => {
                let from = by_number(self.file());
                let link = |to: &Path| Ok(linkat(AT_FDCWD, &from, AT_FDCWD, to, AtFlags::AT_SYMLINK_FOLLOW)?);
                // A link does not replace what has the name; a rename does.
                let named = names(&self.prefix).make_in(&self.directory, link);
                named.map_err(failed("giving it its name"))?.into_temp_path()
            }
        };
        name.persist(&self.target).map_err(|error| failed("giving it its name")(error.error))?;
        let directory = File::open(&self.directory).map_err(failed("making its name durable"))?;
        directory.sync_all().map_err(failed("making its name durable"))
    }
}

/// A file without a name that can be given one; `None` where the system can't.
fn nameless(directory: &Path) -> Option<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(directory).ok()?;
    // It will be linked by this name, which a system without /proc does not have.
    by_number(&file).exists().then_some(file)
}

/// A file with a temporary name that nobody takes for a leftover.
fn named(directory: &Path, prefix: &OsStr) -> io::Result<(Held, Option<TempPath>)> {
    for _ in 0..ATTEMPTS {
        let (file, name) = names(prefix).tempfile_in(directory)?.into_parts();
        let file = Held::new(file);
        if !file.is_removed()? {
            return Ok((file, Some(name)));
        }
    }
    Err(io::Error::other("others remove it again and again"))
}

/// The name by which a process can open what it has open.
fn by_number(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn names(prefix: &OsStr) -> tempfile::Builder<'_, 'static> {
    let mut names = tempfile::Builder::new();
    names.prefix(prefix).suffix(leftover::SUFFIX).rand_bytes(leftover::RANDOM);
    names
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    type Make = fn(&Path) -> Option<File>;
    const BOTH: [(Make, bool); 2] = [(nameless, false), (|_| None, true)];

    fn files(directory: &Path) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn a_file_appears_whole_with_and_without_a_temporary_name() {
        for (make, visible) in BOTH {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("snapshot");
            fs::write(&path, "what was there before").unwrap();

            let dropped = WholeFile::create_by(&path, make).unwrap();
            if visible {
                assert_eq!(files(directory.path()), 2);
            }
            drop(dropped);
            assert_eq!(files(directory.path()), 1);

            let new = WholeFile::create_by(&path, make).unwrap();
            new.file().write_all(b"what is new").unwrap();
            assert_eq!(fs::read(new.temporary_path()).unwrap(), b"what is new");
            assert_eq!(fs::read(&path).unwrap(), b"what was there before");
            new.publish().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"what is new");
            assert_eq!(files(directory.path()), 1);
        }
    }

    #[test]
    fn a_name_that_no_file_can_have_is_refused_before_anything_is_written() {
        for (make, _) in BOTH {
            let directory = tempfile::tempdir().unwrap();
            let at = |name: &str| directory.path().join(name);
            std::os::unix::fs::symlink("other/", at("link")).unwrap();
            for name in ["new/", "new/.", "link", "none/new"] {
                let error = WholeFile::create_by(&at(name), make).unwrap_err();
                assert!(error.to_string().contains("creating a temporary file next to it"), "{name}: {error}");
            }
            assert!(WholeFile::create_by(&at(&"x".repeat(256)), make).is_err());
            assert_eq!(files(directory.path()), 1);
        }
    }

    #[test]
    fn the_longest_names_leave_room_for_a_temporary_one() {
        for (make, _) in BOTH {
            let directory = tempfile::tempdir().unwrap();
            for length in [235, 236, 237, 255] {
                let path = directory.path().join("x".repeat(length));
                let killed = WholeFile::create_by(&path, |_| None).unwrap();
                let left = killed.name.unwrap().keep().unwrap();
                drop(killed.file);
                let new = WholeFile::create_by(&path, make).unwrap();
                assert!(!left.exists(), "{length}");
                new.file().write_all(b"all").unwrap();
                new.publish().unwrap();
                assert_eq!(fs::read(&path).unwrap(), b"all");
            }
            assert_eq!(files(directory.path()), 4);
        }
    }

    #[test]
    fn leftovers_go_away_and_files_in_use_do_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("snapshot");
        let in_use = WholeFile::create_by(&path, |_| None).unwrap();
        // A killed process: the name stays, the lock goes.
        let killed = WholeFile::create_by(&path, |_| None).unwrap();
        let (file, left) = (killed.file, killed.name.unwrap().keep().unwrap());
        let other = directory.path().join(".snapshot.backup.part");
        fs::write(&other, "somebody's").unwrap();
        drop(WholeFile::create_by(&path, |_| None).unwrap());
        assert!(left.exists(), "it is not left behind as long as it is open");
        drop(file);
        drop(WholeFile::create_by(&path, nameless).unwrap());
        assert!(!left.exists());
        assert!(other.exists());
        in_use.file().write_all(b"all").unwrap();
        in_use.publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"all");
    }

    #[test]
    fn a_published_file_is_not_locked() {
        for (make, _) in BOTH {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("snapshot");
            let new = WholeFile::create_by(&path, make).unwrap();
            let _still_open = new.file().try_clone().unwrap();
            new.publish().unwrap();
            let free = nix::fcntl::Flock::lock(File::open(&path).unwrap(), nix::fcntl::FlockArg::LockExclusiveNonblock);
            assert!(free.is_ok());
        }
    }

    #[test]
    fn a_symlink_stays_and_what_it_means_is_replaced() {
        for (make, _) in BOTH {
            let directory = tempfile::tempdir().unwrap();
            let at = |name: &str| directory.path().join(name);
            fs::create_dir(at("sub")).unwrap();
            std::os::unix::fs::symlink("sub/file", at("link")).unwrap();
            for content in ["first, dangling", "then not"] {
                let new = WholeFile::create_by(&at("link"), make).unwrap();
                new.file().write_all(content.as_bytes()).unwrap();
                new.publish().unwrap();
                assert!(at("link").is_symlink());
                assert_eq!(fs::read_to_string(at("sub/file")).unwrap(), content);
            }
            assert!(WholeFile::create_by(Path::new("/dev/null"), make).is_err());
        }
    }
}
