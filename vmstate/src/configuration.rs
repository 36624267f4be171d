//! The configuration at the beginning of a stream: what both sides have to agree on.

use std::io::{Read, Write};

use crate::wire::Wire;
use crate::write::Put;
use crate::{StreamError, WriteError, kind};

/// The capability of a stream whose pages lie at fixed offsets of the file.
pub const MAPPED_RAM: &str = "mapped-ram";
/// The capability of a stream without the content of shared memory.
pub const IGNORE_SHARED: &str = "x-ignore-shared";

/// More capabilities than any QEMU has.
const MAX_CAPABILITIES: u32 = 256;
/// Longer than any machine type.
const MAX_MACHINE: u64 = 4096;

/// Machine type and subsections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// The machine type, always the versioned name, e.g. `pc-i440fx-10.0`.
    pub machine: String,
    /// In the order of the stream.
    pub subsections: Vec<ConfigurationSubsection>,
}

/// What else both sides have to agree on (QEMU `migration/savevm.c`, `vmstate_configuration`).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigurationSubsection {
    /// `configuration/target-page-bits`: log2 of the target's page size, where it is not the usual one.
    TargetPageBits(u32),
    /// `configuration/capabilities`: those that change the stream.
    Capabilities(Vec<String>),
    /// `configuration/uuid`: the identity of the guest.
    Uuid([u8; 16]),
}

impl Configuration {
    /// A configuration without subsections.
    #[must_use]
    pub fn new(machine: impl Into<String>) -> Configuration {
        Configuration { machine: machine.into(), subsections: Vec::new() }
    }

    /// The capabilities it lists.
    pub fn capabilities(&self) -> impl Iterator<Item = &str> {
        self.subsections
            .iter()
            .filter_map(|subsection| match subsection {
                ConfigurationSubsection::Capabilities(names) => Some(names),
                _ => None,
            })
            .flatten()
            .map(String::as_str)
    }

    /// Whether it lists a capability.
    #[must_use]
    pub fn has_capability(&self, name: &str) -> bool {
        self.capabilities().any(|capability| capability == name)
    }

    /// The guest's UUID, if the source was told to send it.
    #[must_use]
    pub fn uuid(&self) -> Option<[u8; 16]> {
        self.subsections.iter().find_map(|subsection| match subsection {
            ConfigurationSubsection::Uuid(uuid) => Some(*uuid),
            _ => None,
        })
    }

    /// The same without one capability: what a destination gets that does not use it. A subsection that lists nothing
    /// any more is left out, as QEMU does.
    #[must_use]
    pub fn without_capability(&self, name: &str) -> Configuration {
        let mut other = self.clone();
        for subsection in &mut other.subsections {
            if let ConfigurationSubsection::Capabilities(names) = subsection {
                names.retain(|capability| capability != name);
            }
        }
        other.subsections.retain(|s| !matches!(s, ConfigurationSubsection::Capabilities(names) if names.is_empty()));
        other
    }

    pub(crate) fn read<R: Read>(wire: &mut Wire<R>) -> Result<Configuration, StreamError> {
        const WHAT: &str = "the configuration";
        let length = wire.u32(WHAT)?;
        let machine = wire.string(length.into(), MAX_MACHINE, "the machine type")?;
        let mut subsections = Vec::new();
        while wire.peek()? == Some(kind::SUBSECTION) {
            let at = wire.position();
            let invalid = |what| StreamError::Invalid { at, what };
            wire.u8(WHAT)?;
            let name = wire.counted_string("the name of a configuration subsection")?;
            let version = wire.u32(WHAT)?;
            if version != 1 {
                return Err(invalid(format!("version {version} of \"{name}\", only version 1 is known")));
            }
            let subsection = match name.as_str() {
                "configuration/target-page-bits" => ConfigurationSubsection::TargetPageBits(wire.u32(WHAT)?),
                "configuration/uuid" => ConfigurationSubsection::Uuid(wire.array(WHAT)?),
                "configuration/capabilities" => {
                    let count = wire.u32(WHAT)?;
                    if count > MAX_CAPABILITIES {
                        return Err(invalid(format!("a list of {count} capabilities")));
                    }
                    let names = (0..count).map(|_| wire.counted_string("the name of a capability"));
                    ConfigurationSubsection::Capabilities(names.collect::<Result<_, _>>()?)
                }
                _ => return Err(invalid(format!("unknown configuration subsection \"{name}\""))),
            };
            if subsections.len() >= 8 {
                return Err(invalid("too many configuration subsections".to_owned()));
            }
            subsections.push(subsection);
        }
        Ok(Configuration { machine, subsections })
    }

    /// Writes what follows the byte [`kind::CONFIGURATION`].
    pub(crate) fn write(&self, out: &mut impl Write) -> Result<(), WriteError> {
        out.u32_len("the machine type", self.machine.len())?;
        out.write_all(self.machine.as_bytes())?;
        for subsection in &self.subsections {
            out.u8(kind::SUBSECTION)?;
            out.counted_string(subsection.name())?;
            out.u32(1)?;
            match subsection {
                ConfigurationSubsection::TargetPageBits(bits) => out.u32(*bits)?,
                ConfigurationSubsection::Uuid(uuid) => out.write_all(uuid)?,
                ConfigurationSubsection::Capabilities(names) => {
                    out.u32_len("the list of capabilities", names.len())?;
                    names.iter().try_for_each(|name| out.counted_string(name))?;
                }
            }
        }
        Ok(())
    }
}

impl ConfigurationSubsection {
    /// Its name in the stream.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            ConfigurationSubsection::TargetPageBits(_) => "configuration/target-page-bits",
            ConfigurationSubsection::Capabilities(_) => "configuration/capabilities",
            ConfigurationSubsection::Uuid(_) => "configuration/uuid",
        }
    }
}
