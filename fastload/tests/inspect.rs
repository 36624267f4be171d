//! `fastload inspect` on real files.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use testkit::samples;

fn inspect(file: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fastload")).arg("inspect").arg(file).args(arguments).output().unwrap()
}

fn printed(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Fails with one line on standard error, which is returned.
fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    // Nothing but the event of the error.
    assert!(
        output.stdout.is_empty()
            || output.stdout.starts_with(b"{\"schema\":1,\"command\":\"inspect\",\"event\":\"error\"")
    );
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// What the JSON consists of: programs rely on it.
const REPORT: [&str; 11] = [
    "schema",
    "command",
    "event",
    "at_us",
    "file",
    "machine",
    "base",
    "capabilities",
    "blocks",
    "sections",
    "warnings",
];
const BLOCK: [&str; 7] = ["name", "length", "page_size", "bitmap_offset", "pages_offset", "stored_pages", "zero_pages"];
const SECTION: [&str; 7] = ["kind", "id", "name", "instance", "version", "start", "end"];

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn json_has_every_known_fact() {
    let directory = tempfile::tempdir().unwrap();
    for sample in samples::stripped() {
        let path = sample.unpack(directory.path()).unwrap();
        let report = printed(&inspect(&path, &["--json"]));
        let golden = &sample.golden;
        assert_eq!(report["machine"], golden["machine"]);
        assert_eq!(report["base"], golden["base"]);
        assert_eq!(report["capabilities"], golden["caps"]);
        let blocks = report["blocks"].as_array().unwrap();
        assert_eq!(blocks.len(), golden["blocks"].as_array().unwrap().len());
        for (block, golden) in blocks.iter().zip(golden["blocks"].as_array().unwrap()) {
            let pairs = [
                ("name", "id"),
                ("length", "len"),
                ("page_size", "page_size"),
                ("bitmap_offset", "bitmap_offset"),
                ("pages_offset", "pages_offset"),
                ("stored_pages", "pages_set"),
            ];
            for (key, golden_key) in pairs {
                assert_eq!(block[key], golden[golden_key], "{} {key}", sample.name);
            }
            assert_eq!(keys(block), BLOCK);
            let left_out = golden["bitmap_len"] == 0;
            let pages = if left_out { 0 } else { golden["len"].as_u64().unwrap() / 4096 };
            assert_eq!(block["stored_pages"].as_u64().unwrap() + block["zero_pages"].as_u64().unwrap(), pages);
        }
        assert_eq!(keys(&report), REPORT);
        let sections = report["sections"].as_array().unwrap().iter().map(|section| {
            assert_eq!(keys(section), SECTION);
            let keys =
                SECTION.into_iter().filter(|key| section["kind"] != "CMD" || !["instance", "version"].contains(key));
            keys.map(|key| section[key].clone()).collect::<Value>()
        });
        assert_eq!(sections.collect::<Value>(), golden["sections"], "{}", sample.name);
        let warnings = report["warnings"].as_array().unwrap();
        assert_eq!(warnings.len(), usize::from(sample.name.contains("bgmr")), "{}: {warnings:?}", sample.name);
        // The text is for people; it names the same blocks.
        let text = String::from_utf8(inspect(&path, &[]).stdout).unwrap();
        assert!(blocks.iter().all(|block| text.contains(block["name"].as_str().unwrap())));
    }
}

#[test]
fn devices_offsets_and_refusals() {
    let directory = tempfile::tempdir().unwrap();
    let all = samples::stripped();
    let unpack = |name: &str| all.iter().find(|s| s.name == name).unwrap().unpack(directory.path()).unwrap();
    let path = unpack("q11-q35-32-smp2.mr");
    let cpus = printed(&inspect(&path, &["--device", "cpu", "--json"]));
    let cpus = &cpus["devices"];
    assert_eq!(cpus.as_array().unwrap().len(), 2);
    assert_eq!(cpus[1]["instance"], 1);
    let regs = cpus[0]["fields"].as_array().unwrap().iter().find(|field| field["name"] == "env.regs").unwrap();
    assert_eq!(regs["values"].as_array().unwrap().len(), 16);
    let text = String::from_utf8(inspect(&path, &["--device", "cpu"]).stdout).unwrap();
    assert!(text.contains("cpu instance 1") && text.contains("env.eip: uint64 = 0x"), "{text}");
    assert!(refused(&inspect(&path, &["--device", "nothing"])).contains("globalstate"));

    let path = unpack("q10-pc-32-offset-unaligned.mr");
    assert_eq!(printed(&inspect(&path, &["--json", "--offset", "0x1234"]))["base"], 0x1234);
    assert!(refused(&inspect(&path, &["--offset", "4k"])).contains("not a QEMU migration stream"));
    assert_eq!(inspect(&path, &["--offset", "x"]).status.code(), Some(2));
    assert!(refused(&inspect(&directory.path().join("nothing"), &[])).contains("No such file"));
    for sample in samples::full().iter().filter(|sample| !sample.is_mapped_ram()) {
        let path = sample.unpack(directory.path()).unwrap();
        assert!(refused(&inspect(&path, &["--json"])).contains("plain migration stream"));
    }
    // One of our own, so that there always is one.
    let mut out = vmstate::StreamWriter::new(Vec::new());
    out.event(&vmstate::Event::Header).unwrap();
    out.event(&vmstate::Event::Configuration(vmstate::Configuration::new("pc-i440fx-10.0"))).unwrap();
    out.event(&vmstate::Event::Eof).unwrap();
    let path = directory.path().join("plain");
    std::fs::write(&path, out.into_inner()).unwrap();
    let said = refused(&inspect(&path, &["--json"]));
    assert!(said.contains("plain migration stream") && said.contains("pc-i440fx-10.0"), "{said}");
}

/// What is signed is shown so, in an array too.
#[test]
fn signed_numbers_have_their_sign() {
    let directory = tempfile::tempdir().unwrap();
    let all = samples::stripped();
    let sample = all.iter().find(|sample| sample.name == "q10-pc-32-plain.mr").unwrap();
    let path = sample.unpack(directory.path()).unwrap();
    let levels = || {
        let device = printed(&inspect(&path, &["--device", "PCIBUS", "--json"]));
        let fields = device["devices"][0]["fields"].as_array().unwrap();
        fields.iter().find(|field| field["name"] == "irq_count").unwrap().clone()
    };
    let before = levels();
    assert_eq!((&before["type"], before["values"].as_array().map(Vec::len)), (&"int32".into(), Some(4)), "{before}");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let second = before["start"].as_u64().unwrap() + 4;
    file.write_all_at(&(-7i32).to_be_bytes(), second).unwrap();
    assert_eq!(levels()["values"], serde_json::json!([0, -7, 0, 0]));
    let text = String::from_utf8(inspect(&path, &["--device", "PCIBUS"]).stdout).unwrap();
    assert!(text.contains("irq_count: int32 = [0x0, -7, 0x0, 0x0]"), "{text}");
}

#[test]
fn damaged_files_are_shown_with_warnings() {
    let directory = tempfile::tempdir().unwrap();
    let all = samples::stripped();
    let sample = all.iter().find(|sample| sample.name == "q10-pc-32-plain.mr").unwrap();
    let path = sample.unpack(directory.path()).unwrap();
    let size = std::fs::metadata(&path).unwrap().len();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let whole = printed(&inspect(&path, &["--json"]));
    let warnings = |length: u64, expected: &str| {
        file.set_len(length).unwrap();
        let report = printed(&inspect(&path, &["--json"]));
        for (now, before) in report["blocks"].as_array().unwrap().iter().zip(whole["blocks"].as_array().unwrap()) {
            assert_eq!(now, before, "the bitmaps are all there");
        }
        assert!(!report["warnings"].to_string().contains("it was truncated"), "said twice: {}", report["warnings"]);
        assert_eq!(report["machine"], sample.golden["machine"]);
        assert!(report["warnings"].to_string().contains(expected), "{}", report["warnings"]);
    };
    warnings(size + 5000, "lengths disagree");
    warnings(size - 1, "can't be read to its end");
    warnings(36 << 20, "truncated page area: RAM block \\\"pc.rom\\\"");
    warnings(20 << 20, "truncated page area: RAM block \\\"pc.ram\\\"");
    file.set_len(90).unwrap();
    refused(&inspect(&path, &["--json"]));
}

#[test]
fn a_result_that_can_not_be_written_is_a_failure_and_a_reader_that_left_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let path = samples::stripped()[0].unpack(directory.path()).unwrap();
    let mut full = Command::new(env!("CARGO_BIN_EXE_fastload"));
    full.arg("inspect").arg(&path).stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    assert!(refused(&full.output().unwrap()).contains("writing the result failed: No space left"));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let left = Command::new(env!("CARGO_BIN_EXE_fastload")).arg("inspect").arg(&path).stdout(writer).output().unwrap();
    assert!(left.status.success() && left.stderr.is_empty(), "{left:?}");
}

#[test]
fn check_names_the_file_once() {
    let directory = tempfile::tempdir().unwrap();
    let all = samples::stripped();
    let sample = all.iter().find(|sample| sample.name == "q10-pc-32-plain.mr").unwrap();
    let path = sample.unpack(directory.path()).unwrap();
    let report = printed(&inspect(&path, &["--json"]));
    let blocks = report["blocks"].as_array().unwrap();
    let rom = blocks.iter().find(|block| block["name"] == "pc.rom").unwrap();
    assert_eq!(rom["length"], 32 * 4096, "the bitmap has bits to spare");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[1], rom["bitmap_offset"].as_u64().unwrap() + 5).unwrap();
    let checked = Command::new(env!("CARGO_BIN_EXE_fastload")).arg("check").arg(&path).output().unwrap();
    assert_eq!(checked.status.code(), Some(1));
    let error = String::from_utf8(checked.stderr).unwrap();
    let name = path.display().to_string();
    assert!(error.contains("beyond the block's last page"), "{error}");
    assert_eq!(error.matches(&name).count(), 1, "{error}");
}
