//! The files that people have, and what they are told about them.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mapped_ram::Snapshot;
use testkit::samples;

fn fastload(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fastload")).args(words).output().unwrap()
}

fn refused(words: &[&str]) -> String {
    let output = fastload(words);
    assert_eq!(output.status.code(), Some(1), "{words:?}: {output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    said
}

fn done(words: &[&str]) -> String {
    let output = fastload(words);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn sample(name: &str, dir: &Path) -> PathBuf {
    samples::stripped().into_iter().find(|sample| sample.name == name).unwrap().unpack(dir).unwrap()
}

/// All commands that read a snapshot say the same of a file; nothing is written.
fn said_by_all(file: &Path) -> String {
    let file = file.to_str().unwrap();
    let out = format!("{file}.out");
    let load = ["load", file, "--qmp", "/nonexistent/qmp"];
    let serve = ["serve", file, "--to", "unix:/nonexistent/socket"];
    let commands: [&[&str]; 5] = [&["inspect", file], &["check", file], &["convert", file, &out], &load, &serve];
    let mut said = commands.map(refused).to_vec();
    assert!(said[0].contains(file), "{said:?}");
    said.dedup();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(!Path::new(&out).exists());
    said.remove(0)
}

/// The part of a message behind the last mark, up to the next.
fn command(said: &str, from: &str) -> String {
    said.rsplit_once(from).unwrap().1.trim().to_owned()
}

/// What one is told to type is typed, and the file is good then.
#[test]
fn compressed_snapshots_are_named_and_the_command_unpacks_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample("q10-pc-32-plain.mr", dir.path());
    for (program, extension) in [("zstd", "zst"), ("gzip", "gz"), ("xz", "xz"), ("bzip2", "bz2"), ("lz4", "lz4")] {
        if Command::new(program).arg("--version").output().is_err() {
            testkit::require::without("a program that compresses", program);
            continue;
        }
        let packed = dir.path().join(format!("the snapshot.{extension}"));
        let mut compress = Command::new(program);
        compress.args(["-1", "-c"]).arg(&path).stdout(fs::File::create(&packed).unwrap());
        assert!(compress.status().unwrap().success());
        let said = said_by_all(&packed);
        assert!(said.contains(&format!("compressed with {program}")), "{said}");
        let typed = command(&said, "first: ");
        let shell = Command::new("sh").args(["-c", &typed]).output().unwrap();
        assert!(shell.status.success(), "{typed}: {shell:?}");
        let unpacked = dir.path().join("the snapshot");
        assert!(fs::read(&unpacked).unwrap() == fs::read(&path).unwrap(), "{program}");
        done(&["check", unpacked.to_str().unwrap()]);
        fs::remove_file(unpacked).unwrap();
    }
}

#[test]
fn disk_images_and_files_that_are_nothing_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str| dir.path().join(name);
    if Command::new("qemu-img").arg("--version").output().is_ok() {
        let named =
            [("qcow2", "qcow2"), ("vmdk", "VMDK"), ("vdi", "VDI"), ("vhdx", "VHDX"), ("vpc", "VHD"), ("qed", "QED")];
        for (format, name) in named {
            let file = make(format);
            let create = Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&file).arg("16M").output();
            assert!(create.unwrap().status.success(), "{format}");
            let said = said_by_all(&file);
            assert!(said.contains(&format!("a {name} disk image")) && said.contains("fastload capture"), "{said}");
        }
        let snapshot = Command::new("qemu-img").args(["snapshot", "-c", "one"]).arg(make("qcow2")).status();
        assert!(snapshot.unwrap().success());
        assert!(said_by_all(&make("qcow2")).contains("1 internal snapshot (savevm); start QEMU with it and -loadvm"));
        // The beginning of a stream in a cluster does not make it one.
        let file = fs::OpenOptions::new().write(true).open(make("qcow2")).unwrap();
        file.write_all_at(&fs::read(sample("q10-pc-32-plain.mr", dir.path())).unwrap(), 512 << 10).unwrap();
        assert!(said_by_all(&make("qcow2")).contains("a qcow2 disk image"));
    } else {
        testkit::require::without("qemu-img", "disk images are tested with their marks only");
    }
    fs::write(make("empty"), "").unwrap();
    assert!(said_by_all(&make("empty")).contains("it is empty"));
    // Flat memory has no mark.
    fs::File::create(make("zeros")).unwrap().set_len(32 << 20).unwrap();
    let said = said_by_all(&make("zeros"));
    assert!(said.contains("--template") && said.contains("Firecracker"), "{said}");
    fs::write(make("text"), "hello\n").unwrap();
    let said = said_by_all(&make("text"));
    assert!(said.contains("not a QEMU migration stream") && !said.contains("--template"), "{said}");
    // A directory of Cloud Hypervisor's.
    fs::create_dir(make("ch")).unwrap();
    for name in ["ch/state.json", "ch/memory-ranges", "ch/config.json"] {
        fs::write(make(name), "{}").unwrap();
    }
    let said = said_by_all(&make("ch"));
    assert!(said.contains("Cloud Hypervisor") && said.contains("memory-ranges"), "{said}");
    let shape = |text: &str| fs::write(make("ch/state.json"), text).unwrap();
    shape("{\"id\":\"vm\",\"snapshots\":{},\"snapshot_data\":{\"state\":\"\"}}");
    assert!(said_by_all(&make("ch/state.json")).contains("Cloud Hypervisor"));
}

