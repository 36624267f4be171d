//! The `globalstate` section: what the guest was doing.

use crate::{Value, ValueError};

/// What the guest was doing when it was saved (QEMU `migration/global_state.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlobalState {
    /// QEMU's name of the run state: `running`, `paused`, ... A destination resumes the guest only if it was running.
    pub runstate: String,
    /// Whether the guest was suspended, where the source tells.
    pub suspended: Option<bool>,
}

impl GlobalState {
    /// The name of its section.
    pub const SECTION: &'static str = "globalstate";

    /// Reads the decoded section.
    ///
    /// # Errors
    /// If a field is missing or of another type.
    pub fn from_value(section: &Value<'_>) -> Result<GlobalState, ValueError> {
        let size = section.field("size")?.as_u32()?;
        let name = section.field("runstate")?;
        // The size counts the NUL.
        let length = usize::try_from(size.saturating_sub(1)).unwrap_or(usize::MAX);
        let text = name.bytes().get(..length).and_then(|text| std::str::from_utf8(text).ok());
        let runstate = text.ok_or_else(|| name.is_not("the name of a run state"))?.to_owned();
        let known = section.get("has_vm_was_suspended").map(Value::as_bool).transpose()?.unwrap_or(false);
        let suspended = if known { Some(section.field("vm_was_suspended")?.as_bool()?) } else { None };
        Ok(GlobalState { runstate, suspended })
    }
}
