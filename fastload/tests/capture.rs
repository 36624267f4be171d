//! `fastload capture` of a QEMU that does what no real one can be made to: one of our own, as far as QMP shows it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

use mapped_ram::Snapshot;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use page_units::ByteLen;
use serde_json::{Value, json};
use vmstate::ram::RecordWriter;
use vmstate::{Configuration, DeviceWriter, Event, Section, SectionHeader, StreamWriter};

const TABLE: &str = "Block Name    PSize              Offset               Used              Total\n\
                     pc.ram    4 KiB  0x0000000000000000 0x0000000000004000 0x0000000000004000\n";

/// QEMU's own words.
const DOUBT: &str = "Background-snapshot is not compatible with guest memory configuration";

/// What it sends: four pages, of which `twice` comes again, and devices.
fn stream(pages: &[u64]) -> Vec<u8> {
    let mut out = StreamWriter::new(Vec::new());
    let mut records = RecordWriter::new();
    out.event(&Event::Header).unwrap();
    out.event(&Event::Configuration(Configuration::new("pc-i440fx-10.0"))).unwrap();
    out.event(&Event::SectionStart(SectionHeader { id: 2, name: "ram".into(), instance: 0, version: 4 })).unwrap();
    records.mem_size(&mut out, ByteLen(4 * 4096)).unwrap();
    out.counted_string("pc.ram").unwrap();
    out.u64(4 * 4096).unwrap();
    for page in pages {
        records.page(&mut out, "pc.ram", ByteLen(page * 4096)).unwrap();
        out.bytes(&[7; 4096]).unwrap();
    }
    records.end(&mut out).unwrap();
    out.event(&Event::Footer { id: 2 }).unwrap();
    let mut devices = DeviceWriter::new(3);
    devices.push(Section::builder("cpu", 0, 1).u64s("regs", &[1, 2, 3]).build().unwrap());
    out.bytes(&devices.finish("pc-i440fx-10.0").unwrap()).unwrap();
    out.into_inner()
}

/// What it is made to do.
#[derive(Clone, Debug)]
struct Plan {
    stream: Vec<u8>,
    /// What becomes of the migration.
    ends: &'static str,
    /// Whether the guest is started again after its state was saved.
    resumes: bool,
    /// A command that is refused.
    refuses: &'static str,
    /// How often it finds that its memory can't be write-protected.
    doubts: usize,
    /// Whether capabilities can't be turned off again.
    keeps_capabilities: bool,
    /// What `query-migrate` says in addition to the state.
    blocked: Option<&'static str>,
}

impl Plan {
    fn new(stream: Vec<u8>) -> Plan {
        let (ends, refuses) = ("completed", "");
        Plan { stream, ends, resumes: true, refuses, doubts: 0, keeps_capabilities: false, blocked: None }
    }
}

/// What it was in the end.
#[derive(Debug)]
struct Qemu {
    plan: Plan,
    socket: UnixStream,
    capabilities: BTreeMap<&'static str, bool>,
    fd: Option<OwnedFd>,
    migration: &'static str,
    state: &'static str,
    /// The commands that change something.
    orders: Vec<String>,
}

