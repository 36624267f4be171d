//! What two snapshots differ in: pages and fields of devices.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use mapped_ram::Snapshot;
use page_source::is_zero;
use page_units::{BlockId, FileOffset, PAGE_SIZE, PageCount, PageIndex};
use serde::Serialize;
use vmstate::{Content, SectionEntry, SectionKind, Value};

use super::tree;
use crate::commands::Failure;
use crate::contents;
use crate::output::HEAD;

/// The most runs of pages, and fields of one device, that are listed in text. JSON has up to [`MOST`].
const SHOWN: usize = 8;
/// The most that is listed anywhere: the figures count all.
const MOST: usize = 10_000;
/// Pages that are compared in one go.
const STEP: u64 = 256;

/// The differences.
#[derive(Debug, Default, Serialize)]
pub(super) struct Diff {
    /// Whether there are none.
    pub(super) same: bool,
    machines: Option<[String; 2]>,
    blocks: Vec<Block>,
    devices: Vec<Device>,
}

#[derive(Debug, Serialize)]
struct Block {
    name: String,
    /// Which of the two has it; both if it can be compared.
    lengths: [Option<u64>; 2],
    different_pages: u64,
    /// First page and number of pages.
    runs: Vec<[u64; 2]>,
}

#[derive(Debug, Serialize)]
struct Device {
    name: String,
    instance: u32,
    /// Which of the two has it.
    present: [bool; 2],
    different_fields: usize,
    fields: Vec<Field>,
}

#[derive(Debug, Serialize)]
struct Field {
    path: String,
    values: [Option<String>; 2],
}

impl Diff {
    pub(super) fn of(one: &Snapshot, other: &Snapshot) -> Result<Diff, Failure> {
        let mut diff = Diff::default();
        let machines = [one, other].map(|snapshot| snapshot.configuration().machine.clone());
        if machines[0] != machines[1] {
            diff.machines = Some(machines);
        }
        let mut names: Vec<&str> = one.layout().blocks().iter().map(page_units::RamBlock::name).collect();
        names.extend(
            other
                .layout()
                .blocks()
                .iter()
                .map(page_units::RamBlock::name)
                .filter(|name| !names.contains(name))
                .collect::<Vec<_>>(),
        );
        for name in names {
            diff.blocks.extend(block(one, other, name)?);
        }
        let (ones, others) = (devices(one), devices(other));
        let mut keys: Vec<_> = ones.keys().chain(others.keys()).copied().collect();
        keys.sort_unstable();
        keys.dedup();
        for (name, instance) in keys {
            let entries = [ones.get(&(name, instance)), others.get(&(name, instance))];
            let fields = match entries {
                [Some(a), Some(b)] => fields(one, a, other, b)?,
                _ => Vec::new(),
            };
            let present = entries.map(|entry| entry.is_some());
            if present != [true, true] || !fields.is_empty() {
                let (name, different_fields) = (name.to_owned(), fields.len());
                let fields = fields.into_iter().take(MOST).collect();
                diff.devices.push(Device { name, instance, present, different_fields, fields });
            }
        }
        diff.same = diff.machines.is_none() && diff.blocks.is_empty() && diff.devices.is_empty();
        Ok(diff)
    }

    pub(super) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        if self.same {
            writeln!(out, "the same memory and device state")?;
        }
        if let Some([one, other]) = &self.machines {
            writeln!(out, "machine: {one} | {other}")?;
        }
        if !self.blocks.is_empty() {
            writeln!(out, "{HEAD}RAM blocks{HEAD:#}")?;
        }
        for Block { name, lengths, different_pages, runs } in &self.blocks {
            match lengths {
                [Some(a), Some(b)] if a == b => writeln!(out, "  {name}: {different_pages} pages differ")?,
                [a, b] => {
                    let length = |length: &Option<u64>| length.map_or("none".to_owned(), crate::output::size);
                    writeln!(out, "  {name}: {} | {}", length(a), length(b))?;
                }
            }
            for [first, pages] in runs.iter().take(SHOWN) {
                writeln!(out, "    from {:#x}: {pages} pages", first * PAGE_SIZE)?;
            }
            more(&mut out, runs.len())?;
        }
        if !self.devices.is_empty() {
            writeln!(out, "{HEAD}Devices{HEAD:#}")?;
        }
        for Device { name, instance, present, different_fields, fields } in &self.devices {
            match present {
                [true, true] => writeln!(out, "  {name} {instance}: {different_fields} fields differ")?,
                [true, false] => writeln!(out, "  {name} {instance}: only in the first")?,
                _ => writeln!(out, "  {name} {instance}: only in the second")?,
            }
            for Field { path, values } in fields.iter().take(SHOWN) {
                let [one, other] = values.each_ref().map(|value| value.as_deref().unwrap_or("none"));
                writeln!(out, "    {path}: {one} | {other}")?;
            }
            more(&mut out, *different_fields)?;
        }
        Ok(out)
    }
}

fn more(out: &mut String, all: usize) -> std::fmt::Result {
    if all > SHOWN { writeln!(out, "    and {} more (--json lists them)", all - SHOWN) } else { Ok(()) }
}

