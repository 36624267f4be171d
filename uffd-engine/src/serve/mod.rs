//! Reading page faults and events: how handlers wait, where they run, and what they do about discards.

pub(crate) mod doorbell;
pub(crate) mod events;
pub(crate) mod handler;
pub(crate) mod parked;
pub(crate) mod placement;
pub(crate) mod retry;
pub(crate) mod wait;
