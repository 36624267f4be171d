//! A file system of one file, behind FUSE: its times may move by themselves, and what it says of holes may be wrong.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    Request, TimeOrNow,
};
use parking_lot::Mutex;

/// Attributes are asked for again each time.
const FOR_NOW: Duration = Duration::ZERO;
/// The number of the one file.
const FILE: INodeNo = INodeNo(2);

/// How it behaves.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Habits {
    /// The modification time is another one each time somebody asks.
    pub(crate) moves_times: bool,
    /// `SEEK_DATA` finds none.
    pub(crate) calls_data_a_hole: bool,
}

struct State {
    file: File,
    names: HashSet<OsString>,
    habits: Habits,
    asked: u64,
}

struct OneFile(Arc<Mutex<State>>);

/// The mounted file system.
pub(crate) struct Disk {
    session: Option<BackgroundSession>,
    directory: tempfile::TempDir,
}

impl Disk {
    /// With that file, called `ram`.
    pub(crate) fn mount(file: File, habits: Habits) -> Disk {
        let directory = tempfile::tempdir().unwrap();
        let state = State { file, names: HashSet::from(["ram".into()]), habits, asked: 0 };
        let one = OneFile(Arc::new(Mutex::new(state)));
        let session = fuser::spawn_mount(one, directory.path(), &Config::default()).unwrap();
        Disk { session: Some(session), directory }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("ram")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let ended = self.session.take().map(BackgroundSession::umount_and_join);
        assert!(ended.is_none_or(|ended| ended.is_ok()) || std::thread::panicking());
    }
}

impl State {
    fn attributes(&mut self, number: INodeNo) -> std::io::Result<FileAttr> {
        let of = self.file.metadata()?;
        self.asked += u64::from(self.habits.moves_times);
        let moved = Duration::from_secs(self.asked);
        let root = number == INodeNo::ROOT;
        let changed = SystemTime::UNIX_EPOCH + Duration::new(of.ctime().unsigned_abs(), 0) + moved;
        Ok(FileAttr {
            ino: number,
            size: if root { 0 } else { of.len() },
            blocks: if root { 0 } else { of.blocks() },
            atime: changed,
            mtime: of.modified()? + moved,
            ctime: changed,
            crtime: changed,
            kind: if root { FileType::Directory } else { FileType::RegularFile },
            perm: if root { 0o700 } else { u16::try_from(of.mode() & 0o777).unwrap() },
            nlink: u32::try_from(self.names.len()).unwrap(),
            uid: of.uid(),
            gid: of.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for OneFile {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.0.lock();
        if !state.names.contains(name) {
            return reply.error(Errno::ENOENT);
        }
        reply.entry(&FOR_NOW, &state.attributes(FILE).unwrap(), Generation(0));
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOR_NOW, &self.0.lock().attributes(number).unwrap());
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.0.lock();
        if let Some(mode) = mode {
            state.file.set_permissions(Permissions::from_mode(mode & 0o777)).unwrap();
        }
        if let Some(size) = size {
            state.file.set_len(size).unwrap();
        }
        reply.attr(&FOR_NOW, &state.attributes(number).unwrap());
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut bytes = vec![0; size as usize];
        let count = self.0.lock().file.read_at(&mut bytes, offset).unwrap();
        reply.data(&bytes[..count]);
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let state = self.0.lock();
        let size = i64::try_from(state.file.metadata().unwrap().len()).unwrap();
        match whence {
            libc::SEEK_DATA if state.habits.calls_data_a_hole || offset >= size => reply.error(Errno::ENXIO),
            libc::SEEK_HOLE if !state.habits.calls_data_a_hole => reply.offset(size),
            _ => reply.offset(offset),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.0.lock();
        state.names.insert(name.to_owned());
        reply.entry(&FOR_NOW, &state.attributes(FILE).unwrap(), Generation(0));
    }

    fn unlink(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.0.lock().names.remove(name);
        reply.ok();
    }

    fn rename(&self, _: &Request, _: INodeNo, name: &OsStr, _: INodeNo, to: &OsStr, _: RenameFlags, reply: ReplyEmpty) {
        let mut state = self.0.lock();
        state.names.remove(name);
        state.names.insert(to.to_owned());
        reply.ok();
    }
}

/// Whether what is told of a file's name is that of a mount of ours.
pub(crate) fn is_fuse(path: &Path) -> bool {
    let magic = nix::sys::statfs::statfs(path).unwrap().filesystem_type().0;
    magic == 0x6573_5546
}
