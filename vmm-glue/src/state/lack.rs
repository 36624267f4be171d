//! What a snapshot needs and a host does not have.

use std::fmt;

/// Something that a guest's state needs and a host lacks. Displayed, it is what an error message says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Lack {
    /// A feature of the processor that the guest has seen.
    CpuFeature {
        /// The CPUID leaf.
        leaf: u32,
        /// Its subleaf.
        subleaf: u32,
        /// The register, in small letters.
        register: &'static str,
        /// The bit of it.
        bit: u32,
        /// What it is called, as `/proc/cpuinfo` does, if this crate knows.
        name: Option<&'static str>,
    },
    /// A component of the extended state that is switched on or used.
    ExtendedState {
        /// Its number: a bit of XCR0.
        component: u32,
    },
    /// Extended state beyond what this host's KVM takes.
    ExtendedStateLength {
        /// How many bytes the snapshot has.
        bytes: usize,
    },
    /// A model-specific register.
    Msr {
        /// Its number.
        index: u32,
    },
    /// A frequency of the time stamp counter.
    TscFrequency {
        /// What the guest has measured, in kHz.
        wanted: u32,
        /// What this host has, in kHz.
        has: u32,
    },
    /// An ability of KVM.
    Capability {
        /// As linux/kvm.h calls it.
        name: &'static str,
        /// What it is for.
        what: &'static str,
    },
    /// As many vCPUs.
    Vcpus {
        /// How many the guest has.
        wanted: usize,
        /// How many a VM can have here.
        most: usize,
    },
}

/// Component 18 of the extended state: AMX tile data, which a process has to ask for (arch_prctl(2)).
const TILE_DATA: u32 = 18;

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lack::CpuFeature { name: Some(name), .. } => write!(f, "CPU feature {name}"),
            Lack::CpuFeature { leaf, subleaf, register, bit, .. } => {
                write!(f, "CPU feature CPUID[{leaf:#x}.{subleaf}].{register} bit {bit}")
            }
            Lack::ExtendedState { component: TILE_DATA } => f.write_str(
                "extended state (XSAVE) component 18 (AMX tiles: the processor has none, or the process has not asked for \
                 them with ARCH_REQ_XCOMP_GUEST_PERM before its first vCPU)",
            ),
            Lack::ExtendedState { component } => write!(f, "extended state (XSAVE) component {component}"),
            Lack::ExtendedStateLength { bytes } => write!(f, "extended state (XSAVE) of {bytes} bytes"),
            Lack::Msr { index } => write!(f, "MSR {index:#x}"),
            Lack::TscFrequency { wanted, has } => {
                write!(f, "a TSC of {wanted} kHz (this host's runs at {has} kHz)")
            }
            Lack::Capability { name, what } => write!(f, "{name} ({what})"),
            Lack::Vcpus { wanted, most } => write!(f, "{wanted} vCPUs (this host allows {most})"),
        }
    }
}

/// Everything, for a message of one line.
pub(super) fn list(all: &[Lack]) -> String {
    all.iter().map(Lack::to_string).collect::<Vec<_>>().join(", ")
}
