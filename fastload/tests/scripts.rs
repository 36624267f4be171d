//! What programs read: every line is in the schema, whatever bytes a path has, and so are errors.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use jsonschema::Validator;
use serde_json::{Value, json};
use testkit::samples;

fn fastload<A: AsRef<OsStr>>(words: impl IntoIterator<Item = A>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fastload")).args(words).env_remove("RUST_LOG").output().unwrap()
}

fn schema() -> Validator {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/fastload-1.schema.json")).unwrap();
    jsonschema::validator_for(&serde_json::from_str(&text).unwrap()).unwrap()
}

/// The events of a run, each of which is in the schema; the last tells how it ended.
fn events(schema: &Validator, output: &Output) -> Vec<Value> {
    let lines = std::str::from_utf8(&output.stdout).unwrap();
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for event in &events {
        let errors: Vec<String> = schema.iter_errors(event).map(|error| error.to_string()).collect();
        assert!(errors.is_empty(), "{event}: {errors:?}");
    }
    let last = events.last().unwrap_or_else(|| panic!("{output:?}"));
    let code = output.status.code().unwrap();
    assert_eq!(last["event"], if code == 0 { "complete" } else { "error" }, "{output:?}");
    assert!(code == 0 || last["exit_code"] == code, "{output:?}");
    let times: Vec<u64> = events.iter().map(|event| event["at_us"].as_u64().unwrap()).collect();
    assert!(times.is_sorted(), "{times:?}");
    events
}

fn sample(name: &str, dir: &Path) -> PathBuf {
    samples::stripped().into_iter().find(|sample| sample.name == name).unwrap().unpack(dir).unwrap()
}

#[test]
fn every_line_of_every_command_is_in_the_schema() {
    let (schema, dir) = (schema(), tempfile::tempdir().unwrap());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let one = sample("q10-pc-32-plain.mr", dir.path()).to_str().unwrap().to_owned();
    let other = sample("q10-pc-32-paused.mr", dir.path()).to_str().unwrap().to_owned();
    let broken = sample("q10-pc-32-bgmr.mr", dir.path()).to_str().unwrap().to_owned();
    let (clean, flat, svg) = (path("clean"), path("flat"), path("map.svg"));
    let done: &[(&[&str], usize)] = &[
        (&["inspect", &one, "--json"], 1),
        (&["inspect", &broken, "--json"], 1),
        (&["inspect", &one, "--device", "cpu", "--json"], 1),
        (&["inspect", "--diff", &one, &other, "--json"], 1),
        (&["check", &one, "--json"], 2),
        (&["check", &one, &other, "--quick", "--json"], 3),
        (&["check", "--host", &one, "--json"], 2),
        (&["convert", &one, &clean, "--json"], 1),
        (&["convert", &one, &flat, "--to", "flat", "--json"], 1),
        (&["convert", &flat, &clean, "--template", &one, "--json"], 1),
        (&["repair", &broken, &clean, "--json"], 1),
        (&["view", &one, "--json"], 1),
        (&["view", &one, "--svg", &svg, "--json"], 1),
    ];
    for (words, lines) in done {
        let output = fastload(*words);
        let events = events(&schema, &output);
        let told = events.iter().filter(|event| event["event"] != "progress").count();
        assert_eq!((output.status.code(), told), (Some(0), *lines), "{words:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{words:?}: {output:?}");
        assert!(events.iter().all(|event| event["command"] == words[0]));
    }
    // What fails says so as an event, and as a line.
    let nothing = path("nothing");
    let failed: &[(&[&str], i32)] = &[
        (&["inspect", &nothing, "--json"], 1),
        (&["check", &broken, "--json"], 1),
        (&["check", &nothing, &one, "--json"], 1),
        (&["convert", &one, &one, "--json"], 1),
        (&["repair", &one, &clean, "--json"], 1),
        (&["view", &nothing, "--json"], 1),
        (&["load", &one, "--qmp", &nothing, "--json"], 1),
        (&["serve", &one, "--to", "unix:/nonexistent/socket", "--json"], 1),
        (&["capture", "--qmp", &nothing, &clean, "--json"], 1),
        (&["inspect", "--json"], 2),
        (&["load", &one, "--json"], 2),
        (&["nonsense", "--json"], 2),
    ];
    for (words, code) in failed {
        let output = fastload(*words);
        let events = events(&schema, &output);
        assert_eq!(output.status.code(), Some(*code), "{words:?}: {output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        if *code == 1 {
            let message = events.last().unwrap()["message"].as_str().unwrap();
            assert_eq!(said, format!("fastload: {message}\n"));
        } else {
            assert!(said.starts_with("error: "), "{said}");
        }
    }
}

