//! Any state of the registers survives: into a VM, out of it, through the encoding, into another VM, and out again.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::Signals;
use kvm_ioctls::Kvm;
use page_units::FileOffset;
use proptest::prelude::*;
use testkit::guest::{GuestConfig, GuestImage, Privilege};
use testkit::require;
use vmm_glue::{
    Backing, GuestRam, Host, MachineConfig, MachineState, NewVm, RestoreOptions, Restored, SaveOptions, SavedVm,
    StateError, VcpuOptions, VcpuState, Vcpus, VmState,
};
use vmstate::{Section, VmDesc, walk};

fn machine(kvm: &Kvm, config: MachineConfig) -> NewVm {
    let ram = Arc::new(GuestRam::allocate(&common::specs(), Backing::Anonymous).unwrap());
    let vcpus = u8::try_from(config.vcpus).unwrap();
    let image = GuestImage::build(ram.memory(), GuestConfig { privilege: Privilege::User, vcpus });
    let machine = NewVm::new(kvm, ram, config).unwrap();
    for (number, vcpu) in (0..).zip(machine.vcpus()) {
        image.boot_vcpu(kvm, vcpu, number);
    }
    machine
}

fn save(machine: &NewVm, host: &Host) -> MachineState {
    let vcpus: Vec<_> = machine.vcpus().iter().collect();
    let config = machine.config();
    MachineState::save(machine.vm(), &vcpus, host, config.irqchip, config.pit).unwrap()
}

fn restore(state: &MachineState, machine: &NewVm, host: &Host) -> Result<Restored, StateError> {
    let vcpus: Vec<_> = machine.vcpus().iter().collect();
    state.restore(machine.vm(), &vcpus, host)
}

/// Through the encoding.
fn recoded(state: &MachineState) -> MachineState {
    let sections = state.sections().unwrap();
    let decode = |section: &Section, with: &mut dyn FnMut(&vmstate::Value<'_>)| {
        let desc = VmDesc::parse(section.description_of_one().as_bytes()).unwrap();
        with(&walk(section.body(), FileOffset(0), &desc.devices()[0]).unwrap());
    };
    let mut state = MachineState::default();
    decode(&sections[0], &mut |value| state.vm = VmState::from_section(value).unwrap());
    for (id, section) in (0..).zip(&sections[1..]) {
        decode(section, &mut |value| state.vcpus.push(VcpuState::from_section(id, value).unwrap()));
    }
    state
}

/// An address that the processor takes.
fn canonical(address: u64) -> u64 {
    ((address << 16).cast_signed() >> 16).cast_unsigned()
}

/// What a test puts into a vCPU, out of random words. Everything in it is a state that a processor can be in.
fn randomise(state: &mut VcpuState, words: &[u64], irqchip: bool) {
    let mut words = words.iter().copied().cycle();
    let mut word = || words.next().unwrap_or(0);
    {
        let regs = &mut state.regs;
        for register in [
            &mut regs.rax,
            &mut regs.rbx,
            &mut regs.rcx,
            &mut regs.rdx,
            &mut regs.rsi,
            &mut regs.rdi,
            &mut regs.rsp,
            &mut regs.rbp,
            &mut regs.r8,
            &mut regs.r9,
            &mut regs.r10,
            &mut regs.r11,
            &mut regs.r12,
            &mut regs.r13,
            &mut regs.r14,
            &mut regs.r15,
        ] {
            *register = word();
        }
        regs.rip = canonical(word());
        regs.rflags = (word() & 0x0cd5) | 2;
    }
    state.sregs.cr2 = word();
    state.sregs.cr8 = word() & 15;
    state.sregs.fs.base = canonical(word());
    state.sregs.gs.base = canonical(word());
    if let Some(sregs) = &mut state.sregs2 {
        (sregs.cr2, sregs.cr8) = (state.sregs.cr2, state.sregs.cr8);
        (sregs.fs, sregs.gs) = (state.sregs.fs, state.sregs.gs);
    }
    // x87, SSE and AVX: registers from byte 32 to 416, the upper halves from 576 to 832.
    state.xcrs.xcrs[0].value = 7;
    for index in (40..104).chain(144..208) {
        state.xsave[index] = u32::try_from(word() >> 32).unwrap();
    }
    state.xsave[128] |= 7;
    for register in &mut state.debug.db {
        *register = canonical(word());
    }
    state.debug.dr6 = 0xffff_0ff0 | (word() & 0xf);
    state.debug.dr7 = 0x400 | (word() & 0x3);
    state.events.nmi.masked = u8::try_from(word() & 1).unwrap();
    state.events.interrupt.shadow = u8::try_from(word() & 3).unwrap() & 1;
    let msrs = [
        (0xc000_0102, canonical(word())), // kernel GS base
        (0xc000_0081, word()),            // STAR
        (0xc000_0082, canonical(word())), // LSTAR
        (0xc000_0083, canonical(word())), // CSTAR
        (0xc000_0084, word() >> 32),      // SFMASK
        (0xc000_0103, word() >> 32),      // TSC_AUX
        (0x174, word() & 0xffff),         // SYSENTER_CS
        (0x175, canonical(word())),       // SYSENTER_ESP
        (0x176, canonical(word())),       // SYSENTER_EIP
        (0x277, 0x0007_0406_0007_0406),   // PAT
        // The memory type ranges and the machine-check banks, which KVM does not list.
        (0x200, (word() & 0xf_f000) | 6),
        (0x201, (0xf_f000 & !(word() & 0xf000)) | 0x800),
        (0x250, 0x0606_0000_0505_0404),
        (0x26f, 0x0606_0606_0505_0101),
        (0x2ff, 0xc00 | ((word() & 1) * 6)),
        (0x404, if word() & 1 == 0 { 0 } else { u64::MAX }),
        (0x17a, word() & 4),
    ];
    for (index, value) in &mut state.msrs {
        if let Some((_, random)) = msrs.iter().find(|(found, _)| found == index) {
            *value = *random;
        }
    }
    if let (true, Some(lapic)) = (irqchip, &mut state.lapic) {
        let mut set = |at: usize, value: u32| {
            for (byte, value) in lapic.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
                *byte = value.cast_signed();
            }
        };
        // The processor priority follows from the task priority.
        set(0x80, u32::try_from(state.sregs.cr8 << 4).unwrap());
        set(0xa0, u32::try_from(state.sregs.cr8 << 4).unwrap());
        set(0xf0, 0x100 | u32::try_from(word() & 0xff).unwrap());
        set(0x320, 0x1_0000 | u32::try_from(word() & 0xff).unwrap());
        set(0x350, 0x1_0000 | u32::try_from(word() & 0xff).unwrap());
        state.mp_state.mp_state = if word() & 1 == 0 { 0 } else { 3 };
    }
}

