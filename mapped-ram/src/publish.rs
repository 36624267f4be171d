//! A file that becomes visible as a whole, or not at all.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::CreateError;

/// A file with a temporary name, which goes away with this value.
#[derive(Debug)]
pub(crate) struct Unpublished {
    file: NamedTempFile,
    directory: PathBuf,
}

impl Unpublished {
    /// Creates a file that can become `path`, and opens it a second time for whoever writes it.
    pub(crate) fn create(path: &Path) -> Result<(Unpublished, File), CreateError> {
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
        let file = tempfile::Builder::new().prefix(&prefix).suffix(".part").tempfile_in(&directory).map_err(failed)?;
        let handle = file.as_file().try_clone().map_err(failed)?;
        Ok((Unpublished { file, directory }, handle))
    }

    /// The temporary name.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Makes the content durable, gives the file its name, and makes the name durable.
    pub(crate) fn publish(self, path: &Path) -> Result<(), CreateError> {
        let failed = |what| move |error| CreateError::Io { path: path.to_owned(), what, error };
        self.file.as_file().sync_all().map_err(failed("making it durable"))?;
        self.file.persist(path).map_err(|error| failed("giving it its name")(error.error))?;
        let directory = File::open(&self.directory).map_err(failed("making its name durable"))?;
        directory.sync_all().map_err(failed("making its name durable"))
    }
}