/// Images of a real libvirt, see testkit/samples/README.md.
#[test]
fn images_of_a_real_libvirt_are_read_or_named() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["sparse", "paused"] {
        let path = samples::libvirt(&format!("{name}.save"), dir.path()).unwrap();
        let file = path.to_str().unwrap();
        assert!(done(&["check", file]).contains("nothing wrong"));
        assert!(done(&["inspect", file]).contains("pc-i440fx-10.0"));
        let (clean, flat) = (dir.path().join("clean"), dir.path().join("flat"));
        done(&["convert", file, clean.to_str().unwrap()]);
        assert!(done(&["check", clean.to_str().unwrap()]).contains("nothing wrong"));
        done(&["convert", file, flat.to_str().unwrap(), "--to", "flat"]);
        // It was not finished.
        let image = fs::OpenOptions::new().write(true).open(&path).unwrap();
        image.write_all_at(b"LibvirtQemudPart", 0).unwrap();
        assert!(said_by_all(&path).contains("was not finished"));
        image.write_all_at(b"LibvirtQemudSave", 0).unwrap();
        // Cut off anywhere, it is refused.
        let size = image.metadata().unwrap().len();
        for length in [size - 1, size / 2, 66_800, 66_712, 4096, 92, 91, 8, 0] {
            image.set_len(length).unwrap();
            refused(&["check", file]);
            refused(&["convert", file, clean.to_str().unwrap()]);
        }
    }
    for format in ["raw", "gzip", "bzip2", "xz", "zstd"] {
        let path = samples::libvirt(&format!("{format}.head"), dir.path()).unwrap();
        let said = said_by_all(&path);
        assert!(said.contains("libvirt") && said.contains(format), "{said}");
        assert!(said.contains("virsh restore") && said.contains("--image-format sparse"), "{said}");
    }
}

/// A header that says how long the XML is needs no search.
#[test]
fn the_stream_is_found_behind_xml_of_any_length() {
    let dir = tempfile::tempdir().unwrap();
    let path = sample("q10-pc-32-plain.mr", dir.path());
    let image = dir.path().join("image");
    for data in [0u32, 1, 4004, (1 << 20) + 4004, (3 << 20) - 92] {
        let mut front = b"LibvirtQemudSave".to_vec();
        for word in [2, data, 1, 6, 0] {
            front.extend(u32::to_le_bytes(word));
        }
        front.resize(92 + usize::try_from(data).unwrap(), b'x');
        behind(&path, &image, &front);
        // Pages are at multiples of 4096 only where the header's length is one.
        let output = fastload(&["inspect", image.to_str().unwrap(), "--json"]);
        if front.len().is_multiple_of(4096) {
            assert!(output.status.success());
        } else {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains("not a multiple of 4096"), "{data}: {said}");
        }
    }
    // What the header says is wrong.
    fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[7, 0, 0, 0], 20).unwrap();
    assert!(said_by_all(&image).contains("header of this image of libvirt's says that it begins"));
}

