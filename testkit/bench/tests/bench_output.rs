//! What the programs do with what they print into.

use std::process::Command;

#[test]
fn a_reader_that_left_is_no_panic() {
    for arguments in [["--list"].as_slice(), &["--list", "resume"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_bench")).args(arguments).stdout(writer).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn a_file_that_can_not_be_written_is_told_before_anything_is_measured() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("none/figures.json");
    let output = Command::new(env!("CARGO_BIN_EXE_bench")).arg("--json").arg(&path).arg("open").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{said}");
    assert!(said.starts_with(&format!("bench: {}: ", path.display())), "{said}");
}
