//! Huge granules, put together from the pieces in which their content arrives.
//!
//! A granule of 2 MiB is installed at once or not at all. Where its content comes in one piece it is copied straight;
//! otherwise the pieces are gathered: in a buffer, or, for shared memory with an alias, in the file behind the memory
//! itself, which is mapped when it is whole.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use page_source::PageBytes;
use page_units::{ByteLen, HostAddr, PAGE_SIZE, PageSize};
use parking_lot::Mutex;

use crate::memory::Place;
use crate::sys::memory::{Scratch, write_alias};
use crate::sys::read;

const PAGES: usize = 512;

/// Which of the 512 pages are there.
#[derive(Clone, Debug, Default)]
struct Filled([u64; PAGES / 64]);

impl Filled {
    fn set(&mut self, first: usize, pages: usize) {
        for page in first..first + pages {
            self.0[page / 64] |= 1 << (page % 64);
        }
    }

    fn has(&self, page: usize) -> bool {
        self.0[page / 64] >> (page % 64) & 1 != 0
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    fn whole(&self) -> bool {
        self.0.iter().all(|&word| word == u64::MAX)
    }
}

#[derive(Debug)]
enum Gathered {
    Buffer(Scratch),
    Alias(HostAddr),
}

#[derive(Debug)]
struct Granule {
    filled: Filled,
    gathered: Gathered,
}

/// A granule that is whole.
#[derive(Debug)]
pub(crate) enum Whole {
    /// Here is its content.
    Buffer(Scratch),
    /// The file behind the memory holds it.
    InFile,
}

/// What has become of pages that were to be added to a granule.
#[derive(Debug)]
pub(crate) enum Added {
    /// They are there, and others are not.
    Part,
    /// They were the last ones.
    Whole(Whole),
    /// The granule needs them no more.
    NotTaken,
    /// Somebody else is at the granule: try again.
    Busy,
}

/// Why pages could not be added.
#[derive(Debug)]
pub(crate) enum NotAdded {
    /// There are too many granules, or there is no memory for one more.
    NoRoom(io::Error),
    /// The bytes, of a mapped file, can't be read.
    Unreadable,
}

/// The granules that are being put together.
#[derive(Debug)]
pub(crate) struct Staging {
    granules: Mutex<HashMap<Place, Arc<Mutex<Option<Granule>>>>>,
    spare: Mutex<Vec<Scratch>>,
    limit: usize,
    zeros: Scratch,
}

/// How many buffers are kept for the next granules.
const SPARE: usize = 4;

impl Staging {
    /// At most `limit` granules at a time are gathered in buffers.
    pub(crate) fn new(limit: usize) -> io::Result<Staging> {
        Ok(Staging {
            granules: Mutex::default(),
            spare: Mutex::default(),
            limit,
            zeros: Scratch::new(PageSize::HUGE.bytes())?,
        })
    }

    /// 2 MiB of zeros, to be copied by the kernel.
    pub(crate) fn zeros(&self) -> *const u8 {
        self.zeros.as_ptr()
    }

    /// Whether the granule is being put together: nobody may map what the file holds of it.
    pub(crate) fn gathering(&self, place: Place) -> bool {
        self.granules.lock().contains_key(&place)
    }

    /// Calls `claim` if the granule is not being put together, and cannot begin to be meanwhile.
    pub(crate) fn unless_gathering<T>(&self, place: Place, claim: impl FnOnce() -> T) -> Option<T> {
        let granules = self.granules.lock();
        (!granules.contains_key(&place)).then(claim)
    }

    /// Adds pages to a granule (zeros, if there are no bytes). Answers with the granule when it is whole. A page that
    /// is there already is not changed.
    ///
    /// `take` is called when nobody else adds to the granule: what it gives is held until the pages are there, or it says
    /// why they are not to be added.
    ///
    /// # Errors
    /// If there are too many granules, or no memory, or the bytes can't be read.
    pub(crate) fn add<T>(
        &self,
        place: Place,
        first: usize,
        pages: usize,
        bytes: Option<PageBytes<'_>>,
        alias: Option<HostAddr>,
        take: impl FnOnce() -> Result<T, Added>,
    ) -> Result<Added, NotAdded> {
        let entry = self.entry(place, alias).map_err(NotAdded::NoRoom)?;
        let mut slot = entry.lock();
        // Somebody else completed or dropped it while we waited for the lock.
        let Some(granule) = slot.as_mut() else { return Ok(Added::NotTaken) };
        let _taken = match take() {
            Ok(taken) => taken,
            Err(Added::NotTaken) => {
                // It was settled before it came here: nobody else would ever take it out again.
                let held = slot.take().map(|granule| granule.gathered);
                let mut granules = self.granules.lock();
                if granules.get(&place).is_some_and(|now| Arc::ptr_eq(now, &entry)) {
                    granules.remove(&place);
                }
                drop(granules);
                self.keep(held);
                return Ok(Added::NotTaken);
            }
            Err(why) => return Ok(why),
        };
        if let Gathered::Alias(at) = &granule.gathered
            && granule.filled.is_empty()
        {
            // Where none is left, an error now instead of a SIGBUS in a moment.
            read::populate_for_writing(*at, PageSize::HUGE.bytes()).map_err(|error| {
                let reason = "no huge page is left in the pool, or its cgroup allows no more";
                NotAdded::NoRoom(io::Error::new(error.kind(), format!("{reason} ({error})")))
            })?;
        }
        let page_len = ByteLen(PAGE_SIZE);
        let mut at = first;
        while at < first + pages {
            let missing = (at..first + pages).take_while(|&page| !granule.filled.has(page)).count();
            if missing == 0 {
                at += 1;
                continue;
            }
            let offset = ByteLen::of(at).0 * page_len.0;
            let len = ByteLen::of(missing).0 * page_len.0;
            let part = bytes.map(|bytes| bytes.slice(ByteLen(ByteLen::of(at - first).0 * page_len.0), ByteLen(len)));
            granule.gathered.put(ByteLen(offset), ByteLen(len), part).map_err(|_| NotAdded::Unreadable)?;
            granule.filled.set(at, missing);
            at += missing;
        }
        if !granule.filled.whole() {
            return Ok(Added::Part);
        }
        Ok(match slot.take().map(|granule| granule.gathered) {
            Some(Gathered::Buffer(buffer)) => Added::Whole(Whole::Buffer(buffer)),
            Some(Gathered::Alias(_)) => Added::Whole(Whole::InFile),
            None => Added::NotTaken,
        })
    }

