//! What can go wrong with a guest's state.

use std::io;

use vmstate::{BuildError, StreamError, ValueError, WalkError};

/// Why state can't be taken, or put back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A KVM call failed.
    #[error("{call} failed{}: {error}", of(*vcpu))]
    Kvm {
        /// Which.
        call: &'static str,
        /// On which vCPU, if on one.
        vcpu: Option<u32>,
        /// What KVM said.
        #[source]
        error: io::Error,
    },
    /// The snapshot needs something that this host does not have.
    #[error("this host lacks what the snapshot needs: {0}")]
    Unsupported(String),
    /// KVM refused the value of a model-specific register.
    #[error("KVM refuses to set MSR {index:#x} of vCPU {vcpu} to {value:#x}")]
    Msr {
        /// The register.
        index: u32,
        /// The vCPU.
        vcpu: u32,
        /// The value.
        value: u64,
    },
    /// The snapshot's state is incomplete or contradicts itself.
    #[error("the snapshot's device state is unusable: {0}")]
    Invalid(String),
    /// The VM is not like the one that was saved.
    #[error("the VM does not fit the snapshot: {0}")]
    Mismatch(String),
    /// The bytes of a section are not what its description says.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// A value in a section is missing or of another kind.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The stream is damaged.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The state can't be encoded.
    #[error(transparent)]
    Build(#[from] BuildError),
}

fn of(vcpu: Option<u32>) -> String {
    vcpu.map(|vcpu| format!(" on vCPU {vcpu}")).unwrap_or_default()
}

/// Names the call that failed.
pub(super) trait Call<T> {
    fn call(self, call: &'static str, vcpu: impl Into<Option<u32>>) -> Result<T, StateError>;
}

impl<T, E: Into<io::Error>> Call<T> for Result<T, E> {
    fn call(self, call: &'static str, vcpu: impl Into<Option<u32>>) -> Result<T, StateError> {
        self.map_err(|error| StateError::Kvm { call, vcpu: vcpu.into(), error: error.into() })
    }
}
