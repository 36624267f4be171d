//! Makes a QEMU listen for a migration, and puts its settings back afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastload_qmp::{Capabilities, Qmp, QmpError};
use page_source::postcopy::Address;
use serde_json::json;

use crate::commands::Failure;
use crate::commands::serving::{Fate, MOMENT};

/// What a postcopy destination must not have, where QEMU knows it.
const OFF: [&str; 8] = [
    "background-snapshot",
    "mapped-ram",
    "multifd",
    "x-colo",
    "x-ignore-shared",
    "xbzrle",
    "postcopy-preempt",
    "validate-uuid",
];

/// How long QEMU may take to notice that its connection is gone.
const NOTICE: Duration = Duration::from_secs(1);

/// A QEMU that listens, and what it was before.
#[derive(Debug)]
pub(crate) struct Waiting<'a> {
    pub(crate) qmp: &'a mut Qmp,
    pub(crate) address: Address,
    pub(crate) preempt: bool,
    pub(crate) paused: bool,
    before: Capabilities,
    socket: PathBuf,
}

impl<'a> Waiting<'a> {
    /// Sets the capabilities and lets QEMU listen.
    pub(crate) fn listen(qmp: &'a mut Qmp, path: &Path, preempt: bool, paused: bool) -> Result<Waiting<'a>, Failure> {
        let state = qmp.run_state()?;
        let (migration, _) = qmp.migration()?;
        if state != "inmigrate" || migration != "none" {
            let now = if migration == "none" { state } else { format!("{state}, migration {migration}") };
            return Err(
                format!("QEMU does not wait for a snapshot (it is {now}): start it with -incoming defer").into()
            );
        }
        let before = qmp.capabilities()?;
        if preempt && !before.0.contains_key("postcopy-preempt") {
            return Err("this QEMU has no capability postcopy-preempt: do without --preempt".into());
        }
        let off = OFF.iter().filter(|name| before.0.contains_key(**name)).map(|name| ((*name).to_owned(), false));
        let mut wanted: Capabilities = Capabilities(off.collect());
        wanted.0.insert("postcopy-ram".to_owned(), true);
        if preempt {
            wanted.0.insert("postcopy-preempt".to_owned(), true);
        }
        // Nothing can fail between this and what restores them.
        let socket = socket_beside(path)?;
        qmp.set_capabilities(&before, &wanted).map_err(userfaultfd)?;
        let mut waiting = Waiting {
            qmp,
            address: Address::Unix(socket.clone()),
            preempt,
            paused,
            before: Capabilities(before.0.into_iter().filter(|(name, _)| wanted.0.contains_key(name)).collect()),
            socket,
        };
        if let Err(error) = waiting.start() {
            let Waiting { qmp, before, .. } = waiting;
            // The first error is the one that matters.
            let _ = qmp.set_capabilities(&Capabilities::default(), &before);
            return Err(userfaultfd(error));
        }
        Ok(waiting)
    }

    /// A QEMU whose guest waits for missing pages, and that listens again.
    pub(crate) fn again(qmp: &'a mut Qmp, path: &Path) -> Result<Waiting<'a>, Failure> {
        let socket = socket_beside(path)?;
        let capabilities = qmp.capabilities()?;
        let preempt = has_preempt(&capabilities);
        // What they were before the load that crashed nobody knows: QEMU's defaults.
        let mine = ["postcopy-ram", "postcopy-preempt"].iter().filter(|name| capabilities.0.contains_key(**name));
        let before = Capabilities(mine.map(|name| ((*name).to_owned(), false)).collect());
        qmp.execute("migrate-recover", json!({"uri": format!("unix:{}", socket.display())}))?;
        Ok(Waiting { qmp, address: Address::Unix(socket.clone()), preempt, paused: false, before, socket })
    }

    fn start(&mut self) -> Result<(), QmpError> {
        if self.paused {
            // Before the guest is there this only says that it is not to be started.
            self.qmp.execute("stop", json!({}))?;
        }
        self.qmp.forget_events();
        let uri = format!("unix:{}", self.socket.display());
        self.qmp.execute("migrate-incoming", json!({"uri": uri})).map(drop)
    }

    /// Puts the settings back if the guest has everything.
    pub(crate) fn finish(&mut self, complete: bool) -> Result<(), Failure> {
        // QEMU removes it itself, where it lives on.
        let _ = fs::remove_file(&self.socket);
        if complete {
            self.qmp.set_capabilities(&Capabilities::default(), &self.before)?;
        }
        Ok(())
    }

    /// What has become of it, after its connection broke.
    pub(crate) fn fate(&mut self) -> Fate {
        let until = Instant::now() + NOTICE;
        loop {
            // One that is about to end still answers.
            match self.qmp.migration() {
                Ok((state, _)) if state == "postcopy-active" && Instant::now() < until => {}
                answer => return fate(answer),
            }
            if let Err(QmpError::Closed) = self.qmp.wait_event(&["MIGRATION"], MOMENT) {
                return Fate::Ended;
            }
        }
    }
}

/// Whether requests are to be answered on a second connection.
pub(super) fn has_preempt(capabilities: &Capabilities) -> bool {
    capabilities.0.get("postcopy-preempt") == Some(&true)
}

fn fate(answer: Result<(String, Option<String>), QmpError>) -> Fate {
    match answer {
        Err(QmpError::Closed) => Fate::Ended,
        Err(_) => Fate::Unknown,
        // One that has not noticed yet will be told by whoever recovers it.
        Ok((state, _)) if state.starts_with("postcopy-") => Fate::Waits,
        Ok((state, _)) if state == "completed" => Fate::Complete,
        Ok((state, why)) => Fate::Other(why.unwrap_or_else(|| format!("the migration is {state}"))),
    }
}

/// A name for a socket that QEMU and we both can reach: beside the one by which we reach QEMU.
fn socket_beside(qmp: &Path) -> Result<PathBuf, Failure> {
    let dir = match qmp.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    };
    let dir = dir.canonicalize().map_err(|error| format!("{}: {error}", dir.display()))?;
    let socket = dir.join(format!(".fastload-{}", std::process::id()));
    if socket.as_os_str().len() > 100 {
        return Err(format!("{}: the path is too long for a socket beside it", dir.display()).into());
    }
    if socket.to_str().is_none_or(|text| text.contains(',')) {
        return Err(format!("{}: QEMU can't open a socket at a path like this", dir.display()).into());
    }
    Ok(socket)
}

/// Says what to do if QEMU has no right to userfaultfd.
fn userfaultfd(error: QmpError) -> Failure {
    let text = error.to_string();
    let lower = text.to_lowercase();
    if lower.contains("userfault") || lower.contains("postcopy is not supported") {
        return format!(
            "{text}. If QEMU lacks the right to userfaultfd, give it one of: read and write access to /dev/userfaultfd \
             (setfacl -m u:USER:rw /dev/userfaultfd), CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1"
        )
        .into();
    }
    error.into()
}
