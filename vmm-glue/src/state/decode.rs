//! State out of device sections. What this version does not know is refused by name, as QEMU refuses it.

use kvm_bindings::{kvm_cpuid_entry2, kvm_lapic_state, kvm_sregs, kvm_sregs2, kvm_xcr, kvm_xcrs};
use mapped_ram::Snapshot;
use vmstate::{SectionKind, Value};

use crate::snapshot::blueprint;

use super::encode::{VCPU, VERSION, VM};
use super::error::Call;
use super::record::{Field, Record};
use super::vm::CHIP;
use super::{Interrupts, MachineState, StateError, VcpuState, VmState};

/// More vCPUs than KVM allows on any host.
const MAX_VCPUS: u32 = 4096;

/// Refuses versions and subsections that are not known here, of whatever is in it too.
pub(crate) fn check(value: &Value<'_>, section: &str, subsections: &[&str]) -> Result<(), StateError> {
    if let Some(version) = value.version().filter(|version| *version > VERSION) {
        return Err(StateError::Unsupported(format!("version {version} of section \"{section}\"")));
    }
    check_members(value, section, subsections)
}

fn check_members(value: &Value<'_>, section: &str, subsections: &[&str]) -> Result<(), StateError> {
    for member in value.members() {
        if member.kind == "subsection" && !subsections.contains(&member.name) {
            return Err(StateError::Unsupported(format!("subsection \"{}\"", member.name)));
        }
        if let Some(version) = member.version().filter(|version| *version > VERSION) {
            let what = format!("version {version} of \"{}\" in section \"{section}\"", member.name);
            return Err(StateError::Unsupported(what));
        }
        check_members(member, section, subsections)?;
    }
    Ok(())
}

/// Refuses devices that nothing here would restore, but for those that are the caller's `own`.
fn no_others(snapshot: &Snapshot, vcpus: usize, own: &dyn Fn(&str, u32) -> bool) -> Result<(), StateError> {
    for section in snapshot.sections().iter().filter(|section| section.kind == SectionKind::Full) {
        let (name, instance) = (section.name.as_str(), section.instance as usize);
        let known = match name {
            VCPU => instance < vcpus,
            VM | blueprint::NAME => instance == 0,
            _ => own(name, section.instance),
        };
        if !known {
            return Err(StateError::Unsupported(format!("device \"{name}\" (instance {instance})")));
        }
    }
    Ok(())
}

fn groups<const N: usize>(value: &Value<'_>) -> Result<Vec<[u64; N]>, StateError> {
    let numbers = value.as_u64s()?;
    let (groups, rest) = numbers.as_chunks::<N>();
    if rest.is_empty() {
        Ok(groups.to_vec())
    } else {
        Err(StateError::Invalid(format!("\"{}\" has {} elements", value.name, numbers.len())))
    }
}

fn low(number: u64) -> Result<u32, StateError> {
    u32::try_from(number).map_err(|_| StateError::Invalid(format!("{number:#x} does not fit 32 bits")))
}

/// The field `field` of the subsection `subsection`, if there is such a subsection.
fn optional<T: Field>(value: &Value<'_>, subsection: &str, field: &str) -> Result<Option<T>, StateError> {
    value.get(subsection).map(|value| T::take(value.field(field)?)).transpose()
}

/// The same as `sregs`, with what only the newer structure has.
fn with_pdptrs(sregs: &kvm_sregs, value: &Value<'_>) -> Result<kvm_sregs2, StateError> {
    let kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = *sregs;
    let flags = u64::take(value.field("flags")?)?;
    let pdptrs = Field::take(value.field("pdptrs")?)?;
    Ok(kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        flags,
        pdptrs,
    })
}

impl VcpuState {
    /// The state of vCPU `id` out of its section.
    ///
    /// # Errors
    /// If something is missing, of another kind, or not known here.
    pub fn from_section(id: u32, value: &Value<'_>) -> Result<VcpuState, StateError> {
        const SUBSECTIONS: [&str; 5] =
            ["kvm-vcpu/sregs2", "kvm-vcpu/tsc_khz", "kvm-vcpu/tsc_offset", "kvm-vcpu/lapic", "kvm-vcpu/ssp"];
        check(value, VCPU, &SUBSECTIONS)?;
        let leaf = |leaf: [u64; 7]| -> Result<kvm_cpuid_entry2, StateError> {
            let [function, index, flags, eax, ebx, ecx, edx] = leaf.map(|word| word & u64::from(u32::MAX)).map(low);
            Ok(kvm_cpuid_entry2 {
                function: function?,
                index: index?,
                flags: flags?,
                eax: eax?,
                ebx: ebx?,
                ecx: ecx?,
                edx: edx?,
                ..kvm_cpuid_entry2::default()
            })
        };
        let cpuid = groups::<7>(value.field("cpuid")?)?.into_iter().map(leaf).collect::<Result<_, _>>()?;
        let xcr_values = groups::<2>(value.field("xcrs")?)?;
        let mut xcrs = kvm_xcrs { nr_xcrs: low(xcr_values.len() as u64)?, ..kvm_xcrs::default() };
        if xcr_values.len() > xcrs.xcrs.len() {
            return Err(StateError::Invalid(format!("{} extended control registers", xcr_values.len())));
        }
        for (xcr, [number, value]) in xcrs.xcrs.iter_mut().zip(xcr_values) {
            *xcr = kvm_xcr { xcr: low(number)?, value, ..kvm_xcr::default() };
        }
        let (xsave, partial) = value.field("xsave")?.bytes().as_chunks::<4>();
        if xsave.len() < 1024 || !partial.is_empty() {
            return Err(StateError::Invalid(format!("extended state of {} words", xsave.len())));
        }
        let msr = |[index, value]: [u64; 2]| low(index).map(|index| (index, value));
        let sregs = kvm_sregs::read(value.field("sregs")?)?;
        let sregs2 = value.get(SUBSECTIONS[0]).map(|value| with_pdptrs(&sregs, value)).transpose()?;
        Ok(VcpuState {
            id,
            cpuid,
            tsc_khz: optional(value, SUBSECTIONS[1], "tsc_khz")?,
            tsc_offset: optional(value, SUBSECTIONS[2], "tsc_offset")?,
            regs: Record::read(value.field("regs")?)?,
            sregs,
            sregs2,
            xcrs,
            xsave: xsave.iter().map(|word| u32::from_le_bytes(*word)).collect(),
            debug: Record::read(value.field("debug")?)?,
            events: Record::read(value.field("events")?)?,
            mp_state: Record::read(value.field("mp_state")?)?,
            msrs: groups::<2>(value.field("msrs")?)?.into_iter().map(msr).collect::<Result<_, _>>()?,
            lapic: value.get(SUBSECTIONS[3]).map(lapic).transpose()?,
            ssp: optional(value, SUBSECTIONS[4], "ssp")?,
        })
    }
}

