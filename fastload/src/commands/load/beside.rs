//! What lies beside a QMP socket: the socket at which QEMU listens for us, and a note for whoever has to recover a guest.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use fastload_qmp::Capabilities;
use page_units::PageSize;
use serde::{Deserialize, Serialize};

use crate::commands::Failure;
use crate::commands::serving::Image;

/// The longest note that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// The two files. Their names depend on that of the QMP socket only, so that they can be found again.
#[derive(Clone, Debug)]
pub(crate) struct Beside {
    pub(crate) socket: PathBuf,
    note: PathBuf,
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
}

impl Beside {
    /// Both files are in the directory of the QMP socket, which QEMU and we can reach.
    pub(crate) fn of(qmp: &Path) -> Result<Beside, Failure> {
        let dir = match qmp.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("/"),
        };
        let dir = dir.canonicalize().map_err(|error| format!("{}: {error}", dir.display()))?;
        let name = qmp.file_name().unwrap_or_default().as_encoded_bytes();
        // Half of it keeps the name as short as can be.
        let name = format!(".fastload-{:08x}", hash(name, SEED) >> 32);
        let (socket, note) = (dir.join(&name), dir.join(format!("{name}.json")));
        if socket.as_os_str().len() > 100 {
            return Err(format!("{}: the path is too long for a socket beside it", dir.display()).into());
        }
        if socket.to_str().is_none_or(|text| text.contains(',')) {
            return Err(format!("{}: QEMU can't open a socket at a path like this", dir.display()).into());
        }
        Ok(Beside { socket, note })
    }

    /// What QEMU takes for the address of the socket.
    pub(crate) fn uri(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    /// Writes the note, for our own eyes. Nobody else's file is written to, wherever a name leads.
    pub(crate) fn write(&self, note: &Note) -> io::Result<()> {
        self.forget();
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.note)?;
        file.write_all(&serde_json::to_vec(note)?)
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
        }
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
        }
    }

    #[test]
    fn a_note_comes_back_and_overwrites_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let beside = Beside::of(&dir.path().join("qmp")).unwrap();
        assert_eq!(beside.socket, Beside::of(&dir.path().join("./qmp")).unwrap().socket);
        assert_ne!(beside.socket, Beside::of(&dir.path().join("qmp2")).unwrap().socket);
        assert_eq!(beside.read(), None);
        beside.write(&note()).unwrap();
        assert_eq!(beside.read(), Some(note()));
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
