//! The unsafe part: pages go to a socket by address.
#![expect(unsafe_code, reason = "raw addresses go to the kernel, which checks them")]

use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use page_source::PageBytes;

/// The most parts of one message that the kernel takes (`UIO_MAXIOV`, include/uapi/linux/uio.h).
const PARTS: usize = 1024;
/// Parts of most messages.
const ROOM: usize = 128;

/// Sends the parts, one behind the other, as far as the kernel takes them. How many bytes it took.
///
/// # Errors
/// What `sendmsg` says: [`WouldBlock`](io::ErrorKind::WouldBlock) if there is no space; EFAULT if a page of a file is
/// gone, in which case nothing was taken.
pub(super) fn send<'a>(socket: BorrowedFd<'_>, parts: impl Iterator<Item = PageBytes<'a>>) -> io::Result<usize> {
    let vector = |part: PageBytes<'_>| libc::iovec {
        iov_base: part.as_kernel_ptr().cast_mut().cast(),
        iov_len: part.len().get(),
    };
    let mut vectors = Vec::with_capacity(ROOM);
    vectors.extend(parts.take(PARTS).map(vector));
    // SAFETY: a plain C struct, of which all zero is a valid value: no name, no data, no control message.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = vectors.as_mut_ptr();
    header.msg_iovlen = vectors.len() as _;
    // SAFETY: the header and its vectors live through the call. The kernel only reads what the vectors point to, checks
    // the addresses, and answers EFAULT where nothing is.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Tells the processor what is copied next. Its own prefetching ends with each page of 4 KiB, and the kernel copies page
/// by page: without this, every one of them begins with a wait for memory.
pub(super) fn prefetch(bytes: PageBytes<'_>) {
    let (start, length) = (bytes.as_kernel_ptr(), bytes.len().get());
    #[cfg(target_arch = "x86_64")]
    for at in (0..length).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: nothing is read that the program sees, and an address where nothing is does no harm.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, length);
}

/// How much memory the kernel holds for what was sent to a unix socket and not received: not less than the bytes.
pub(super) fn unreceived(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes: c_int = 0;
    // SAFETY: the kernel writes one `int` there (include/uapi/linux/sockios.h, `SIOCOUTQ`, which is `TIOCOUTQ`).
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(bytes).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use page_units::{ByteLen, FileOffset};

    use super::*;

    #[test]
    fn parts_arrive_in_a_row_and_are_counted_until_they_are_received() {
        let (near, mut far) = UnixStream::pair().unwrap();
        assert_eq!(unreceived(near.as_fd()).unwrap(), 0);
        let parts = [b"ab".as_slice(), b"", b"cde"].map(PageBytes::from_slice);
        assert_eq!(send(near.as_fd(), parts.into_iter()).unwrap(), 5);
        assert!(unreceived(near.as_fd()).unwrap() >= 5);
        let mut all = [0; 5];
        far.read_exact(&mut all).unwrap();
        assert_eq!(&all, b"abcde");
        assert_eq!(unreceived(near.as_fd()).unwrap(), 0);
    }

    #[test]
    fn what_is_gone_is_an_error_and_so_is_a_peer_that_is() {
        let (near, far) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let nowhere = PageBytes::from_mapped_file(std::ptr::null(), ByteLen(4096), &file, FileOffset(0));
        prefetch(nowhere);
        let error = send(near.as_fd(), [PageBytes::from_slice(b"ab"), nowhere].into_iter()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        assert_eq!(unreceived(near.as_fd()).unwrap(), 0);
        drop(far);
        let error = send(near.as_fd(), [PageBytes::from_slice(b"ab")].into_iter()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
