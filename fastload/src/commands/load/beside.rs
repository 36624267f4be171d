//! What lies next to a QMP socket: the socket at which QEMU listens for us, and a note for the process that recovers a
//! guest.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fastload_qmp::{Capabilities, Qmp, QmpAddress};
use page_units::PageSize;
use serde::{Deserialize, Serialize};

use crate::commands::Failure;
use crate::commands::serving::Image;

/// The longest note that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// The longest path of a unix socket, in bytes (unix(7): 108 with the NUL).
const LONGEST_PATH: usize = 107;

/// The two files. Their names depend on that of the QMP socket only, so that they can be found again.
#[derive(Clone, Debug)]
pub(crate) struct Beside {
    /// The socket, as this process reaches it.
    pub(crate) socket: PathBuf,
    /// The same, as QEMU is told.
    pub(crate) listen: String,
    note: PathBuf,
    directory: PathBuf,
    /// Keeps a way to the directory open that needs no name.
    way: Option<Arc<File>>,
    /// Where QEMU's files are others than ours.
    elsewhere: bool,
}

/// What can't be asked of a QEMU whose main thread is held up, and what no QEMU knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    /// The snapshot, for people.
    snapshot: String,
    /// What tells it from others, see [`identity`].
    identity: String,
    pub(crate) preempt: bool,
    /// Of the RAM blocks, in bytes.
    page_sizes: BTreeMap<String, u64>,
    /// The capabilities before we changed them.
    capabilities: BTreeMap<String, bool>,
    /// The command that recovers the guest.
    #[serde(default)]
    recovery: String,
    /// Where QEMU listens, in its words, and where that is for us.
    #[serde(default)]
    listen: String,
    #[serde(default)]
    socket: OsString,
}

impl Beside {
    /// Both files are in the directory of the QMP socket, which QEMU and we can reach; for QMP over TCP, in one for files
    /// of running programs.
    pub(crate) fn of(qmp: &QmpAddress) -> Result<Beside, Failure> {
        let (dir, name) = match qmp.path() {
            Some(path) => (directory_of(path).to_owned(), path.file_name().unwrap_or_default().to_owned()),
            None => (runtime_directory(), OsString::from(qmp.to_string())),
        };
        let directory = dir.canonicalize().map_err(|error| format!("{}: {error}", dir.display()))?;
        // Half of it keeps the name as short as can be.
        let name = format!(".fastload-{:08x}", hash(name.as_encoded_bytes(), SEED) >> 32);
        let (socket, note) = (directory.join(&name), directory.join(format!("{name}.json")));
        let listen = socket.display().to_string();
        Ok(Beside { socket, listen, note, directory, way: None, elsewhere: false })
    }

    /// Finds names for the socket that QEMU and this process can use: QEMU may have another root directory, and the path
    /// may be too long for an address, or have bytes that QEMU's own syntax does not.
    pub(crate) fn reached_by(mut self, qmp: &mut Qmp) -> Result<Beside, Failure> {
        let name = self.socket.file_name().unwrap_or_default().to_owned();
        let root = qmp.process().map(|id| PathBuf::from(format!("/proc/{id}/root")));
        let inside = |root: &Path, path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
        let same = |root: &Path| same_directory(&inside(root, &self.directory), &self.directory);
        self.elsewhere = root.as_deref().is_some_and(|root| !same(root));
        self.socket = self.directory.join(&name);
        self.listen = self.socket.display().to_string();
        let plain = self.socket.to_str().is_some_and(|text| text.len() <= LONGEST_PATH && !text.contains(','));
        if plain && !self.elsewhere {
            return Ok(self);
        }
        let failed = |error| format!("{}: {error}", self.directory.display());
        let way = Arc::new(File::open(&self.directory).map_err(failed)?);
        self.socket = PathBuf::from(format!("/proc/self/fd/{}", way.as_raw_fd())).join(&name);
        let has_proc = root.as_deref().is_none_or(|root| root.join("proc/self").symlink_metadata().is_ok());
        if let (Some(root), false) = (root.as_deref(), has_proc) {
            // It sees no more than a directory of its own.
            self.socket = root.join(&name);
            self.listen = format!("/{}", name.display());
        } else if !qmp.passes_fds() {
            return Err(format!(
                "{}: QEMU can't open a socket at a path like this: give it a QMP unix socket in another directory",
                self.directory.display()
            )
            .into());
        } else {
            // QEMU is given the directory itself.
            let number = qmp.add_fd(way.as_fd())?;
            self.listen = format!("/proc/self/fd/{number}/{}", name.display());
        }
        self.way = Some(way);
        Ok(self)
    }