impl Qemu {
    fn run(plan: Plan, listener: &UnixListener) -> Qemu {
        let (socket, _) = listener.accept().unwrap();
        let names = ["background-snapshot", "events", "mapped-ram", "xbzrle"];
        let capabilities = names.into_iter().map(|name| (name, false)).collect();
        let mut qemu =
            Qemu { plan, socket, capabilities, fd: None, migration: "none", state: "running", orders: vec![] };
        qemu.say(&json!({"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}}}));
        let mut text = Vec::new();
        while qemu.receive(&mut text) {
            while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                let message: Value = serde_json::from_slice(&line).unwrap();
                let command = message["execute"].as_str().unwrap().to_owned();
                let mut answer = match qemu.answer(&command, &message["arguments"]) {
                    Ok(value) => json!({"return": value}),
                    Err(why) => json!({"error": {"class": "GenericError", "desc": why}}),
                };
                answer["id"] = message["id"].clone();
                qemu.say(&answer);
                if command == "migrate" && answer["error"].is_null() {
                    qemu.migrate();
                }
            }
        }
        qemu
    }

    fn receive(&mut self, text: &mut Vec<u8>) -> bool {
        let mut buffer = [0; 4096];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::empty();
        let Ok(message) = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), flags) else {
            return false;
        };
        for control in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(fds) = control {
                self.fd = Some(own(fds[0]));
            }
        }
        let n = message.bytes;
        text.extend_from_slice(&buffer[..n]);
        n > 0
    }

    fn say(&mut self, message: &Value) {
        // It may have gone.
        let _ = self.socket.write_all(format!("{message}\n").as_bytes());
    }

    fn event(&mut self, name: &str, data: &Value, microseconds: u64) {
        let timestamp = json!({"seconds": 1_700_000_000, "microseconds": microseconds});
        self.say(&json!({"event": name, "data": data, "timestamp": timestamp}));
    }

    fn answer(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        if command == self.plan.refuses {
            return Err("refused by the test".to_owned());
        }
        if ["getfd", "migrate", "migrate_cancel", "migrate-set-capabilities", "cont", "closefd"].contains(&command) {
            self.orders.push(command.to_owned());
        }
        Ok(match command {
            "query-status" => json!({"status": self.state}),
            "query-migrate" => match self.plan.blocked {
                Some(reason) => json!({"blocked-reasons": [reason]}),
                None => json!({"status": self.migration, "error-desc": "in its own words"}),
            },
            "query-migrate-parameters" => json!({"tls-creds": "", "mode": "normal"}),
            "query-migrate-capabilities" => {
                let list = self.capabilities.iter();
                list.map(|(name, state)| json!({"capability": name, "state": state})).collect()
            }
            "migrate-set-capabilities" => {
                if self.plan.doubts > 0 {
                    self.plan.doubts -= 1;
                    return Err(DOUBT.to_owned());
                }
                for wanted in arguments["capabilities"].as_array().unwrap() {
                    let state = wanted["state"].as_bool().unwrap();
                    if self.plan.keeps_capabilities && !state {
                        return Err("not now".to_owned());
                    }
                    *self.capabilities.get_mut(wanted["capability"].as_str().unwrap()).unwrap() = state;
                }
                json!({})
            }
            "x-query-ramblock" => json!({"human-readable-text": TABLE}),
            "query-memory-devices" | "query-memdev" | "query-named-block-nodes" | "qom-list" | "query-block" => {
                json!([])
            }
            "human-monitor-command" => json!(""),
            "qom-get" if arguments["property"] == "type" => json!("pc-i440fx-10.0-machine"),
            "qom-get" => json!(false),
            "migrate" => {
                assert!(self.capabilities["background-snapshot"] && self.capabilities["events"]);
                assert!(arguments["uri"].as_str().unwrap().starts_with("fd:") && self.fd.is_some());
                json!({})
            }
            "cont" => {
                self.state = "running";
                json!({})
            }
            "migrate_cancel" | "qmp_capabilities" | "getfd" | "closefd" => json!({}),
            other => return Err(format!("{other} is not known here")),
        })
    }

    /// All of it at once: it is short enough for the socket.
    fn migrate(&mut self) {
        self.event("STOP", &json!({}), 100);
        self.state = "paused";
        if self.plan.resumes {
            self.event("RESUME", &json!({}), 1334);
            self.state = "running";
        }
        let mut to = UnixStream::from(self.fd.take().unwrap());
        let _ = to.write_all(&self.plan.stream);
        self.migration = self.plan.ends;
        self.event("MIGRATION", &json!({"status": self.plan.ends}), 2000);
    }
}

/// A descriptor that came over a socket.
#[expect(unsafe_code, reason = "descriptors come as numbers")]
fn own(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

struct Outcome {
    ended: Output,
    stderr: String,
    qemu: Qemu,
    dir: tempfile::TempDir,
}

impl Outcome {
    fn of(plan: Plan) -> Outcome {
        let dir = tempfile::tempdir().unwrap();
        let sockets = tempfile::tempdir().unwrap();
        let path = sockets.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let qemu = thread::spawn(move || Qemu::run(plan, &listener));
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastload"));
        let ended = command.args(["capture", "--json", "--qmp"]).arg(path).arg(file(dir.path())).output().unwrap();
        let stderr = String::from_utf8(ended.stderr.clone()).unwrap();
        Outcome { ended, stderr, qemu: qemu.join().unwrap(), dir }
    }

    /// It failed with these words, left no file, and QEMU's capabilities as they were.
    fn failed(&self, words: &[&str]) {
        assert_eq!(self.ended.status.code(), Some(1), "{}", self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "{}", self.stderr);
        }
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 0);
        assert!(self.qemu.capabilities.values().all(|state| !state), "{:?}", self.qemu);
    }
}

fn file(dir: &Path) -> PathBuf {
    dir.join("vm.snap")
}

