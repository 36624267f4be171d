//! All examples of the workspace do what their READMEs say.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use mapped_ram::Snapshot;
use page_units::ByteLen;
use testkit::samples::{self, Sample};
use vmstate::ram::RecordWriter;
use vmstate::{Configuration, DeviceWriter, Event, Section, SectionHeader, StreamWriter};

/// A test for each example, and one that none is left out.
macro_rules! examples {
    ($($name:ident needs[$($need:ident),*] $body:block)*) => {
        $(
            #[test]
            fn $name() {
                $(testkit::require!($need);)*
                $body
            }
        )*

        #[test]
        fn none_is_left_out() {
            let tested: Vec<&str> = vec![$(stringify!($name)),*];
            assert_eq!(EXAMPLES.keys().collect::<Vec<_>>(), tested);
        }
    };
}

examples! {
    copy needs[] {
        let said = run("copy", NOTHING);
        let readme = std::fs::read_to_string(root().join("page-source/files/README.md")).unwrap();
        let (_, shown) = readme.split_once("--example copy\n").unwrap();
        for line in shown.lines().take(2) {
            assert!(said.contains(line), "{line:?} is not in {said}");
        }
    }

    frames needs[Zstd] {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("plain"), dir.path().join("frames.zst"));
        let bytes: Vec<u8> = (0..300_000_u32).flat_map(|n| if n > 200_000 { [0; 4] } else { n.to_le_bytes() }).collect();
        std::fs::write(&from, &bytes).unwrap();
        let said = run("frames", [&from, &to]);
        says(&said, &["1200000 bytes became ", " in 19 frames\n", "\nroot "]);
        let decoded = Command::new("zstd").arg("-dc").arg(&to).output().unwrap();
        assert!(decoded.status.success() && decoded.stdout == bytes);
    }

    lazy_memory needs[Userfaultfd] {
        let said = run("lazy_memory", NOTHING);
        says(&said, &["1024 MiB usable after ", "\"this is page 131072\" after ", "complete after ", "a fault took "]);
        let counts = said.lines().find(|line| line.contains("pages on demand")).unwrap_or_else(|| panic!("{said}"));
        let counts: Vec<u64> = counts.split(' ').filter_map(|word| word.parse().ok()).collect();
        assert_eq!((counts[0], counts[0] + counts[1]), (1, 4096), "{said}");
    }

    network needs[] {
        says(&run("network", NOTHING), &["64 pages came over the socket, each as it should be\n"]);
    }

    own_vmm needs[Kvm, Userfaultfd] {
        let said = run("own_vmm", NOTHING);
        says(&said, &["freeze point: the guest stood still for ", "saved: ", "restored: ", "it has come to its end: "]);
        says(&said, &[" pages came on demand\n"]);
    }

    restore needs[Kvm, Userfaultfd] {
        let said = run("restore", NOTHING);
        says(&said, &["the guest runs after ", "first fault after ", "all memory is there after ", "saved again: "]);
    }

    rewrite needs[] {
        let dir = tempfile::tempdir().unwrap();
        for sample in samples::stripped().iter().filter(|sample| sample.name.ends_with("plain.mr")) {
            let (from, to) = (sample.unpack(dir.path()).unwrap(), dir.path().join("new.snap"));
            let said = run("rewrite", [&from, &to]);
            let (old, new) = (Snapshot::open(&from).unwrap(), Snapshot::open(&to).unwrap());
            for (block, ram) in old.layout().iter() {
                let stored = new.stored_pages(block).unwrap();
                assert_eq!(stored, old.stored_pages(block).unwrap());
                says(&said, &[&format!("{}: {stored} of {} pages stored\n", ram.name(), ram.pages())]);
            }
            says(&said, &["new.snap: published\n"]);
        }
        let nothing = output("rewrite", NOTHING);
        assert!(!nothing.status.success() && String::from_utf8_lossy(&nothing.stderr).contains("usage: rewrite IN OUT"));
    }

    stream needs[] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stream");
        std::fs::write(&path, plain_stream()).unwrap();
        let said = run("stream", [&path]);
        says(&said, &["machine type example\n", "  RAM block pc.ram, 8192 bytes\n", "RAM, 1 pages with content, 1 of zeros\n"]);
        says(&said, &["cpu instance 0, 24 bytes, 1 fields\n", "the end\n"]);
        for sample in samples::full().iter().filter(|sample| !sample.is_mapped_ram()) {
            says(&run("stream", [sample.unpack(dir.path()).unwrap()]), &["  RAM block pc.ram, ", "the end\n"]);
        }
        let sample = samples::stripped().into_iter().find(Sample::is_mapped_ram).unwrap();
        let refused = output("stream", [sample.unpack(dir.path()).unwrap()]);
        assert!(String::from_utf8_lossy(&refused.stderr).contains("a mapped-ram file"), "{refused:?}");
    }
}

/// All of them, built as the tests are: by name.
static EXAMPLES: LazyLock<BTreeMap<String, PathBuf>> = LazyLock::new(|| {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--workspace", "--examples", "--message-format", "json"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let built = cargo.current_dir(root()).stderr(Stdio::inherit()).output().expect("cargo runs");
    assert!(built.status.success(), "the examples can't be built");
    let messages = String::from_utf8(built.stdout).expect("cargo writes text");
    let examples = messages.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).expect("cargo writes JSON");
        let executable = message["executable"].as_str()?;
        Some((message["target"]["name"].as_str()?.to_owned(), executable.into()))
    });
    examples.collect()
});

const NOTHING: [&str; 0] = [];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn output<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> std::process::Output {
    let program = EXAMPLES.get(name).unwrap_or_else(|| panic!("no example {name}"));
    Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// What it says, if it succeeds.
fn run<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> String {
    let output = output(name, arguments);
    assert!(output.status.success(), "{name}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is not in:\n{said}");
    }
}

/// Two pages of RAM and a device.
fn plain_stream() -> Vec<u8> {
    let (mut out, mut records) = (StreamWriter::new(Vec::new()), RecordWriter::new());
    let ram = SectionHeader { id: 2, name: "ram".into(), instance: 0, version: 4 };
    for event in [Event::Header, Event::Configuration(Configuration::new("example")), Event::SectionStart(ram)] {
        out.event(&event).unwrap();
    }
    records.mem_size(&mut out, ByteLen(8192)).unwrap();
    out.counted_string("pc.ram").unwrap();
    out.u64(8192).unwrap();
    records.end(&mut out).unwrap();
    out.event(&Event::Footer { id: 2 }).unwrap();
    out.event(&Event::SectionEnd { id: 2 }).unwrap();
    records.page(&mut out, "pc.ram", ByteLen(0)).unwrap();
    out.bytes(&[7; 4096]).unwrap();
    records.zero(&mut out, "pc.ram", ByteLen(4096)).unwrap();
    records.end(&mut out).unwrap();
    out.event(&Event::Footer { id: 2 }).unwrap();
    let mut devices = DeviceWriter::new(3);
    devices.push(Section::builder("cpu", 0, 1).u64s("regs", &[1, 2, 3]).build().unwrap());
    out.bytes(&devices.finish("example").unwrap()).unwrap();
    out.into_inner()
}
