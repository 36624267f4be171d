//! Makes a QEMU listen for a migration, and puts its settings back afterwards.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use fastload_qmp::{Capabilities, Qmp, QmpError};
use qemu_pages::serve::{Address, Control};
use serde_json::json;

use super::beside::{Beside, Note};
use super::keeper::{Coming, Keeper};
use super::state::Paused;
use crate::commands::Failure;
use crate::commands::serving::{self, Fate, MOMENT};

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

/// States of a QEMU that has not noticed that its connection is gone, or is about to end because of it. The second is
/// what QEMU 10.2 and later is in while it loads its devices, instead of the first; it ends then.
const UNDECIDED: [&str; 4] = ["postcopy-active", "postcopy-device", "failing", "failed"];

/// How long QEMU may take to notice that its connection is gone.
const NOTICE: Duration = Duration::from_secs(1);

/// A QEMU that listens, and what it was before.
#[derive(Debug)]
pub(crate) struct Waiting<'a> {
    pub(crate) qmp: &'a mut Qmp,
    pub(crate) address: Address,
    pub(crate) preempt: bool,
    pub(crate) paused: Option<Paused>,
    before: Capabilities,
    beside: Beside,
    keeper: Option<Keeper>,
}

impl<'a> Waiting<'a> {
    /// Sets the capabilities and lets QEMU listen, unless `control` was stopped.
    pub(super) fn listen(
        qmp: &'a mut Qmp,
        beside: &Beside,
        control: &Control,
        preempt: bool,
        paused: Option<Paused>,
        keeper: Coming,
    ) -> Result<Waiting<'a>, Failure> {
        let before = qmp.capabilities()?;
        let off = OFF.iter().filter(|name| before.0.contains_key(**name)).map(|name| ((*name).to_owned(), false));
        let mut wanted: Capabilities = Capabilities(off.collect());
        wanted.0.insert("postcopy-ram".to_owned(), true);
        if preempt {
            wanted.0.insert("postcopy-preempt".to_owned(), true);
        }
        // Nothing can fail between this and what restores them.
        qmp.set_capabilities(&before, &wanted).map_err(userfaultfd)?;
        let before = Capabilities(before.0.into_iter().filter(|(name, _)| wanted.0.contains_key(name)).collect());
        let mut waiting = Waiting::over(qmp, beside, preempt, paused, before);
        if let Err(error) = waiting.start(control, keeper) {
            // The first error is the one that matters.
            let _ = waiting.put_back();
            waiting.forget();
            return Err(error);
        }
        Ok(waiting)
    }

    /// A QEMU whose guest waits for missing pages, and that listens again.
    pub(super) fn again(
        qmp: &'a mut Qmp,
        beside: &Beside,
        note: Option<&Note>,
        keeper: Coming,
    ) -> Result<Waiting<'a>, Failure> {
        let preempt = has_preempt(&qmp.capabilities()?);
        let mut waiting = Waiting::recovered(qmp, beside, preempt, note)?;
        let keeper = keeper.arm();
        // Its main thread may be held up from now on, and must not be who accepts the connection.
        if let Err(error) = waiting.qmp.execute_out_of_band("migrate-recover", json!({"uri": beside.uri()})) {
            keeper.into_iter().for_each(Keeper::dismiss);
            return Err(error.into());
        }
        waiting.keeper = keeper;
        Ok(waiting)
    }

    /// The same, if it listened already.
    pub(crate) fn recovered(
        qmp: &'a mut Qmp,
        beside: &Beside,
        preempt: bool,
        note: Option<&Note>,
    ) -> Result<Waiting<'a>, Failure> {
        let mut before = note.map(Note::capabilities).unwrap_or_default();
        if before.0.is_empty() {
            // What they were before the load that crashed nobody knows: QEMU's defaults.
            let known = qmp.capabilities()?;
            let mine = ["postcopy-ram", "postcopy-preempt"].into_iter().filter(|name| known.0.contains_key(*name));
            before.0.extend(mine.map(|name| (name.to_owned(), false)));
        }
        Ok(Waiting::over(qmp, beside, preempt, None, before))
    }

    fn over(
        qmp: &'a mut Qmp,
        beside: &Beside,
        preempt: bool,
        paused: Option<Paused>,
        before: Capabilities,
    ) -> Waiting<'a> {
        let (address, beside) = (Address::Unix(beside.socket.clone()), beside.clone());
        Waiting { qmp, address, preempt, paused, before, beside, keeper: None }
    }

    fn start(&mut self, control: &Control, keeper: Coming) -> Result<(), Failure> {
        self.qmp.forget_events();
        // Once it listens there is no way back for it.
        if control.is_stopped() {
            return Err("stopped before anything was loaded".into());
        }
        self.keeper = keeper.arm();
        let listening = self.qmp.execute("migrate-incoming", json!({"uri": self.beside.uri()}));
        listening.map_err(|error| self.refused(error))?;
        if self.paused.is_some() {
            // Before the guest is there this only says that it is not to be started; it could not be taken back.
            self.qmp.execute("stop", json!({}))?;
        }
        Ok(())
    }

    /// What a refusal to listen means.
    fn refused(&self, error: QmpError) -> Failure {
        let text = error.to_string();
        if text.contains("already been started") {
            return format!("{text}. {LISTENED}: end it, and start it anew with -incoming defer").into();
        }
        if text.contains("Failed to bind socket") {
            return self.beside.unreachable(&text).into();
        }
        userfaultfd(error)
    }

    /// Puts the settings back as they were.
    pub(super) fn put_back(&mut self) -> Result<(), QmpError> {
        self.qmp.set_capabilities(&Capabilities::default(), &self.before)
    }

    /// What the capabilities were before.
    pub(crate) fn before(&self) -> &Capabilities {
        &self.before
    }

    /// There will be nothing to recover.
    pub(crate) fn forget(&mut self) {
        self.keeper.take().into_iter().for_each(Keeper::dismiss);
        self.beside.forget();
    }

    /// Puts the settings back if the guest has everything.
    pub(crate) fn finish(&mut self, complete: bool) -> Result<(), Failure> {
        // QEMU removes it itself, where it lives on.
        let _ = fs::remove_file(&self.beside.socket);
        if complete {
            self.forget();
            self.put_back()?;
        }
        Ok(())
    }

    /// What has become of it, after its connection broke.
    pub(crate) fn fate(&mut self) -> Fate {
        let until = Instant::now() + NOTICE;
        loop {
            // One that is about to end still answers.
            match self.qmp.migration() {
                Ok((state, _)) if UNDECIDED.contains(&state.as_str()) && Instant::now() < until => {}
                answer => return fate(answer),
            }
            if let Err(QmpError::Closed) = self.qmp.wait_event(&["MIGRATION"], MOMENT) {
                return Fate::Ended;
            }
        }
    }
}

