//! `--exec-frozen`: a command that runs while nothing writes to the guest's disks.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::interrupt::Interrupts;
use crate::commands::Failure;

/// How often it is looked whether the command has ended, which nothing else tells.
const AGAIN: Duration = Duration::from_millis(2);

/// The command.
#[derive(Clone, Debug)]
pub(super) struct Hook {
    pub(super) command: OsString,
    /// How long it may take.
    pub(super) limit: Duration,
    /// What it finds in its environment.
    pub(super) variables: Vec<(&'static str, OsString)>,
}

impl Hook {
    /// Runs it to its end. How long it took.
    pub(super) fn run(&self, interrupts: &Interrupts) -> Result<Duration, Failure> {
        let begun = Instant::now();
        let name = self.command.display();
        let failed = |error: io::Error| format!("the command \"{name}\" can't be run: {error}");
        let mut running = Running(self.start().map_err(failed)?);
        loop {
            if let Some(status) = running.0.try_wait().map_err(failed)? {
                return match status.success() {
                    true => Ok(begun.elapsed()),
                    false => Err(format!("the command \"{name}\" has failed ({})", ended(status)).into()),
                };
            }
            if begun.elapsed() > self.limit {
                let limit = self.limit.as_secs_f64();
                return Err(format!("the command \"{name}\" takes longer than {limit} s (--exec-limit)").into());
            }
            if interrupts.came() {
                return Err("cancelled: the guest goes on, and nothing was written".into());
            }
            thread::sleep(AGAIN);
        }
    }

    fn start(&self) -> io::Result<Child> {
        let mut command = Command::new("sh");
        command.arg("-c").arg(&self.command);
        command.envs(self.variables.iter().map(|(name, value)| (OsStr::new(name), value)));
        // What it prints is no result of ours. Its group ends with it.
        let output = io::stderr().as_fd().try_clone_to_owned()?;
        command.stdin(Stdio::null()).stdout(output).process_group(0).spawn()
    }
}

fn ended(status: ExitStatus) -> String {
    status.code().map_or_else(|| status.to_string(), |code| format!("exit code {code}"))
}

/// Nothing of it is left when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let group = i32::try_from(self.0.id()).map(Pid::from_raw);
            // It may have ended by itself.
            let _ = group.map(|group| killpg(group, Signal::SIGKILL));
            let _ = self.0.wait();
        }
    }
}
