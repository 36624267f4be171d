//! A kernel in QEMU, without KVM.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::report::{Column, Line};
use crate::run::{Done, show};

/// What boots.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    /// Where what the kernel says is written.
    pub(crate) console: &'a Path,
    /// Where what the tests say is written.
    pub(crate) log: &'a Path,
    /// How long all of it may take.
    pub(crate) limit: Duration,
}

/// On a busy host timer interrupts come late; before it has seen some come in time the kernel does not go on, unless told
/// not to look (`no_timer_check`).
const KERNEL: &str = "console=ttyS0 no_timer_check panic=-1 oops=panic mitigations=off rdinit=/init -- in-guest";

/// How much of what was said last is shown of a machine that went wrong.
const TAIL: usize = 40;

/// Boots it, and hears what init says until all is over.
///
/// # Errors
/// If QEMU can't be started, the guest says nothing sensible, or takes too long. A test that fails is no error here: it
/// is in the column.
pub(crate) fn run(machine: &Machine<'_>, column: &mut Column) -> Done {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2G"])
        .arg("-kernel")
        .arg(machine.kernel)
        .arg("-initrd")
        .arg(machine.initramfs)
        .args(["-append", KERNEL])
        .arg("-serial")
        .arg(format!("file:{}", machine.console.display()))
        .args(["-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let began = Instant::now();
    let mut log = File::create(machine.log).map_err(|error| format!("{}: {error}", machine.log.display()))?;
    let mut qemu = command.spawn().map_err(|error| format!("{}: {error}", show(&command)))?;
    let (lines, heard) = channel();
    if let Some(output) = qemu.stdout.take() {
        thread::spawn(move || {
            BufReader::new(output).split(b'\n').map_while(Result::ok).try_for_each(|line| lines.send(line))
        });
    }
    let mut last = VecDeque::with_capacity(TAIL);
    let mut problem = None;
    loop {
        let left = machine.limit.saturating_sub(began.elapsed());
        match heard.recv_timeout(left) {
            Ok(line) => {
                let text = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                writeln!(log, "{text}")?;
                column.hear(&Line::parse(&text));
                if last.len() == TAIL {
                    last.pop_front();
                }
                last.push_back(text);
            }
            Err(RecvTimeoutError::Timeout) => {
                problem = Some(format!("took longer than {} s", machine.limit.as_secs()));
                break;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    if problem.is_some() {
        // It may have ended by itself this very moment.
        let _ = qemu.kill();
    }
    let status = qemu.wait()?;
    column.took = began.elapsed();
    if problem.is_none() && !column.complete {
        problem = Some(format!("ended before its time ({status})"));
    }
    let Some(problem) = problem else { return Ok(()) };
    let running = column.running().map_or_else(|| "none".into(), |name| format!("\"{name}\""));
    let problem = format!("the machine {problem}; test program at the time: {running}");
    say!("   {problem}\n   what was said last:");
    last.iter().for_each(|line| say!("     {line}"));
    let console = fs::read(machine.console).unwrap_or_default();
    let console = String::from_utf8_lossy(&console).into_owned();
    let lines: Vec<&str> = console.lines().collect();
    say!("   what the kernel said last ({}):", machine.console.display());
    lines[lines.len().saturating_sub(TAIL)..].iter().for_each(|line| say!("     {}", line.trim_end()));
    Err(problem.into())
}
