//! What can be wrong with a source or a sink.

use std::fmt;

/// A rule of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rule {
    /// The end is said once.
    TwoEnds,
    /// The end is said.
    NoEnd,
    /// Nothing comes after the end.
    CallAfterEnd,
    /// Nothing comes after the feed was finished or dropped.
    CallAfterDrop,
    /// A span is not longer than what was asked about, and not empty inside the layout.
    Span,
    /// A unit contains its page and lies in its block.
    Unit,
    /// What is said of a page without I/O, and what comes, is what it is.
    WrongContent,
    /// What is absent is not zero.
    AbsentAsZero,
    /// Pages that are delivered are in the layout.
    BeyondTheLayout,
    /// Bytes are as long as their run.
    WrongLength,
    /// A run has at least a page.
    EmptyRun,
    /// Each requested page ends.
    NoAnswer,
    /// `Here`: all was answered before the call returned.
    HereWithoutAnswer,
    /// A one-shot source answers from a thread of its own.
    HereFromOneShot,
    /// A one-shot source delivers each page once.
    Twice,
    /// Before `Complete`, every page that is not zero was delivered.
    CompleteTooEarly,
    /// `finish` returns.
    FinishHangs,
    /// Dropping a feed returns.
    DropHangs,
    /// After `Stop` nothing more is delivered.
    GoesOnAfterStop,
    /// What is unreadable is answered with `failed`, and the source goes on.
    UnreadableNotFailed,
    /// A thread that dies ends the flow as broken.
    DiesSilently,
    /// It starts, and starts again if it is repeatable.
    DoesNotStart,
    /// It does not panic.
    Panics,
    /// A sink takes what is right.
    Refused,
    /// A sink refuses what is wrong.
    TakesWhatIsWrong,
    /// A sink says that bytes are unreadable, and does not take them.
    TakesUnreadable,
    /// A sink makes nothing of a flow that was not complete.
    CompleteWithoutComplete,
    /// A sink makes something of a flow that was complete.
    NotComplete,
}

impl Rule {
    /// That it was broken, and how.
    pub(super) fn breach(self, how: impl fmt::Display) -> Breach {
        Breach { rule: self, how: how.to_string() }
    }
}

/// A rule that was broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule:?}: {how}")]
pub struct Breach {
    /// Which rule.
    pub rule: Rule,
    /// How.
    pub how: String,
}
