//! Decoded frames. Each is decoded once while somebody wants it, however many threads ask.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use page_units::ByteLen;
use parking_lot::{Condvar, Mutex};

#[derive(Debug)]
pub(crate) struct FrameCache {
    limit: ByteLen,
    state: Mutex<State>,
    decoded: Condvar,
}

#[derive(Debug, Default)]
struct State {
    frames: HashMap<u64, Slot>,
    /// Which became ready first.
    order: VecDeque<u64>,
    bytes: ByteLen,
    /// A buffer that nobody uses any more.
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
enum Slot {
    Decoding,
    Ready(Arc<Vec<u8>>),
}

impl FrameCache {
    /// A cache of at most `limit` bytes, not counting what is in use.
    pub(crate) fn new(limit: ByteLen) -> FrameCache {
        FrameCache { limit, state: Mutex::default(), decoded: Condvar::new() }
    }

    /// The content of frame `number`: what is kept of it, or what `decode` puts into the buffer that it is given. Waits
    /// while another thread decodes the same frame.
    pub(crate) fn get<E>(
        &self,
        number: u64,
        decode: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<Arc<Vec<u8>>, E> {
        let mut state = self.state.lock();
        loop {
            match state.frames.get(&number) {
                Some(Slot::Ready(content)) => return Ok(Arc::clone(content)),
                Some(Slot::Decoding) => self.decoded.wait(&mut state),
                None => break,
            }
        }
        state.frames.insert(number, Slot::Decoding);
        let mut buffer = state.spare.pop().unwrap_or_default();
        drop(state);
        let mut claim = Claim { cache: self, number, content: None };
        decode(&mut buffer)?;
        let content = Arc::new(buffer);
        claim.content = Some(Arc::clone(&content));
        Ok(content)
    }
}

/// A frame that one thread decodes. When it is dropped, the others find the content, or that they have to try.
struct Claim<'a> {
    cache: &'a FrameCache,
    number: u64,
    content: Option<Arc<Vec<u8>>>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.cache.state.lock();
        state.frames.remove(&self.number);
        if let Some(content) = self.content.take() {
            state.keep(self.number, content, self.cache.limit);
        }
        self.cache.decoded.notify_all();
    }
}

impl State {
    fn keep(&mut self, number: u64, content: Arc<Vec<u8>>, limit: ByteLen) {
        self.bytes += ByteLen::of(content.len());
        self.frames.insert(number, Slot::Ready(content));
        self.order.push_back(number);
        while self.bytes > limit
            && let Some(oldest) = self.order.pop_front()
        {
            let Some(Slot::Ready(content)) = self.frames.remove(&oldest) else { continue };
            self.bytes = self.bytes - ByteLen::of(content.len());
            // One spare buffer for each thread that decodes is enough; there are few.
            if let Some(buffer) = Arc::into_inner(content)
                && self.spare.len() < 4
            {
                self.spare.push(buffer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn fill(value: u8, length: usize) -> impl FnOnce(&mut Vec<u8>) -> Result<(), Infallible> {
        move |buffer| {
            buffer.clear();
            buffer.resize(length, value);
            Ok(())
        }
    }

    #[test]
    fn threads_that_want_one_frame_decode_it_once() {
        let (cache, decoded) = (FrameCache::new(ByteLen(1 << 20)), AtomicUsize::new(0));
        let inside = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                cache.get(7, |buffer| {
                    inside.wait();
                    decoded.fetch_add(1, Ordering::Relaxed);
                    fill(3, 10)(buffer)
                })
            });
            inside.wait();
            let again = || {
                decoded.fetch_add(1, Ordering::Relaxed);
                Ok::<(), Infallible>(())
            };
            assert_eq!(*cache.get(7, |_| again()).unwrap(), [3; 10]);
            assert_eq!(*first.join().unwrap().unwrap(), [3; 10]);
        });
        assert_eq!(decoded.into_inner(), 1);
    }

    #[test]
    fn a_failure_is_not_kept_and_hides_nothing() {
        let cache = FrameCache::new(ByteLen(100));
        assert_eq!(cache.get(1, |_| Err("unreadable")).unwrap_err(), "unreadable");
        assert_eq!(*cache.get(1, fill(5, 4)).unwrap(), [5; 4]);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            cache.get::<Infallible>(2, |_| panic!("on purpose"))
        }));
        assert!(panicked.is_err());
        assert_eq!(*cache.get(2, fill(6, 4)).unwrap(), [6; 4]);
    }

    #[test]
    fn it_holds_no_more_than_its_limit() {
        let cache = FrameCache::new(ByteLen(100));
        for number in 0..50 {
            let content = cache.get(number, fill(1, 30)).unwrap();
            assert_eq!(content.len(), 30);
        }
        let state = cache.state.lock();
        assert!(state.bytes <= ByteLen(100) && state.frames.len() == 3 && state.order.len() == 3);
        assert!(state.spare.len() <= 4);
    }
}
