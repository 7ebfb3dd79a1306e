//! Values loaded into the processor's caches ahead of their use.
//!
//! A table's values are not in the caches when they are scanned, and waiting for memory, line after line, takes as long
//! as opening a short value. These are hints: they read nothing, and an address that holds nothing does no harm.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that are loaded together.
const LINE: usize = 64;
/// Most bytes of a value that are asked for; the processor goes on by itself.
const MOST: usize = 1024;
/// Rows of a page lie this close together.
const PAGE: usize = 8192;

/// Where the last value was, and where the one after it was thought to be. Hints: a thread more would make them worse, not wrong.
/// Finding a thread's own takes a call in a library that is loaded.
static LAST: AtomicUsize = AtomicUsize::new(0);
static EXPECTED: AtomicUsize = AtomicUsize::new(0);

/// Has the processor load a value, and the place where the next row's is if it lies as far from this one as this one does
/// from the last: rows of equal length lie in a page one beside the other.
#[inline]
pub fn value(bytes: &[u8]) {
    let at = bytes.as_ptr() as usize;
    let (last, expected) = (LAST.load(Ordering::Relaxed), EXPECTED.load(Ordering::Relaxed));
    let step = at.wrapping_sub(last);
    let next = at.wrapping_add(step);
    LAST.store(at, Ordering::Relaxed);
    EXPECTED.store(next, Ordering::Relaxed);
    let length = bytes.len().min(MOST);
    if at != expected {
        load(at, length);
    }
    if step.wrapping_add(PAGE) < 2 * PAGE {
        // With the row's own header, which comes before its columns.
        load(next.wrapping_sub(LINE), length + LINE);
    }
}

#[inline]
fn load(at: usize, length: usize) {
    for offset in (0..length).step_by(LINE) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint that never faults; SSE is part of x86_64.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(offset) as *const i8);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (at, offset);
    }
}