    fn entry(&self, place: Place, alias: Option<HostAddr>) -> io::Result<Arc<Mutex<Option<Granule>>>> {
        let mut granules = self.granules.lock();
        if let Some(entry) = granules.get(&place) {
            return Ok(Arc::clone(entry));
        }
        let gathered = match alias {
            Some(alias) => Gathered::Alias(alias),
            None if granules.len() >= self.limit => {
                let reason = format!("more than {} huge pages are incomplete at a time", self.limit);
                return Err(io::Error::other(reason));
            }
            None => Gathered::Buffer(match self.spare.lock().pop() {
                Some(buffer) => buffer,
                None => Scratch::new(PageSize::HUGE.bytes())?,
            }),
        };
        let granule = Granule { filled: Filled::default(), gathered };
        let entry = Arc::new(Mutex::new(Some(granule)));
        granules.insert(place, Arc::clone(&entry));
        Ok(entry)
    }

    /// The granule is settled: a buffer may serve another.
    pub(crate) fn settled(&self, place: Place, buffer: Option<Scratch>) {
        let entry = self.granules.lock().remove(&place);
        let held = entry.and_then(|entry| entry.lock().take()).map(|granule| granule.gathered);
        self.keep(buffer.map(Gathered::Buffer).into_iter().chain(held));
    }

    /// Buffers that may serve other granules.
    fn keep(&self, unused: impl IntoIterator<Item = Gathered>) {
        let mut spare = self.spare.lock();
        for gathered in unused {
            if let Gathered::Buffer(buffer) = gathered
                && spare.len() < SPARE
            {
                spare.push(buffer);
            }
        }
    }
}

impl Gathered {
    fn put(&mut self, offset: ByteLen, len: ByteLen, bytes: Option<PageBytes<'_>>) -> io::Result<()> {
        match (self, bytes) {
            (Gathered::Buffer(buffer), Some(bytes)) => bytes.copy_to(buffer.bytes_mut(offset.get(), len.get())),
            (Gathered::Buffer(buffer), None) => {
                buffer.bytes_mut(offset.get(), len.get()).fill(0);
                Ok(())
            }
            (Gathered::Alias(alias), Some(bytes)) => write_alias(*alias + offset, &bytes),
            (Gathered::Alias(alias), None) => {
                let zeros = vec![0; len.get()];
                write_alias(*alias + offset, &PageBytes::from_slice(&zeros))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { area: 0, granule: 7 };

    #[test]
    fn pieces_in_any_order_make_a_whole() {
        let staging = Staging::new(1).unwrap();
        let bytes = vec![7u8; 2 << 20];
        let half = |n: usize| PageBytes::from_slice(&bytes[n << 20..(n + 1) << 20]);
        let add = |place, first, pages, bytes| staging.add(place, first, pages, bytes, None, || Ok(()));
        assert!(matches!(add(PLACE, 256, 256, Some(half(1))).unwrap(), Added::Part));
        assert!(staging.gathering(PLACE));
        let other = Place { granule: 8, ..PLACE };
        assert!(matches!(add(other, 0, 1, None), Err(NotAdded::NoRoom(_))), "bounded");
        assert!(matches!(add(PLACE, 0, 255, None).unwrap(), Added::Part));
        // Page 256 again: not changed.
        let Added::Whole(Whole::Buffer(mut buffer)) = add(PLACE, 255, 2, None).unwrap() else {
            panic!("it is whole now");
        };
        let all = buffer.bytes_mut(0, 2 << 20);
        assert!(all[..1 << 20].iter().all(|&b| b == 0) && all[1 << 20..].iter().all(|&b| b == 7));
        staging.settled(PLACE, Some(buffer));
        assert!(!staging.gathering(PLACE));
        assert!(matches!(add(other, 0, 1, None).unwrap(), Added::Part));
    }

    #[test]
    fn what_is_not_needed_leaves_nothing_behind() {
        let staging = Staging::new(1).unwrap();
        for _ in 0..3 {
            assert!(matches!(
                staging.add(PLACE, 0, 1, None, None, || Err::<(), _>(Added::NotTaken)).unwrap(),
                Added::NotTaken
            ));
            assert!(!staging.gathering(PLACE));
        }
    }
}
