//! A running QEMU that belongs to one test.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use fastload_qmp::{Capabilities, Qmp, QmpError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;
use tempfile::TempDir;
use testkit::scratch::Scratch;

use crate::blocks::Hidden;
use crate::guest::{STATUS, Status, TICKS};
use crate::ram::copy_sparse;
use crate::{RamDump, Setup};

/// How much of RAM is dumped at a time, in bytes.
const DUMPED: usize = 256 << 20;
/// No single step of a test takes as long.
const LIMIT: Duration = Duration::from_secs(60);

/// Why a QEMU did not do what a test wanted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuError {
    /// A file, a socket or the process.
    #[error("{what}: {error}\nQEMU says: {stderr}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        #[source]
        error: io::Error,
        /// QEMU's standard error.
        stderr: String,
    },
    /// QMP.
    #[error("{error}\nQEMU says: {stderr}")]
    Qmp {
        /// What QMP said.
        #[source]
        error: QmpError,
        /// QEMU's standard error.
        stderr: String,
    },
    /// The guest answered something else, or a migration failed.
    #[error("{what}\nQEMU says: {stderr}")]
    Unexpected {
        /// What happened.
        what: String,
        /// QEMU's standard error.
        stderr: String,
    },
}

/// A QEMU process. Killed when it is dropped.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    setup: Setup,
    qmp: Qmp,
    serial: UnixStream,
    said: Vec<u8>,
    dir: TempDir,
}

