//! Snapshots that begin at an offset of their file, farther in than one is looked for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mapped_ram::Snapshot;
use testkit::samples;

/// What is in front: where QEMU puts a snapshot with `file:...,offset=2M`.
const FRONT: usize = 2 << 20;

fn fastload(words: &[&str], offset: bool) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fastload"));
    command.args(words);
    if offset {
        command.args(["--offset", "2M"]);
    }
    command.output().unwrap()
}

fn done(words: &[&str], offset: bool) {
    let output = fastload(words, offset);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn refused(words: &[&str], offset: bool) -> String {
    let output = fastload(words, offset);
    assert_eq!(output.status.code(), Some(1), "{words:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn sample(name: &str, dir: &Path) -> PathBuf {
    let sample = samples::stripped().into_iter().find(|sample| sample.name.contains(name)).unwrap();
    sample.unpack(dir).unwrap()
}

/// The same snapshot behind other bytes. The offsets in its headers are the file's: they move with it.
fn behind(path: &Path, to: &Path) {
    let snapshot = Snapshot::open(path).unwrap();
    let mut bytes = vec![0xa5; FRONT];
    bytes.extend_from_slice(&fs::read(path).unwrap());
    for (id, _) in snapshot.layout().iter() {
        let place = snapshot.block(id).unwrap();
        let header = FRONT + usize::try_from(place.header_offset.0).unwrap();
        // Behind a version of 4 bytes and a page size of 8.
        for (word, was) in [(header + 12, place.bitmap_offset.0), (header + 20, place.pages_offset.0)] {
            assert_eq!(bytes[word..word + 8], was.to_be_bytes());
            bytes[word..word + 8].copy_from_slice(&(was + FRONT as u64).to_be_bytes());
        }
    }
    fs::write(to, bytes).unwrap();
}

#[test]
fn a_snapshot_behind_something_else_is_converted_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let original = sample("q10-pc-32-plain", dir.path());
    let names = ["moved", "new", "new-of-moved", "flat", "flat-of-moved"];
    let paths = names.map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    let [moved, new, new_of_moved, flat, flat_of_moved] = paths.each_ref().map(String::as_str);
    let original = original.to_str().unwrap();
    behind(original.as_ref(), moved.as_ref());

    assert!(refused(&["convert", moved, new], false).contains("not a QEMU migration stream"));
    done(&["convert", original, new], false);
    done(&["convert", moved, new_of_moved], true);
    assert!(fs::read(new).unwrap() == fs::read(new_of_moved).unwrap());
    done(&["convert", original, flat, "--to", "flat"], false);
    done(&["convert", moved, flat_of_moved, "--to", "flat"], true);
    assert!(fs::read(flat).unwrap() == fs::read(flat_of_moved).unwrap());
    assert!(fs::read(flat).unwrap().iter().any(|byte| *byte != 0));
    done(&["check", moved], true);
    done(&["inspect", moved], true);
    // Flat memory begins where it begins.
    let mixed = fastload(&["convert", flat, new, "--template", original], true);
    assert_eq!(mixed.status.code(), Some(2), "{mixed:?}");
}

#[test]
fn a_snapshot_behind_something_else_is_repaired_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let broken = sample("bgmr", dir.path());
    let paths = ["moved", "good", "good-of-moved"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    let [moved, good, good_of_moved] = paths.each_ref().map(String::as_str);
    let broken = broken.to_str().unwrap();
    behind(broken.as_ref(), moved.as_ref());
    assert!(refused(&["repair", moved, good], false).contains("not a QEMU migration stream"));
    done(&["repair", broken, good], false);
    done(&["repair", moved, good_of_moved], true);
    assert!(fs::read(good).unwrap() == fs::read(good_of_moved).unwrap());
}

#[test]
fn a_snapshot_behind_something_else_can_be_served() {
    let dir = tempfile::tempdir().unwrap();
    let moved = dir.path().join("moved");
    behind(&sample("q10-pc-32-plain", dir.path()), &moved);
    let nobody = dir.path().join("nobody");
    let (moved, nobody) = (moved.to_str().unwrap(), nobody.to_str().unwrap());
    let to = format!("unix:{nobody}");
    for words in [["serve", moved, "--to", &to], ["load", moved, "--qmp", nobody]] {
        assert!(refused(&words, false).contains("not a QEMU migration stream"));
        // It is opened, and then there is no QEMU.
        let said = refused(&words, true);
        assert!(said.contains(nobody) && said.contains("No such file"), "{said}");
    }
}
