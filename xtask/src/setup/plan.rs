//! From what is missing to the commands that bring it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::Need;
use super::facts::{self, Facts};
use crate::run::{Done, quote, run, show};

/// One command.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Write a file that tells apt of a further suite.
    AddSource { path: String, text: String },
    /// Fetch the lists of packages.
    Update,
    /// Install from the machine's own suite, or from another.
    Install { packages: Vec<&'static str>, suite: Option<String> },
    /// Unpack packages of a suite into a directory, without installing them.
    Unpack { packages: Vec<&'static str>, suite: String, into: PathBuf },
    /// Add parts of the Rust toolchain.
    Components(Vec<&'static str>),
}

/// What to do, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    steps: Vec<Step>,
    /// What can't be done from here, and is left to the user; the rest can be done all the same.
    by_hand: Vec<String>,
}

/// Plans to bring those of `needs` that are missing. What this machine can't be made to have is
/// [left to the user](Plan::by_hand), in words.
pub(crate) fn make(facts: &Facts, needs: &[Need]) -> Plan {
    let mut missing: Vec<Need> = needs.iter().copied().filter(|&need| !facts.has(need)).collect();
    let mut plan = Plan::default();
    // No other system has it in packages. The tests say what they lack.
    if !(facts.os.is_debian() && facts.apt_get && !facts.os.has_own_qemu()) {
        missing.retain(|need| *need != Need::OlderQemu);
    }
    // No package changes where the build looks then.
    if let Some(path) = facts.libclang_path.as_ref().filter(|_| missing.contains(&Need::Libclang)) {
        let path = path.display();
        plan.by_hand
            .push(format!("LIBCLANG_PATH is \"{path}\", where there is no libclang; please unset it, or mend it"));
        missing.retain(|need| *need != Need::Libclang);
    }
    let in_packages = |need: &Need| !matches!(need, Need::Rustfmt | Need::Clippy);
    let (system, toolchain): (Vec<Need>, Vec<Need>) = missing.into_iter().partition(in_packages);
    if !system.is_empty() {
        if facts.os.is_debian() && facts.apt_get {
            plan.packages(facts, &system);
        } else {
            let names: Vec<&str> = system.iter().map(|need| need.name()).collect();
            let what = "this is not a Debian with apt-get; please install with your package manager";
            plan.by_hand.push(format!("{what}: {}", names.join(", ")));
        }
    }
    let components: Vec<&str> =
        toolchain.iter().map(|need| if *need == Need::Rustfmt { "rustfmt" } else { "clippy" }).collect();
    if !components.is_empty() {
        if facts.rustup {
            plan.steps.push(Step::Components(components));
        } else {
            let names = components.join(", ");
            plan.by_hand.push(format!("there is no rustup; please add to your Rust toolchain: {names}"));
        }
    }
    plan
}

impl Plan {
    fn packages(&mut self, facts: &Facts, missing: &[Need]) {
        let mut own = Vec::new();
        let mut from_backports = Vec::new();
        if missing.contains(&Need::Libclang) {
            own.push("libclang-dev");
        }
        if missing.contains(&Need::Cxx) {
            own.push("g++");
        }
        if missing.contains(&Need::Compressors) {
            own.extend(["zstd", "lz4"]);
        }
        if missing.contains(&Need::Readers) {
            own.extend(["zsh", "mandoc"]);
        }
        for (need, package) in [(Need::Qemu, "qemu-system-x86"), (Need::QemuTools, "qemu-utils")] {
            if missing.contains(&need) {
                if facts.os.has_own_qemu() { &mut own } else { &mut from_backports }.push(package);
            }
        }
        let backports = format!("{}-backports", facts.os.codename);
        if !from_backports.is_empty() && !facts.sources.iter().any(|entry| entry.offers_main_of(&backports)) {
            if let Some(entry) = facts.sources.iter().find(|entry| entry.offers_main_of(&facts.os.codename)) {
                let (extension, text) = entry.for_suite(&backports);
                let path = format!("/etc/apt/sources.list.d/fastload-backports.{extension}");
                self.steps.push(Step::AddSource { path, text });
            } else {
                self.by_hand.push(format!(
                    "apt has no source for \"{}\", from which the one for \"{backports}\" could be made; please \
                     install {}",
                    facts.os.codename,
                    Need::Qemu.name()
                ));
                from_backports.clear();
            }
        }
        let older = missing.contains(&Need::OlderQemu);
        // Without root the lists are taken as they are.
        if !own.is_empty() || !from_backports.is_empty() || (older && facts.root) {
            self.steps.push(Step::Update);
        }
        if !own.is_empty() {
            self.steps.push(Step::Install { packages: own, suite: None });
        }
        if !from_backports.is_empty() {
            self.steps.push(Step::Install { packages: from_backports, suite: Some(backports) });
        }
        if older {
            // The libraries that it needs come with the newer one.
            let packages = vec!["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];
            self.steps.push(Step::Unpack { packages, suite: facts.os.codename.clone(), into: facts::older_qemu() });
        }
    }

    /// What is left to the user, one sentence each; empty if nothing is.
    pub(crate) fn by_hand(&self) -> &[String] {
        &self.by_hand
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Whether some of it is for root only.
    pub(crate) fn needs_root(&self) -> bool {
        self.steps.iter().any(Step::needs_root)
    }

    /// Does it.
    ///
    /// # Errors
    /// If a step fails; the error names the command.
    pub(crate) fn execute(&self) -> Done {
        for step in &self.steps {
            if let Step::AddSource { path, text } = step {
                eprintln!("+ writing {path}");
                fs::write(path, text).map_err(|error| format!("{path}: {error}"))?;
            } else {
                let mut command = step.command();
                eprintln!("+ {}", show(&command));
                command.env("DEBIAN_FRONTEND", "noninteractive").stdout(std::io::stderr());
                run(&mut command)?;
            }
        }
        Ok(())
    }

    /// The same as one line for a shell; with `sudo` where root is needed and the reader is not (known to be) root.
    pub(crate) fn shell(&self, root: bool) -> String {
        let (system, toolchain): (Vec<&Step>, Vec<&Step>) = self.steps.iter().partition(|step| step.needs_root());
        let line = |steps: Vec<&Step>| steps.into_iter().map(Step::shell).collect::<Vec<_>>().join(" && ");
        let mut parts = Vec::new();
        if !system.is_empty() {
            let system = line(system);
            parts.push(if root { system } else { format!("sudo sh -c {}", quote(&system)) });
        }
        if !toolchain.is_empty() {
            parts.push(line(toolchain));
        }
        parts.join(" && ")
    }
}

impl Step {
    fn needs_root(&self) -> bool {
        !matches!(self, Step::Components(_) | Step::Unpack { .. })
    }

    fn command(&self) -> Command {
        let words: String;
        let (program, arguments): (&str, Vec<&str>) = match self {
            Step::Unpack { packages, suite, into } => {
                let from_suite: Vec<String> = packages.iter().map(|package| format!("{package}/{suite}")).collect();
                let into = quote(&into.display().to_string());
                words = format!(
                    "rm -rf {into} && mkdir -p {into} && cd {into} && apt-get download {} && \
                     for package in *.deb; do dpkg -x \"$package\" . && rm \"$package\"; done",
                    from_suite.join(" ")
                );
                ("sh", vec!["-ec", &words])
            }
            Step::AddSource { path, text } => ("sh", vec!["-c", "printf %s \"$1\" > \"$2\"", "sh", text, path]),
            Step::Update => ("apt-get", vec!["update"]),
            Step::Install { packages, suite } => {
                let mut arguments = vec!["install", "-y", "--no-install-recommends"];
                if let Some(suite) = suite {
                    arguments.extend(["-t", suite.as_str()]);
                }
                arguments.extend(packages);
                ("apt-get", arguments)
            }
            Step::Components(names) => {
                let mut arguments = vec!["component", "add"];
                arguments.extend(names);
                ("rustup", arguments)
            }
        };
        let mut command = Command::new(program);
        command.args(arguments);
        command
    }

    fn shell(&self) -> String {
        match self {
            Step::AddSource { path, text } => format!("printf %s {} > {}", quote(text), quote(path)),
            _ => show(&self.command()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::setup::apt;
    use crate::setup::debian::OsRelease;

    fn fresh(version: u32, codename: &str) -> Facts {
        let etc = tempfile::tempdir().unwrap();
        let text = format!("deb [signed-by=/k.gpg] http://mirror.test/debian {codename} main\n");
        fs::write(etc.path().join("sources.list"), text).unwrap();
        Facts {
            root: true,
            os: OsRelease { id: "debian".into(), codename: codename.into(), version: Some(version) },
            apt_get: true,
            rustup: true,
            libclang_path: None,
            sources: apt::read_all(etc.path()),
            present: vec![Need::Rustfmt, Need::Clippy],
        }
    }

    #[test]
    fn an_old_debian_takes_qemu_from_its_backports() {
        let plan = make(&fresh(12, "bookworm"), &Need::ALL);
        assert!(plan.needs_root());
        let (installing, unpacking) =
            plan.shell(true).split_once(" && sh -ec ").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
        for word in ["apt-get download qemu-system-x86/bookworm", "seabios/bookworm", "dpkg -x", "older-qemu"] {
            assert!(unpacking.contains(word), "{unpacking}");
        }
        assert_eq!(
            installing,
            "printf %s 'deb [signed-by=/k.gpg] http://mirror.test/debian bookworm-backports main\n' > \
             /etc/apt/sources.list.d/fastload-backports.list && apt-get update && \
             apt-get install -y --no-install-recommends libclang-dev g++ zstd lz4 zsh mandoc && \
             apt-get install -y --no-install-recommends -t bookworm-backports qemu-system-x86 qemu-utils"
        );
        let mut configured = fresh(12, "bookworm");
        let more = "Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm-backports\nComponents: main\n";
        let etc = tempfile::tempdir().unwrap();
        fs::create_dir(etc.path().join("sources.list.d")).unwrap();
        fs::write(etc.path().join("sources.list.d/more.sources"), more).unwrap();
        configured.sources.extend(apt::read_all(etc.path()));
        assert!(make(&configured, &[Need::Qemu]).shell(true).starts_with("apt-get update && apt-get install"));
    }

    #[test]
    fn a_newer_debian_has_its_own() {
        let plan = make(&fresh(13, "trixie"), &Need::ALL);
        assert_eq!(
            plan.shell(false),
            "sudo sh -c 'apt-get update && apt-get install -y --no-install-recommends libclang-dev g++ zstd lz4 zsh mandoc qemu-system-x86 qemu-utils'"
        );
    }

    #[test]
    fn what_is_unpacked_needs_no_root() {
        let present = Need::ALL.into_iter().filter(|need| *need != Need::OlderQemu).collect();
        let facts = Facts { present, root: false, ..fresh(12, "bookworm") };
        let plan = make(&facts, &Need::ALL);
        assert!(!plan.needs_root() && plan.shell(false).starts_with("sh -ec "), "{plan:?}");
        assert!(make(&Facts { root: true, ..facts }, &Need::ALL).shell(true).starts_with("apt-get update && sh -ec "));
    }

    #[test]
    fn toolchain_parts_need_no_root() {
        let facts = Facts {
            present: Need::ALL.into_iter().filter(|need| ![Need::Rustfmt, Need::Clippy].contains(need)).collect(),
            root: false,
            ..fresh(12, "bookworm")
        };
        let plan = make(&facts, &Need::ALL);
        assert!(!plan.needs_root());
        assert_eq!(plan.shell(false), "rustup component add rustfmt clippy");
        let plan = make(&Facts { rustup: false, ..facts }, &Need::ALL);
        assert!(plan.is_empty() && plan.by_hand()[0].contains("rustfmt, clippy"), "{plan:?}");
    }

    #[test]
    fn nothing_missing_is_nothing_to_do() {
        let facts = Facts { present: Need::ALL.to_vec(), ..Facts::default() };
        assert_eq!(make(&facts, &Need::ALL), Plan::default());
    }

    #[test]
    fn what_can_not_be_done_is_said_and_the_rest_is_done() {
        let other = OsRelease { id: "other".into(), ..OsRelease::default() };
        let elsewhere = Facts { os: other, present: vec![Need::Rustfmt], ..fresh(12, "bookworm") };
        let plan = make(&elsewhere, &[Need::Qemu, Need::Clippy]);
        assert_eq!(plan.shell(false), "rustup component add clippy");
        assert!(plan.by_hand().len() == 1 && plan.by_hand()[0].contains("QEMU 10"), "{plan:?}");

        let no_rustup = Facts { rustup: false, present: Vec::new(), ..fresh(13, "trixie") };
        let plan = make(&no_rustup, &[Need::Libclang, Need::Rustfmt, Need::Clippy]);
        let apt = "apt-get update && apt-get install -y --no-install-recommends libclang-dev";
        assert_eq!(plan.shell(false), format!("sudo sh -c '{apt}'"));
        assert!(plan.by_hand().len() == 1 && plan.by_hand()[0].contains("rustfmt, clippy"), "{plan:?}");

        let no_sources = Facts { sources: Vec::new(), ..fresh(12, "bookworm") };
        let plan = make(&no_sources, &[Need::Qemu]);
        assert!(plan.is_empty() && plan.by_hand()[0].contains("bookworm-backports"), "{plan:?}");
        let plan = make(&no_sources, &[Need::Qemu, Need::Libclang]);
        assert_eq!((plan.shell(true), plan.by_hand().len()), (apt.to_owned(), 1));
    }

    #[test]
    fn where_the_build_is_told_to_look_in_vain_no_package_helps() {
        let facts = Facts { libclang_path: Some("/opt/none".into()), ..fresh(13, "trixie") };
        let plan = make(&facts, &Need::ALL);
        assert!(plan.by_hand().len() == 1 && plan.by_hand()[0].contains("LIBCLANG_PATH is \"/opt/none\""), "{plan:?}");
        assert!(!plan.shell(true).contains("libclang") && plan.shell(true).contains("g++"), "{plan:?}");
        let there = Facts { present: Need::ALL.to_vec(), ..facts };
        assert_eq!(make(&there, &Need::ALL), Plan::default());
    }

    #[test]
    fn the_file_for_apt_is_written_as_planned() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.list").to_str().unwrap().to_owned();
        let text = "deb [signed-by='/a b'] http://mirror.test/debian x main\n".to_owned();
        let plan = Plan { steps: vec![Step::AddSource { path: path.clone(), text: text.clone() }], ..Plan::default() };
        plan.execute().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        fs::remove_file(&path).unwrap();
        run(Command::new("sh").args(["-c", &plan.shell(true)])).unwrap();
        assert_eq!(fs::read_to_string(Path::new(&path)).unwrap(), text);
    }
}
