//! A file that becomes visible as a whole, or not at all.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;
use tempfile::NamedTempFile;

use crate::CreateError;

/// A file without a name, or with a temporary one, which goes away with this value.
#[derive(Debug)]
pub(crate) struct Unpublished {
    file: Temporary,
    /// What a temporary name begins with.
    prefix: std::ffi::OsString,
    directory: PathBuf,
}

#[derive(Debug)]
enum Temporary {
    /// Goes away even if the process is killed.
    Nameless(File),
    /// Where the file system has no other.
    Named(NamedTempFile),
}

impl Unpublished {
    /// Creates a file that can become `path`, and opens it a second time for whoever writes it.
    pub(crate) fn create(path: &Path) -> Result<(Unpublished, File), CreateError> {
        Unpublished::create_by(path, nameless)
    }

    fn create_by(
        path: &Path,
        nameless: impl FnOnce(&Path) -> Option<File>,
    ) -> Result<(Unpublished, File), CreateError> {
        let failed = |error| CreateError::Io { path: path.to_owned(), what: "creating a file beside it", error };
        let Some(name) = path.file_name() else {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        };
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        prefix.push(".");
        let (file, handle) = match nameless(&directory) {
            Some(file) => (file.try_clone().map(Temporary::Nameless), file),
            None => {
                let file = names(&prefix).tempfile_in(&directory).map_err(failed)?;
                let handle = file.as_file().try_clone().map_err(failed)?;
                (Ok(Temporary::Named(file)), handle)
            }
        };
        Ok((Unpublished { file: file.map_err(failed)?, prefix, directory }, handle))
    }

    /// A name under which this process can open it.
    pub(crate) fn path(&self) -> PathBuf {
        match &self.file {
            Temporary::Nameless(file) => by_number(file),
            Temporary::Named(file) => file.path().to_owned(),
        }
    }

    /// Makes the content durable, gives the file its name, and makes the name durable.
    pub(crate) fn publish(self, path: &Path) -> Result<(), CreateError> {
        let failed = |what| move |error| CreateError::Io { path: path.to_owned(), what, error };
        let named = match self.file {
            Temporary::Nameless(file) => {
                file.sync_all().map_err(failed("making it durable"))?;
                let from = by_number(&file);
                let link = |to: &Path| Ok(linkat(AT_FDCWD, &from, AT_FDCWD, to, AtFlags::AT_SYMLINK_FOLLOW)?);
                // A link does not replace what has the name; a rename does.
                let named = names(&self.prefix).make_in(&self.directory, link);
                named.map_err(failed("giving it its name"))?.into_temp_path()
            }
            Temporary::Named(file) => {
                file.as_file().sync_all().map_err(failed("making it durable"))?;
                file.into_temp_path()
            }
        };
        named.persist(path).map_err(|error| failed("giving it its name")(error.error))?;
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

/// The name by which a process can open what it has open.
fn by_number(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn names(prefix: &std::ffi::OsStr) -> tempfile::Builder<'_, 'static> {
    let mut names = tempfile::Builder::new();
    names.prefix(prefix).suffix(".part");
    names
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn with_and_without_a_temporary_name() {
        for (nameless, visible) in [(nameless as fn(&Path) -> Option<File>, None), (|_| None, Some(2))] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("snapshot");
            fs::write(&path, "what was there before").unwrap();
            let files = || fs::read_dir(directory.path()).unwrap().count();

            let (dropped, _) = Unpublished::create_by(&path, nameless).unwrap();
            if let Some(visible) = visible {
                assert_eq!(files(), visible);
            }
            drop(dropped);
            assert_eq!(files(), 1);

            let (unpublished, mut file) = Unpublished::create_by(&path, nameless).unwrap();
            file.write_all(b"what is new").unwrap();
            assert_eq!(fs::read(unpublished.path()).unwrap(), b"what is new");
            assert_eq!(fs::read(&path).unwrap(), b"what was there before");
            unpublished.publish(&path).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"what is new");
            assert_eq!(files(), 1);
        }
    }
}
