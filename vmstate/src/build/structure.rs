//! The fields of a section, a structure or a subsection.

use super::quoted;
use crate::kind;
use crate::write::Put;

/// Builds the fields of a section, a structure or a subsection.
///
/// Fields must be added before subsections: that is their order in the stream.
#[derive(Clone, Debug)]
pub struct StructBuilder {
    name: String,
    pub(super) version: u32,
    body: Vec<u8>,
    fields: Vec<String>,
    subsections: Vec<(String, Vec<u8>)>,
    error: Option<String>,
}

impl StructBuilder {
    pub(super) fn new(name: &str, version: u32) -> StructBuilder {
        StructBuilder {
            name: name.to_owned(),
            version,
            body: Vec::new(),
            fields: Vec::new(),
            subsections: Vec::new(),
            error: None,
        }
    }

    pub(super) fn field(mut self, name: &str, kind: &str, array: Option<usize>, bytes: &[u8]) -> StructBuilder {
        self.body.extend_from_slice(bytes);
        // QEMU describes no array of one element or none as an array.
        let many = array.filter(|count| *count > 1).map(array_len).unwrap_or_default();
        let size = bytes.len() / array.unwrap_or(1).max(1);
        if array != Some(0) {
            self.push(format!("{{\"name\":{},{many}\"type\":\"{kind}\",\"size\":{size}}}", quoted(name)));
        }
        self
    }

    fn push(&mut self, field: String) {
        if !self.subsections.is_empty() {
            self.error.get_or_insert_with(|| format!("\"{}\": a field after a subsection", self.name));
        }
        self.fields.push(field);
    }

    /// Adds a truth value, one byte.
    #[must_use]
    pub fn bool(self, name: &str, value: bool) -> StructBuilder {
        self.field(name, "bool", None, &[u8::from(value)])
    }

    /// Adds bytes.
    #[must_use]
    pub fn buffer(self, name: &str, bytes: &[u8]) -> StructBuilder {
        self.field(name, "buffer", None, bytes)
    }

    /// Adds a structure, described as `vmsd` in version `version`.
    #[must_use]
    pub fn structure(
        self,
        name: &str,
        vmsd: &str,
        version: u32,
        build: impl FnOnce(StructBuilder) -> StructBuilder,
    ) -> StructBuilder {
        self.structures(name, vmsd, version, [build], |one, build| build(one))
    }

    /// Adds structures that share a name, one for each item: an array, described once, if they are alike.
    #[must_use]
    pub fn structures<T>(
        mut self,
        name: &str,
        vmsd: &str,
        version: u32,
        items: impl IntoIterator<Item = T>,
        mut build: impl FnMut(StructBuilder, T) -> StructBuilder,
    ) -> StructBuilder {
        let mut described: Vec<(String, usize)> = Vec::new();
        for item in items {
            let (body, inner, error) = build(StructBuilder::new(vmsd, version), item).finish();
            self.error = self.error.or(error);
            self.body.extend_from_slice(&body);
            described.push((inner, body.len()));
        }
        let count = described.len();
        if count > 1 && described.iter().all(|one| *one == described[0]) {
            described.truncate(1);
            self.push_structure(name, Some(count), &described[0]);
        } else {
            described.iter().for_each(|one| self.push_structure(name, None, one));
        }
        self
    }

    fn push_structure(&mut self, name: &str, array: Option<usize>, (inner, size): &(String, usize)) {
        let (name, many) = (quoted(name), array.map(array_len).unwrap_or_default());
        self.push(format!("{{\"name\":{name},{many}\"type\":\"struct\",\"struct\":{{{inner}}},\"size\":{size}}}"));
    }

    /// Adds a subsection: state that is there only sometimes. Its name must begin with the parent's name and `/`.
    #[must_use]
    pub fn subsection(
        mut self,
        name: &str,
        version: u32,
        build: impl FnOnce(StructBuilder) -> StructBuilder,
    ) -> StructBuilder {
        let (body, description, error) = build(StructBuilder::new(name, version)).finish();
        self.error = self.error.or(error);
        if !name.strip_prefix(self.name.as_str()).is_some_and(|rest| rest.starts_with('/')) {
            self.error.get_or_insert_with(|| format!("\"{name}\" is not a subsection of \"{}\"", self.name));
        }
        let mut bytes = vec![kind::SUBSECTION];
        let written = bytes.counted_string(name).and_then(|()| bytes.u32(version));
        if let Err(error) = written {
            self.error.get_or_insert_with(|| error.to_string());
        }
        bytes.extend_from_slice(&body);
        self.subsections.push((description, bytes));
        self
    }

    /// Bytes, the members of the describing object, and what went wrong.
    pub(super) fn finish(self) -> (Vec<u8>, String, Option<String>) {
        let mut body = self.body;
        let mut description = format!(
            "\"vmsd_name\":{},\"version\":{},\"fields\":[{}]",
            quoted(&self.name),
            self.version,
            self.fields.join(",")
        );
        if !self.subsections.is_empty() {
            let all: Vec<String> = self.subsections.iter().map(|(text, _)| format!("{{{text}}}")).collect();
            description.push_str(&format!(",\"subsections\":[{}]", all.join(",")));
            self.subsections.iter().for_each(|(_, bytes)| body.extend_from_slice(bytes));
        }
        (body, description, self.error)
    }
}

fn array_len(count: usize) -> String {
    format!("\"array_len\":{count},")
}
