//! The least that each task can take: the system calls it can't do without, and nothing else.

pub mod copy;
pub mod eager;
pub mod fault;
pub mod freeze;
pub mod kvm;
