//! `compress` and `decompress`, and the other commands on what they write.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use testkit::samples;

fn fastload(arguments: &[&str], paths: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fastload"));
    command.arg(arguments[0]).args(paths).args(&arguments[1..]).output().unwrap()
}

fn done(arguments: &[&str], paths: &[&Path]) -> String {
    let output = fastload(arguments, paths);
    assert!(output.status.success(), "{arguments:?} {paths:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(arguments: &[&str], paths: &[&Path]) -> String {
    let output = fastload(arguments, paths);
    assert_eq!(output.status.code(), Some(1), "{arguments:?} {paths:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

#[test]
fn what_is_decompressed_is_the_identical_file_and_every_command_takes_the_compressed_one() {
    let dir = tempfile::tempdir().unwrap();
    let sample = samples::stripped().into_iter().find(|sample| sample.name.ends_with("pc-32-plain.mr")).unwrap();
    let plain = sample.unpack(dir.path()).unwrap();
    let (packed, back) = (dir.path().join("packed"), dir.path().join("back"));
    for codec in ["zstd", "lz4"] {
        let said = json(&done(&["compress", "--codec", codec, "--json"], &[&plain, &packed]));
        assert_eq!((said["codec"].as_str(), said["event"].as_str()), (Some(codec), Some("complete")));
        assert_eq!(said["bytes"], fs::metadata(&packed).unwrap().len());
        assert!(said["bytes"].as_u64() < said["snapshot_bytes"].as_u64().map(|bytes| bytes / 2), "{said}");

        let report = json(&done(&["inspect", "--json"], &[&packed]));
        assert_eq!(report["compressed"]["root"], said["root"]);
        assert_eq!(report["blocks"], json(&done(&["inspect", "--json"], &[&plain]))["blocks"]);
        assert!(done(&["inspect"], &[&packed]).contains(said["root"].as_str().unwrap()));
        done(&["check"], &[&packed]);

        let unpacked = json(&done(&["decompress", "--json"], &[&packed, &back]));
        assert_eq!(unpacked["root"], said["root"]);
        assert!(fs::read(&back).unwrap() == fs::read(&plain).unwrap(), "{codec}");

        // Converted, it is the same as what the plain file becomes.
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        done(&["convert"], &[&plain, &one]);
        done(&["convert"], &[&packed, &other]);
        assert!(fs::read(one).unwrap() == fs::read(other).unwrap());
        assert!(refused(&["compress"], &[&packed, &back]).contains("compressed already"));
    }
}

#[test]
fn a_damaged_frame_is_found_by_check_and_by_decompress_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let sample = samples::stripped().into_iter().find(|sample| sample.name.ends_with("pc-32-plain.mr")).unwrap();
    let plain = sample.unpack(dir.path()).unwrap();
    let (packed, back) = (dir.path().join("packed"), dir.path().join("back"));
    done(&["compress"], &[&plain, &packed]);
    let mut bytes = fs::read(&packed).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&packed, &bytes).unwrap();
    let said = refused(&["decompress"], &[&packed, &back]);
    assert!(said.contains("frame ") && said.contains("digest") && said.contains("offset"), "{said}");
    assert!(!back.exists());
    assert!(!fastload(&["check"], &[&packed]).status.success());
}

#[test]
fn what_can_not_be_compressed_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (text, out) = (dir.path().join("text"), dir.path().join("out"));
    fs::write(&text, "no snapshot").unwrap();
    assert!(refused(&["compress"], &[&text, &out]).contains("text"));
    assert!(refused(&["decompress"], &[&text, &out]).contains("seek table"));
    assert!(!out.exists());
    let usage = fastload(&["compress", "--frame", "5000"], &[&text, &out]);
    assert_eq!(usage.status.code(), Some(2), "{}", String::from_utf8_lossy(&usage.stderr));
}
