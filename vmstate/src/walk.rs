//! From a section's bytes and its description to a tree of values.

use page_units::{ByteLen, FileOffset};

use crate::value::{Content, Value};
use crate::{DeviceDesc, FieldDesc, Nested, StructDesc, kind};

/// More values than any real device has: what a hostile description may cost.
const MAX_VALUES: u32 = 1 << 20;
/// The same of elements of arrays that take no byte of the section, so that nothing else limits them.
const MAX_EMPTY: u32 = 1 << 10;

/// Why a section is not what its description says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WalkError {
    /// The section ends before a field does.
    #[error("\"{field}\" at offset {at} needs {needed} bytes, the section has {left} left")]
    Short {
        /// The field.
        field: String,
        /// Where it begins.
        at: FileOffset,
        /// Its length.
        needed: ByteLen,
        /// What is left.
        left: ByteLen,
    },
    /// A structure's parts are not as long as the structure.
    #[error("\"{field}\" at offset {at} is {size} bytes long, its parts are {parts}")]
    Size {
        /// The structure.
        field: String,
        /// Where it begins.
        at: FileOffset,
        /// Its length by its own description.
        size: ByteLen,
        /// The length of its parts.
        parts: ByteLen,
    },
    /// A subsection or a list is not where the description says.
    #[error("\"{field}\" at offset {at}: {what}")]
    Mismatch {
        /// The subsection or list.
        field: String,
        /// Where it should be.
        at: FileOffset,
        /// What is there.
        what: &'static str,
    },
    /// The description makes more values than any real device has.
    #[error("\"{field}\" at offset {at}: more than {MAX_VALUES} values in one section")]
    TooMany {
        /// Where it stopped.
        field: String,
        /// Where it stopped.
        at: FileOffset,
    },
}

/// Decodes the body of a section (without header and footer), whose first byte is at `at` of the file.
///
/// The values cover the body exactly, each byte once.
///
/// # Errors
/// If the body and the description do not fit.
pub fn walk<'a>(body: &'a [u8], at: FileOffset, desc: &'a DeviceDesc) -> Result<Value<'a>, WalkError> {
    let mut walker = Walker { body, base: at.0, at: 0, budget: MAX_VALUES, empty: MAX_EMPTY };
    let members = walker.members(&desc.state)?;
    walker.must_span(0, body.len() as u64, &desc.name)?;
    Ok(walker.value(&desc.name, "section", 0, Content::Struct { version: desc.state.version, members }))
}

struct Walker<'a> {
    body: &'a [u8],
    base: u64,
    /// Never more than the length of the body.
    at: u64,
    budget: u32,
    empty: u32,
}

impl<'a> Walker<'a> {
    fn members(&mut self, desc: &'a StructDesc) -> Result<Vec<Value<'a>>, WalkError> {
        let mut members = Vec::new();
        for field in &desc.fields {
            members.push(self.field(field)?);
        }
        for subsection in &desc.subsections {
            members.push(self.subsection(subsection)?);
        }
        Ok(members)
    }

    fn subsection(&mut self, desc: &'a StructDesc) -> Result<Value<'a>, WalkError> {
        self.spend(&desc.name)?;
        let start = self.at;
        let header = self.take(desc.header_len(), &desc.name)?;
        let begin = [kind::SUBSECTION, u8::try_from(desc.name.len()).unwrap_or(u8::MAX)];
        let version = desc.version.to_be_bytes();
        if !header.iter().eq(begin.iter().chain(desc.name.as_bytes()).chain(&version)) {
            let what = "no such subsection here";
            return Err(WalkError::Mismatch { field: desc.name.clone(), at: self.place(start), what });
        }
        let members = self.members(desc)?;
        Ok(self.value(&desc.name, "subsection", start, Content::Struct { version: desc.version, members }))
    }

    fn field(&mut self, desc: &'a FieldDesc) -> Result<Value<'a>, WalkError> {
        self.spend(&desc.name)?;
        let start = self.at;
        let length = desc.wire_len().unwrap_or(u64::MAX);
        self.check(length, &desc.name)?;
        let is_list = matches!(&*desc.kind, "qtailq" | "qlist");
        let content = match &desc.nested {
            Nested::Struct(inner) => self.structs(desc, inner)?,
            Nested::Inline(inner) if is_list && desc.array_len.is_none() => self.list(desc, inner)?,
            Nested::Inline(_) => match desc.inline() {
                Some(inner) => self.structs(desc, inner)?,
                // What carries keys and markers around its parts, as a tree does, stays bytes.
                None => self.plain(desc, length)?,
            },
            Nested::Nothing => self.plain(desc, length)?,
        };
        self.must_span(start, length, &desc.name)?;
        Ok(self.value(&desc.name, &desc.kind, start, content))
    }

    fn plain(&mut self, desc: &FieldDesc, length: u64) -> Result<Content<'a>, WalkError> {
        self.take(length, &desc.name)?;
        Ok(match desc.array_len {
            Some(count) => Content::Array { count, size: desc.size },
            None => Content::Plain,
        })
    }

    fn structs(&mut self, desc: &'a FieldDesc, inner: &'a StructDesc) -> Result<Content<'a>, WalkError> {
        let Some(count) = desc.array_len else {
            return self.one(desc, inner);
        };
        let mut elements = Vec::new();
        for _ in 0..count {
            self.spend(&desc.name)?;
            let start = self.at;
            if desc.size == 0 {
                self.empty = self.empty.checked_sub(1).ok_or_else(|| WalkError::Mismatch {
                    field: desc.name.clone(),
                    at: self.place(start),
                    what: "more elements without content than any real device has",
                })?;
            }
            let content = self.one(desc, inner)?;
            elements.push(self.value(&desc.name, &desc.kind, start, content));
        }
        Ok(Content::Elements(elements))
    }

    fn one(&mut self, desc: &'a FieldDesc, inner: &'a StructDesc) -> Result<Content<'a>, WalkError> {
        let start = self.at;
        let members = self.members(inner)?;
        self.must_span(start, desc.size, &desc.name)?;
        Ok(Content::Struct { version: inner.version, members })
    }