fn survives(words: &[u64], config: MachineConfig) {
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let first = machine(&kvm, config);
    let mut wanted = save(&first, &host);
    for (vcpu, words) in wanted.vcpus.iter_mut().zip(words.chunks(words.len() / 2)) {
        randomise(vcpu, words, config.irqchip);
    }
    if let Some(chips) = &mut wanted.vm.interrupts {
        // An entry of the I/O APIC's redirection table: masked, edge, this vector.
        chips.ioapic[24 + 8 * 4..24 + 8 * 5].copy_from_slice(&(0x1_0000 | (words[0] & 0xef) | 0x10).to_le_bytes());
    }
    if let Some(pit) = &mut wanted.vm.pit {
        // The speaker's channel makes no interrupts.
        pit.channels[2].count = u32::try_from(words[1] & 0x7fff).unwrap() + 2;
        pit.channels[2].mode = 3;
        pit.channels[2].rw_mode = 3;
    }
    restore(&wanted, &first, &host).unwrap();
    let saved = save(&first, &host);
    for (wanted, saved) in wanted.vcpus.iter_mut().zip(&saved.vcpus) {
        // What it shows follows from what is switched on: the size of the extended state, OSXSAVE.
        wanted.cpuid.clone_from(&saved.cpuid);
    }
    common::assert_same_state(&saved, &wanted);
    let recoded = recoded(&saved);
    assert_eq!(recoded, saved);
    // What few processors have.
    let mut rare = saved.clone();
    rare.vcpus[0].ssp = Some(words[2]);
    assert_eq!(self::recoded(&rare), rare);
    host.check(&kvm, &recoded).unwrap();
    let second = machine(&kvm, config);
    let begun = Instant::now();
    restore(&recoded, &second, &host).unwrap();
    let again = save(&second, &host);
    common::assert_same_state(&saved, &again);
    goes_on(&saved, &again, begun.elapsed());
    survives_in_a_file(first, &saved, &kvm, &host, words[0] & 1 == 0);
}

/// The same through a snapshot, and into a machine that was just created: there less is put back than in one that was
/// used before.
fn survives_in_a_file(machine: NewVm, state: &MachineState, kvm: &Kvm, host: &Host, on_demand: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    let bus = || Arc::new(Signals::default());
    let paused = VcpuOptions::default().paused();
    let vcpus = Vcpus::start(machine, bus(), paused).unwrap();
    vmm_glue::save(&vcpus, host, &path, &SaveOptions::default()).unwrap();
    let saved = SavedVm::open(&path, kvm, host).unwrap();
    let options = RestoreOptions::default().paused();
    let vm = match on_demand {
        true => saved.restore_on_demand(kvm, host, bus(), &options, |engine| engine),
        false => saved.restore_eager(kvm, host, bus(), &options),
    };
    let again = vm.unwrap().vcpus().save_state(host).unwrap();
    common::assert_same_state(state, &again);
}

