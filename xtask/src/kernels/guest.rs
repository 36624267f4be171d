//! What runs inside: this program as the init of the guest. It runs each test program, and tells on the second serial
//! line how they did (the first one is the kernel's).

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::initramfs::PLAN;
use super::report::Line;
use crate::hung::Watch;
use crate::run::{Done, run as run_command};

/// The serial line that we speak on.
const LINE: &str = "/dev/ttyS1";
/// Where the tests write what they skipped.
const SKIPS: &str = "/tmp/skips";
/// How long one program may take: nothing takes nearly as long, unless it hangs.
const LIMIT: Duration = Duration::from_secs(10 * 60);
/// Without KVM it takes some ten times as long.
const SLOW: &str = "8";
/// How often programs that hang are looked for.
const TICK: Duration = Duration::from_secs(1);

/// What it takes: nothing.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs the plan, and switches the machine off.
///
/// # Errors
/// If this is not the init of a guest, or the guest lacks something.
pub(crate) fn run(_: &Args) -> Done {
    if std::process::id() != 1 {
        return Err("this is for the init of a test machine only: see cargo xtask kernels".into());
    }
    let done = all();
    if let Err(error) = &done {
        eprintln!("init: {error}");
    }
    // Reboot at once: QEMU ends then (`-no-reboot`). The line is empty by now, for close(2) waits for that.
    fs::write("/proc/sysrq-trigger", "b")?;
    loop {
        thread::park();
    }
}

fn all() -> Done {
    for (kind, place) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp"), ("tmpfs", "/var/tmp")]
    {
        run_command(Command::new("/bin/mount").args(["-t", kind, kind, place]))?;
    }
    fs::create_dir_all("/dev/shm")?;
    run_command(Command::new("/bin/mount").args(["-t", "tmpfs", "tmpfs", "/dev/shm"]))?;
    let mut line = OpenOptions::new().write(true).open(LINE).map_err(|error| format!("{LINE}: {error}"))?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    say(&mut line, &Line::Kernel(release.trim().to_owned()))?;
    let plan = fs::read_to_string(PLAN)?;
    for (name, filter) in plan.lines().filter_map(|entry| entry.split_once(' ')) {
        one(&mut line, name, filter)?;
    }
    let skips = fs::read_to_string(SKIPS).unwrap_or_default();
    skips.lines().try_for_each(|skip| say(&mut line, &Line::Skip(skip.to_owned())))?;
    say(&mut line, &Line::Done)
}

fn say(line: &mut File, what: &Line) -> Done {
    line.write_all(format!("{what}\n").as_bytes())?;
    Ok(())
}

/// Runs one program to its end, or to the limit.
fn one(line: &mut File, name: &str, filter: &str) -> Done {
    say(line, &Line::Begin(name.to_owned()))?;
    let began = Instant::now();
    let mut command = Command::new(format!("/tests/{name}"));
    command.args(["--test-threads", "2"]).args(filter.split_whitespace());
    // A machine that we made has everything: what is skipped is for lack of what this kernel has not.
    command.envs([
        ("CI", "true"),
        ("FASTLOAD_SLOW", SLOW),
        ("TESTKIT_SKIPS", SKIPS),
        ("RUST_BACKTRACE", "1"),
        ("HOME", "/root"),
        ("PATH", "/bin"),
    ]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (lines, heard) = channel();
    if let (Some(output), Some(errors)) = (child.stdout.take(), child.stderr.take()) {
        pass_on(output, lines.clone());
        pass_on(errors, lines);
    }
    let mut watch = Watch::new(std::process::id(), LIMIT);
    let mut looked = Instant::now();
    loop {
        match heard.recv_timeout(TICK) {
            Ok(said) => say(line, &Line::Output(said))?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if looked.elapsed() >= TICK {
            looked = Instant::now();
            for hung in watch.look() {
                say(line, &Line::Output(format!("ENDED, it took too long: {}", hung.name)))?;
                hung.report.lines().try_for_each(|text| say(line, &Line::Output(text.to_owned())))?;
            }
        }
    }
    let status = child.wait()?;
    say(
        line,
        &Line::End { name: name.to_owned(), ok: status.success(), how: status.to_string(), took: began.elapsed() },
    )
}

fn pass_on(from: impl Read + Send + 'static, to: Sender<String>) {
    thread::spawn(move || {
        let lines = BufReader::new(from).split(b'\n').map_while(Result::ok);
        // The receiver is there until all senders have gone.
        lines.map(|line| String::from_utf8_lossy(&line).into_owned()).try_for_each(|line| to.send(line))
    });
}