    /// `{1, element}` for each element, then 0.
    fn list(&mut self, desc: &'a FieldDesc, inner: &'a [StructDesc]) -> Result<Content<'a>, WalkError> {
        let mut elements = Vec::new();
        for element in inner {
            self.spend(&desc.name)?;
            self.marker(1, desc)?;
            let start = self.at;
            let members = self.members(element)?;
            let content = Content::Struct { version: element.version, members };
            elements.push(self.value(&desc.name, &element.name, start, content));
        }
        self.marker(0, desc)?;
        Ok(Content::Elements(elements))
    }

    fn marker(&mut self, expected: u8, desc: &FieldDesc) -> Result<(), WalkError> {
        let start = self.at;
        if self.take(1, &desc.name)? == [expected] {
            return Ok(());
        }
        let what = "the list has not as many elements as its description";
        Err(WalkError::Mismatch { field: desc.name.clone(), at: self.place(start), what })
    }

    fn value(&self, name: &'a str, kind: &'a str, start: u64, content: Content<'a>) -> Value<'a> {
        let range = self.place(start)..self.place(self.at);
        Value { name, kind, range, content, bytes: self.slice(start) }
    }

    /// What was taken since `start`.
    fn slice(&self, start: u64) -> &'a [u8] {
        let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        self.body.get(index(start)..index(self.at)).unwrap_or_default()
    }

    fn place(&self, at: u64) -> FileOffset {
        FileOffset(self.base.saturating_add(at))
    }

    fn check(&self, length: u64, field: &str) -> Result<(), WalkError> {
        let left = (self.body.len() as u64).saturating_sub(self.at);
        if length <= left {
            return Ok(());
        }
        let (needed, left) = (ByteLen(length), ByteLen(left));
        Err(WalkError::Short { field: field.to_owned(), at: self.place(self.at), needed, left })
    }

    fn take(&mut self, length: u64, field: &str) -> Result<&'a [u8], WalkError> {
        self.check(length, field)?;
        let start = self.at;
        self.at += length;
        Ok(self.slice(start))
    }

    fn must_span(&self, start: u64, size: u64, field: &str) -> Result<(), WalkError> {
        let parts = self.at - start;
        if parts == size {
            return Ok(());
        }
        let (size, parts) = (ByteLen(size), ByteLen(parts));
        Err(WalkError::Size { field: field.to_owned(), at: self.place(start), size, parts })
    }

    fn spend(&mut self, field: &str) -> Result<(), WalkError> {
        match self.budget.checked_sub(1) {
            Some(rest) => {
                self.budget = rest;
                Ok(())
            }
            None => Err(WalkError::TooMany { field: field.to_owned(), at: self.place(self.at) }),
        }
    }
}
