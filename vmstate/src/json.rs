//! JSON with everything kept: the order of keys, and keys that come twice.
//!
//! QEMU's description has objects with repeated keys (each element of a list adds its own `fields`), which an ordinary
//! map would drop without a word.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::DescError;

/// Most values in a description. The one of a large guest has about 20 000.
const MAX_NODES: usize = 2_000_000;
/// Longest description. Real ones have 45 KB to a few hundred KB.
const MAX_BYTES: usize = 64 << 20;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Other,
    Number(u64),
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Parses a text. Depth is limited to 128 by `serde_json`.
    pub(crate) fn parse(text: &[u8]) -> Result<Json, DescError> {
        if text.len() > MAX_BYTES {
            return Err(DescError::TooLarge { what: "bytes", limit: MAX_BYTES });
        }
        let left = Cell::new(MAX_NODES);
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        let parsed = Node(&left).deserialize(&mut deserializer);
        if left.get() == 0 {
            return Err(DescError::TooLarge { what: "values", limit: MAX_NODES });
        }
        let json = parsed?;
        deserializer.end()?;
        Ok(json)
    }

    pub(crate) fn as_object(&self) -> Option<&[(String, Json)]> {
        match self {
            Json::Object(pairs) => Some(pairs),
            _ => None,
        }
    }

    pub(crate) fn as_list(&self) -> Option<&[Json]> {
        match self {
            Json::List(items) => Some(items),
            _ => None,
        }
    }

    pub(crate) fn as_number(&self) -> Option<u64> {
        match self {
            Json::Number(number) => Some(*number),
            _ => None,
        }
    }

    pub(crate) fn as_text(&self) -> Option<&str> {
        match self {
            Json::Text(text) => Some(text),
            _ => None,
        }
    }
}

#[derive(Clone, Copy)]
struct Node<'a>(&'a Cell<usize>);

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Json, D::Error> {
        let left = self.0.get().saturating_sub(1);
        self.0.set(left);
        if left == 0 {
            return Err(D::Error::custom("too many values"));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Json, E> {
        Ok(Json::Other)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Json, E> {
        Ok(u64::try_from(number).map_or(Json::Other, Json::Number))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Json, E> {
        Ok(Json::Number(number))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Json, E> {
        Ok(Json::Other)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Json, E> {
        Ok(Json::Text(text.to_owned()))
    }

    fn visit_unit<E: Error>(self) -> Result<Json, E> {
        Ok(Json::Other)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Json::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Json, A::Error> {
        let mut pairs = Vec::new();
        while let Some(key) = access.next_key::<String>()? {
            pairs.push((key, access.next_value_seed(self)?));
        }
        Ok(Json::Object(pairs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_keys_and_their_order_are_kept() {
        let json = Json::parse(br#"{"b": 1, "a": [true, -1], "b": "x"}"#).unwrap();
        let pairs = json.as_object().unwrap();
        assert_eq!(pairs[0], ("b".into(), Json::Number(1)));
        assert_eq!(pairs[1], ("a".into(), Json::List(vec![Json::Other, Json::Other])));
        assert_eq!(pairs[2], ("b".into(), Json::Text("x".into())));
    }

    #[test]
    fn hostile_texts_end_with_an_error() {
        assert!(Json::parse(&b"[".repeat(100_000)).is_err());
        assert!(Json::parse(b"{} x").is_err());
        let many = format!("[{}0]", "0,".repeat(MAX_NODES));
        assert!(matches!(Json::parse(many.as_bytes()), Err(DescError::TooLarge { .. })));
    }
}
