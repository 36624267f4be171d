//! The order in which frozen memory is swept: where somebody has written first.

use std::ops::Range;

use page_units::ByteLen;

use super::zone::Zone;

/// How much is copied, released and delivered at a time.
pub(crate) const PIECE: ByteLen = ByteLen(2 << 20);

/// All pieces of all zones, each once.
#[derive(Debug)]
pub(crate) struct Order {
    zones: Vec<Pieces>,
    /// Everything before this zone, and this piece of it, was swept.
    at: (usize, usize),
}

#[derive(Debug)]
struct Pieces {
    granules: usize,
    granules_in_one: usize,
    swept: Vec<bool>,
}

impl Pieces {
    fn granules(&self, piece: usize) -> Range<usize> {
        let first = piece * self.granules_in_one;
        first..(first + self.granules_in_one).min(self.granules)
    }
}

impl Order {
    pub(crate) fn new(zones: &[Zone]) -> Order {
        let of = |zone: &Zone| (zone.saved.len(), ByteLen(PIECE.0 / zone.granule.bytes().0).get().max(1));
        Order::of(zones.iter().map(of))
    }

    /// From how many granules a zone has, and how many of them a piece.
    fn of(zones: impl Iterator<Item = (usize, usize)>) -> Order {
        let pieces = |(granules, granules_in_one): (usize, usize)| Pieces {
            granules,
            granules_in_one,
            swept: vec![false; granules.div_ceil(granules_in_one)],
        };
        Order { zones: zones.map(pieces).collect(), at: (0, 0) }
    }

    /// The piece in which a granule lies, by zone and granules: `None` if it was swept before.
    pub(crate) fn around(&mut self, zone: usize, granule: usize) -> Option<(usize, Range<usize>)> {
        let pieces = &mut self.zones[zone];
        let piece = granule / pieces.granules_in_one;
        (!std::mem::replace(&mut pieces.swept[piece], true)).then(|| (zone, pieces.granules(piece)))
    }

    /// The first piece that was not swept.
    pub(crate) fn next(&mut self) -> Option<(usize, Range<usize>)> {
        loop {
            let (zone, piece) = self.at;
            let pieces = self.zones.get_mut(zone)?;
            match pieces.swept.get_mut(piece) {
                None => self.at = (zone + 1, 0),
                Some(swept) => {
                    self.at.1 += 1;
                    if !std::mem::replace(swept, true) {
                        return Some((zone, pieces.granules(piece)));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_piece_once_and_the_wanted_first() {
        let mut order = Order::of([(0, 4), (10, 4), (3, 1)].into_iter());
        let mut all = vec![order.next(), order.around(1, 9), order.around(2, 1), order.around(2, 1)];
        all.extend(std::iter::from_fn(|| Some(order.next())).take_while(Option::is_some));
        let expected = [Some((1, 0..4)), Some((1, 8..10)), Some((2, 1..2)), None];
        assert_eq!(all[..4], expected);
        assert_eq!(all[4..], [Some((1, 4..8)), Some((2, 0..1)), Some((2, 2..3))]);
        assert_eq!(order.around(1, 0), None);
        assert_eq!(order.next(), None);
    }
}