/// The same snapshot behind other bytes. The offsets in its headers are the file's: they move with it.
fn behind(path: &Path, to: &Path, front: &[u8]) {
    let snapshot = Snapshot::open(path).unwrap();
    let mut bytes = front.to_vec();
    bytes.extend(fs::read(path).unwrap());
    for (id, _) in snapshot.layout().iter() {
        let place = snapshot.block(id).unwrap();
        let header = front.len() + usize::try_from(place.header_offset.0).unwrap();
        for (word, was) in [(header + 12, place.bitmap_offset.0), (header + 20, place.pages_offset.0)] {
            bytes[word..word + 8].copy_from_slice(&(was + front.len() as u64).to_be_bytes());
        }
    }
    fs::File::create(to).unwrap().write_all(&bytes).unwrap();
}

/// A diff has holes for what did not change. Taken for zeros, they would make a snapshot that passes every check.
#[test]
fn a_diff_is_no_memory_without_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let template = sample("q10-pc-32-plain.mr", dir.path());
    let paths = ["full", "diff", "out", "merged", "expected"].map(|name| dir.path().join(name));
    let [full, diff, out, merged, expected] = paths.each_ref().map(|path| path.to_str().unwrap());
    let template = template.to_str().unwrap();
    done(&["convert", template, full, "--to", "flat"]);
    let memory = fs::read(full).unwrap();
    let file = fs::File::create(diff).unwrap();
    file.set_len(memory.len() as u64).unwrap();
    file.write_all_at(&[0x5a; 64 << 10], 5 << 20).unwrap();
    // A page that is zero now, and is there.
    file.write_all_at(&[0; 4096], 0).unwrap();
    let said = refused(&["convert", diff, out, "--template", template]);
    for word in ["pages are holes", "--base", "--holes-are-zero", "pc.ram", diff, template] {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert!(!Path::new(out).exists());
    done(&["convert", diff, out, "--template", template, "--base", full]);
    done(&["convert", out, merged, "--to", "flat"]);
    let mut should = memory.clone();
    should[5 << 20..(5 << 20) + (64 << 10)].fill(0x5a);
    should[..4096].fill(0);
    assert!(fs::read(merged).unwrap() == should);
    // Of several bases the oldest comes first.
    fs::write(expected, &should).unwrap();
    done(&["convert", diff, out, "--template", template, "--base", expected, "--base", full]);
    done(&["convert", out, merged, "--to", "flat"]);
    assert!(fs::read(merged).unwrap() == should);
    // A diff of a diff is as doubtful.
    assert!(refused(&["convert", diff, out, "--template", template, "--base", diff]).contains("--base"));
    // Who says that they are zero has it so.
    done(&["convert", diff, out, "--template", template, "--holes-are-zero"]);
    done(&["convert", out, merged, "--to", "flat"]);
    let zeros = fs::read(merged).unwrap();
    assert!(zeros.iter().filter(|byte| **byte != 0).count() == 64 << 10);
    // Full memory that was written sparsely has holes where the template has none but zeros.
    done(&["convert", full, out, "--template", template]);
    done(&["convert", out, merged, "--to", "flat"]);
    assert!(fs::read(merged).unwrap() == memory);
    // A base of another size.
    fs::write(expected, &should[..4096]).unwrap();
    assert!(refused(&["convert", diff, out, "--template", template, "--base", expected]).contains("4096"));
}
