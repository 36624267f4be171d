//! The decoded state of a device.

use std::fmt::Write;

use mapped_ram::Snapshot;
use serde_json::json;
use vmstate::{Content, SectionKind, Value};

use crate::commands::Failure;
use crate::contents;

/// Bytes that are shown of a long field in text. JSON has them all.
const SHOWN: usize = 32;

/// All sections of that name, as text or as a JSON array.
pub(super) fn show(snapshot: &Snapshot, name: &str, as_json: bool) -> Result<String, Failure> {
    let full = || snapshot.sections().iter().filter(|entry| entry.kind == SectionKind::Full);
    let mut text = String::new();
    let mut all = Vec::new();
    for entry in full().filter(|entry| entry.name == name) {
        let Some(device) = contents::device(snapshot, entry)? else {
            return Err(format!("{}: the state of \"{name}\" is not described", snapshot.path().display()).into());
        };
        let value = device.decode().map_err(|error| format!("{}: {error}", snapshot.path().display()))?;
        if as_json {
            all.push(json!({ "name": name, "instance": entry.instance, "version": entry.version,
                "start": entry.range.start.0, "end": entry.range.end.0, "fields": members(&value) }));
        } else {
            writeln!(text, "{name} instance {} version {} at {}", entry.instance, entry.version, entry.range.start)?;
            write_members(&mut text, &value, 1)?;
        }
    }
    if as_json && !all.is_empty() {
        return Ok(serde_json::to_string_pretty(&all)? + "\n");
    }
    if text.is_empty() {
        let mut names: Vec<&str> = full().map(|entry| entry.name.as_str()).collect();
        names.dedup();
        let path = snapshot.path().display();
        return Err(format!("{path}: no device section \"{name}\"; there are: {}", names.join(", ")).into());
    }
    Ok(text)
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

fn plain(value: &Value<'_>) -> String {
    if let (Ok(numbers), Ok(signed)) = (value.as_u64s(), value.as_i64s()) {
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

fn is_signed(value: &Value<'_>) -> bool {
    value.kind.starts_with("int")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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
        Content::Array { .. } => match (value.as_u64s(), value.as_i64s()) {
            (_, Ok(numbers)) if is_signed(value) => ("values", json!(numbers)),
            (Ok(numbers), _) => ("values", json!(numbers)),
            _ => ("bytes", json!(hex(value.bytes()))),
        },
    };
    object[key] = content;
    object
}
