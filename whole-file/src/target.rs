//! Which file a name means.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::WholeFileError;

/// How many dangling symlinks are followed (as many as Linux follows, path_resolution(7)).
const MOST_LINKS: usize = 40;

/// The file that is replaced, or made, by writing to `path`: symlinks are followed, dangling ones too.
///
/// # Errors
/// If something else than a regular file is there, or the system can't tell.
pub fn target(path: &Path) -> Result<PathBuf, WholeFileError> {
    let failed = |error| WholeFileError::io(path, "finding it", error);
    let mut at = path.to_owned();
    for _ in 0..MOST_LINKS {
        match fs::metadata(&at) {
            Ok(meta) if !meta.is_file() => return Err(WholeFileError::NotAFile { path: path.to_owned() }),
            // The directory of what is not a symlink stays as it was written.
            Ok(_) if !is_symlink(&at).map_err(failed)? => return Ok(at),
            Ok(_) => return at.canonicalize().map_err(failed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        if !is_symlink(&at).map_err(failed)? {
            return Ok(at);
        }
        let to = fs::read_link(&at).map_err(failed)?;
        at = at.parent().unwrap_or(Path::new("")).join(to);
    }
    Err(failed(io::Error::from_raw_os_error(libc::ELOOP)))
}

fn is_symlink(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(meta) => Ok(meta.is_symlink()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn symlinks_are_followed_to_files_and_to_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        let at = |name: &str| real.join(name);
        fs::write(at("file"), "").unwrap();
        fs::create_dir(at("sub")).unwrap();
        for (to, name) in [("file", "link"), ("link", "link-to-link"), ("new", "sub/dangling"), ("loop", "loop")] {
            symlink(to, at(name)).unwrap();
        }
        symlink("sub/dangling", at("far")).unwrap();
        for (name, expected) in [("file", "file"), ("link", "file"), ("link-to-link", "file"), ("none", "none")] {
            assert_eq!(target(&at(name)).unwrap(), at(expected));
        }
        for name in ["sub/dangling", "far"] {
            assert_eq!(target(&at(name)).unwrap(), at("sub/new"));
        }
        assert!(target(&at("loop")).unwrap_err().to_string().contains("loop"));
        assert_eq!(target(Path::new("none")).unwrap(), Path::new("none"));
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, link) = (dir.path().join("fifo"), dir.path().join("link"));
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        symlink(&fifo, &link).unwrap();
        for path in [&fifo, &link, Path::new("/dev/null"), dir.path()] {
            let error = target(path).unwrap_err();
            assert_eq!(error.to_string(), format!("{}: not a regular file", path.display()));
        }
    }
}