    /// The same files, where a note says that the socket is.
    pub(crate) fn noted(&self, note: &Note) -> Beside {
        if note.listen.is_empty() {
            return self.clone();
        }
        let mut noted = Beside { socket: PathBuf::from(&note.socket), listen: note.listen.clone(), ..self.clone() };
        // A descriptor's number is of no use to another process than the one that had it.
        if let (true, Ok(way)) = (noted.socket.starts_with("/proc/self"), File::open(&self.directory)) {
            let name = self.socket.file_name().unwrap_or_default();
            noted.socket = PathBuf::from(format!("/proc/self/fd/{}", way.as_raw_fd())).join(name);
            noted.way = Some(Arc::new(way));
        }
        noted
    }

    /// What it means that QEMU can't make the socket.
    pub(crate) fn unreachable(&self, error: &str) -> String {
        let directory = self.directory.display();
        if self.elsewhere {
            return format!(
                "{error}. QEMU sees another root directory (chroot, or a mount namespace of its own), in which it can't \
                 make a socket: let its user write to it, or start QEMU without"
            );
        }
        format!("{error}. QEMU's user must be able to make a socket in {directory}, where its QMP socket is")
    }

    /// What QEMU takes for the address of the socket.
    pub(crate) fn uri(&self) -> String {
        format!("unix:{}", self.listen)
    }

    /// Writes the note, for our own eyes. Nobody else's file is written to, wherever a name leads.
    pub(crate) fn write(&self, note: &Note) -> io::Result<()> {
        self.forget();
        let note = Note { listen: self.listen.clone(), socket: self.socket.clone().into(), ..note.clone() };
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.note)?;
        file.write_all(&serde_json::to_vec(&note)?)
    }

    /// The note, if it is there, can be understood, and is from somebody who may tell us.
    pub(crate) fn read(&self) -> Option<Note> {
        let meta = fs::symlink_metadata(&self.note).ok().filter(fs::Metadata::is_file)?;
        let trusted = meta.uid() == 0 || meta.uid() == nix::unistd::geteuid().as_raw();
        let file = fs::File::open(&self.note).ok().filter(|_| trusted)?;
        let mut text = Vec::new();
        file.take(LONGEST).read_to_end(&mut text).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Removes the note.
    pub(crate) fn forget(&self) {
        // It may not be there.
        let _ = fs::remove_file(&self.note);
    }
}

impl Note {
    pub(crate) fn new(
        snapshot: &Path,
        image: &Image,
        preempt: bool,
        page_sizes: &HashMap<String, PageSize>,
        capabilities: &Capabilities,
    ) -> Note {
        Note {
            snapshot: std::path::absolute(snapshot).as_deref().unwrap_or(snapshot).display().to_string(),
            identity: identity(image),
            preempt,
            page_sizes: page_sizes.iter().map(|(name, size)| (name.clone(), size.bytes().0)).collect(),
            capabilities: capabilities.0.clone(),
            recovery: String::new(),
            listen: String::new(),
            socket: OsString::new(),
        }
    }

    /// The same with the command that recovers the guest.
    pub(crate) fn with_recovery(self, command: &str) -> Note {
        Note { recovery: command.to_owned(), ..self }
    }

    /// The command that recovers the guest, or another one if the note does not tell.
    pub(crate) fn recovery(&self, other: &str) -> String {
        if self.recovery.is_empty() { other.to_owned() } else { self.recovery.clone() }
    }

    /// Another snapshot than that from which the guest got the memory that it has would give it a mixture of two.
    pub(crate) fn is_about(&self, image: &Image, path: &Path) -> Result<(), Failure> {
        if identity(image) == self.identity {
            return Ok(());
        }
        let (path, right) = (path.display(), &self.snapshot);
        Err(format!(
            "{path}: it is not the snapshot that this guest was loaded from, its device state is another: the guest still \
             waits for that one, which was {right}"
        )
        .into())
    }

