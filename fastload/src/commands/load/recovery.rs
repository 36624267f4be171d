//! `fastload load --recover`, with QEMU's help or, where it is held up, without.

use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use fastload_qmp::{Qmp, QmpError};
use qemu_pages::serve::{Address, Phase, ServeError, Server};

use super::beside::{Beside, Note};
use super::keeper::{Coming, Keeper};
use super::qemu::{self, Waiting};
use super::{ANSWER, Load, Times, check, recover};
use crate::commands::Failure;
use crate::commands::monitor;
use crate::commands::serving::{self, Fate, Image};

/// How long a QEMU that listens may take to say which pages it has.
const NOTICE: Duration = Duration::from_secs(5);

/// How long it is tried at a time whether QEMU answers again.
const TRIED: Duration = Duration::from_millis(250);

impl Load {
    /// Goes on after a crash.
    pub(super) fn recover(&self, begun: Instant, image: &Image) -> Result<(), Failure> {
        let known = Beside::of(&self.qmp).ok().and_then(|beside| Some((beside.read()?, beside)));
        let Some((note, beside)) = known else {
            let mut qmp = monitor::connect(&self.qmp, self.patience).map_err(gone)?;
            let beside = Beside::of(&self.qmp)?.reached_by(&mut qmp)?;
            let done = self
                .listening(&mut qmp, image, &beside, None)
                .and_then(|(server, waiting)| self.serve(begun, image, server, waiting));
            if done.is_err() {
                qmp.leave_open();
            }
            return done;
        };
        let connected = match Qmp::connect(&self.qmp, ANSWER) {
            // The stand-by process has it, for a moment.
            Err(QmpError::NoGreeting { .. }) => monitor::connect(&self.qmp, self.patience),
            other => other,
        };
        let mut qmp = match connected {
            Err(QmpError::Mute { .. }) => return self.unasked(begun, image, &beside.noted(&note), &note),
            Err(error) => {
                if matches!(&error, QmpError::Connect { error, .. } if is_end(error)) {
                    beside.forget();
                }
                return Err(gone(error));
            }
            Ok(qmp) => qmp,
        };
        qmp.set_limit(ANSWER);
        let (noted, beside) = (beside.noted(&note), beside.reached_by(&mut qmp)?);
        let ready = self.listening(&mut qmp, image, &beside, Some((&note, &noted)));
        let late = |failure: &Failure| matches!(failure.downcast_ref(), Some(QmpError::Timeout { .. }));
        if ready.as_ref().is_err_and(late) {
            drop(ready);
            drop(qmp);
            return self.unasked(begun, image, &noted, &note);
        }
        let done = ready.and_then(|(server, waiting)| {
            waiting.qmp.set_limit(self.patience.get());
            self.serve(begun, image, server, waiting)
        });
        if done.is_err() {
            qmp.leave_open();
        }
        done
    }

    /// Makes sure that it fits, and lets QEMU listen again.
    fn listening<'a>(
        &self,
        qmp: &'a mut Qmp,
        image: &Image,
        beside: &Beside,
        note: Option<(&Note, &Beside)>,
    ) -> Result<(Server, Waiting<'a>), Failure> {
        let keeper = Coming::new(qmp, &beside.uri());
        let blocks = check::fits(qmp, &image.snapshot, &self.snapshot, self.compared())?;
        // A note may be about another QEMU, which had the same monitor.
        let note = match note {
            Some((note, noted)) if qmp.listening()?.contains(&noted.uri()) => Some(note),
            _ => None,
        };
        if let Some(note) = note {
            note.is_about(image, &self.snapshot)?;
        }
        // A guest to be recovered has what it was started with.
        let preempt = qemu::has_preempt(&qmp.capabilities()?);
        if self.preempt && !preempt {
            serving::note("the guest was loaded without --preempt, and is recovered without it");
        }
        let server = image.server(&blocks, self.options(preempt))?;
        let waiting = recover::listen(qmp, beside, note, keeper)?;
        if note.is_none() {
            // Should it be killed again.
            let note = Note::new(&self.snapshot, image, preempt, &blocks, waiting.before());
            let _ = beside.write(&note.with_recovery(&self.recovery()));
        }
        serving::interrupts(server.control(), self.recovery())?;
        Ok((server, waiting))
    }

    /// Serves a QEMU that says nothing, since its main thread waits for a page of the guest. The stand-by process of the
    /// server that was killed has let it listen.
    fn unasked(&self, begun: Instant, image: &Image, beside: &Beside, note: &Note) -> Result<(), Failure> {
        note.is_about(image, &self.snapshot)?;
        let server = image.server(&note.page_sizes(), self.options(note.preempt))?;
        serving::interrupts(server.control(), self.recovery())?;
        serving::note("QEMU does not answer, as one whose guest holds it up: going on without asking it");
        let connecting = Instant::now();
        let address = Address::Unix(beside.socket.clone());
        let (mut answering, mut keeper, mut mute) = (None, None, false);
        let served = serving::attend(image, server, &address, true, self.json, |control| {
            let Ok(mut qmp) = Qmp::connect(&self.qmp, TRIED) else {
                mute = control.progress().phase < Phase::Started && connecting.elapsed() > NOTICE;
                if mute {
                    control.stop();
                }
                return Ok(!mute);
            };
            let again = beside.clone().reached_by(&mut qmp).unwrap_or_else(|_| beside.clone());
            keeper = Coming::new(&qmp, &again.uri()).arm();
            answering = Some(qmp);
            Ok(false)
        });
        let report = match served {
            Ok(report) => report,
            Err(failure) => {
                answering.into_iter().for_each(Qmp::leave_open);
                return Err(self.explain(failure, beside, mute));
            }
        };
        keeper.into_iter().for_each(Keeper::dismiss);
        let mut qmp = answering.map_or_else(|| monitor::connect(&self.qmp, self.patience), Ok)?;
        qmp.set_limit(self.patience.get());
        let mut waiting = Waiting::recovered(&mut qmp, beside, note.preempt, Some(note))?;
        waiting.finish(true)?;
        self.tell(Times { begun, connecting, running: None }, &report, &mut waiting)
    }

    fn explain(&self, failure: Failure, beside: &Beside, mute: bool) -> Failure {
        let why = match failure.downcast_ref() {
            Some(ServeError::Connect { error, .. }) => error.to_string(),
            _ if mute => "it says nothing".to_owned(),
            _ => return serving::explain(failure, &self.recovery(), || Fate::Unknown),
        };
        let (qmp, socket) = (&self.qmp, beside.socket.display());
        format!(
            "{qmp}: QEMU does not answer, and does not listen at {socket} either ({why}): it is stopped, or its main thread \
             is held up by its guest, and no process of this program stood by to make it listen. It hears only a QMP \
             client that was there before, and has enabled commands out of band: \
             {{\"exec-oob\": \"migrate-recover\", \"arguments\": {{\"uri\": \"{}\"}}, \"id\": 1}}; then: {}",
            beside.uri(),
            self.recovery()
        )
        .into()
    }
}

/// Why a QEMU that is to be recovered can't be reached.
fn gone(error: QmpError) -> Failure {
    match &error {
        QmpError::Connect { error: reason, .. } if is_end(reason) => format!(
            "{error}. If that is its socket, QEMU has ended, and its guest with it: there is nothing to recover. Start it \
             again with -incoming defer, and load the snapshot anew"
        )
        .into(),
        _ => error.into(),
    }
}

/// Nobody listens there.
fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound)
}
