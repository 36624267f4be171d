//! Reading page faults and events: how handlers wait, where they run, and what they do about discards.
//!
//! What serves a fault is known to it only as [`Served`](served::Served).

pub(crate) mod events;
pub(crate) mod handler;
pub(crate) mod placement;
pub(crate) mod served;
pub(crate) mod stop;
pub(crate) mod wait;
