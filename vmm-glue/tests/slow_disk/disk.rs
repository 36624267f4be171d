//! A disk that takes as long for each write as a test wants, or fails: a file system of one directory, whose content is
//! in ordinary files, and whose writes stand still until they are let go.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, WriteFlags,
};
use parking_lot::{Condvar, Mutex};

/// Who asked again finds what has changed meanwhile.
const FOR_NOW: Duration = Duration::ZERO;

/// What a disk can't do any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// To write, after a number of further writes.
    WriteAfter(u64),
    /// To make durable what was written.
    Sync,
}

/// Holds writes.
#[derive(Default)]
pub(crate) struct Turnstile {
    state: Mutex<State>,
    change: Condvar,
}

#[derive(Default)]
struct State {
    /// Writes that stand, or have stood, in front of it; and how many were let through.
    came: u64,
    passed: u64,
    open: bool,
    failure: Option<Failure>,
}

impl Turnstile {
    /// Waits until a write stands in front of it, for a limited time.
    pub(crate) fn somebody_waits(&self, limit: Duration) -> bool {
        let mut state = self.state.lock();
        if state.came == state.passed {
            self.change.wait_for(&mut state, limit);
        }
        state.came > state.passed
    }

    /// Lets one write through.
    pub(crate) fn let_one_pass(&self) {
        self.state.lock().passed += 1;
        self.change.notify_all();
    }

    /// Holds nobody any more.
    pub(crate) fn open(&self) {
        self.state.lock().open = true;
        self.change.notify_all();
    }

    /// From now on, or not any more.
    pub(crate) fn fail(&self, failure: Option<Failure>) {
        self.state.lock().failure = failure;
    }

    /// Waits its turn: to write, or to make durable.
    fn pass(&self, sync: bool) -> Result<(), Errno> {
        self.stand();
        match &mut self.state.lock().failure {
            Some(Failure::WriteAfter(0)) if !sync => Err(Errno::EIO),
            Some(Failure::WriteAfter(left)) if !sync => {
                *left -= 1;
                Ok(())
            }
            Some(Failure::Sync) if sync => Err(Errno::EIO),
            _ => Ok(()),
        }
    }

    fn stand(&self) {
        let mut state = self.state.lock();
        state.came += 1;
        let me = state.came;
        self.change.notify_all();
        while state.passed < me && !state.open {
            self.change.wait(&mut state);
        }
    }
}

/// The mounted file system.
pub(crate) struct SlowDisk {
    pub(crate) turnstile: Arc<Turnstile>,
    session: Option<BackgroundSession>,
    directory: tempfile::TempDir,
}

impl SlowDisk {
    pub(crate) fn mount() -> SlowDisk {
        let turnstile = Arc::new(Turnstile::default());
        let directory = tempfile::tempdir().unwrap();
        let slow = Slow { turnstile: Arc::clone(&turnstile), files: Mutex::default() };
        let session = fuser::spawn_mount(slow, directory.path(), &Config::default()).unwrap();
        SlowDisk { turnstile, session: Some(session), directory }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        self.turnstile.open();
        let ended = self.session.take().map(BackgroundSession::umount_and_join);
        assert!(ended.is_none_or(|ended| ended.is_ok()) || std::thread::panicking());
    }
}

struct Slow {
    turnstile: Arc<Turnstile>,
    files: Mutex<Files>,
}

#[derive(Default)]
struct Files {
    names: HashMap<OsString, u64>,
    content: HashMap<u64, Arc<File>>,
}

fn attributes(number: u64, kind: FileType, size: u64) -> FileAttr {
    let now = SystemTime::UNIX_EPOCH;
    let perm = if kind == FileType::Directory { 0o700 } else { 0o600 };
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: size.div_ceil(512),
        atime: now,
        mtime: now,
        ctime: now,
        crtime: now,
        kind,
        perm,
        nlink: 1,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Slow {
    fn file(&self, number: INodeNo) -> Result<Arc<File>, Errno> {
        self.files.lock().content.get(&number.0).cloned().ok_or(Errno::ENOENT)
    }

    fn attributes(&self, number: INodeNo) -> Result<FileAttr, Errno> {
        if number == INodeNo::ROOT {
            return Ok(attributes(number.0, FileType::Directory, 0));
        }
        let size = self.file(number)?.metadata()?.len();
        Ok(attributes(number.0, FileType::RegularFile, size))
    }

    fn named(&self, name: &OsStr) -> Result<FileAttr, Errno> {
        let number = *self.files.lock().names.get(name).ok_or(Errno::ENOENT)?;
        self.attributes(INodeNo(number))
    }

    fn make(&self, name: &OsStr) -> Result<FileAttr, Errno> {
        let mut files = self.files.lock();
        let number = files.content.len() as u64 + 2;
        files.content.insert(number, Arc::new(tempfile::tempfile()?));
        files.names.insert(name.to_owned(), number);
        Ok(attributes(number, FileType::RegularFile, 0))
    }
}

/// Answers with one or the other.
macro_rules! answer {
    ($reply:ident, $result:expr, $value:ident => $good:expr) => {
        match $result {
            Ok($value) => $good,
            Err(error) => $reply.error(Errno::from(error)),
        }
    };
}

impl Filesystem for Slow {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        answer!(reply, self.named(name), found => reply.entry(&FOR_NOW, &found, Generation(0)));
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        answer!(reply, self.attributes(number), found => reply.attr(&FOR_NOW, &found));
    }

    fn create(&self, _: &Request, _: INodeNo, name: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        // Each write comes here at once, and its thread waits.
        let made = self.make(name);
        answer!(reply, made, found => {
            reply.created(&FOR_NOW, &found, Generation(0), FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
        });
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn readdir(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        for (at, (name, number)) in (1..).zip(&self.files.lock().names).skip(usize::try_from(offset).unwrap()) {
            if reply.add(INodeNo(*number), at, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut bytes = vec![0; size as usize];
        let count = self.file(number).and_then(|file| Ok(file.read_at(&mut bytes, offset)?));
        answer!(reply, count, count => reply.data(&bytes[..count]));
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        bytes: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let passed = self.turnstile.pass(false);
        let written = passed.and_then(|()| Ok(self.file(number)?.write_all_at(bytes, offset)?));
        answer!(reply, written, _done => reply.written(u32::try_from(bytes.len()).unwrap()));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let passed = self.turnstile.pass(true);
        answer!(reply, passed, _done => reply.ok());
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.files.lock().names.remove(name).ok_or(Errno::ENOENT);
        answer!(reply, removed, _number => reply.ok());
    }

    fn rename(&self, _: &Request, _: INodeNo, name: &OsStr, _: INodeNo, to: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        let mut files = self.files.lock();
        let moved = files.names.remove(name).ok_or(Errno::ENOENT);
        answer!(reply, moved, number => {
            files.names.insert(to.to_owned(), number);
            reply.ok();
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(1 << 24, 1 << 24, 1 << 24, 1000, 1000, 4096, 255, 4096);
    }
}
