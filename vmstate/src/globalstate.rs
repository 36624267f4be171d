//! The `globalstate` section: whether the guest was running.

use crate::Section;

/// What the source's VM was doing when it was saved (QEMU `migration/global_state.c`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlobalState {
    /// Name of the run state: `running`, `paused`, ...
    pub runstate: String,
    /// Whether it was suspended before.
    pub was_suspended: Option<bool>,
}

const NAME_LENGTH: usize = 32;
const UNUSED: usize = 66;

impl GlobalState {
    /// The name of the section.
    pub const SECTION: &'static str = "globalstate";

    /// Reads the body of the section; `None` if it is too short or no text.
    #[must_use]
    pub fn decode(body: &[u8]) -> Option<GlobalState> {
        let (size, rest) = body.split_first_chunk()?;
        let size = usize::try_from(u32::from_be_bytes(*size)).ok()?;
        let (name, rest) = rest.split_at_checked(NAME_LENGTH)?;
        let name = name.get(..size.checked_sub(1)?)?;
        let was_suspended = match rest {
            [1, flag, ..] => Some(*flag != 0),
            _ => None,
        };
        Some(GlobalState { runstate: String::from_utf8(name.to_vec()).ok()?, was_suspended })
    }

    /// The section as QEMU writes it.
    ///
    /// # Errors
    /// If the name of the run state is longer than 31 bytes.
    pub fn encode(&self) -> Result<Section, crate::EncodeError> {
        let length = self.runstate.len();
        if length >= NAME_LENGTH {
            return Err(crate::EncodeError::Length { what: "the run state", length, limit: NAME_LENGTH - 1 });
        }
        let mut name = [0; NAME_LENGTH];
        name[..length].copy_from_slice(self.runstate.as_bytes());
        crate::SectionBuilder::new(GlobalState::SECTION, 0, 1)
            .u32("size", u32::try_from(length + 1).unwrap_or(0))
            .buffer("runstate", &name)
            .bool("has_vm_was_suspended", self.was_suspended.is_some())
            .bool("vm_was_suspended", self.was_suspended == Some(true))
            .unused("unused", UNUSED)
            .build()
    }
}
