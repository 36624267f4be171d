//! `fastload inspect` on real files.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
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
    assert!(output.stdout.is_empty());
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
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
            if block["in_file"] == json!(true) {
                let pages = block["stored_pages"].as_u64().unwrap() + block["zero_pages"].as_u64().unwrap();
                assert_eq!(pages * 4096, block["length"].as_u64().unwrap());
            }
        }
        let sections = report["sections"].as_array().unwrap().iter().map(|section| {
            let keys = ["kind", "id", "name", "instance", "version", "start", "end"];
            let keys =
                keys.into_iter().filter(|key| section["kind"] != "CMD" || !["instance", "version"].contains(key));
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
    warnings(size - 1, "not complete");
    warnings(36 << 20, "truncated page area: RAM block \\\"pc.rom\\\"");
    warnings(20 << 20, "truncated page area: RAM block \\\"pc.ram\\\"");
    file.set_len(90).unwrap();
    refused(&inspect(&path, &["--json"]));
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
