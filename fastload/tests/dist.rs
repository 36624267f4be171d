//! `cargo xtask dist`: the man pages, the completions, the package, and the program that needs nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    output
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Everything, around the program that is built already.
fn dist(to: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut command = Command::new(env!("CARGO"));
    command.args([
        "run",
        "--quiet",
        "--package",
        "xtask",
        "--",
        "dist",
        "--binary",
        env!("CARGO_BIN_EXE_fastload"),
        "--to",
    ]);
    let output = command.arg(to).current_dir(root).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

const COMMANDS: [&str; 12] = [
    "inspect",
    "check",
    "convert",
    "compress",
    "decompress",
    "repair",
    "load",
    "serve",
    "resume",
    "capture",
    "view",
    "completions",
];

#[test]
fn the_package_installs_and_has_all_its_parts() {
    testkit::require!(Root);
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("dist");
    dist(&to);
    let package = entries(&to).into_iter().find(|path| path.extension().is_some_and(|end| end == "deb")).unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("var/lib/dpkg/updates")).unwrap();
    fs::create_dir_all(root.join("var/lib/dpkg/info")).unwrap();
    fs::write(root.join("var/lib/dpkg/status"), "").unwrap();
    run("dpkg", &["--root", root.to_str().unwrap(), "--install", package.to_str().unwrap()]);
    let listed = run(
        "dpkg-query",
        &["--root", root.to_str().unwrap(), "--show", "--showformat=${Status} ${Version}", "fastload"],
    );
    assert_eq!(text(&listed), format!("install ok installed {}", env!("CARGO_PKG_VERSION")));
    let program = root.join("usr/bin/fastload");
    assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o777, 0o755);
    assert!(text(&run(program.to_str().unwrap(), &["--version"])).starts_with("fastload "));
    let pages: Vec<String> = ["".to_owned()]
        .into_iter()
        .chain(COMMANDS.map(|name| format!("-{name}")))
        .map(|name| format!("fastload{name}.1.gz"))
        .collect();
    for page in &pages {
        assert!(root.join("usr/share/man/man1").join(page).exists(), "{page}");
    }
    assert_eq!(entries(&root.join("usr/share/man/man1")).len(), pages.len());
    for file in [
        "usr/share/bash-completion/completions/fastload",
        "usr/share/zsh/vendor-completions/_fastload",
        "usr/share/fish/vendor_completions.d/fastload.fish",
        "usr/share/doc/fastload/json.md",
        "usr/share/doc/fastload/fastload-1.schema.json",
        "usr/share/doc/fastload/LICENSE-MIT",
        "usr/share/doc/fastload/copyright",
        "usr/share/doc/fastload/examples/fastload@.service",
    ] {
        assert!(fs::metadata(root.join(file)).unwrap().len() > 0, "{file}");
    }
    run("dpkg", &["--root", root.to_str().unwrap(), "--purge", "fastload"]);
    assert!(!program.exists());
}

fn manual(dir: &Path) -> Vec<PathBuf> {
    run(env!("CARGO_BIN_EXE_fastload"), &["manual", dir.to_str().unwrap()]);
    entries(dir)
}

#[test]
fn mandoc_renders_the_man_pages_and_has_no_complaint() {
    testkit::require!(Mandoc);
    let dir = tempfile::tempdir().unwrap();
    for page in manual(dir.path()) {
        let page = page.to_str().unwrap();
        let lint = Command::new("mandoc").args(["-T", "lint", "-W", "warning", page]).output().unwrap();
        let said = String::from_utf8_lossy(&lint.stdout).into_owned() + &String::from_utf8_lossy(&lint.stderr);
        // Written by clap_mangen: no date, and an empty paragraph here and there.
        let serious: Vec<&str> = said
            .lines()
            .filter(|line| !line.contains("missing date") && !line.contains("skipping paragraph macro"))
            .collect();
        assert!(serious.is_empty(), "{serious:#?}");
        let rendered = text(&run("mandoc", &["-T", "utf8", page]));
        // Bold is a letter, a backspace and the letter again.
        let letters: Vec<char> = rendered.chars().collect();
        let plain = letters
            .iter()
            .enumerate()
            .filter(|(at, letter)| **letter != '\u{8}' && letters.get(at + 1) != Some(&'\u{8}'));
        let plain: String = plain.map(|(_, letter)| letter).collect();
        for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "ENVIRONMENT", "JSON"] {
            assert!(plain.lines().any(|line| line == section), "{page}: no {section}: {plain}");
        }
        assert!(rendered.len() > 2000, "{rendered}");
    }
}

