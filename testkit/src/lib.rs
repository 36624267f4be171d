//! The parts that the tests of this workspace share (being written).
