//! Where a granule is.

/// A granule of an area: the number of the area, and the granule's number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) area: usize,
    pub(crate) granule: usize,
}
