//! Going on after a broken connection: the destination says what it has.

use vmstate::Command;

use super::opening::commands;
use super::options::Phase;
use super::session::Session;
use super::{ServeError, Started};
use crate::wire::return_path::{Message, ReturnPathError};

impl Session<'_> {
    /// A conversation that goes on from where another server left it. There is no header, and the guest runs.
    pub(super) fn resume(&mut self) -> Result<(), ServeError> {
        let counters = &self.outlet.shared.counters;
        counters.enter(Phase::Resuming);
        if !self.outlet.shared.commit() {
            return Err(ServeError::Stopped { started: Started::Yes });
        }
        let layout = self.layout;
        let blocks = || layout.iter().filter(|(_, block)| block.length().0 > 0);
        let ask: Vec<Command> =
            blocks().map(|(_, block)| Command::RecvBitmap { block: block.name().to_owned() }).collect();
        self.outlet.main.send_bytes(commands(&ask)?);
        for (id, block) in blocks() {
            let name = block.name();
            let answer = |message: &Message| matches!(message, Message::Received { block, .. } if block == name);
            if let Message::Received { bits, .. } = self.wait_for("which pages it has", answer)? {
                self.note_received(id, &bits)?;
            }
        }
        if self.outlet.options.preempt {
            self.open_fast()?;
        }
        self.outlet.main.send_bytes(commands(&[Command::PostcopyResume])?);
        let answer = self.wait_for("that it goes on", |message| matches!(message, Message::ResumeAck(_)))?;
        if answer != Message::ResumeAck(1) {
            return Err(self.protocol(ReturnPathError::Unexpected("a RESUME_ACK that refuses")));
        }
        counters.enter(Phase::Started);
        self.outlet.window.begin(&self.outlet.main);
        self.outlet.let_flow();
        Ok(())
    }
}
