//! The program under test.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

/// Where the `fastload` program is; builds it if need be.
///
/// # Panics
/// If it can't be built.
#[must_use]
pub fn fastload() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "--package", "fastload", "--bin", "fastload", "--message-format", "json"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let built = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).stderr(Stdio::inherit()).output();
        let built = built.expect("cargo runs");
        assert!(built.status.success(), "fastload can't be built");
        let messages = String::from_utf8_lossy(&built.stdout).into_owned();
        let executable = messages.lines().rev().find_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            message["executable"].as_str().map(PathBuf::from)
        });
        executable.expect("cargo says where it is")
    })
}

/// A `fastload` at work. Killed when it is dropped.
#[derive(Debug)]
pub struct Fastload {
    child: Child,
}

/// How a `fastload` ended.
#[derive(Debug)]
pub struct Ended {
    /// Its status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ended {
    /// Its figures (`--json`): the event that ends the output, `complete`.
    ///
    /// # Panics
    /// If it failed, or printed none.
    #[must_use]
    pub fn figures(&self) -> Value {
        assert!(self.status.success(), "{self:?}");
        let last = self.stdout.lines().last().unwrap_or_default();
        let figures: Value = serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert_eq!(figures["event"], "complete", "{self:?}");
        figures
    }

    /// Types the command that its last line tells the user to type: `fastload SUBCOMMAND ...`, with more arguments.
    ///
    /// # Panics
    /// If there is none, or it can't be started.
    #[must_use]
    pub fn typed(&self, subcommand: &str, more: &[&str]) -> Ended {
        let said = self.stderr.lines().last().unwrap_or_default();
        let begin =
            said.find(&format!("fastload {subcommand}")).unwrap_or_else(|| panic!("no {subcommand} in: {said}"));
        let rest = &said[begin..];
        let end = end_of_command(rest);
        let command = rest[..end].replacen("fastload", &format!("'{}'", fastload().display()), 1);
        let typed = Command::new("bash").arg("-c").arg(format!("{command} \"$@\"")).arg("bash").args(more).output();
        let typed = typed.expect("bash runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ended { status: typed.status, stdout: text(&typed.stdout), stderr: text(&typed.stderr) }
    }

    /// Its only line of error.
    ///
    /// # Panics
    /// If it did not fail.
    #[must_use]
    pub fn error(&self) -> &str {
        assert!(!self.status.success(), "{self:?}");
        self.stderr.lines().last().unwrap_or_default()
    }
}

/// Where a command ends in a sentence: at what follows it, outside of a shell's quotes.
fn end_of_command(text: &str) -> usize {
    let (mut quoted, mut escaped) = (false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '\'' => quoted = !quoted,
            _ if !quoted && [". ", "; ", " (", ", "].iter().any(|stop| text[at..].starts_with(stop)) => return at,
            _ => {}
        }
    }
    text.len()
}

impl Fastload {
    /// Starts it.
    ///
    /// # Errors
    /// The system's.
    pub fn start<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> io::Result<Fastload> {
        let mut command = Command::new(fastload());
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Fastload { child: command.spawn()? })
    }

    /// Its process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// The system's.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> io::Result<()> {
        let id = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).map_err(io::Error::other)?);
        Ok(nix::sys::signal::kill(id, signal)?)
    }

    /// Waits for it.
    ///
    /// # Errors
    /// The system's.
    pub fn finish(mut self) -> io::Result<Ended> {
        let mut texts = [String::new(), String::new()];
        // Both are far shorter than a pipe is deep.
        if let Some(stdout) = &mut self.child.stdout {
            stdout.read_to_string(&mut texts[0])?;
        }
        if let Some(stderr) = &mut self.child.stderr {
            stderr.read_to_string(&mut texts[1])?;
        }
        let status = self.child.wait()?;
        let [stdout, stderr] = texts;
        Ok(Ended { status, stdout, stderr })
    }

    /// Kills it, as a crash would, and waits until it is gone.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// Its standard error, to be read while it runs.
    pub fn stderr(&mut self) -> Option<std::process::ChildStderr> {
        self.child.stderr.take()
    }
}

impl Drop for Fastload {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
