//! The memory that is served: its regions and their granules, who may change them when, and what the kernel is told.

pub(crate) mod area;
pub(crate) mod descriptor;
pub(crate) mod gate;
pub(crate) mod memory;
pub(crate) mod place;
pub(crate) mod poison;
pub(crate) mod region;
pub(crate) mod states;

pub(crate) use area::Area;
pub(crate) use memory::Memory;
pub(crate) use place::Place;
