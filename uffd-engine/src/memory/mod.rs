//! The memory that is served: its regions and their granules, who may change them when, and what the kernel is told.
//!
//! It knows neither a source nor a freeze. What the gate must ask of a freeze is [`Holder`](holder::Holder), what a
//! freeze must ask of a load is [`Fetch`](holder::Fetch).

pub(crate) mod area;
pub(crate) mod backing;
pub(crate) mod descriptor;
pub(crate) mod fill;
pub(crate) mod gate;
pub(crate) mod holder;
pub(crate) mod huge_file;
pub(crate) mod mapping;
pub(crate) mod memory;
pub(crate) mod own_pages;
pub(crate) mod page_table;
pub(crate) mod place;
pub(crate) mod poison;
pub(crate) mod region;
pub(crate) mod retry;
pub(crate) mod states;
pub(crate) mod view;

pub(crate) use area::Area;
pub(crate) use memory::Memory;
pub(crate) use place::Place;