/// The schema is no sieve with holes.
#[test]
fn the_schema_refuses_what_is_not_described() {
    let schema = schema();
    let good = json!({"schema": 1, "command": "check", "event": "complete", "at_us": 5, "files": 1});
    assert!(schema.is_valid(&good));
    for (key, value) in [("files", json!("1")), ("schema", json!(2)), ("more", json!(0)), ("event", json!("done"))] {
        let mut bad = good.clone();
        bad[key] = value;
        assert!(!schema.is_valid(&bad), "{bad}");
    }
    for key in ["schema", "command", "event", "at_us", "files"] {
        let mut bad = good.clone();
        bad.as_object_mut().unwrap().remove(key);
        assert!(!schema.is_valid(&bad), "{bad}");
    }
}

/// Names are bytes. Every command works with any, for people and for programs.
#[test]
fn a_path_of_any_bytes_is_no_failure() {
    let (schema, dir) = (schema(), tempfile::tempdir().unwrap());
    let one = sample("q10-pc-32-plain.mr", dir.path());
    for name in [b"caf\xe9 \xff.snap".as_slice(), b"new\nline.snap", b"two  spaces.snap", "\u{1b}[31mred".as_bytes()] {
        let file = dir.path().join(OsStr::from_bytes(name));
        fs::copy(&one, &file).unwrap();
        let mut out = file.clone().into_os_string().into_vec();
        out.extend(b"\xfe.out");
        let out = OsString::from_vec(out);
        let file = file.as_os_str();
        let [check, inspect, convert, view, json] = ["check", "inspect", "convert", "view", "--json"].map(OsStr::new);
        for words in [vec![inspect, file], vec![check, file], vec![view, file], vec![convert, file, &out]] {
            let text = fastload(&words);
            assert!(text.status.success(), "{words:?}: {text:?}");
            let output = fastload(words.iter().chain([&json]));
            let events = events(&schema, &output);
            let named = events.iter().find_map(|event| {
                ["output", "file"].iter().find_map(|key| Some((event[format!("{key}_hex")].as_str()?.to_owned(), *key)))
            });
            if file.to_str().is_none() || words.len() == 3 {
                let (hex, key) = named.unwrap();
                let wanted = if key == "output" { &out } else { file };
                let expected: String = wanted.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(hex, expected);
            }
        }
        // An error about it is one line, and has no control character in it.
        fs::OpenOptions::new().write(true).open(file).unwrap().write_all_at(b"xxxx", 0).unwrap();
        let output = fastload([check, file]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && said.lines().count() == 1, "{said:?}");
        assert!(!said.trim_end().contains(char::is_control), "{said:?}");
        let whole = String::from_utf8_lossy(name);
        assert!(!name.starts_with(b"two") || said.contains(&*whole), "{said:?}");
    }
}

#[test]
fn quiet_and_verbose_say_less_and_more() {
    let dir = tempfile::tempdir().unwrap();
    let one = sample("q10-pc-32-plain.mr", dir.path());
    let said = |words: &[&str], log: Option<&str>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fastload"));
        command.arg("check").arg(&one).args(words);
        match log {
            Some(log) => command.env("RUST_LOG", log),
            None => command.env_remove("RUST_LOG"),
        };
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(said(&[], None), "");
    assert_eq!(said(&["--quiet"], None), "");
    let verbose = said(&["-v"], None);
    assert!(verbose.contains("DEBUG fastload") && verbose.contains("opened"), "{verbose}");
    assert!(!verbose.contains('\u{1b}'), "no colours in a file: {verbose}");
    assert!(said(&["-v", "--color", "always"], None).contains('\u{1b}'));
    assert!(said(&[], Some("fastload=debug")).contains("DEBUG fastload"));
    // Who is quiet still hears why it failed.
    let output = fastload(["check", "-q", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8(output.stderr).unwrap().lines().count(), 1);
}
