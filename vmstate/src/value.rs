//! The decoded state of a device.

use std::ops::Range;

use page_units::FileOffset;

/// A field, a structure or a subsection of a device's state, with the bytes it occupies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value<'a> {
    /// The field's name; of a subsection, its full name.
    pub name: &'a str,
    /// QEMU's name of the encoding; `section` for a whole section and `subsection` for one of those.
    pub kind: &'a str,
    /// Where it is in the file (of a subsection: with its header).
    pub range: Range<FileOffset>,
    /// What it consists of.
    pub content: Content<'a>,
    pub(crate) bytes: &'a [u8],
}

/// What a [`Value`] consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// One plain value: [`Value::bytes`].
    Plain,
    /// Plain values of equal size.
    Array {
        /// How many.
        count: u64,
        /// Bytes of each.
        size: u64,
    },
    /// A structure: its fields, then its subsections.
    Struct {
        /// The version of its encoding.
        version: u32,
        /// In the order of the stream.
        members: Vec<Value<'a>>,
    },
    /// An array or a list of structures.
    Elements(Vec<Value<'a>>),
}

/// Why a value is not what a reader wants.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ValueError {
    /// There is no such field.
    #[error("\"{parent}\" (offset {at}) has no field \"{name}\"")]
    Missing {
        /// Of what.
        parent: String,
        /// Where that is.
        at: FileOffset,
        /// The field.
        name: String,
    },
    /// It is something else.
    #[error("\"{name}\" at offset {at} is {found}, not {wanted}")]
    Type {
        /// The field.
        name: String,
        /// Where it is.
        at: FileOffset,
        /// What it is.
        found: String,
        /// What was wanted.
        wanted: &'static str,
    },
}

impl<'a> Value<'a> {
    /// Its bytes as they are in the stream.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Fields and subsections of a structure, elements of an array of structures.
    #[must_use]
    pub fn members(&self) -> &[Value<'a>] {
        match &self.content {
            Content::Struct { members, .. } | Content::Elements(members) => members,
            Content::Plain | Content::Array { .. } => &[],
        }
    }

    /// The first field or subsection of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn field(&self, name: &str) -> Result<&Value<'a>, ValueError> {
        self.get(name).ok_or_else(|| ValueError::Missing {
            parent: self.name.to_owned(),
            at: self.range.start,
            name: name.to_owned(),
        })
    }

    /// The first field or subsection of that name, if there is one.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value<'a>> {
        self.members().iter().find(|member| member.name == name)
    }

    /// All fields of that name: the elements of an array that had to be described one by one.
    pub fn fields<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'s Value<'a>> {
        self.members().iter().filter(move |member| member.name == name)
    }

    /// The version of a structure's encoding.
    #[must_use]
    pub fn version(&self) -> Option<u32> {
        match self.content {
            Content::Struct { version, .. } => Some(version),
            _ => None,
        }
    }

    /// The number, of a plain unsigned integer of any size (a `bool` is 0 or 1).
    ///
    /// # Errors
    /// If it is something else.
    pub fn as_u64(&self) -> Result<u64, ValueError> {
        match self.content {
            Content::Plain if (1..=8).contains(&self.bytes.len()) && self.is_integer() => Ok(big_endian(self.bytes)),
            _ => Err(self.is_not("an integer")),
        }
    }

    /// The number, of a plain unsigned integer that fits 32 bits.
    ///
    /// # Errors
    /// If it is something else.
    pub fn as_u32(&self) -> Result<u32, ValueError> {
        self.as_u64().ok().and_then(|v| u32::try_from(v).ok()).ok_or_else(|| self.is_not("an integer of 32 bits"))
    }

    /// The number, of a plain signed integer of any size.
    ///
    /// # Errors
    /// If it is something else.
    pub fn as_i64(&self) -> Result<i64, ValueError> {
        Ok(signed(self.as_u64()?, self.bytes.len() as u64))
    }

    /// Whether a plain integer is not zero.
    ///
    /// # Errors
    /// If it is something else.
    pub fn as_bool(&self) -> Result<bool, ValueError> {
        self.as_u64().map(|value| value != 0)
    }

    /// The numbers of an array of unsigned integers (or of a single one).
    ///
    /// # Errors
    /// If it is something else.
    pub fn as_u64s(&self) -> Result<Vec<u64>, ValueError> {
        match self.content {
            Content::Plain => Ok(vec![self.as_u64()?]),
            Content::Array { size: size @ 1..=8, .. } if self.is_integer() => {
                let size = usize::try_from(size).unwrap_or(8);
                Ok(self.bytes.chunks_exact(size).map(big_endian).collect())
            }
            _ => Err(self.is_not("an array of integers")),
        }
    }

    /// The numbers of an array of signed integers (or of a single one).
    ///
    /// # Errors
    /// If it is something else.
    pub fn as_i64s(&self) -> Result<Vec<i64>, ValueError> {
        let each = match self.content {
            Content::Array { size, .. } => size,
            _ => self.bytes.len() as u64,
        };
        Ok(self.as_u64s()?.into_iter().map(|value| signed(value, each)).collect())
    }

    /// Whether the encoding is a big-endian integer.
    pub(crate) fn is_integer(&self) -> bool {
        let kind = self.kind;
        kind == "bool" || kind == "timer" || kind.starts_with("uint") || kind.starts_with("int")
    }

    /// Writes the bytes of the tree again, from its leaves: the same bytes, or the tree does not cover them.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match &self.content {
            Content::Plain | Content::Array { .. } => out.extend_from_slice(self.bytes),
            Content::Struct { members, version } => {
                if self.kind == "subsection" {
                    out.push(crate::kind::SUBSECTION);
                    out.push(u8::try_from(self.name.len()).unwrap_or(u8::MAX));
                    out.extend_from_slice(self.name.as_bytes());
                    out.extend_from_slice(&version.to_be_bytes());
                }
                members.iter().for_each(|member| member.encode(out));
            }
            Content::Elements(elements) if self.is_list() => {
                for element in elements {
                    out.push(1);
                    element.encode(out);
                }
                out.push(0);
            }
            Content::Elements(elements) => elements.iter().for_each(|element| element.encode(out)),
        }
    }

    fn is_list(&self) -> bool {
        matches!(self.kind, "qtailq" | "qlist")
    }

    pub(crate) fn is_not(&self, wanted: &'static str) -> ValueError {
        let found = match &self.content {
            Content::Plain => format!("a {} of {} bytes", self.kind, self.bytes.len()),
            Content::Array { count, .. } => format!("an array of {count} {}", self.kind),
            Content::Struct { .. } => "a structure".to_owned(),
            Content::Elements(elements) => format!("{} structures", elements.len()),
        };
        ValueError::Type { name: self.name.to_owned(), at: self.range.start, found, wanted }
    }
}

/// Extends the sign of an integer of that many bytes.
fn signed(value: u64, bytes: u64) -> i64 {
    let unused = 64 - 8 * bytes.clamp(1, 8);
    (value << unused).cast_signed() >> unused
}

fn big_endian(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
