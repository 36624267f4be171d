//! CPU features that a guest has seen and a host may lack.

use kvm_bindings::kvm_cpuid_entry2;

use super::Lack;

/// One register of feature bits. (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.)
struct Features {
    leaf: u32,
    subleaf: u32,
    register: &'static str,
    of: fn(&kvm_cpuid_entry2) -> u32,
    /// Names from bit 0 on, separated by spaces; `-` for a bit without a name. A `!` before the name: the bit shows
    /// what the guest has switched on or what the VMM provides, not what the host can do.
    names: &'static str,
}

const FEATURES: &[Features] = &[
    Features {
        leaf: 1,
        subleaf: 0,
        register: "ecx",
        of: |entry| entry.ecx,
        names: "sse3 pclmulqdq dtes64 !monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca \
                sse4_1 sse4_2 !x2apic movbe popcnt !tsc_deadline aes xsave !osxsave avx f16c rdrand !hypervisor",
    },
    Features {
        leaf: 1,
        subleaf: 0,
        register: "edx",
        of: |entry| entry.edx,
        names: "fpu vme de pse tsc msr pae mce cx8 !apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx \
                fxsr sse sse2 ss !ht tm ia64 pbe",
    },
    Features {
        leaf: 7,
        subleaf: 0,
        register: "ebx",
        of: |entry| entry.ebx,
        names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt \
                avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd \
                sha_ni avx512bw avx512vl",
    },
    Features {
        leaf: 7,
        subleaf: 0,
        register: "ecx",
        of: |entry| entry.ecx,
        names: "prefetchwt1 avx512vbmi umip pku !ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
                avx512_bitalg tme avx512_vpopcntdq - la57",
    },
    Features { leaf: 7, subleaf: 0, register: "edx", of: |entry| entry.edx, names: "" },
    Features { leaf: 7, subleaf: 1, register: "eax", of: |entry| entry.eax, names: "" },
    Features { leaf: 7, subleaf: 1, register: "ecx", of: |entry| entry.ecx, names: "" },
    Features { leaf: 7, subleaf: 1, register: "edx", of: |entry| entry.edx, names: "" },
    Features { leaf: 7, subleaf: 2, register: "edx", of: |entry| entry.edx, names: "" },
    // The parts of the extended state that can be switched on: in XCR0, and in IA32_XSS.
    Features { leaf: 0xd, subleaf: 0, register: "eax", of: |entry| entry.eax, names: "" },
    Features { leaf: 0xd, subleaf: 0, register: "edx", of: |entry| entry.edx, names: "" },
    Features { leaf: 0xd, subleaf: 1, register: "eax", of: |entry| entry.eax, names: "xsaveopt xsavec xgetbv1 xsaves" },
    Features { leaf: 0xd, subleaf: 1, register: "ecx", of: |entry| entry.ecx, names: "" },
    Features { leaf: 0xd, subleaf: 1, register: "edx", of: |entry| entry.edx, names: "" },
    Features {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: "ecx",
        of: |entry| entry.ecx,
        names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt \
                - lwp fma4",
    },
    Features { leaf: 0x8000_0001, subleaf: 0, register: "edx", of: |entry| entry.edx, names: "" },
    Features { leaf: 0x8000_0007, subleaf: 0, register: "edx", of: |entry| entry.edx, names: "- - - - - - - - invtsc" },
    Features {
        leaf: 0x8000_0008,
        subleaf: 0,
        register: "ebx",
        of: |entry| entry.ebx,
        names: "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - \
                stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no",
    },
    Features { leaf: 0x8000_0021, subleaf: 0, register: "eax", of: |entry| entry.eax, names: "" },
    Features { leaf: 0x4000_0001, subleaf: 0, register: "eax", of: |entry| entry.eax, names: "" },
];

/// The features in `wanted` that are not in `host`.
pub(super) fn missing(wanted: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<Lack> {
    let mut missing = Vec::new();
    for features in FEATURES {
        let matches = |entry: &&kvm_cpuid_entry2| entry.function == features.leaf && entry.index == features.subleaf;
        let bits = |entries: &[kvm_cpuid_entry2]| {
            entries.iter().filter(matches).fold(0, |all, entry| all | (features.of)(entry))
        };
        let lacking = bits(wanted) & !bits(host);
        if lacking == 0 {
            continue;
        }
        let names: Vec<&str> = features.names.split_whitespace().collect();
        for (bit, name) in (0..32).map(|bit| (bit, names.get(bit as usize))).filter(|(bit, _)| lacking >> bit & 1 == 1)
        {
            let name = name.copied().filter(|name| *name != "-");
            if !name.is_some_and(|name| name.starts_with('!')) {
                let &Features { leaf, subleaf, register, .. } = features;
                missing.push(Lack::CpuFeature { leaf, subleaf, register, bit, name });
            }
        }
    }
    missing
}

/// Which parts of the extended state can be switched on, as bits of XCR0; x87 and SSE always can.
pub(super) fn extended_state(entries: &[kvm_cpuid_entry2]) -> u64 {
    let leaf = entries.iter().find(|entry| entry.function == 0xd && entry.index == 0);
    leaf.map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax)) | 3
}

/// Whether the guest can have shadow stacks.
pub(super) fn has_shadow_stacks(entries: &[kvm_cpuid_entry2]) -> bool {
    entries.iter().any(|entry| entry.function == 7 && entry.index == 0 && entry.ecx >> 7 & 1 == 1)
}

/// The interface other than KVM's own that a vCPU shows, whose state is not saved. (The leaves that are left to
/// hypervisors: Linux Documentation/virt/kvm/x86/cpuid.rst, Hyper-V TLFS 2.4, Xen public/arch-x86/cpuid.h.)
pub(super) fn other_hypervisor(entries: &[kvm_cpuid_entry2]) -> Option<&'static str> {
    let signatures = entries.iter().filter(|entry| entry.function & 0xffff_00ff == 0x4000_0000);
    signatures.into_iter().find_map(|entry| {
        match [entry.ebx, entry.ecx, entry.edx].map(u32::to_le_bytes).as_flattened() {
            b"Microsoft Hv" => Some("Hyper-V"),
            b"XenVMMXenVMM" => Some("Xen"),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lacking_is_named() {
        let entry = |ebx| kvm_cpuid_entry2 { function: 7, ebx, ..kvm_cpuid_entry2::default() };
        let host = [entry(1 << 3)];
        assert!(missing(&[entry(1 << 3)], &host).is_empty());
        let named = |wanted| missing(&[wanted], &host).iter().map(Lack::to_string).collect::<Vec<_>>();
        let names = named(entry(1 << 16 | 1 << 22));
        assert_eq!(names, ["CPU feature avx512f", "CPU feature CPUID[0x7.0].ebx bit 22"]);
        let switched_on = kvm_cpuid_entry2 { function: 1, ecx: 1 << 27, ..kvm_cpuid_entry2::default() };
        assert!(missing(&[switched_on], &host).is_empty());
        let speculation = kvm_cpuid_entry2 { function: 0x8000_0008, ebx: 1 << 14, ..kvm_cpuid_entry2::default() };
        assert_eq!(named(speculation), ["CPU feature amd_ibrs"]);
    }
}