/// Time did not stand still, and did not jump: the clock, and the time stamp counters, in step.
fn goes_on(saved: &MachineState, again: &MachineState, took: Duration) {
    let most = (took + Duration::from_secs(1)).as_secs_f64();
    if let (Some(before), Some(after)) = (saved.vm.clock, again.vm.clock) {
        let passed = after.checked_sub(before).expect("the clock goes forward");
        assert!(passed as f64 / 1e9 <= most, "{passed} ns in {took:?}");
    }
    for (before, after) in saved.vcpus.iter().zip(&again.vcpus) {
        let khz = f64::from(before.tsc_khz.unwrap());
        let passed = after.msr(0x10).unwrap().checked_sub(before.msr(0x10).unwrap()).expect("the counter goes forward");
        assert!(passed as f64 / khz / 1e3 <= most, "{passed} ticks in {took:?}");
    }
    if let ([first, second], [one, two]) = (&saved.vcpus[..], &again.vcpus[..])
        && let (Some(a), Some(b), Some(c), Some(d)) =
            (first.tsc_offset, second.tsc_offset, one.tsc_offset, two.tsc_offset)
    {
        assert_eq!(a.wrapping_sub(b), c.wrapping_sub(d), "the counters are as far apart as before");
    }
}

#[test]
fn random_states_survive() {
    require!(Kvm);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 32,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let strategy = (prop::collection::vec(any::<u64>(), 96), 1..=2u32, any::<bool>());
    runner
        .run(&strategy, |(words, vcpus, full)| {
            survives(&words, if full { MachineConfig::full(vcpus) } else { MachineConfig::bare(vcpus) });
            Ok(())
        })
        .unwrap();
}

#[test]
fn what_this_host_lacks_is_refused_by_name() {
    require!(Kvm);
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let first = machine(&kvm, MachineConfig::bare(1));
    let state = save(&first, &host);
    host.check(&kvm, &state).unwrap();

    let mut future = state.clone();
    let leaf = future.vcpus[0].cpuid.iter_mut().find(|leaf| leaf.function == 1).unwrap();
    leaf.ecx |= 1 << 18; // direct cache access, which no guest has
    let error = host.check(&kvm, &future).unwrap_err();
    assert!(error.to_string().contains("CPU feature dca"), "{error}");

    let mut faster = state.clone();
    faster.vcpus[0].tsc_khz = faster.vcpus[0].tsc_khz.map(|khz| khz * 2);
    let has = first.vcpus()[0].get_tsc_khz().unwrap();
    let error = host.check(&kvm, &faster).unwrap_err();
    assert!(error.to_string().contains("a TSC of"), "before anything starts: {error}");
    let error = restore(&faster, &first, &host).unwrap_err();
    assert!(matches!(&error, StateError::Unsupported(what) if what.contains("TSC")), "{error}");
    assert_eq!(first.vcpus()[0].get_tsc_khz().unwrap(), has, "it was put back");

    let mut other = state.clone();
    other.vcpus[0].msrs.push((0xdead_beef, 1));
    let error = host.check(&kvm, &other).unwrap_err();
    assert!(error.to_string().contains("MSR 0xdeadbeef"), "{error}");

    let mut more = state.clone();
    more.vcpus.push(state.vcpus[0].clone());
    assert!(matches!(restore(&more, &first, &host), Err(StateError::Mismatch(_))));
}

#[test]
fn unknown_versions_and_subsections_are_refused_by_name() {
    let refused = |section: Section| {
        let desc = VmDesc::parse(section.description_of_one().as_bytes()).unwrap();
        let value = walk(section.body(), FileOffset(0), &desc.devices()[0]).unwrap();
        VmState::from_section(&value).unwrap_err().to_string()
    };
    let newer = Section::builder("kvm-vm", 0, 2).bool("irqchip", false).build().unwrap();
    assert!(refused(newer).contains("version 2 of section \"kvm-vm\""));
    let inside = Section::builder("kvm-vm", 0, 1)
        .bool("irqchip", false)
        .subsection("kvm-vm/clock", 2, |to| to.u64("clock", 1))
        .build()
        .unwrap();
    let error = refused(inside);
    assert!(error.contains("version 2 of \"kvm-vm/clock\""), "{error}");
    let more = Section::builder("kvm-vm", 0, 1)
        .bool("irqchip", false)
        .subsection("kvm-vm/hyperv", 1, |to| to.u8("on", 1))
        .build()
        .unwrap();
    assert!(refused(more).contains("subsection \"kvm-vm/hyperv\""));
    let less = Section::builder("kvm-vm", 0, 1).bool("irqchip", true).build().unwrap();
    assert!(refused(less).contains("kvm-vm/irqchip"));
}