/// `None` if there is no difference.
fn block(one: &Snapshot, other: &Snapshot, name: &str) -> Result<Option<Block>, Failure> {
    let found = [one, other].map(|snapshot| snapshot.layout().find(name));
    let lengths = found.map(|found| found.map(|(_, block)| block.length().0));
    let name = name.to_owned();
    let [Some((a, block)), Some((b, _))] = found else {
        return Ok(Some(Block { name, lengths, different_pages: 0, runs: Vec::new() }));
    };
    if lengths[0] != lengths[1] {
        return Ok(Some(Block { name, lengths, different_pages: 0, runs: Vec::new() }));
    }
    let mut different = Block { name, lengths, different_pages: 0, runs: Vec::new() };
    let (mut page, end) = (0, block.pages().0);
    let (mut bytes, mut others) = (Vec::new(), Vec::new());
    while page < end {
        let run = one.load_run(a, PageIndex(page), PageCount(end - page))?;
        let also = other.load_run(b, PageIndex(page), run.pages())?;
        let (in_one, in_other) = (run.is_stored(), also.is_stored());
        let pages = run.pages().0.min(also.pages().0).max(1);
        if !in_one && !in_other {
            page += pages;
            continue;
        }
        let pages = pages.min(STEP);
        read(one, a, page, in_one.then_some(pages), &mut bytes)?;
        read(other, b, page, in_other.then_some(pages), &mut others)?;
        for number in 0..pages {
            let part = usize::try_from(number * PAGE_SIZE)?..usize::try_from((number + 1) * PAGE_SIZE)?;
            let same = match (bytes.get(part.clone()), others.get(part)) {
                (Some(one), Some(other)) => one == other,
                (Some(only), None) | (None, Some(only)) => is_zero(only),
                (None, None) => true,
            };
            if !same {
                different.add(page + number);
            }
        }
        page += pages;
    }
    Ok((different.different_pages > 0).then_some(different))
}

impl Block {
    fn add(&mut self, page: u64) {
        self.different_pages += 1;
        let room = self.runs.len() < MOST;
        match self.runs.last_mut() {
            Some([first, pages]) if *first + *pages == page => *pages += 1,
            _ if room => self.runs.push([page, 1]),
            _ => {}
        }
    }
}

/// Reads stored pages; nothing if they are not stored.
fn read(snapshot: &Snapshot, block: BlockId, page: u64, pages: Option<u64>, into: &mut Vec<u8>) -> Result<(), Failure> {
    into.clear();
    let (Some(pages), Some(place)) = (pages, snapshot.block(block)) else { return Ok(()) };
    into.resize(usize::try_from(pages * PAGE_SIZE)?, 0);
    let at = FileOffset(place.pages_offset.0 + page * PAGE_SIZE);
    let path = snapshot.path().display();
    Ok(snapshot.read_exact_at(into, at).map_err(|error| format!("{path}: reading at {at} failed: {error}"))?)
}

fn devices(snapshot: &Snapshot) -> BTreeMap<(&str, u32), &SectionEntry> {
    let mut all = BTreeMap::new();
    for entry in snapshot.sections().iter().filter(|entry| entry.kind == SectionKind::Full) {
        // A second state of the same device is one that nobody would load.
        all.entry((entry.name.as_str(), entry.instance)).or_insert(entry);
    }
    all
}

fn fields(one: &Snapshot, a: &SectionEntry, other: &Snapshot, b: &SectionEntry) -> Result<Vec<Field>, Failure> {
    contents::check_total(one, &[a])?;
    contents::check_total(other, &[b])?;
    let bytes = [contents::read(one, a.body.clone())?, contents::read(other, b.body.clone())?];
    if bytes[0] == bytes[1] {
        return Ok(Vec::new());
    }
    let (Some(one), Some(other)) = (contents::device(one, a)?, contents::device(other, b)?) else {
        return Ok(vec![opaque(&bytes)]);
    };
    let (Ok(one), Ok(other)) = (one.decode(), other.decode()) else { return Ok(vec![opaque(&bytes)]) };
    let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
    leaves(&one, "", &mut before);
    leaves(&other, "", &mut after);
    let mut paths: Vec<&String> = before.keys().chain(after.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    let differ = paths
        .into_iter()
        .filter(|path| before.get(*path).map(|(bytes, _)| bytes) != after.get(*path).map(|(bytes, _)| bytes));
    let field = |path: &String| {
        let value = |all: &BTreeMap<String, (&[u8], String)>| all.get(path).map(|(_, text)| text.clone());
        Field { path: path.clone(), values: [value(&before), value(&after)] }
    };
    Ok(differ.map(field).collect())
}

fn opaque(bytes: &[Vec<u8>; 2]) -> Field {
    Field {
        path: "(not described)".into(),
        values: bytes.each_ref().map(|bytes| Some(format!("{} bytes", bytes.len()))),
    }
}

/// Everything that has a value, by its path. A name that repeats gets a number.
fn leaves<'v>(value: &Value<'v>, path: &str, into: &mut BTreeMap<String, (&'v [u8], String)>) {
    let elements = matches!(value.content, Content::Elements(_));
    for (index, member) in value.members().iter().enumerate() {
        let mut name = match (elements, path) {
            (true, _) => format!("{path}[{index}]"),
            (false, "") => member.name.to_string(),
            (false, _) => format!("{path}.{}", member.name),
        };
        match member.content {
            Content::Struct { .. } | Content::Elements(_) => leaves(member, &name, into),
            Content::Plain | Content::Array { .. } => {
                if into.contains_key(&name) {
                    name = format!("{name}#{index}");
                }
                into.insert(name, (member.bytes(), tree::plain(member)));
            }
        }
    }
}
