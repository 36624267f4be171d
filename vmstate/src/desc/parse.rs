//! From the text of a description to its parts, with nothing in between: each restore of a guest waits for it.
//!
//! The objects of the JSON keep their order and may repeat a key, as QEMU's do for lists.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;

use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{DescError, DeviceDesc, FieldDesc, Nested, StructDesc, VmDesc};

/// More objects than any real description has: what a hostile one may cost.
const MAX_OBJECTS: u32 = 1 << 20;

/// Depth is limited by `serde_json` (128).
pub(super) fn parse(text: &[u8]) -> Result<VmDesc, DescError> {
    // Checked once here, and not again for each text in it.
    let text = std::str::from_utf8(text)?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let desc = deserializer.deserialize_map(Whole(&Cell::new(MAX_OBJECTS)))?;
    deserializer.end()?;
    Ok(desc)
}

/// The object that is the whole text.
struct Whole<'b>(&'b Cell<u32>);

impl<'de> Visitor<'de> for Whole<'_> {
    type Value = VmDesc;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<VmDesc, A::Error> {
        let (mut page_size, mut devices) = (None, Vec::new());
        let mut found = false;
        while let Some(Text(key)) = map.next_key()? {
            match &*key {
                "page_size" => page_size = Some(map.next_value()?),
                "devices" => {
                    found = true;
                    map.next_value_seed(Each { budget: self.0, into: &mut devices, make: device })?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        if found { Ok(VmDesc::new(page_size, devices)) } else { Err(de::Error::custom("no list of devices")) }
    }
}

/// What a device, a field, or a description says of itself: they differ in what they must say.
#[derive(Default)]
struct Object {
    name: Option<String>,
    kind: Cow<'static, str>,
    instance: u32,
    size: Option<u64>,
    array_len: Option<u64>,
    index: Option<u64>,
    structure: Option<Box<StructDesc>>,
    /// A new one begins with each `vmsd_name` (or with the first other member, where a device has no name).
    described: Vec<StructDesc>,
}

impl Object {
    fn current(&mut self) -> &mut StructDesc {
        if self.described.is_empty() {
            self.described.push(StructDesc::default());
        }
        let last = self.described.len() - 1;
        &mut self.described[last]
    }
}

/// The only one, if there is any.
fn only(mut described: Vec<StructDesc>) -> Result<Option<StructDesc>, String> {
    let last = described.pop();
    if described.is_empty() { Ok(last) } else { Err("more than one description".into()) }
}

fn device(object: Object) -> Result<DeviceDesc, String> {
    let name = object.name.ok_or("a device without a name")?;
    Ok(DeviceDesc::new(name, object.instance, only(object.described)?.unwrap_or_default()))
}

fn structure(object: Object) -> Result<StructDesc, String> {
    only(object.described)?.ok_or_else(|| "a structure without a description".into())
}

fn field(object: Object) -> Result<FieldDesc, String> {
    let Object { name, kind, size, array_len, index, structure, described, .. } = object;
    let name = name.unwrap_or_default();
    let size = size.ok_or_else(|| format!("field \"{name}\" has no size"))?;
    let nested = match structure {
        Some(structure) => Nested::Struct(structure),
        None if described.is_empty() => Nested::Nothing,
        None => Nested::Inline(described),
    };
    // Found out once, however many elements there are.
    let inline_is_all =
        matches!(&nested, Nested::Inline(inner) if matches!(&**inner, [inner] if inner.wire_len() == Some(size)));
    Ok(FieldDesc { name, kind, size, array_len, index, nested, inline_is_all })
}

/// One object, filled in its place.
struct One<'b, 'o>(&'b Cell<u32>, &'o mut Object);

impl<'de> DeserializeSeed<'de> for One<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        let Some(rest) = self.0.get().checked_sub(1) else {
            return Err(de::Error::custom(format_args!("more than {MAX_OBJECTS} objects")));
        };
        self.0.set(rest);
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for One<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let One(budget, object) = self;
        while let Some(Text(key)) = map.next_key()? {
            match &*key {
                "name" => object.name = Some(map.next_value::<Text<'_>>()?.shown()?),
                "type" => object.kind = map.next_value::<Text<'_>>()?.kind()?,
                "size" => object.size = Some(map.next_value()?),
                "array_len" => object.array_len = Some(map.next_value()?),
                "index" => object.index = Some(map.next_value()?),
                "instance_id" => object.instance = map.next_value()?,
                "struct" => {
                    let mut inner = Object::default();
                    map.next_value_seed(One(budget, &mut inner))?;
                    object.structure = Some(structure(inner).map_err(de::Error::custom)?.into());
                }
                "vmsd_name" => {
                    let name = map.next_value::<Text<'_>>()?.shown()?;
                    object.described.push(StructDesc { name, ..StructDesc::default() });
                }
                "version" => object.current().version = map.next_value()?,
                "fields" => {
                    let into = &mut object.current().fields;
                    map.next_value_seed(Each { budget, into, make: field })?;
                }
                "subsections" => {
                    let into = &mut object.current().subsections;
                    map.next_value_seed(Each { budget, into, make: structure })?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// A list of objects, each made into something.
struct Each<'b, T> {
    budget: &'b Cell<u32>,
    into: &'b mut Vec<T>,
    make: fn(Object) -> Result<T, String>,
}

impl<'de, T> DeserializeSeed<'de> for Each<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de, T> Visitor<'de> for Each<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let mut object = Object::default();
        while seq.next_element_seed(One(self.budget, &mut object))?.is_some() {
            self.into.push((self.make)(std::mem::take(&mut object)).map_err(de::Error::custom)?);
        }
        Ok(())
    }
}

/// A text, borrowed where it can be.
struct Text<'a>(Cow<'a, str>);

/// The encodings that nearly all fields have.
const KINDS: [&str; 8] = ["uint8", "uint16", "uint32", "uint64", "int32", "bool", "buffer", "struct"];

impl Text<'_> {
    fn kind<E: de::Error>(self) -> Result<Cow<'static, str>, E> {
        match KINDS.iter().find(|kind| **kind == self.0) {
            Some(&kind) => Ok(kind.into()),
            None => Ok(self.shown()?.into()),
        }
    }

    /// Names are shown to people.
    fn shown<E: de::Error>(self) -> Result<String, E> {
        let plain = self.0.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if !plain && self.0.chars().any(char::is_control) {
            return Err(E::custom("a control character in a text"));
        }
        Ok(self.0.into_owned())
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Text<'a>, D::Error> {
        struct Texts;

        impl<'de> Visitor<'de> for Texts {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_str<E>(self, value: &str) -> Result<Text<'de>, E> {
                Ok(Text(value.to_owned().into()))
            }

            fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(value.into()))
            }
        }

        from.deserialize_str(Texts)
    }
}