    pub(crate) fn page_sizes(&self) -> HashMap<String, PageSize> {
        let sizes = self.page_sizes.iter();
        sizes.filter_map(|(name, size)| Some((name.clone(), PageSize::new(*size)?))).collect()
    }

    pub(crate) fn capabilities(&self) -> Capabilities {
        Capabilities(self.capabilities.clone())
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    }
}

/// Where programs of this user keep files as long as they run.
fn runtime_directory() -> PathBuf {
    let own = std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|directory| directory.is_absolute() && directory.is_dir());
    own.unwrap_or_else(|| if nix::unistd::geteuid().is_root() { "/run" } else { "/tmp" }.into())
}

fn same_directory(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    // If we may not look, it is as good as always so.
    match (identity(a), identity(b)) {
        (Ok(a), Ok(b)) => a == b,
        (Err(error), _) => error.kind() == io::ErrorKind::PermissionDenied,
        (_, Err(_)) => false,
    }
}

/// Machine type, RAM blocks and device state: as good as never the same in two snapshots, and the same in all files that
/// are made of one.
fn identity(image: &Image) -> String {
    let mut all = hash(image.opening.configuration.machine.as_bytes(), SEED);
    for block in image.snapshot.layout().blocks() {
        all = hash(&block.length().0.to_le_bytes(), hash(block.name().as_bytes(), all));
    }
    all = hash(&image.opening.devices, hash(&image.opening.early, all));
    format!("{all:016x}")
}

const SEED: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a over words of eight bytes, and the length. Not for those who mean to deceive.
fn hash(bytes: &[u8], seed: u64) -> u64 {
    let word = |chunk: &[u8]| chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let words = bytes.chunks(8).map(word).chain([bytes.len() as u64]);
    words.fold(seed, |hash, word| {
        let mixed = (hash ^ word).wrapping_mul(0x0100_0000_01b3);
        // Or else the high bits of a word would never reach the low ones.
        mixed ^ (mixed >> 32)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn note() -> Note {
        Note {
            snapshot: "/a".into(),
            identity: "1".into(),
            preempt: true,
            page_sizes: BTreeMap::from([("pc.ram".into(), 2 << 20), ("odd".into(), 3)]),
            capabilities: BTreeMap::from([("xbzrle".into(), true)]),
            recovery: "fastload load /a".into(),
            listen: String::new(),
            socket: OsString::new(),
        }
    }

    #[test]
    fn a_note_comes_back_and_overwrites_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str| Beside::of(&dir.path().join(name).as_path().into()).unwrap();
        let beside = of("qmp");
        assert_eq!(beside.socket, of("./qmp").socket);
        assert_ne!(beside.socket, of("qmp2").socket);
        assert_eq!(beside.read(), None);
        beside.write(&note()).unwrap();
        let written = Note { listen: beside.listen.clone(), socket: beside.socket.clone().into(), ..note() };
        assert_eq!(beside.read(), Some(written));
        assert_eq!(note().page_sizes(), HashMap::from([("pc.ram".into(), PageSize::new(2 << 20).unwrap())]));
        beside.forget();
        assert_eq!(beside.read(), None);
        // A link that somebody has put there.
        let other = dir.path().join("other");
        fs::write(&other, serde_json::to_vec(&note()).unwrap()).unwrap();
        symlink(&other, &beside.note).unwrap();
        assert_eq!(beside.read(), None);
        beside.write(&Note { preempt: false, ..note() }).unwrap();
        assert!(fs::read(&other).unwrap() == serde_json::to_vec(&note()).unwrap());
        fs::write(&beside.note, "{").unwrap();
        assert_eq!(beside.read(), None);
    }

    #[test]
    fn each_byte_counts() {
        let bytes: Vec<u8> = (0..100).collect();
        let whole = hash(&bytes, SEED);
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 0x80;
            assert_ne!(hash(&other, SEED), whole);
            assert_ne!(hash(&bytes[..at], SEED), whole);
        }
        assert_ne!(hash(&[0], SEED), hash(&[0, 0], SEED));
    }
}
