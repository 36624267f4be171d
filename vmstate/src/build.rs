//! Encoding state of our own as QEMU encodes its devices'.

mod structure;

pub use structure::StructBuilder;

use crate::device_writer::describe;

/// The state of one device: the body of its section and the description of that body, which name each field.
///
/// ```
/// use page_units::FileOffset;
/// use vmstate::{Section, VmDesc, walk};
///
/// let section = Section::builder("example/cpu", 0, 1)
///     .u64("rip", 0xfff0)
///     .structure("cs", "example/segment", 1, |cs| cs.u16("selector", 0xf000).u64("base", 0xffff_0000))
///     .buffer("xsave", &[0; 64])
///     .subsection("example/cpu/nmi", 1, |nmi| nmi.bool("pending", true))
///     .build()?;
///
/// let desc = VmDesc::parse(section.description_of_one().as_bytes())?;
/// let cpu = walk(section.body(), FileOffset(0), &desc.devices()[0])?;
/// assert_eq!(cpu.field("cs")?.field("base")?.as_u64()?, 0xffff_0000);
/// assert!(cpu.field("example/cpu/nmi")?.field("pending")?.as_bool()?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    name: String,
    instance: u32,
    version: u32,
    body: Vec<u8>,
    description: String,
}

impl Section {
    /// The state of instance `instance` of the device `name`, in version `version` of its encoding.
    #[must_use]
    pub fn builder(name: &str, instance: u32, version: u32) -> SectionBuilder {
        SectionBuilder { name: name.to_owned(), instance, state: StructBuilder::new(name, version) }
    }

    /// The name of the section.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which one of that name.
    #[must_use]
    pub fn instance(&self) -> u32 {
        self.instance
    }

    /// The version of its encoding.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The section without header and footer.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Its entry in the list of devices, as JSON.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.description
    }

    /// A whole description with this device alone, as JSON.
    #[must_use]
    pub fn description_of_one(&self) -> String {
        describe("none", [self])
    }
}

/// Builds a [`Section`].
#[derive(Clone, Debug)]
pub struct SectionBuilder {
    name: String,
    instance: u32,
    state: StructBuilder,
}

macro_rules! integers {
    ($($(#[$doc:meta])* $name:ident $array:ident: $type:ty = $kind:literal;)*) => {
        impl StructBuilder {
            $(
                $(#[$doc])*
                #[must_use]
                pub fn $name(self, name: &str, value: $type) -> StructBuilder {
                    self.field(name, $kind, None, &value.to_be_bytes())
                }

                /// Adds an array of such numbers.
                #[must_use]
                pub fn $array(self, name: &str, values: &[$type]) -> StructBuilder {
                    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_be_bytes()).collect();
                    self.field(name, $kind, Some(values.len()), &bytes)
                }
            )*
        }

        impl SectionBuilder {
            $(
                $(#[$doc])*
                #[must_use]
                pub fn $name(self, name: &str, value: $type) -> SectionBuilder {
                    self.map(|state| state.$name(name, value))
                }

                /// Adds an array of such numbers.
                #[must_use]
                pub fn $array(self, name: &str, values: &[$type]) -> SectionBuilder {
                    self.map(|state| state.$array(name, values))
                }
            )*
        }
    };
}

integers! {
    /// Adds a number of 8 bits.
    u8 u8s: u8 = "uint8";
    /// Adds a number of 16 bits.
    u16 u16s: u16 = "uint16";
    /// Adds a number of 32 bits.
    u32 u32s: u32 = "uint32";
    /// Adds a number of 64 bits.
    u64 u64s: u64 = "uint64";
    /// Adds a signed number of 32 bits.
    i32 i32s: i32 = "int32";
    /// Adds a signed number of 64 bits.
    i64 i64s: i64 = "int64";
}

impl SectionBuilder {
    fn map(mut self, change: impl FnOnce(StructBuilder) -> StructBuilder) -> SectionBuilder {
        self.state = change(self.state);
        self
    }

    /// Adds a truth value, one byte.
    #[must_use]
    pub fn bool(self, name: &str, value: bool) -> SectionBuilder {
        self.map(|state| state.bool(name, value))
    }

    /// Adds bytes.
    #[must_use]
    pub fn buffer(self, name: &str, bytes: &[u8]) -> SectionBuilder {
        self.map(|state| state.buffer(name, bytes))
    }

    /// Adds a structure, described as `vmsd` in version `version`.
    #[must_use]
    pub fn structure(
        self,
        name: &str,
        vmsd: &str,
        version: u32,
        build: impl FnOnce(StructBuilder) -> StructBuilder,
    ) -> SectionBuilder {
        self.map(|state| state.structure(name, vmsd, version, build))
    }

    /// Adds structures that share a name: one for each item.
    #[must_use]
    pub fn structures<T>(
        self,
        name: &str,
        vmsd: &str,
        version: u32,
        items: impl IntoIterator<Item = T>,
        build: impl FnMut(StructBuilder, T) -> StructBuilder,
    ) -> SectionBuilder {
        self.map(|state| state.structures(name, vmsd, version, items, build))
    }

    /// Adds a subsection: state that is there only sometimes. Its name must begin with the section's name and `/`.
    #[must_use]
    pub fn subsection(
        self,
        name: &str,
        version: u32,
        build: impl FnOnce(StructBuilder) -> StructBuilder,
    ) -> SectionBuilder {
        self.map(|state| state.subsection(name, version, build))
    }

    /// The section.
    ///
    /// # Errors
    /// If a name is longer than 255 bytes, a subsection is named after something else, or a field follows a
    /// subsection.
    pub fn build(self) -> Result<Section, BuildError> {
        let (name, instance) = (self.name, self.instance);
        if name.len() > 255 {
            return Err(BuildError(format!("the name \"{name}\" is longer than 255 bytes")));
        }
        let version = self.state.version;
        let (body, fields, error) = self.state.finish();
        if let Some(error) = error {
            return Err(BuildError(error));
        }
        let description = format!("{{\"name\":{},\"instance_id\":{instance},{fields}}}", quoted(&name));
        Ok(Section { name, instance, version, body, description })
    }
}

/// A section that can't be encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the state can't be encoded: {0}")]
pub struct BuildError(String);

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
