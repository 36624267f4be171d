//! The description of the devices' state that follows a stream: what fields its sections consist of.

use page_units::ByteLen;
use std::borrow::Cow;

use crate::json::{self, Json};

/// The description of all devices' state (QEMU `docs/devel/migration/main.rst`, "vmdesc").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDesc {
    /// The page size of the target in bytes, if it tells.
    pub page_size: Option<u64>,
    /// In the order of the stream's FULL sections.
    pub devices: Vec<DeviceDesc>,
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
    pub kind: String,
    /// Bytes of one element.
    pub size: u64,
    /// How many elements, where they are described together.
    pub array_len: Option<u64>,
    /// Which element, where they are described one by one. QEMU leaves it out for the last one.
    pub index: Option<u64>,
    /// What an element consists of.
    pub nested: Nested,
}

/// What an element of a field consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Nested {
    /// A plain value.
    #[default]
    Nothing,
    /// A structure.
    Struct(StructDesc),
    /// One or more structures, described in the field itself: `tmp`, `vstruct`, lists.
    Inline(Vec<StructDesc>),
}

/// Why a description can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescError {
    /// It is not JSON (or too deep, or too large).
    #[error("the description of the device state is not usable JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// It is not what QEMU writes.
    #[error("the description of the device state: {place}: {what}")]
    Invalid {
        /// In which device or field.
        place: String,
        /// What is wrong.
        what: String,
    },
}

fn invalid(place: &str, what: impl Into<String>) -> DescError {
    DescError::Invalid { place: place.to_owned(), what: what.into() }
}

impl VmDesc {
    /// Reads a description. Unknown members are ignored, repeated ones kept.
    ///
    /// # Errors
    /// If it is not JSON, has no devices, or a size is missing or does not fit.
    pub fn parse(text: &[u8]) -> Result<VmDesc, DescError> {
        let Json::Object(members) = json::parse(text)? else {
            return Err(invalid("top level", "not an object"));
        };
        let mut desc = VmDesc { page_size: None, devices: Vec::new() };
        let mut found = false;
        for (key, value) in members {
            match (&*key, value) {
                ("page_size", value) => desc.page_size = Some(number("top level", &key, &value)?),
                ("devices", Json::Array(devices)) => {
                    found = true;
                    for device in devices {
                        desc.devices.push(DeviceDesc::from_json(device)?);
                    }
                }
                _ => {}
            }
        }
        if !found {
            return Err(invalid("top level", "no list of devices"));
        }
        Ok(desc)
    }

    /// The description of a section.
    #[must_use]
    pub fn device(&self, name: &str, instance: u32) -> Option<&DeviceDesc> {
        self.devices.iter().find(|device| device.name == name && device.instance == instance)
    }
}

impl DeviceDesc {
    fn from_json(value: Json<'_>) -> Result<DeviceDesc, DescError> {
        let Json::Object(members) = value else {
            return Err(invalid("devices", "a device is not an object"));
        };
        let (mut name, mut instance) = (None, None);
        let mut rest = Vec::new();
        for (key, value) in members {
            match (&*key, value) {
                ("name", Json::Text(text)) => name = Some(text.into_owned()),
                ("instance_id", value) => instance = Some(number("device", &key, &value)?),
                (_, value) => rest.push((key, value)),
            }
        }
        let name = name.ok_or_else(|| invalid("devices", "a device without a name"))?;
        let instance = u32::try_from(instance.unwrap_or(0)).map_err(|_| invalid(&name, "instance does not fit"))?;
        let mut parts = structs(&name, &mut rest)?;
        let state = match (parts.pop(), parts.is_empty()) {
            (Some(state), true) => state,
            (None, _) => StructDesc::default(),
            (Some(_), false) => return Err(invalid(&name, "more than one description")),
        };
        Ok(DeviceDesc { name, instance, state })
    }

