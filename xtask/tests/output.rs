//! What the tasks say, and to whom.

use std::process::Command;

#[test]
fn a_reader_that_left_is_no_panic() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut setup = Command::new(env!("CARGO_BIN_EXE_xtask"));
    let output = setup.args(["setup", "--dry-run"]).stdout(writer).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(0 | 1)) && !said.contains("panicked"), "{:?}: {said}", output.status);
}