/// What is to be done with a QEMU that was told to listen, and got nothing.
const LISTENED: &str =
    "QEMU listens for a migration already (since a load that was killed, perhaps), and got nothing yet";

/// The same, and what helps: the snapshot can be brought to where it listens, if it is one that takes it.
fn listened(qmp: &mut Qmp, snapshot: &str) -> Result<String, QmpError> {
    let capabilities = qmp.capabilities()?;
    let takes_it = capabilities.0.get("postcopy-ram") == Some(&true) && capabilities.0.get("mapped-ram") != Some(&true);
    // A name that only QEMU knows is of no use.
    let known = |address: &String| !address.starts_with("unix:/proc/");
    let address = qmp.listening()?.into_iter().find(known).filter(|_| takes_it);
    Ok(match address {
        Some(address) => {
            let preempt = if has_preempt(&capabilities) { " --preempt" } else { "" };
            let address = serving::quoted(Path::new(&address));
            format!(
                "{LISTENED}. End it, and start it anew with -incoming defer; or feed it where it listens: fastload serve \
                 {snapshot} --to {address}{preempt}"
            )
        }
        None => format!("{LISTENED}: end it, and start it anew with -incoming defer"),
    })
}

/// Refuses a QEMU that does not wait for a snapshot. One whose guest waits for the rest of its memory is not to be ended:
/// `recovery` brings it.
pub(super) fn waits(qmp: &mut Qmp, note: Option<&Note>, recovery: &str, snapshot: &str) -> Result<(), Failure> {
    let state = qmp.run_state()?;
    let (migration, _) = qmp.migration()?;
    if state == "inmigrate" && migration == "none" {
        return Ok(());
    }
    if state == "inmigrate" && migration == "setup" {
        return Err(listened(qmp, snapshot)?.into());
    }
    let recovery = note.map_or_else(|| recovery.to_owned(), |note| note.recovery(recovery));
    if migration == "postcopy-paused" {
        return Err(format!(
            "this QEMU has a guest already, which was being loaded and waits for the rest of its memory: {recovery}"
        )
        .into());
    }
    if migration.starts_with("postcopy-") {
        return Err(format!(
            "this QEMU has a guest already, which is being loaded (migration {migration}). If the process that does it has \
             ended, the guest waits for the rest of its memory: {recovery}"
        )
        .into());
    }
    if state == "inmigrate" && migration == "completed" {
        return Err("QEMU has loaded a guest that it could not start, and can't start any more: end it, and start it \
                    anew with -incoming defer"
            .into());
    }
    let now = if migration == "none" { state } else { format!("{state}, migration {migration}") };
    Err(format!(
        "QEMU does not wait for a snapshot (it has a guest, which is {now}): load it into another QEMU, one that was started \
         with -incoming defer"
    )
    .into())
}

/// Refuses a QEMU to which requests can't be answered on a second connection, before anything changes.
pub(super) fn knows_preempt(qmp: &mut Qmp) -> Result<(), Failure> {
    let (major, minor, micro) = qmp.version();
    if major < 8 {
        return Err(format!(
            "--preempt needs QEMU 8.0 or later, and this is QEMU {major}.{minor}.{micro}, which speaks another protocol \
             there: do without --preempt"
        )
        .into());
    }
    if !qmp.capabilities()?.0.contains_key("postcopy-preempt") {
        return Err("this QEMU has no capability postcopy-preempt: do without --preempt".into());
    }
    Ok(())
}

