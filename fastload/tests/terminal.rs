//! What people see: help and tables as they are, on terminals of any width, and nothing left of a bar.
//!
//! The expected texts are in `tests/golden`. `FASTLOAD_BLESS=1 cargo test -p fastload --test terminal` writes them anew:
//! look at the difference before you commit it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::samples;

const COMMANDS: [&str; 11] =
    ["", "inspect", "check", "convert", "repair", "load", "serve", "resume", "capture", "view", "completions"];

fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("FASTLOAD_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "{} differs (FASTLOAD_BLESS=1 writes it anew). Now it is:\n{text}", path.display());
}

fn sample(name: &str, dir: &Path) -> PathBuf {
    samples::stripped().into_iter().find(|sample| sample.name == name).unwrap().unpack(dir).unwrap()
}

/// What a command prints into a pipe.
fn piped(dir: &Path, words: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fastload"));
    let output = command.args(words).current_dir(dir).env("COLUMNS", "80").output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// All that a command writes to a terminal of `columns` columns.
fn on_terminal(columns: u16, words: &[&str], environment: &[(&str, &str)]) -> Vec<u8> {
    let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let line = format!("stty cols {columns} rows 50; '{}' {}", env!("CARGO_BIN_EXE_fastload"), quoted.join(" "));
    let mut command = Command::new("script");
    command
        .args(["-qec", &line, "/dev/null"])
        .env_remove("NO_COLOR")
        .env_remove("COLUMNS")
        .env("TERM", "xterm-256color");
    let output = command.envs(environment.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
    output.stdout
}

/// What stands on the terminal then, without what the lines have behind their end.
fn screen(columns: u16, bytes: &[u8]) -> String {
    let size = |number: u16| std::num::NonZero::new(number).unwrap();
    let mut terminal = vt100::Parser::new(size(50), size(columns), 10_000);
    terminal.process(bytes);
    terminal.screen().contents()
}

fn help(command: &str) -> Vec<&str> {
    if command.is_empty() { vec!["--help"] } else { vec![command, "--help"] }
}

#[test]
fn help_is_as_it_was_read_before() {
    let dir = tempfile::tempdir().unwrap();
    for command in COMMANDS {
        let name = if command.is_empty() { "fastload" } else { command };
        golden(&format!("help-{name}.txt"), &piped(dir.path(), &help(command)));
    }
}

#[test]
fn tables_and_json_are_as_they_were_read_before() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["q10-pc-32-plain.mr", "q10-pc-32-paused.mr", "q10-pc-32-bgmr.mr"] {
        sample(name, dir.path());
    }
    let (one, other) = ("q10-pc-32-plain.mr", "q10-pc-32-paused.mr");
    let cases: [(&str, &[&str]); 7] = [
        ("inspect.txt", &["inspect", one]),
        ("inspect-damaged.txt", &["inspect", "q10-pc-32-bgmr.mr"]),
        ("inspect-device.txt", &["inspect", one, "--device", "globalstate"]),
        ("inspect-diff.txt", &["inspect", "--diff", one, other]),
        ("check.txt", &["check", one, other]),
        ("check-host.txt", &["check", "--host", one]),
        ("view.txt", &["view", one]),
    ];
    for (name, words) in cases {
        golden(name, &piped(dir.path(), words));
        let words: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
        let lines = piped(dir.path(), &words);
        let lines: Vec<String> = lines
            .lines()
            .map(|line| {
                let mut event: serde_json::Value = serde_json::from_str(line).unwrap();
                // The only field that no two runs share.
                assert!(event["at_us"].is_u64());
                event["at_us"] = 0.into();
                serde_json::to_string_pretty(&event).unwrap() + "\n"
            })
            .collect();
        if name != "view.txt" && name != "inspect-device.txt" {
            golden(&name.replace(".txt", ".json"), &lines.concat());
        }
    }
}

/// Every word is there, whole, and no line is longer than the terminal.
#[test]
fn help_fits_terminals_of_any_width() {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    for command in COMMANDS {
        let wide = words(&String::from_utf8(on_terminal(200, &help(command), &[("NO_COLOR", "1")])).unwrap());
        for columns in [60, 80] {
            let bytes = on_terminal(columns, &help(command), &[("NO_COLOR", "1")]);
            let text = String::from_utf8(bytes).unwrap();
            assert_eq!(words(&text), wide, "{command} at {columns}");
            // A word that is longer than a line is the only one of its line.
            let long = text
                .lines()
                .map(str::trim_end)
                .find(|line| line.chars().count() > usize::from(columns) && line.split_whitespace().count() > 1);
            assert_eq!(long, None, "{command} at {columns}");
        }
    }
}

#[test]
fn colours_are_for_terminals() {
    let dir = tempfile::tempdir().unwrap();
    let one = sample("q10-pc-32-plain.mr", dir.path());
    let one = one.to_str().unwrap();
    let colored = |bytes: &[u8]| bytes.windows(2).any(|pair| pair == b"\x1b[");
    assert!(colored(&on_terminal(80, &["inspect", one], &[])));
    assert!(!colored(&on_terminal(80, &["inspect", one], &[("NO_COLOR", "1")])));
    assert!(!colored(&on_terminal(80, &["--color", "never", "inspect", one], &[])));
    assert!(!colored(piped(dir.path(), &["inspect", one]).as_bytes()));
    assert!(colored(piped(dir.path(), &["--color", "always", "inspect", one]).as_bytes()));
    assert!(colored(&on_terminal(80, &["--help"], &[])));
}

#[test]
fn a_bar_is_seen_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let one = sample("q10-pc-32-plain.mr", dir.path());
    let one = one.to_str().unwrap();
    for columns in [60, 80, 200] {
        for words in [&["check", one] as &[&str], &["check", one, "-v"]] {
            let bytes = on_terminal(columns, words, &[]);
            let text = String::from_utf8_lossy(&bytes);
            assert!(text.contains(if columns < 80 { "%" } else { "left" }), "no bar at {columns}: {text:?}");
            let shown = screen(columns, &bytes);
            assert!(!shown.contains("left") && !shown.contains('\u{2588}') && !shown.contains("0%"), "{shown}");
            assert!(shown.contains("nothing wrong") && shown.contains("1914 pages stored"), "{shown}");
            assert!(words.len() == 2 || shown.contains("DEBUG"), "{shown}");
        }
        let quiet = on_terminal(columns, &["check", one, "--no-progress"], &[("NO_COLOR", "1")]);
        assert_eq!(String::from_utf8(quiet).unwrap().lines().count(), 3);
    }
}

#[test]
fn the_picture_of_a_map_is_whole_xml() {
    let dir = tempfile::tempdir().unwrap();
    let one = sample("q10-pc-32-plain.mr", dir.path());
    let odd = dir.path().join("<&\"'>.mr");
    fs::rename(one, &odd).unwrap();
    piped(dir.path(), &["view", odd.to_str().unwrap(), "--svg", "map.svg"]);
    let svg = fs::read_to_string(dir.path().join("map.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert!(svg.contains("&lt;&amp;&quot;'&gt;.mr</title>"), "{}", &svg[..500]);
    // Each element is closed, and nothing is open at the end.
    let mut open = Vec::new();
    for tag in svg.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').unwrap();
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
        match (tag.starts_with('/'), tag.ends_with('/')) {
            (true, _) => assert_eq!(open.pop().as_deref(), Some(name)),
            (false, true) => {}
            (false, false) => open.push(name.to_owned()),
        }
    }
    assert!(open.is_empty(), "{open:?}");
}