fn lapic(value: &Value<'_>) -> Result<kvm_lapic_state, StateError> {
    let bytes = value.field("regs")?.bytes();
    let bytes: [u8; 1024] = bytes
        .try_into()
        .map_err(|_| StateError::Invalid(format!("a local APIC of {} bytes instead of 1024", bytes.len())))?;
    Ok(kvm_lapic_state { regs: bytes.map(u8::cast_signed) })
}

impl VmState {
    /// The state out of its section.
    ///
    /// # Errors
    /// If something is missing, of another kind, or not known here.
    pub fn from_section(value: &Value<'_>) -> Result<VmState, StateError> {
        check(value, VM, &["kvm-vm/irqchip", "kvm-vm/pit", "kvm-vm/clock", "kvm-vm/realtime"])?;
        let chips = |value: &Value<'_>| {
            let chip = |name| -> Result<Vec<u8>, StateError> {
                let bytes = value.field(name)?.bytes();
                if bytes.len() == CHIP {
                    return Ok(bytes.to_vec());
                }
                Err(StateError::Invalid(format!("\"{name}\" of {} bytes instead of {CHIP}", bytes.len())))
            };
            Ok::<_, StateError>(Interrupts {
                pic_master: chip("pic_master")?,
                pic_slave: chip("pic_slave")?,
                ioapic: chip("ioapic")?,
            })
        };
        let interrupts = value.get("kvm-vm/irqchip").map(chips).transpose()?;
        if value.field("irqchip")?.as_bool()? != interrupts.is_some() {
            return Err(StateError::Invalid("the subsection \"kvm-vm/irqchip\" is missing".into()));
        }
        let pit = value.get("kvm-vm/pit").map(Record::read).transpose()?;
        let clock = optional(value, "kvm-vm/clock", "clock")?;
        Ok(VmState { interrupts, pit, clock, realtime: optional(value, "kvm-vm/realtime", "realtime")? })
    }
}

impl MachineState {
    /// The state in a snapshot file.
    ///
    /// # Errors
    /// If the file has no such state (one that QEMU wrote has none), or it is not what it should be.
    pub fn load(snapshot: &Snapshot) -> Result<MachineState, StateError> {
        MachineState::load_with_devices(snapshot, |_, _| false)
    }

    /// The same, of a file that has device sections of the caller's `own` besides: told by name and instance.
    ///
    /// # Errors
    /// As [`load`](MachineState::load): devices that are not the caller's own are refused by name.
    pub fn load_with_devices(snapshot: &Snapshot, own: impl Fn(&str, u32) -> bool) -> Result<MachineState, StateError> {
        let read = |name, instance| snapshot.device(name, instance).call("reading the device state", None);
        let vm = read(VM, 0)?.ok_or_else(|| {
            let machine = &snapshot.configuration().machine;
            StateError::Unsupported(format!("a snapshot with KVM state (section \"{VM}\"); this is of a \"{machine}\""))
        })?;
        let vm = VmState::from_section(&vm.decode()?)?;
        let mut vcpus = Vec::new();
        for id in 0..MAX_VCPUS {
            let Some(device) = read(VCPU, id)? else { break };
            vcpus.push(VcpuState::from_section(id, &device.decode()?)?);
        }
        no_others(snapshot, vcpus.len(), &own)?;
        let state = MachineState { vm, vcpus };
        state.coherent()?;
        Ok(state)
    }

    /// Refuses a machine that can't have been saved: what it lacks would be that of a new one.
    fn coherent(&self) -> Result<(), StateError> {
        let invalid = |what: String| Err(StateError::Invalid(what));
        if self.vcpus.is_empty() {
            return invalid("it is of a machine without vCPUs".into());
        }
        let chips = self.vm.interrupts.is_some();
        if self.vm.pit.is_some() && !chips {
            return invalid("there is a timer (kvm-vm/pit), but no interrupt controllers".into());
        }
        match self.vcpus.iter().find(|vcpu| vcpu.lapic.is_some() != chips) {
            Some(vcpu) if chips => invalid(format!("vCPU {} has no local APIC (kvm-vcpu/lapic)", vcpu.id)),
            Some(vcpu) => invalid(format!("vCPU {} has a local APIC, but there is no I/O APIC", vcpu.id)),
            None => Ok(()),
        }
    }
}
