//! Disk images that another process holds. QEMU takes its disks over no sooner than it starts the guest, and fails then.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use fastload_qmp::{ImageFile, Process, Qmp, QmpError};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;

/// The byte whose lock says that nobody else may write to an image (QEMU block/file-posix.c: `RAW_LOCK_SHARED_BASE`, and
/// the number of `BLK_PERM_WRITE`).
const NOBODY_ELSE_WRITES: i64 = 200 + 1;

/// An image that another process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    file: String,
    by: Vec<Process>,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by: Vec<String> = self.by.iter().map(Process::to_string).collect();
        let by = if by.is_empty() { "another process".to_owned() } else { by.join(" and ") };
        write!(f, "its disk image {} is in use by {by}", self.file)
    }
}

/// The first image to which the guest would write, and another process does not let it.
pub(crate) fn held(qmp: &mut Qmp) -> Result<Option<Held>, QmpError> {
    let images: Vec<ImageFile> = qmp.image_files()?.into_iter().filter(|image| image.writable).collect();
    if images.is_empty() {
        return Ok(None);
    }
    let qemu = qmp.process();
    Ok(images.iter().find_map(|image| holder(image, qemu)))
}

/// As QEMU sees a file of this name.
pub(crate) fn seen_by(qemu: Option<u32>, file: &str) -> PathBuf {
    match (qemu, file.strip_prefix('/')) {
        (Some(id), Some(absolute)) => PathBuf::from(format!("/proc/{id}/root/{absolute}")),
        (Some(id), None) => PathBuf::from(format!("/proc/{id}/cwd/{file}")),
        (None, _) => PathBuf::from(file),
    }
}

fn holder(image: &ImageFile, qemu: Option<u32>) -> Option<Held> {
    let open = |path: PathBuf| {
        let flags = (OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits();
        fs::OpenOptions::new().read(true).custom_flags(flags).open(path)
    };
    let opened = open(seen_by(qemu, &image.file)).or_else(|_| open(PathBuf::from(&image.file)));
    // What can't be looked at is found out by QEMU.
    let file = opened.ok()?;
    if !is_locked(&file) {
        return None;
    }
    let mut by = processes_that_lock(&file.metadata().ok()?);
    let own = by.len();
    by.retain(|id| Some(*id) != qemu);
    if by.is_empty() && own > 0 {
        return None;
    }
    Some(Held { file: image.file.clone(), by: by.into_iter().filter_map(Process::find).collect() })
}

/// Whether anybody has the lock.
#[expect(clippy::cast_possible_truncation, reason = "small constants, which the structure has as shorts")]
fn is_locked(file: &File) -> bool {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: NOBODY_ELSE_WRITES,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && lock.l_type != libc::F_UNLCK as libc::c_short
}

/// The processes that have it, as far as we may see (proc_pid_fdinfo(5)).
fn processes_that_lock(image: &Metadata) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    ids.filter(|id| {
        let mut fds = fs::read_dir(format!("/proc/{id}/fd")).into_iter().flatten().flatten();
        fds.any(|fd| {
            let same = |meta: Metadata| meta.dev() == image.dev() && meta.ino() == image.ino();
            let number = fd.file_name();
            fs::metadata(fd.path()).is_ok_and(same)
                && fs::read_to_string(format!("/proc/{id}/fdinfo/{}", number.display()))
                    .is_ok_and(|text| text.lines().any(is_the_lock))
        })
    })
    .collect()
}

/// A line such as `lock: 1: OFDLCK ADVISORY READ -1 00:2c:1234 201 201`.
fn is_the_lock(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [first, .., from, to] = &words[..] else { return false };
    let number = |word: &str| word.parse::<i64>().ok();
    *first == "lock:"
        && number(from).is_some_and(|from| from <= NOBODY_ELSE_WRITES)
        && (*to == "EOF" || number(to).is_some_and(|to| to >= NOBODY_ELSE_WRITES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_fdinfo() {
        assert!(is_the_lock("lock:\t1: OFDLCK  ADVISORY  READ -1 00:2c:1234 201 201"));
        assert!(is_the_lock("lock:\t2: POSIX  ADVISORY  WRITE 77 00:2c:1234 0 EOF"));
        assert!(!is_the_lock("lock:\t1: OFDLCK  ADVISORY  READ -1 00:2c:1234 100 101"));
        assert!(!is_the_lock("flags:\t02100000") && !is_the_lock(""));
    }

    #[test]
    fn an_image_that_nobody_locks_is_free() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let name = file.path().display().to_string();
        let image = ImageFile { node: String::new(), file: name, writable: true };
        assert_eq!(holder(&image, None), None);
        assert_eq!(holder(&ImageFile { file: "/nonexistent".into(), ..image }, None), None);
    }
}
