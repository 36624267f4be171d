//! What memory may be after a failure: right, or an error.

use page_units::{PageIndex, PageRun};
use testkit::oracle::Oracle;

use super::Memory;

/// Each page is the oracle's, or an error. Answers how many are errors.
pub(crate) fn right_or_refused(memory: &Memory, oracle: &Oracle) -> u64 {
    right_or_refused_or_zero(memory, oracle, &[])
}

/// The same, but for pages (of any block) that were given back: they are zero, or an error.
pub(crate) fn right_or_refused_or_zero(memory: &Memory, oracle: &Oracle, given_back: &[PageIndex]) -> u64 {
    let mut refused = 0;
    for run in memory.layout.runs() {
        for page in run.iter() {
            let one = PageRun::single(run.block, page);
            match memory.read(run.block, page) {
                Ok(bytes) if given_back.contains(&page) => assert!(bytes.iter().all(|&byte| byte == 0), "{one}"),
                Ok(bytes) => assert!(bytes == oracle.run(one), "{one} has wrong bytes"),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{one}");
                    refused += 1;
                }
            }
        }
    }
    refused
}