impl Qemu {
    /// Starts one with this guest (an ELF file) and waits until its monitor answers.
    ///
    /// # Errors
    /// If it does not start; with what it said.
    pub fn start(setup: &Setup, guest: &[u8]) -> Result<Qemu, QemuError> {
        let dir = tempfile::Builder::new().prefix("fastload-qemu-").tempdir().map_err(|e| plain("a directory", e))?;
        let listen = |name: &str| UnixListener::bind(dir.path().join(name)).map_err(|e| plain(name, e));
        let (own, serial) = (listen("own.qmp")?, listen("serial")?);
        fs::write(dir.path().join("guest.elf"), guest).map_err(|e| plain("the guest", e))?;
        let stderr = File::create(dir.path().join("stderr")).map_err(|e| plain("stderr", e))?;
        let mut command = setup.program();
        command.args(setup.arguments(dir.path())).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        if let Some(user) = setup.user {
            command.uid(user);
            for (name, mode) in [("", 0o777), ("own.qmp", 0o777), ("serial", 0o777)] {
                let path = dir.path().join(name);
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| plain("permissions", e))?;
            }
        }
        let mut child = command.spawn().map_err(|e| plain("qemu-system-x86_64", e))?;
        let connected = accept(&own).and_then(|own| Ok((own, accept(&serial)?)));
        let opened = connected
            .map_err(|error| io_error(dir.path(), "QEMU does not start", error))
            .and_then(|(own, serial)| Ok((Qmp::over(own, LIMIT).map_err(|e| qmp_error(dir.path(), e))?, serial)));
        match opened {
            Ok((qmp, serial)) => Ok(Qemu { child, setup: setup.clone(), qmp, serial, said: Vec::new(), dir }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// How it was started.
    #[must_use]
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// A QMP socket for the program under test; the harness has its own.
    #[must_use]
    pub fn qmp_path(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    /// A directory for this QEMU's files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The harness's own QMP connection.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Executes a QMP command.
    ///
    /// # Errors
    /// QEMU's.
    pub fn execute(&mut self, command: &str, arguments: serde_json::Value) -> Result<serde_json::Value, QemuError> {
        self.qmp.execute(command, arguments).map_err(|e| qmp_error(self.dir.path(), e))
    }

    /// Makes QEMU's main thread read a byte of the guest's memory (of these that the monitor offers, the one way that QEMU
    /// 11 still takes while memory is on its way). Returns when the byte is there.
    ///
    /// # Errors
    /// QEMU's.
    pub fn touch(&mut self, at: u64) -> Result<(), QemuError> {
        self.word(at).map(drop)
    }

    /// The same, and what it reads: eight bytes.
    ///
    /// # Errors
    /// QEMU's.
    pub fn word(&mut self, at: u64) -> Result<u64, QemuError> {
        let said = self.execute("human-monitor-command", json!({"command-line": format!("xp /1xg {at}")}))?;
        let word = said.as_str().and_then(|said| u64::from_str_radix(said.trim().rsplit_once("0x")?.1, 16).ok());
        word.ok_or_else(|| self.unexpected(&format!("the monitor reads {said}")))
    }

    /// How many interrupts the guest has taken, also while memory is on its way.
    ///
    /// # Errors
    /// QEMU's.
    pub fn ticks(&mut self) -> Result<u64, QemuError> {
        self.word(TICKS)
    }

    /// Its process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What QEMU wrote to its standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        stderr(self.dir.path())
    }

    /// Kills it, as a crash would.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// The system's.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> io::Result<()> {
        let id = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).map_err(io::Error::other)?);
        Ok(nix::sys::signal::kill(id, signal)?)
    }

    /// How much memory it has in use, in bytes: what arrives in the guest's RAM makes it more.
    ///
    /// # Errors
    /// The system's.
    pub fn resident(&self) -> io::Result<u64> {
        // The second number of proc_pid_statm(5), in pages, which are 4 KiB on x86-64.
        let text = fs::read_to_string(format!("/proc/{}/statm", self.child.id()))?;
        let pages: Option<u64> = text.split(' ').nth(1).and_then(|pages| pages.parse().ok());
        Ok(pages.ok_or(io::ErrorKind::InvalidData)? * 4096)
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// If it does not.
    pub fn wait_exit(&mut self) -> Result<ExitStatus, QemuError> {
        // The monitor's socket closes when the process ends: no need to ask again and again.
        if self.qmp.wait_event(&[], LIMIT).is_ok() {
            return Err(self.unexpected("QEMU does not end"));
        }
        self.child.wait().map_err(|error| io_error(self.dir.path(), "waiting for QEMU", error))
    }

    /// Waits for the guest's next answer: the letter, its passes, its errors.
    ///
    /// # Errors
    /// If the guest is silent, or says something else.
    pub fn answer(&mut self) -> Result<(char, u64, u64), QemuError> {
        let until = Instant::now() + LIMIT;
        let line = loop {
            if let Some(end) = self.said.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.said.drain(..=end).collect();
                break String::from_utf8_lossy(&line).into_owned();
            }
            if !readable(&self.serial, until).map_err(|error| io_error(self.dir.path(), "the serial port", error))? {
                return Err(self.unexpected("the guest is silent"));
            }
            let mut some = [0; 256];
            match self.serial.read(&mut some) {
                Ok(0) => return Err(self.unexpected("the serial port was closed")),
                Ok(n) => self.said.extend_from_slice(&some[..n]),
                Err(error) => return Err(io_error(self.dir.path(), "the serial port", error)),
            }
        };
        let mut words = line.split_whitespace();
        let letter = words.next().and_then(|word| word.chars().last());
        let mut number = || words.next().and_then(|word| u64::from_str_radix(word, 16).ok());
        match (letter, number(), number()) {
            (Some(letter), Some(passes), Some(errors)) => Ok((letter, passes, errors)),
            _ => Err(self.unexpected(&format!("the guest says {line:?}"))),
        }
    }

    /// Gives the guest an order (`?`, `s`, `g` or `h`) and waits for its answer: passes and errors.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn order(&mut self, order: char) -> Result<(u64, u64), QemuError> {
        let sent = write!(self.serial, "{order}");
        sent.map_err(|error| io_error(self.dir.path(), "the serial port", error))?;
        loop {
            let (letter, passes, errors) = self.answer()?;
            if letter == order {
                return Ok((passes, errors));
            }
        }
    }

    /// Waits until the guest has filled its memory.
    ///
    /// # Errors
    /// If it does not say so.
    pub fn wait_ready(&mut self) -> Result<(), QemuError> {
        match self.answer()? {
            ('r', _, 0) => Ok(()),
            other => Err(self.unexpected(&format!("the guest is not ready: {other:?}"))),
        }
    }

    /// Saves the guest into a mapped-ram file, which stops it.
    ///
    /// # Errors
    /// If the migration does not complete.
    pub fn save(&mut self, to: &Path, multifd: bool, direct_io: bool) -> Result<(), QemuError> {
        self.set_capabilities(&[("mapped-ram", true), ("multifd", multifd), ("events", true)])?;
        if multifd {
            self.execute("migrate-set-parameters", json!({"multifd-channels": 2, "direct-io": direct_io}))?;
        }
        self.qmp.forget_events();
        self.execute("migrate", json!({"uri": format!("file:{}", to.display())}))?;
        self.wait_migration("completed")?;
        self.set_capabilities(&[("mapped-ram", false), ("multifd", false)])
    }

    /// Sets migration capabilities.
    ///
    /// # Errors
    /// QEMU's.
    pub fn set_capabilities(&mut self, wanted: &[(&str, bool)]) -> Result<(), QemuError> {
        let wanted = Capabilities(wanted.iter().map(|(name, state)| ((*name).to_owned(), *state)).collect());
        let set = self.qmp.set_capabilities(&Capabilities::default(), &wanted);
        set.map_err(|e| qmp_error(self.dir.path(), e))
    }

    /// Waits for the migration to reach a state (with the capability `events` on).
    ///
    /// # Errors
    /// If it fails, or does not come to it.
    pub fn wait_migration(&mut self, state: &str) -> Result<(), QemuError> {
        loop {
            let event = self.qmp.wait_event(&["MIGRATION"], LIMIT).map_err(|e| qmp_error(self.dir.path(), e))?;
            match event.as_ref().and_then(|event| event.data["status"].as_str()) {
                Some(reached) if reached == state => return Ok(()),
                Some("failed" | "cancelled") | None => {
                    let now = self.qmp.migration();
                    return Err(self.unexpected(&format!("the migration is not {state}: {now:?}")));
                }
                Some(_) => {}
            }
        }
    }

    /// Stops the guest and takes all its RAM, what the guest sees and what it does not, and the firmware below 4 GiB. (What
    /// only devices have, as the registers and the palette of a graphics card, is not RAM, and is not taken.)
    ///
    /// # Errors
    /// QEMU's, or the system's.
    pub fn dump(&mut self) -> Result<RamDump, QemuError> {
        self.execute("stop", json!({}))?;
        // Each piece is there for a moment: not on a disk, unless QEMU is somebody who may not write elsewhere.
        let pieces = Scratch::new_in(Path::new("/dev/shm")).ok();
        let pieces = pieces.filter(|_| self.setup.user.is_none());
        let mut wanted = self.setup.machine.ram_ranges(self.setup.ram());
        wanted.push((0xfffe_0000, 1 << 32));
        let mut ranges = Vec::new();
        for (first, last) in wanted {
            let failed = |error| io_error(self.dir.path(), "the dump", error);
            let whole =
                tempfile::tempfile_in(self.dir.path()).and_then(|file| file.set_len(last - first).map(|()| file));
            let whole = whole.map_err(failed)?;
            // A piece at a time, since zero pages take space in the file that QEMU writes.
            for at in (first..last).step_by(DUMPED) {
                let size = (last - at).min(DUMPED as u64);
                let path = pieces.as_ref().map_or(self.dir.path(), Scratch::path).join("dump");
                let name = path.display().to_string();
                self.execute("pmemsave", json!({"val": at, "size": size, "filename": name}))?;
                let opened = File::open(&path).and_then(|file| fs::remove_file(&path).map(|()| file));
                let copied = opened.and_then(|file| copy_sparse(&file, &whole, at - first));
                copied.map_err(|error| io_error(self.dir.path(), "the dump", error))?;
            }
            ranges.push(((first, last), whole));
        }
        let table = self.execute("x-query-ramblock", json!({}))?;
        let table = table["human-readable-text"].as_str().unwrap_or_default();
        let hidden = Hidden::read(self.child.id(), table, self.setup.main_memory());
        let hidden = hidden.map_err(|error| io_error(self.dir.path(), "the memory of QEMU", error))?;
        Ok(RamDump { ranges, hidden })
    }

    /// The guest's status page, as it is now.
    ///
    /// # Errors
    /// QEMU's, or if the guest has not begun.
    pub fn status(&mut self) -> Result<Status, QemuError> {
        let path = self.dir.path().join("status");
        self.execute("pmemsave", json!({"val": STATUS, "size": 4096, "filename": path.display().to_string()}))?;
        let page = fs::read(&path).map_err(|error| io_error(self.dir.path(), "the status page", error))?;
        Status::parse(&page).ok_or_else(|| self.unexpected("the guest has not begun"))
    }

    fn unexpected(&self, what: &str) -> QemuError {
        QemuError::Unexpected { what: what.to_owned(), stderr: self.stderr() }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.kill();
    }
}

fn readable(socket: impl AsFd, until: Instant) -> io::Result<bool> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout)? > 0)
}

fn accept(listener: &UnixListener) -> io::Result<UnixStream> {
    if !readable(listener, Instant::now() + Duration::from_secs(10))? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    listener.accept().map(|(socket, _)| socket)
}

fn stderr(dir: &Path) -> String {
    fs::read(dir.join("stderr")).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

fn plain(what: &str, error: io::Error) -> QemuError {
    QemuError::Io { what: what.to_owned(), error, stderr: String::new() }
}

fn io_error(dir: &Path, what: &str, error: io::Error) -> QemuError {
    QemuError::Io { what: what.to_owned(), error, stderr: stderr(dir) }
}

fn qmp_error(dir: &Path, error: QmpError) -> QemuError {
    QemuError::Qmp { error, stderr: stderr(dir) }
}
