//! `fastload check` where it can't do all of its work.

use std::fs::OpenOptions;
use std::process::Command;

use mapped_ram::{Snapshot, Writer};
use page_units::{BlockId, ByteLen, Layout, PageIndex, PageRun, PageSize, RamBlock};
use testkit::samples;
use vmstate::{Configuration, DeviceWriter, Section};

/// Where the file does not fit into what the process may map, that is a problem, said once: the pages were not read.
#[test]
fn pages_that_can_not_be_mapped_are_a_problem() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large");
    let layout = Layout::new(vec![RamBlock::new("ram", ByteLen(8 << 30), PageSize::SMALL).unwrap()]).unwrap();
    let mut devices = DeviceWriter::new(2);
    devices.push(Section::builder("example", 0, 1).u64("counter", 42).build().unwrap());
    let writer = Writer::create(&path, &Configuration::new("m"), layout).unwrap();
    writer.write(PageRun::single(BlockId(0), PageIndex(7)), &[1; 4096]).unwrap();
    writer.finish(&devices.finish("m").unwrap()).unwrap();
    let check = |limit: &str| {
        let script = format!("ulimit -v {limit} && exec \"$0\" check --json \"$1\"");
        Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_fastload")]).arg(&path).output().unwrap()
    };
    let whole = check("unlimited");
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
    let limited = check("4194304");
    assert_eq!(limited.status.code(), Some(1));
    let error = String::from_utf8(limited.stderr).unwrap();
    assert!(error.contains("mapping it failed") && error.lines().count() == 1, "{error}");
    assert_eq!(error.matches(&path.display().to_string()).count(), 1, "{error}");
    let first = limited.stdout.split(|byte| *byte == b'\n').next().unwrap();
    let found: serde_json::Value = serde_json::from_slice(first).unwrap();
    assert_eq!((&found["ok"], &found["pages"]), (&false.into(), &serde_json::Value::Null), "{found}");
    assert_eq!(found["problems"].as_array().map(Vec::len), Some(1), "{found}");
}

/// Where a file was cut off at a byte that happens to be zero, it ends as a whole one without description does.
#[test]
fn a_file_that_was_cut_off_is_never_called_whole() {
    let directory = tempfile::tempdir().unwrap();
    let all = samples::stripped();
    let path = all.iter().find(|sample| sample.name == "q10-pc-32-plain.mr").unwrap().unpack(directory.path()).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    let devices = snapshot.read(snapshot.device_state()).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let mut zeros = 0;
    // From the end, so that each length is less than the one before; the longest has the end mark, and no description.
    for length in (1..=devices.len() + 1).rev().step_by(101) {
        file.set_len(snapshot.device_state().start.0 + length as u64).unwrap();
        zeros += usize::from(devices.get(length - 1).is_none_or(|byte| *byte == 0));
        let output =
            Command::new(env!("CARGO_BIN_EXE_fastload")).args(["check", "--quick"]).arg(&path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.code() == Some(1) && said.contains("problem: "), "{length} bytes: {output:?}");
    }
    assert!(zeros > 20, "{zeros}");
}