/// Whether requests are to be answered on a second connection.
pub(super) fn has_preempt(capabilities: &Capabilities) -> bool {
    capabilities.0.get("postcopy-preempt") == Some(&true)
}

fn fate(answer: Result<(String, Option<String>), QmpError>) -> Fate {
    match answer {
        Err(QmpError::Closed) => Fate::Ended,
        Err(_) => Fate::Unknown,
        // It has not begun to run the guest, and will not.
        Ok((state, _)) if state == "postcopy-device" => Fate::Unknown,
        // One that has not noticed yet is told by the process that recovers it.
        Ok((state, _)) if state.starts_with("postcopy-") => Fate::Waits,
        Ok((state, _)) if state == "completed" => Fate::Complete,
        Ok((state, why)) => Fate::Other(why.unwrap_or_else(|| format!("the migration is {state}"))),
    }
}

/// Says what to do if QEMU has no right to userfaultfd.
fn userfaultfd(error: QmpError) -> Failure {
    let text = error.to_string();
    let lower = text.to_lowercase();
    // QEMU's own reason, where it gives one, is the right one.
    if lower.contains("host backend files") || lower.contains("tmpfs") {
        return error.into();
    }
    if lower.contains("userfault") || lower.contains("postcopy is not supported") {
        return format!(
            "{text}. If QEMU lacks the right to userfaultfd, give it one of: read and write access to /dev/userfaultfd \
             (setfacl -m u:USER:rw /dev/userfaultfd), CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1"
        )
        .into();
    }
    error.into()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::thread::{self, JoinHandle};

    use serde_json::Value;

    use super::super::recover;
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// A QEMU whose migration is in these states, one after the other, and stays in the last, or ends after it. The other
    /// commands that it was given.
    fn qemu(states: &'static [&'static str], ends: bool) -> (Qmp, JoinHandle<Vec<String>>) {
        let (near, far) = UnixStream::pair().unwrap();
        let commands = thread::spawn(move || {
            let (mut to, mut at, mut commands) = (&far, 0, Vec::new());
            writeln!(to, "{}", json!({"QMP": {"version": {"qemu": {"major": 11}}, "capabilities": ["oob"]}})).unwrap();
            for line in BufReader::new(&far).lines().map_while(Result::ok) {
                let command: Value = serde_json::from_str(&line).unwrap();
                let name = ["execute", "exec-oob"].iter().find_map(|how| command[*how].as_str()).unwrap();
                assert_eq!(command["execute"].is_null(), name == "migrate-recover");
                let answer = match name {
                    "query-migrate" if at == states.len() && ends => break,
                    "query-migrate" => {
                        let state = states[at.min(states.len() - 1)];
                        at += 1;
                        json!({"status": state})
                    }
                    "query-migrate-capabilities" => json!([{"capability": "postcopy-ram", "state": true}]),
                    _ => {
                        commands.push(format!("{name} {}", states[at.saturating_sub(1).min(states.len() - 1)]));
                        json!({})
                    }
                };
                writeln!(to, "{}", json!({"return": answer, "id": command["id"]})).unwrap();
            }
            commands
        });
        (Qmp::over(near, LONG).unwrap(), commands)
    }

    fn fate_of(states: &'static [&'static str], ends: bool) -> Fate {
        let (mut qmp, commands) = qemu(states, ends);
        let beside = Beside::of(&Path::new("/tmp/qmp").into()).unwrap();
        let fate = Waiting::over(&mut qmp, &beside, false, None, Capabilities::default()).fate();
        drop(qmp);
        commands.join().unwrap();
        fate
    }

    #[test]
    fn a_qemu_that_was_about_to_start_its_guest_ends() {
        // As QEMU 10.0 says it, and QEMU 10.2.
        for state in
            [&["postcopy-active"; 3] as &[&str], &["postcopy-device"; 3], &["postcopy-device", "failing", "failed"]]
        {
            assert_eq!(fate_of(state, true), Fate::Ended, "{state:?}");
        }
        assert_eq!(fate_of(&["postcopy-device", "postcopy-active", "postcopy-paused"], false), Fate::Waits);
        // What does not come to an end is not called one that waits for us.
        assert_eq!(fate_of(&["postcopy-device"], false), Fate::Unknown);
        assert_eq!(fate_of(&["failed"], false), Fate::Other("the migration is failed".into()));
    }

    #[test]
    fn a_recovery_waits_until_the_devices_are_loaded() {
        let (mut qmp, commands) =
            qemu(&["postcopy-device", "postcopy-device", "postcopy-active", "postcopy-paused"], false);
        let beside = Beside::of(&Path::new("/tmp/qmp").into()).unwrap();
        assert!(recover::listen(&mut qmp, &beside, None, Coming::default()).is_ok());
        drop(qmp);
        let commands = commands.join().unwrap();
        assert_eq!(commands[1..], ["migrate-pause postcopy-active", "migrate-recover postcopy-paused"]);
        let (mut qmp, _) = qemu(&["postcopy-device"], true);
        assert!(recover::listen(&mut qmp, &beside, None, Coming::default()).is_err());
    }
}
