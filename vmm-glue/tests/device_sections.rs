//! `docs/device-sections.md` says what the encoder does: names, types, offsets and lengths of all fields.

use std::collections::BTreeMap;

use kvm_bindings::{kvm_cpuid_entry2, kvm_lapic_state, kvm_pit_state2, kvm_sregs2};
use page_units::{ByteLen, GuestAddr};
use serde_json::Value;
use vmm_glue::state::Interrupts;
use vmm_glue::{Backing, GuestRam, MachineState, RamSpec, VcpuState, VmState};
use vmstate::Section;

const DOCUMENT: &str = include_str!("../../docs/device-sections.md");

/// Fields that are as long as there is something: what they have one item for, and how many there are in [`reference`].
const VARIABLE: [(&str, &str, &str, u64); 5] = [
    ("kvm-vcpu", "cpuid", "entry", 2),
    ("kvm-vcpu", "xcrs", "register", 1),
    ("kvm-vcpu", "xsave", "word", 1030),
    ("kvm-vcpu", "msrs", "register", 3),
    ("vm-memory", "pieces", "piece", 3),
];

/// A state that has everything, encoded.
fn reference() -> Vec<Section> {
    let mut vcpu = VcpuState::default();
    vcpu.cpuid = vec![kvm_cpuid_entry2::default(); 2];
    vcpu.xcrs.nr_xcrs = 1;
    vcpu.xsave = vec![0; 1030];
    vcpu.msrs = vec![(0x10, 1), (0x11, 2), (0x12, 3)];
    vcpu.sregs2 = Some(kvm_sregs2::default());
    (vcpu.tsc_khz, vcpu.tsc_offset, vcpu.ssp) = (Some(1), Some(2), Some(3));
    vcpu.lapic = Some(kvm_lapic_state::default());
    let mut vm = VmState::default();
    vm.interrupts = Some(Interrupts { pic_master: vec![0; 512], pic_slave: vec![0; 512], ioapic: vec![0; 512] });
    vm.pit = Some(kvm_pit_state2::default());
    (vm.clock, vm.realtime) = (Some(1), Some(2));
    let more = RamSpec::new("more").at(GuestAddr(1 << 30), ByteLen(4096));
    let specs = [RamSpec::new("ram").at(GuestAddr(0), ByteLen(8192)).at(GuestAddr(1 << 32), ByteLen(4096)), more];
    let mut sections = vec![GuestRam::allocate(&specs, Backing::Anonymous).unwrap().section().unwrap()];
    sections.extend(MachineState { vm, vcpus: vec![vcpu] }.sections().unwrap());
    sections
}

/// Rows of the tables: offset, field, type, bytes.
type Rows = Vec<[String; 4]>;

/// What the encoder says: by structure, version and rows; and how many bytes each has.
#[derive(Default)]
struct Encoded(BTreeMap<String, (u64, Rows)>);

impl Encoded {
    /// Adds a structure, and all within, and returns its length.
    fn add(&mut self, structure: &Value) -> u64 {
        let name = structure["vmsd_name"].as_str().unwrap();
        let (mut at, mut rows, mut fixed) = (0, Rows::new(), true);
        for field in structure["fields"].as_array().unwrap() {
            let field_name = field["name"].as_str().unwrap();
            let one = match field["struct"].is_object() {
                true => self.add(&field["struct"]),
                false => field["size"].as_u64().unwrap(),
            };
            assert_eq!(one, field["size"].as_u64().unwrap(), "{name}.{field_name}");
            let count = field["array_len"].as_u64();
            let length = one * count.unwrap_or(1);
            let inner = field["struct"]["vmsd_name"].as_str().or(field["type"].as_str()).unwrap();
            let unit = VARIABLE.iter().find(|(of, field, ..)| *of == name && *field == field_name);
            let (kind, bytes) = match (unit, count) {
                (Some((.., unit, items)), _) => {
                    assert_eq!(length % items, 0, "{name}.{field_name}");
                    (inner.to_owned(), format!("{} per {unit}", length / items))
                }
                (None, Some(count)) => (format!("{count} x {inner}"), length.to_string()),
                (None, None) => (inner.to_owned(), length.to_string()),
            };
            let offset = if fixed { at.to_string() } else { "follows".to_owned() };
            rows.push([offset, field_name.to_owned(), kind, bytes]);
            fixed &= unit.is_none();
            at += length;
        }
        for inner in structure["subsections"].as_array().into_iter().flatten() {
            let header = 1 + 1 + inner["vmsd_name"].as_str().unwrap().len() as u64 + 4;
            at += header + self.add(inner);
        }
        let version = structure["version"].as_u64().unwrap();
        let before = self.0.insert(name.to_owned(), (version, rows.clone()));
        assert!(before.is_none_or(|before| before == (version, rows)), "two structures of the name {name}");
        at
    }
}

/// The tables of the document: each belongs to the heading above it.
fn documented() -> BTreeMap<String, (u64, Rows)> {
    let mut tables = BTreeMap::new();
    let mut name = String::new();
    let (mut in_table, mut version) = (false, 0);
    for line in DOCUMENT.lines() {
        let cells: Vec<String> = line.trim_matches('|').split('|').map(|cell| cell.trim().replace("`", "")).collect();
        if let Some(heading) = line.strip_prefix('#') {
            name = heading.trim_start_matches('#').split('`').nth(1).unwrap_or_default().to_owned();
        } else if let Some(text) = line.strip_prefix("Version ") {
            version = text.split(|other: char| !other.is_ascii_digit()).next().unwrap().parse().unwrap();
        } else if line.starts_with("| offset |") {
            in_table = true;
            let before = tables.insert(name.clone(), (version, Rows::new()));
            assert!(before.is_none() && !name.is_empty(), "a table without a name, or twice: \"{name}\"");
        } else if !line.starts_with('|') {
            in_table = false;
        } else if in_table && !line.starts_with("|-") {
            tables.get_mut(&name).unwrap().1.push(cells[..4].to_vec().try_into().unwrap());
        }
    }
    tables
}

#[test]
fn the_document_says_what_the_encoder_does() {
    let mut encoded = Encoded::default();
    for section in reference() {
        let description: Value = serde_json::from_str(section.description()).unwrap();
        let length = encoded.add(&description);
        assert_eq!(length, section.body().len() as u64, "{}", section.name());
    }
    let documented = documented();
    let mut problems = String::new();
    for (name, (version, rows)) in &encoded.0 {
        if documented.get(name) != Some(&(*version, rows.clone())) {
            let table = rows.iter().map(|row| format!("| {} |\n", row.join(" | "))).collect::<String>();
            problems += &format!("`{name}`\n\nVersion {version}.\n\n{table}\n");
        }
    }
    assert!(problems.is_empty(), "the document should say of\n{problems}");
    let more: Vec<_> = documented.keys().filter(|name| !encoded.0.contains_key(*name)).collect();
    assert!(more.is_empty(), "nothing encodes {more:?}");
}

/// What [`VARIABLE`] names is there.
#[test]
fn each_variable_field_is_encoded() {
    let sections = reference();
    for (section, field, ..) in VARIABLE {
        let found = sections.iter().find(|found| found.name() == section).unwrap();
        assert!(found.description().contains(&format!("\"name\":\"{field}\"")), "{section}.{field}");
    }
}