#[test]
fn man_knows_the_pages() {
    if Command::new("man").arg("--version").output().is_err() {
        testkit::require::without("man", "man pages are rendered by mandoc only");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for page in manual(dir.path()) {
        let mut man = Command::new("man");
        let output =
            man.args(["--warnings", "-l"]).arg(&page).env("MANWIDTH", "80").env("LC_ALL", "C.UTF-8").output().unwrap();
        let name = page.file_stem().unwrap().to_str().unwrap().to_owned();
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && shown.contains(&name), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
}

fn completions(shell: &str, dir: &Path) -> String {
    let path = dir.join(format!("_fastload.{shell}"));
    fs::write(&path, run(env!("CARGO_BIN_EXE_fastload"), &["completions", shell]).stdout).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn bash_completes_commands_and_options() {
    let dir = tempfile::tempdir().unwrap();
    let script = completions("bash", dir.path());
    let complete = |words: &str, last: &str, before: &str| {
        let count = words.split_whitespace().count() + usize::from(last.is_empty());
        let line = format!(
            "source {script}; COMP_WORDS=({words}); COMP_CWORD={}; _fastload fastload '{last}' '{before}'; echo ${{COMPREPLY[@]}}",
            count - 1
        );
        text(&run("bash", &["--norc", "-c", &line]))
    };
    let commands = complete("fastload", "", "fastload");
    for command in COMMANDS {
        assert!(commands.split_whitespace().any(|word| word == command), "{command}: {commands}");
    }
    assert!(!commands.contains("stand-by"), "{commands}");
    assert_eq!(complete("fastload ins", "ins", "fastload").trim(), "inspect");
    assert_eq!(complete("fastload check --hos", "--hos", "check").trim(), "--host");
}

#[test]
fn zsh_loads_the_completions() {
    testkit::require!(Zsh);
    let dir = tempfile::tempdir().unwrap();
    let script = completions("zsh", dir.path());
    run("zsh", &["-n", &script]);
    fs::rename(&script, dir.path().join("_fastload")).unwrap();
    let line = format!(
        "fpath=({} $fpath); autoload -Uz compinit; compinit -D -u; print $_comps[fastload]; autoload +X _fastload; \
         functions _fastload | grep -c inspect",
        dir.path().display()
    );
    let said = text(&run("zsh", &["-fc", &line]));
    let mut lines = said.lines();
    assert_eq!(lines.next(), Some("_fastload"));
    assert!(lines.next().unwrap().parse::<u32>().unwrap() > 0, "{said}");
}

/// A build of everything, for the long tests only.
#[test]
fn the_static_program_runs_where_there_is_nothing_else() {
    testkit::require!(Root);
    if std::env::var_os("FASTLOAD_FULL").is_none() {
        testkit::require::without("the static program", "it is built in the long tests (--full)");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("dist");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut command = Command::new(env!("CARGO"));
    command.args(["run", "--quiet", "--package", "xtask", "--", "dist", "--to"]).arg(&to).current_dir(root);
    assert!(command.status().unwrap().success());
    let nothing = dir.path().join("nothing");
    fs::create_dir(&nothing).unwrap();
    fs::copy(to.join("bin/fastload"), nothing.join("fastload")).unwrap();
    let samples = testkit::samples::stripped();
    let sample = samples.iter().find(|sample| sample.name == "q10-pc-32-plain.mr").unwrap();
    sample.unpack(&nothing).unwrap();
    let nothing = nothing.to_str().unwrap();
    assert!(text(&run("chroot", &[nothing, "/fastload", "check", "/q10-pc-32-plain.mr"])).contains("nothing wrong"));
    run("chroot", &[nothing, "/fastload", "convert", "/q10-pc-32-plain.mr", "/new"]);
    assert!(text(&run("chroot", &[nothing, "/fastload", "check", "/new"])).contains("nothing wrong"));
}
