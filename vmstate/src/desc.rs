//! The description of the devices' state that follows a stream: what fields its sections consist of.

mod parse;

use std::borrow::Cow;

use page_units::ByteLen;

/// The description of all devices' state (QEMU `docs/devel/migration/main.rst`, "vmdesc").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDesc {
    /// The page size of the target in bytes, if it tells.
    pub page_size: Option<u64>,
    devices: Vec<DeviceDesc>,
    /// Where they are in `devices`, by name and instance.
    sorted: Vec<usize>,
}

/// What one device's section consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceDesc {
    /// The name of its section.
    pub name: String,
    /// The instance of its section.
    pub instance: u32,
    /// What is in it.
    pub state: StructDesc,
    body_len: Option<ByteLen>,
}

/// Fields, then subsections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StructDesc {
    /// The name of the description, which prefixes the names of its subsections; empty for a device without any.
    pub name: String,
    /// The version of the encoding.
    pub version: u32,
    /// In the order of the stream.
    pub fields: Vec<FieldDesc>,
    /// In the order of the stream.
    pub subsections: Vec<StructDesc>,
}

/// One field, or an array of equal ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldDesc {
    /// Its name; elements of one array that had to be described one by one share theirs.
    pub name: String,
    /// QEMU's name of the encoding, e.g. `uint32`, `struct`, `buffer`.
    pub kind: Cow<'static, str>,
    /// Bytes of one element.
    pub size: u64,
    /// How many elements, where they are described together.
    pub array_len: Option<u64>,
    /// Which element, where they are described one by one. QEMU leaves it out for the last one.
    pub index: Option<u64>,
    /// What an element consists of.
    pub nested: Nested,
    /// Whether what is described in the field itself is all of an element.
    inline_is_all: bool,
}

/// What an element of a field consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Nested {
    /// A plain value.
    #[default]
    Nothing,
    /// A structure.
    Struct(Box<StructDesc>),
    /// One or more structures, described in the field itself: `tmp`, `vstruct`, lists.
    Inline(Vec<StructDesc>),
}

/// Why a description can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescError {
    /// It is not JSON, not what QEMU writes, too deep, or too large.
    #[error("the description of the device state is not usable: {0}")]
    Json(#[from] serde_json::Error),
    /// It is not text.
    #[error("the description of the device state is not text: {0}")]
    Text(#[from] std::str::Utf8Error),
}

impl VmDesc {
    /// Reads a description. Unknown members are ignored, repeated ones kept.
    ///
    /// # Errors
    /// If it is not JSON, has no devices, or a size is missing or does not fit.
    pub fn parse(text: &[u8]) -> Result<VmDesc, DescError> {
        parse::parse(text)
    }

    fn new(page_size: Option<u64>, devices: Vec<DeviceDesc>) -> VmDesc {
        let mut sorted: Vec<usize> = (0..devices.len()).collect();
        // Stable: of two with the same name and instance the first one is found.
        sorted.sort_by_key(|at| devices[*at].key());
        VmDesc { page_size, devices, sorted }
    }

    /// All devices, in the order of the stream's FULL sections.
    #[must_use]
    pub fn devices(&self) -> &[DeviceDesc] {
        &self.devices
    }

    /// The description of a section; if there are several, the first. Found without a look at all of them.
    #[must_use]
    pub fn device(&self, name: &str, instance: u32) -> Option<&DeviceDesc> {
        let key = (name, instance);
        let first = self.sorted.partition_point(|at| self.devices[*at].key() < key);
        self.devices.get(*self.sorted.get(first)?).filter(|device| device.key() == key)
    }
}

impl DeviceDesc {
    fn new(name: String, instance: u32, state: StructDesc) -> DeviceDesc {
        // Once, however many sections say that they are this device's.
        let body_len = state.wire_len().map(ByteLen);
        DeviceDesc { name, instance, state, body_len }
    }

    fn key(&self) -> (&str, u32) {
        (&self.name, self.instance)
    }

    /// How many bytes the section's body has, by the description that was read; `None` if the sizes don't add up to a
    /// number.
    #[must_use]
    pub fn body_len(&self) -> Option<ByteLen> {
        self.body_len
    }
}

impl StructDesc {
    /// Bytes of the fields and, each with its header, of the subsections.
    pub(crate) fn wire_len(&self) -> Option<u64> {
        let fields = self.fields.iter().try_fold(0u64, |sum, field| sum.checked_add(field.wire_len()?));
        self.subsections.iter().try_fold(fields?, |sum, subsection| {
            sum.checked_add(subsection.header_len())?.checked_add(subsection.wire_len()?)
        })
    }

    /// Bytes in front of a subsection: type, counted name, version.
    pub(crate) fn header_len(&self) -> u64 {
        1 + 1 + self.name.len() as u64 + 4
    }
}

impl FieldDesc {
    /// The one structure that is described in the field itself, if it is all of an element.
    pub(crate) fn inline(&self) -> Option<&StructDesc> {
        match &self.nested {
            Nested::Inline(inner) if self.inline_is_all => inner.first(),
            _ => None,
        }
    }

    /// How many elements.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.array_len.unwrap_or(1)
    }

    pub(crate) fn wire_len(&self) -> Option<u64> {
        self.size.checked_mul(self.count())
    }
}
