//! Arguments that clap does not know by itself.

use clap::builder::{OsStringValueParser, TypedValueParser};
use fastload_qmp::QmpAddress;

/// The address of a QMP monitor.
pub(crate) fn qmp() -> impl TypedValueParser<Value = QmpAddress> {
    OsStringValueParser::new().try_map(|text| QmpAddress::parse(&text))
}

/// A number of bytes as QEMU takes it: decimal or `0x`, with an optional suffix `k`, `M` or `G` (powers of 1024).
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let value = match number.strip_prefix("0x").or_else(|| number.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => number.parse(),
    };
    let value = value.map_err(|_| "expected a number of bytes, e.g. 4660, 0x1234 or 1M".to_owned())?;
    value.checked_mul(1 << shift).ok_or_else(|| "more bytes than any file has".to_owned())
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn numbers_as_qemu_takes_them() {
        for (text, value) in [("0", 0), ("4660", 4660), ("0x1234", 0x1234), ("1M", 1 << 20), ("0x2k", 2048)] {
            assert_eq!(bytes(text), Ok(value));
        }
        for text in ["", "k", "-1", "1x", "0x", "99999999999G", "\u{e9}"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
