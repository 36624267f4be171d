//! `convert`, `repair` and `check`, on files that QEMU wrote.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mapped_ram::{Snapshot, Writer};
use page_units::{ByteLen, Layout, PageSize, RamBlock};
use serde_json::Value;
use testkit::samples::{self, Sample};
use vmstate::{Configuration, ConfigurationSubsection, Event, SectionHeader, StreamWriter};

fn fastload(arguments: &[&str], paths: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fastload"));
    command.arg(arguments[0]).args(paths).args(&arguments[1..]).output().unwrap()
}

fn done(arguments: &[&str], paths: &[&Path]) -> String {
    let output = fastload(arguments, paths);
    assert!(output.status.success(), "{arguments:?} {paths:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs something that has to fail, with one line that says why.
fn refused(arguments: &[&str], paths: &[&Path]) -> String {
    let output = fastload(arguments, paths);
    assert_eq!(output.status.code(), Some(1), "{arguments:?} {paths:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

/// What the file says RAM is: bits and bytes, read by the simplest code that does.
fn ram(path: &Path) -> Vec<(String, Vec<u8>)> {
    let snapshot = Snapshot::open(path).unwrap();
    let bytes = fs::read(path).unwrap();
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let blocks = snapshot.layout().iter().map(|(id, ram)| {
        let place = snapshot.block(id).unwrap();
        let (bitmap, pages) = (at(place.bitmap_offset.0), at(place.pages_offset.0));
        let mut content = vec![0; ram.length().get()];
        for (page, out) in content.chunks_exact_mut(4096).enumerate() {
            if bytes[bitmap + page / 8] >> (page % 8) & 1 == 1 {
                out.copy_from_slice(&bytes[pages + page * 4096..][..4096]);
            }
        }
        (ram.name().to_owned(), content)
    });
    blocks.collect()
}

/// Everything behind RAM.
fn tail(path: &Path) -> Vec<u8> {
    let snapshot = Snapshot::open(path).unwrap();
    snapshot.read(snapshot.tail()).unwrap()
}

/// Samples that have all of RAM and their bitmaps.
fn whole() -> Vec<Sample> {
    let all = samples::stripped().into_iter().chain(samples::full()).filter(Sample::is_mapped_ram);
    all.filter(|sample| !sample.name.contains("bgmr") && !sample.name.contains("ignore-shared")).collect()
}

fn sample(name: &str) -> Sample {
    samples::stripped().into_iter().find(|sample| sample.name.contains(name)).unwrap()
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// The first event.
fn first(lines: &str) -> Value {
    serde_json::from_str(lines.lines().next().unwrap()).unwrap()
}

#[test]
fn converted_files_have_the_same_ram_and_devices() {
    for sample in whole() {
        let dir = tempfile::tempdir().unwrap();
        let original = sample.unpack(dir.path()).unwrap();
        let [clean, flat, back] = ["clean", "flat", "back"].map(|name| dir.path().join(name));
        let (before, devices) = (ram(&original), tail(&original));

        let told = first(&done(&["convert", "--json"], &[&original, &clean]));
        assert!(ram(&clean) == before, "{}", sample.name);
        assert_eq!(tail(&clean), devices);
        let stored: u64 =
            sample.golden["blocks"].as_array().unwrap().iter().filter_map(|b| b["pages_set"].as_u64()).sum();
        assert_eq!(told["stored_pages"], stored, "{}", sample.name);
        assert_eq!(Snapshot::open(&clean).unwrap().configuration(), Snapshot::open(&original).unwrap().configuration());
        done(&["check"], &[&clean]);

        done(&["convert", "--to", "flat"], &[&original, &flat]);
        let all: Vec<u8> = before.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        assert!(fs::read(&flat).unwrap() == all, "{}", sample.name);
        done(&["convert", "--template", original.to_str().unwrap()], &[&flat, &back]);
        assert!(fs::read(&back).unwrap() == fs::read(&clean).unwrap(), "{}", sample.name);

        let on_disk = |path: &Path| fs::metadata(path).unwrap().blocks() * 512;
        let content = all.chunks(4096).filter(|page| page.iter().any(|byte| *byte != 0)).count() as u64 * 4096;
        assert!(on_disk(&clean) < content + (2 << 20) && on_disk(&flat) < content + (1 << 20), "holes stay holes");
        assert_eq!(entries(dir.path()), 4, "no temporary file stays");
    }
}

#[test]
fn stale_bytes_are_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let original = sample("q10-pc-32-plain").unpack(dir.path()).unwrap();
    let snapshot = Snapshot::open(&original).unwrap();
    let before = ram(&original);
    let (id, _) = snapshot.layout().find("pc.ram").unwrap();
    let zero = before[0].1.chunks(4096).position(|page| page.iter().all(|byte| *byte == 0)).unwrap();
    let offset = snapshot.block(id).unwrap().pages_offset.0 + zero as u64 * 4096;
    File::options().write(true).open(&original).unwrap().write_all_at(&[0xbb; 4096], offset).unwrap();
    let report = first(&done(&["check", "--json"], &[&original]));
    assert_eq!((&report["ok"], &report["pages"]["stale"]), (&Value::Bool(true), &1.into()));
    let clean = dir.path().join("clean");
    done(&["convert"], &[&original, &clean]);
    assert!(ram(&clean) == before);
    assert!(!fs::read(&clean).unwrap().windows(64).any(|bytes| bytes == [0xbb; 64]));
    let report = first(&done(&["check", "--json"], &[&clean]));
    assert_eq!(report["pages"]["stale"], 0);
}

#[test]
fn the_background_snapshot_bug_is_repaired() {
    let all = samples::stripped().into_iter().chain(samples::full());
    for sample in all.filter(|sample| sample.name.contains("bgmr")) {
        let dir = tempfile::tempdir().unwrap();
        let broken = sample.unpack(dir.path()).unwrap();
        let good = dir.path().join("good");
        assert!(refused(&["check"], &[&broken]).contains("fastload repair"));
        assert!(refused(&["convert"], &[&broken, &good]).contains("fastload repair"));
        assert_eq!(entries(dir.path()), 1);

        done(&["repair"], &[&broken, &good]);
        let bytes = fs::read(&broken).unwrap();
        for ((name, content), golden) in ram(&good).iter().zip(sample.golden["blocks"].as_array().unwrap()) {
            assert_eq!(golden["id"], name.as_str());
            let at = usize::try_from(golden["pages_offset"].as_u64().unwrap()).unwrap();
            assert!(*content == bytes[at..][..content.len()], "{name}");
        }
        assert!(ram(&good)[0].1.iter().any(|byte| *byte != 0));
        assert_eq!(tail(&good), tail(&broken));
        done(&["check"], &[&good]);
        assert!(refused(&["repair"], &[&good, &dir.path().join("again")]).contains("nothing to repair"));
    }
}

#[test]
fn an_interrupted_save_is_not_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let broken = sample("bgmr").unpack(dir.path()).unwrap();
    let snapshot = Snapshot::open(&broken).unwrap();
    let (devices, tail) = (snapshot.device_state(), snapshot.tail());
    let some_device = snapshot.sections().iter().find(|section| section.name == "fw_cfg").unwrap().range.clone();
    drop(snapshot);
    let whole = fs::read(&broken).unwrap();
    let good = dir.path().join("good");
    let at = |offset: u64| usize::try_from(offset).unwrap();
    // Cut in the pages, before the devices, between and inside devices, before and inside the description.
    let cuts = [0x200_000, devices.start.0, some_device.start.0, some_device.end.0 - 2, devices.end.0, tail.end.0 - 1];
    for cut in cuts {
        fs::write(&broken, &whole[..at(cut)]).unwrap();
        refused(&["repair"], &[&broken, &good]);
        refused(&["check"], &[&broken]);
        refused(&["convert"], &[&broken, &good]);
        assert_eq!(entries(dir.path()), 1, "cut at {cut:#x}");
    }
    // A whole file that lacks one of the devices which its description lists.
    let mut without = whole[..at(some_device.start.0)].to_vec();
    without.extend_from_slice(&whole[at(some_device.end.0)..]);
    fs::write(&broken, &without).unwrap();
    assert!(refused(&["repair"], &[&broken, &good]).contains("\"fw_cfg\" 0 is missing"));
    assert!(refused(&["check"], &[&broken]).contains("all bitmaps are zero"));
    assert_eq!(entries(dir.path()), 1);
}

#[test]
fn problems_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample("q10-pc-32-plain").unpack(dir.path()).unwrap();
    let whole = fs::read(&path).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    let cpu = snapshot.sections().iter().find(|section| section.name == "cpu").unwrap().range.clone();
    let bitmap = snapshot.block(page_units::BlockId(1)).unwrap().bitmap_offset.0;
    let spoiled = |offset: u64, byte: u8| {
        fs::write(&path, &whole).unwrap();
        File::options().write(true).open(&path).unwrap().write_all_at(&[byte], offset).unwrap();
        refused(&["check"], &[&path])
    };
    assert!(spoiled(cpu.end.0 - 5, 0).contains(": "), "a footer");
    // The second block has 32 pages: bit 63 of its bitmap is none of them.
    assert!(spoiled(bitmap + 7, 0x80).contains("bitmap of RAM block \"/rom@etc/acpi/tables\""));
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(refused(&["check"], &[&path]).contains("needs the file up to"));
    fs::write(&path, [whole.as_slice(), b"more"].concat()).unwrap();
    assert!(done(&["check"], &[&path]).contains("note: lengths disagree"));
    fs::write(&path, b"nothing of the kind").unwrap();
    assert!(refused(&["check"], &[&path]).contains("not a QEMU migration stream"));
}

/// A section that is there over and over is not decoded over and over.
#[test]
fn a_section_that_repeats_costs_no_more_each() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let mut tail = StreamWriter::new(Vec::new());
    for id in 1000..101_000 {
        let header = SectionHeader { id, name: "d".into(), instance: 0, version: 1 };
        tail.event(&Event::SectionFull(header)).unwrap();
        tail.event(&Event::Footer { id }).unwrap();
    }
    tail.event(&Event::Eof).unwrap();
    let fields = vec![r#"{"size": 0}"#; 100_000].join(",");
    let text = format!(r#"{{"devices": [{{"name": "d", "vmsd_name": "d", "fields": [{fields}]}}]}}"#);
    tail.event(&Event::VmDesc(text.into_bytes())).unwrap();
    let layout = Layout::new(vec![RamBlock::new("ram", ByteLen(4096), PageSize::SMALL).unwrap()]).unwrap();
    let mut configuration = Configuration::new("m");
    configuration.subsections.push(ConfigurationSubsection::Capabilities(vec!["mapped-ram".into()]));
    Writer::create(&path, &configuration, layout).unwrap().finish(&tail.into_inner()).unwrap();
    let said = refused(&["check"], &[&path]);
    assert!(said.contains("is there twice") && said.contains("and 99998 more"), "{said}");
}

#[test]
fn what_can_not_be_converted_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let unpack = |name| sample(name).unpack(dir.path()).unwrap();
    let (plain, shared) = (unpack("q10-pc-32-plain"), unpack("ignore-shared"));
    let out: PathBuf = dir.path().join("out");
    assert!(refused(&["convert"], &[&shared, &out]).contains("RAM block \"pc.ram\" is not in the file"));
    done(&["check"], &[&shared]);
    let flat = dir.path().join("flat");
    fs::write(&flat, vec![1; 8192]).unwrap();
    let template = ["convert", "--template", plain.to_str().unwrap()];
    assert!(refused(&["convert"], &[&flat, &out]).contains("--template"));
    assert!(refused(&template, &[&flat, &out]).contains("/flat has 8192 bytes, but the RAM blocks of"));
    fs::write(&flat, vec![1; (64 << 20) + 4096]).unwrap();
    assert!(refused(&template, &[&flat, &out]).contains("but the RAM blocks of"));
    assert!(refused(&["convert"], &[&plain, &plain]).contains("the same file"));
    let link = dir.path().join("link");
    fs::hard_link(&plain, &link).unwrap();
    assert!(refused(&["convert"], &[&plain, &link]).contains("the same file"));
    assert!(refused(&["convert"], &[&plain, Path::new("/proc/none")]).contains("/proc"));
    assert_eq!(entries(dir.path()), 4);
}

#[test]
fn what_is_no_file_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let original = sample("pc-32-plain").unpack(dir.path()).unwrap();
    let broken = sample("bgmr").unpack(dir.path()).unwrap();
    let [fifo, link, real] = ["fifo", "link", "real"].map(|name| dir.path().join(name));
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for to in [fifo.as_path(), Path::new("/dev/null")] {
        let before = fs::metadata(to).unwrap().file_type();
        for (command, from) in
            [(&["convert"] as &[_], &original), (&["convert", "--to", "flat"], &original), (&["repair"], &broken)]
        {
            let error = refused(command, &[from, to]);
            assert_eq!(error, format!("fastload: {}: not a regular file\n", to.display()));
        }
        assert_eq!(fs::metadata(to).unwrap().file_type(), before);
    }
    // A symlink stays, whether what it means is there or not.
    std::os::unix::fs::symlink("real", &link).unwrap();
    for command in [&["convert"] as &[_], &["convert", "--to", "flat"]] {
        done(command, &[&original, &link]);
        assert!(link.is_symlink() && !real.is_symlink());
    }
}