#[test]
fn all_is_well() {
    let outcome = Outcome::of(Plan::new(stream(&[3, 0, 1])));
    assert!(outcome.ended.status.success(), "{}", outcome.stderr);
    let lines = String::from_utf8(outcome.ended.stdout).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let at = 1_700_000_000_000_100u64;
    assert_eq!((&lines[0]["event"], &lines[1]["event"]), (&json!("frozen"), &json!("complete")));
    assert_eq!((&lines[0]["frozen_at_us"], &lines[0]["blackout_us"]), (&json!(at), &json!(1234)));
    assert_eq!(lines[0]["frozen_at"], "2023-11-14T22:13:20.000100Z");
    assert_eq!((&lines[1]["stored_pages"], &lines[1]["zero_pages"]), (&json!(3), &json!(1)));
    assert_eq!(outcome.qemu.orders, ["getfd", "migrate-set-capabilities", "migrate", "migrate-set-capabilities"]);
    assert!(outcome.qemu.capabilities.values().all(|state| !state));
    let snapshot = Snapshot::open(file(outcome.dir.path())).unwrap();
    assert!(snapshot.device("cpu", 0).unwrap().unwrap().decode().is_ok());
}

#[test]
fn a_page_that_comes_twice_is_refused_with_its_offset() {
    let outcome = Outcome::of(Plan { ends: "failed", ..Plan::new(stream(&[0, 1, 2, 1])) });
    outcome.failed(&["offset ", "page at 4096 of RAM block \"pc.ram\"", "second time", "in its own words"]);
}

#[test]
fn a_migration_that_failed_after_all_was_sent_makes_no_file() {
    let outcome = Outcome::of(Plan { ends: "failed", ..Plan::new(stream(&[0, 1, 2, 3])) });
    outcome.failed(&["QEMU sent everything, then gave up: in its own words"]);
}

#[test]
fn a_guest_that_was_left_stopped_is_started() {
    let plan = Plan { ends: "failed", resumes: false, ..Plan::new(Vec::new()) };
    let outcome = Outcome::of(plan);
    outcome.failed(&["in its own words"]);
    assert_eq!(outcome.qemu.state, "running");
    assert!(outcome.qemu.orders.contains(&"cont".to_owned()));
}

#[test]
fn half_a_device_is_no_snapshot() {
    let mut half = stream(&[0, 1, 2, 3]);
    half.truncate(half.len() - 10);
    // It says that all is well.
    Outcome::of(Plan::new(half)).failed(&["offset", "description"]);
}

#[test]
fn a_migration_that_is_refused_puts_everything_back() {
    for refuses in ["migrate", "getfd"] {
        let outcome = Outcome::of(Plan { refuses, ..Plan::new(Vec::new()) });
        outcome.failed(&[&format!("refused {refuses}"), "refused by the test"]);
    }
    let outcome = Outcome::of(Plan { refuses: "migrate-set-capabilities", ..Plan::new(Vec::new()) });
    outcome.failed(&["refused by the test"]);
    assert_eq!(outcome.qemu.orders, ["getfd", "closefd"]);
    let outcome = Outcome::of(Plan { blocked: Some("a device that can't"), ..Plan::new(Vec::new()) });
    outcome.failed(&["a device that can't"]);
    assert_eq!(outcome.qemu.orders, [""; 0]);
}

#[test]
fn a_memory_that_is_refused_now_and_then_is_tried_again_but_not_for_ever() {
    let outcome = Outcome::of(Plan { doubts: 99, ..Plan::new(stream(&[0, 1, 2, 3])) });
    assert!(outcome.ended.status.success(), "{}", outcome.stderr);
    assert!(Snapshot::open(file(outcome.dir.path())).is_ok());

    let outcome = Outcome::of(Plan { doubts: 1000, ..Plan::new(Vec::new()) });
    outcome.failed(&[DOUBT]);
    let [first, tries @ .., last] = &outcome.qemu.orders[..] else { panic!("{:?}", outcome.qemu.orders) };
    assert_eq!((first.as_str(), last.as_str()), ("getfd", "closefd"));
    assert_eq!(tries, ["migrate-set-capabilities"; 100]);
}

#[test]
fn settings_that_can_not_be_put_back_are_told_and_the_file_is_there() {
    let plan = Plan { keeps_capabilities: true, ..Plan::new(stream(&[0, 1, 2, 3])) };
    let outcome = Outcome::of(plan);
    assert_eq!(outcome.ended.status.code(), Some(1));
    assert!(outcome.stderr.contains("is complete, but") && outcome.stderr.contains("not now"), "{}", outcome.stderr);
    assert!(Snapshot::open(file(outcome.dir.path())).is_ok());
}