    /// How many bytes the section's body has; `None` if the sizes don't add up to a number.
    #[must_use]
    pub fn body_len(&self) -> Option<ByteLen> {
        self.state.wire_len().map(ByteLen)
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

    fn from_json(place: &str, value: Json<'_>) -> Result<StructDesc, DescError> {
        let Json::Object(mut members) = value else {
            return Err(invalid(place, "a description is not an object"));
        };
        let mut parts = structs(place, &mut members)?;
        match (parts.pop(), parts.is_empty()) {
            (Some(only), true) => Ok(only),
            _ => Err(invalid(place, "not exactly one description")),
        }
    }
}

impl FieldDesc {
    /// How many elements.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.array_len.unwrap_or(1)
    }

    pub(crate) fn wire_len(&self) -> Option<u64> {
        self.size.checked_mul(self.count())
    }

    fn from_json(place: &str, value: Json<'_>) -> Result<FieldDesc, DescError> {
        let Json::Object(members) = value else {
            return Err(invalid(place, "a field is not an object"));
        };
        let mut field = FieldDesc {
            name: String::new(),
            kind: String::new(),
            size: 0,
            array_len: None,
            index: None,
            nested: Nested::Nothing,
        };
        let mut size = None;
        let mut rest = Vec::new();
        for (key, value) in members {
            match (&*key, value) {
                ("name", Json::Text(text)) => field.name = text.into_owned(),
                ("type", Json::Text(text)) => field.kind = text.into_owned(),
                ("size", value) => size = Some(number(place, &key, &value)?),
                ("array_len", value) => field.array_len = Some(number(place, &key, &value)?),
                ("index", value) => field.index = Some(number(place, &key, &value)?),
                ("struct", value) => field.nested = Nested::Struct(StructDesc::from_json(place, value)?),
                (_, value) => rest.push((key, value)),
            }
        }
        field.size = size.ok_or_else(|| invalid(place, format!("field \"{}\" has no size", field.name)))?;
        let inline = structs(place, &mut rest)?;
        if !inline.is_empty() && field.nested == Nested::Nothing {
            field.nested = Nested::Inline(inline);
        }
        Ok(field)
    }
}

/// The descriptions among the members of an object: a new one begins with each `vmsd_name` (or with the first other
/// member, where a device has no name).
fn structs(place: &str, members: &mut Vec<(Cow<'_, str>, Json<'_>)>) -> Result<Vec<StructDesc>, DescError> {
    let mut all: Vec<StructDesc> = Vec::new();
    for (key, value) in members.drain(..) {
        match (&*key, value) {
            ("vmsd_name", Json::Text(name)) => {
                all.push(StructDesc { name: name.into_owned(), ..StructDesc::default() })
            }
            ("version", value) => {
                let version = number(place, "version", &value)?;
                let version = u32::try_from(version).map_err(|_| invalid(place, "version does not fit"))?;
                current(&mut all).version = version;
            }
            ("fields", Json::Array(fields)) => {
                let into = current(&mut all);
                for field in fields {
                    into.fields.push(FieldDesc::from_json(place, field)?);
                }
            }
            ("subsections", Json::Array(subsections)) => {
                let into = current(&mut all);
                for subsection in subsections {
                    into.subsections.push(StructDesc::from_json(place, subsection)?);
                }
            }
            _ => {}
        }
    }
    Ok(all)
}

fn current(all: &mut Vec<StructDesc>) -> &mut StructDesc {
    if all.is_empty() {
        all.push(StructDesc::default());
    }
    let last = all.len() - 1;
    &mut all[last]
}

fn number(place: &str, key: &str, value: &Json<'_>) -> Result<u64, DescError> {
    match value {
        // QEMU writes signed numbers; a version of -1 has been seen nowhere but costs nothing to refuse by name.
        Json::Number(value) => {
            u64::try_from(*value).map_err(|_| invalid(place, format!("\"{key}\" is {value}, which does not fit")))
        }
        _ => Err(invalid(place, format!("\"{key}\" is not a whole number"))),
    }
}
