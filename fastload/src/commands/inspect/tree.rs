//! The decoded state of a device.

use std::collections::HashSet;
use std::fmt::Write;

use mapped_ram::Snapshot;
use serde_json::json;
use vmstate::{Content, SectionEntry, SectionKind, Value};

use crate::commands::Failure;
use crate::contents;

/// Bytes that are shown of a long field in text. JSON has them all.
const SHOWN: usize = 32;

/// A longer array is shown as bytes: a number in JSON takes many times the memory of one.
const MOST_NUMBERS: u64 = 1 << 20;

/// All sections of that name, for people.
pub(super) fn text(snapshot: &Snapshot, name: &str) -> Result<String, Failure> {
    let mut text = String::new();
    each(snapshot, name, |entry, value| {
        writeln!(text, "{name} instance {} version {} at {}", entry.instance, entry.version, entry.range.start)?;
        write_members(&mut text, value, 1)
    })?;
    Ok(text)
}

/// The same for programs.
pub(super) fn values(snapshot: &Snapshot, name: &str) -> Result<Vec<serde_json::Value>, Failure> {
    let mut all = Vec::new();
    each(snapshot, name, |entry, value| {
        all.push(json!({ "name": name, "instance": entry.instance, "version": entry.version,
            "start": entry.range.start.0, "end": entry.range.end.0, "fields": members(value) }));
        Ok(())
    })?;
    Ok(all)
}

/// Decodes the sections of a name, of which there must be one.
fn each(
    snapshot: &Snapshot,
    name: &str,
    mut show: impl FnMut(&SectionEntry, &Value<'_>) -> std::fmt::Result,
) -> Result<(), Failure> {
    let full = || snapshot.sections().iter().filter(|entry| entry.kind == SectionKind::Full);
    let mut seen = HashSet::new();
    // A second state of the same device is one that nobody would load.
    let wanted: Vec<_> = full().filter(|entry| entry.name == name && seen.insert(entry.instance)).collect();
    let path = snapshot.path().display();
    if wanted.is_empty() {
        let mut names: Vec<&str> = full().map(|entry| entry.name.as_str()).collect();
        names.dedup();
        return Err(format!("{path}: no device section \"{name}\"; there are: {}", names.join(", ")).into());
    }
    contents::check_total(snapshot, &wanted)?;
    for entry in wanted {
        let Some(device) = contents::device(snapshot, entry)? else {
            return Err(format!("{path}: the state of \"{name}\" is not described").into());
        };
        show(entry, &device.decode().map_err(|error| format!("{path}: {error}"))?)?;
    }
    Ok(())
}

fn write_members(out: &mut String, value: &Value<'_>, depth: usize) -> std::fmt::Result {
    for (index, member) in value.members().iter().enumerate() {
        let indent = "  ".repeat(depth);
        match &member.content {
            Content::Struct { .. } if matches!(value.content, Content::Elements(_)) => {
                writeln!(out, "{indent}[{index}]")?;
                write_members(out, member, depth + 1)?;
            }
            Content::Struct { version, .. } => {
                writeln!(out, "{indent}{} ({}, version {version})", member.name, member.kind)?;
                write_members(out, member, depth + 1)?;
            }
            Content::Elements(elements) => {
                writeln!(out, "{indent}{} ({} elements)", member.name, elements.len())?;
                write_members(out, member, depth + 1)?;
            }
            Content::Plain | Content::Array { .. } => {
                writeln!(out, "{indent}{}: {} = {}", member.name, member.kind, plain(member))?;
            }
        }
    }
    Ok(())
}

pub(super) fn plain(value: &Value<'_>) -> String {
    if let Some((numbers, signed)) = numbers(value) {
        let many = if numbers.len() > SHOWN { ", ..." } else { "" };
        let shown = numbers.iter().zip(&signed).take(SHOWN).map(|(number, signed)| match signed {
            ..0 if is_signed(value) => signed.to_string(),
            _ => format!("{number:#x}"),
        });
        let shown: Vec<String> = shown.collect();
        return match shown.as_slice() {
            [one] => one.clone(),
            all => format!("[{}{many}]", all.join(", ")),
        };
    }
    let bytes = value.bytes();
    let more = if bytes.len() > SHOWN { " ..." } else { "" };
    format!("{} bytes {}{more}", bytes.len(), hex(&bytes[..bytes.len().min(SHOWN)]))
}

/// What numbers it has, also read as signed ones; none if it consists of something else, or of too many.
fn numbers(value: &Value<'_>) -> Option<(Vec<u64>, Vec<i64>)> {
    match value.content {
        Content::Array { count, .. } if count > MOST_NUMBERS => None,
        _ => Some((value.as_u64s().ok()?, value.as_i64s().ok()?)),
    }
}

fn is_signed(value: &Value<'_>) -> bool {
    value.kind.starts_with("int")
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing into a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Members as a list: names may repeat.
fn members(value: &Value<'_>) -> serde_json::Value {
    value.members().iter().map(member).collect()
}

fn member(value: &Value<'_>) -> serde_json::Value {
    let mut object = json!({ "name": value.name, "type": value.kind,
        "start": value.range.start.0, "end": value.range.end.0 });
    let (key, content) = match &value.content {
        Content::Struct { .. } => ("fields", members(value)),
        Content::Elements(_) => ("elements", members(value)),
        Content::Plain => match (value.as_u64(), value.as_i64()) {
            (_, Ok(number)) if is_signed(value) => ("value", json!(number)),
            (Ok(number), _) => ("value", json!(number)),
            _ => ("bytes", json!(hex(value.bytes()))),
        },
        Content::Array { .. } => match numbers(value) {
            Some((_, numbers)) if is_signed(value) => ("values", json!(numbers)),
            Some((numbers, _)) => ("values", json!(numbers)),
            None => ("bytes", json!(hex(value.bytes()))),
        },
    };
    object[key] = content;
    object
}
