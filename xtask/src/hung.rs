//! Programs that hang: found, described and ended, so that a test that waits for ever costs minutes, and is named.
//!
//! All from `/proc`, see proc(5): there is no other way that needs nothing but Rust.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A process, told from another one that has its number later by the time at which it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Process {
    number: u32,
    began: u64,
}

/// Watches the programs that another one runs, such as the test programs of `cargo test`, one after the other.
#[derive(Debug)]
pub(crate) struct Watch {
    parent: u32,
    limit: Duration,
    seen: HashMap<Process, Instant>,
    /// What is killed is there for a moment still.
    ended: HashSet<Process>,
}

impl Watch {
    /// Over the children of the process `parent`, none of which should take longer than `limit`.
    pub(crate) fn new(parent: u32, limit: Duration) -> Watch {
        Watch { parent, limit, seen: HashMap::new(), ended: HashSet::new() }
    }

    /// To be called now and then: ends each child that has been here for too long, with all that it has started, and
    /// answers what was to be seen of it.
    pub(crate) fn look(&mut self) -> Vec<Hung> {
        let all = processes();
        let now = Instant::now();
        let children = all.iter().filter(|one| one.parent == self.parent).map(|one| one.process);
        self.seen = children.map(|child| (child, self.seen.get(&child).copied().unwrap_or(now))).collect();
        let late = self.seen.iter().filter(|&(_, &since)| now - since >= self.limit).map(|(&child, _)| child).collect();
        self.end(&all, late)
    }

    /// Ends all who could still write to a pipe, but for ourselves: such as a daemon that a test forgot.
    pub(crate) fn end_writers(&mut self, pipe: &Path) -> Vec<Hung> {
        let all = processes();
        let writers = writers_of(&all, pipe);
        self.end(&all, writers)
    }

    fn end(&mut self, all: &[Entry], mut these: Vec<Process>) -> Vec<Hung> {
        these.retain(|&process| self.ended.insert(process));
        these.into_iter().map(|process| end(all, process)).collect()
    }
}

/// A program that took too long, and is no more.
#[derive(Debug)]
pub(crate) struct Hung {
    /// Its command line.
    pub(crate) name: String,
    /// What each of its threads was doing, and each of those of the programs it had started.
    pub(crate) report: String,
}

fn writers_of(all: &[Entry], pipe: &Path) -> Vec<Process> {
    let own = std::process::id();
    let writes = |file: &Path| fs::symlink_metadata(file).is_ok_and(|link| link.permissions().mode() & 0o200 != 0);
    let holds = |number: u32| {
        let mut files = fs::read_dir(format!("/proc/{number}/fd")).into_iter().flatten().flatten();
        files.any(|file| fs::read_link(file.path()).is_ok_and(|link| link == pipe) && writes(&file.path()))
    };
    all.iter().map(|one| one.process).filter(|one| one.number != own && holds(one.number)).collect()
}

/// Ends a process and all of its descendants.
fn end(all: &[Entry], process: Process) -> Hung {
    let mut family = vec![process.number];
    let mut next = 0;
    while let Some(&parent) = family.get(next) {
        family.extend(all.iter().filter(|one| one.parent == parent).map(|one| one.process.number));
        next += 1;
    }
    let report: String = family.iter().map(|&number| describe(number)).collect();
    let name = command_line(process.number);
    // The shell's own `kill`: the program of that name may not be installed.
    let numbers: Vec<String> = family.iter().map(u32::to_string).collect();
    let mut kill = Command::new("sh");
    kill.args(["-c", &format!("kill -KILL {}", numbers.join(" "))]).stderr(Stdio::null());
    // Some may have ended by themselves.
    let _ = kill.status();
    Hung { name, report }
}

#[derive(Debug)]
struct Entry {
    process: Process,
    parent: u32,
}

fn processes() -> Vec<Entry> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // A name may contain anything.
            let (_, after_name) = stat.rsplit_once(") ")?;
            let mut fields = after_name.split(' ');
            let parent = fields.nth(1)?.parse().ok()?;
            let began = fields.nth(17)?.parse().ok()?;
            Some(Entry { process: Process { number, began }, parent })
        })
        .collect()
}

fn command_line(number: u32) -> String {
    let bytes = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
    let words: Vec<_> = bytes.split(|&byte| byte == 0).map(String::from_utf8_lossy).collect();
    words.join(" ").trim_end().to_owned()
}

/// A line for each thread: its name (in a test program that of the test, cut to 15 bytes), whether it runs or how it
/// sleeps, the place in the kernel, and the system call with its arguments (-1: none, as in a page fault). Then where in
/// the kernel it is, which only root may see.
fn describe(number: u32) -> String {
    let mut text = format!("process {number}: {}\n", command_line(number));
    let threads = fs::read_dir(format!("/proc/{number}/task")).into_iter().flatten().flatten();
    for thread in threads {
        let what = |file: &str| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        let status = what("status");
        let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or_default();
        let (id, name) = (thread.file_name(), what("comm"));
        let (id, name, place, call) = (id.to_string_lossy(), name.trim_end(), what("wchan"), what("syscall"));
        // A string takes all that is written to it.
        let _ = writeln!(text, "  thread {id} {name}: {}, {place}, {}", state.trim(), call.trim_end());
        what("stack").lines().for_each(|line| {
            let _ = writeln!(text, "      {line}");
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// The only child of a process, as soon as it runs a program that is called so.
    fn child_of(parent: u32, name: &str) -> u32 {
        loop {
            let all = processes();
            if let Some(child) = all.iter().find(|one| one.parent == parent).map(|one| one.process.number)
                && command_line(child).starts_with(name)
            {
                return child;
            }
        }
    }

    #[test]
    fn a_child_is_ended_with_its_children_when_its_time_is_over() {
        // The shell is what `cargo` is otherwise. Its child has a child.
        let mut parent = Command::new("sh");
        let script = "sh -c 'sleep 60; true'; echo \"and on, $?\"";
        let parent = parent.args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let child = child_of(parent.id(), "sh -c sleep");
        child_of(child, "sleep");
        assert!(Watch::new(parent.id(), Duration::from_secs(60)).look().is_empty());
        let mut watch = Watch::new(parent.id(), Duration::ZERO);
        let hung = watch.look();
        let [Hung { name, report }] = &hung[..] else { panic!("{hung:?}") };
        assert_eq!(name, "sh -c sleep 60; true");
        assert!(report.contains(&format!("process {child}: sh")) && report.contains(" sleep: "), "{report}");
        let again = watch.ended.iter().copied().collect();
        assert!(watch.end(&[], again).is_empty(), "once is enough, even if it is there still");
        let output = parent.wait_with_output().unwrap();
        assert_eq!(output.stdout, b"and on, 137\n");
    }

    #[test]
    fn who_may_write_to_a_pipe_is_found() {
        let (reader, writer) = std::io::pipe().unwrap();
        let pipe = fs::read_link(format!("/proc/self/fd/{}", reader.as_raw_fd())).unwrap();
        let mut holder = Command::new("sleep").arg("60").stdout(writer).spawn().unwrap();
        let mut other = Command::new("sleep").arg("60").stdin(reader).spawn().unwrap();
        // What another test is about to start has a copy for a moment: nobody is ended here.
        let writers = || writers_of(&processes(), &pipe).iter().map(|one| one.number).collect::<Vec<_>>();
        let found = writers();
        assert!(found.contains(&holder.id()) && !found.contains(&other.id()), "{found:?}");
        for child in [&mut holder, &mut other] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(!writers().contains(&holder.id()));
    }
}
