//! Fixed-size slots in anonymous pages of their own, one arena a thread.

use std::cell::RefCell;
use std::ptr::NonNull;

use zeroize::Zeroize;

/// Bytes mapped at a time. Mapping in large pieces keeps the number of locked mappings small.
const REGION: usize = 64 * 1024;
/// Slots are multiples of this, and aligned to it: a cache line.
const GRAIN: usize = 64;

/// A piece of locked memory that is wiped and handed back when dropped.
pub(crate) struct Slot {
    start: NonNull<u8>,
    grains: usize,
}

impl Slot {
    /// A slot of at least `bytes` bytes, aligned to `align`.
    ///
    /// Panics when that is more than a region holds or when the system has no memory, as `Box::new` would.
    pub(crate) fn take(bytes: usize, align: usize) -> Slot {
        assert!(align <= GRAIN && bytes <= REGION, "too large for a locked slot");
        let grains = grains_of(bytes);
        let start = ARENA.with_borrow_mut(|arena| arena.take(grains));
        Slot { start, grains }
    }

    pub(crate) fn pointer(&self) -> NonNull<u8> {
        self.start
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: the slot is ours alone and `grains * GRAIN` bytes long; its content was dropped by the owner.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.grains * GRAIN) }.zeroize();
        // At thread exit the arena may be gone before its slots: the bytes are wiped, the address is lost.
        let _ = ARENA.try_with(|arena| arena.borrow_mut().give(self.start, self.grains));
    }
}

const fn grains_of(bytes: usize) -> usize {
    if bytes == 0 { 1 } else { bytes.div_ceil(GRAIN) }
}

const fn slots_in_region(grains: usize) -> usize {
    REGION / (grains * GRAIN)
}

/// Bytes that an arena maps for `count` slots of one size.
pub(crate) const fn mapped_for(bytes: usize, count: usize) -> usize {
    count.div_ceil(slots_in_region(grains_of(bytes))) * REGION
}

/// Regions are never unmapped: a backend's secrets come and go, and free slots are used again.
struct Arena {
    /// Free slots by size in grains.
    free: Vec<Vec<NonNull<u8>>>,
    regions: Vec<NonNull<u8>>,
}

thread_local! {
    static ARENA: RefCell<Arena> = const { RefCell::new(Arena { free: Vec::new(), regions: Vec::new() }) };
}

impl Arena {
    fn take(&mut self, grains: usize) -> NonNull<u8> {
        if self.free.len() <= grains {
            self.free.resize(grains + 1, Vec::new());
        }
        if self.free[grains].is_empty() {
            self.add_region(grains);
        }
        self.free[grains].pop().expect("a region holds at least one slot")
    }

    fn give(&mut self, slot: NonNull<u8>, grains: usize) {
        self.free[grains].push(slot);
    }

    fn add_region(&mut self, grains: usize) {
        let start = map_region();
        self.regions.push(start);
        let slots = slots_in_region(grains);
        // SAFETY: every offset lies within the region just mapped.
        let addresses = (0..slots).rev().map(|n| unsafe { start.add(n * grains * GRAIN) });
        self.free[grains].extend(addresses);
    }
}

fn map_region() -> NonNull<u8> {
    // SAFETY: a new private anonymous mapping touches no memory that exists.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            REGION,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert!(start != libc::MAP_FAILED, "out of memory for secrets");
    // Best effort: a low RLIMIT_MEMLOCK must not stop the database from reading its data.
    // SAFETY: the advice covers exactly the mapping made above.
    unsafe {
        libc::mlock(start, REGION);
        libc::madvise(start, REGION, libc::MADV_DONTDUMP);
        libc::madvise(start, REGION, libc::MADV_WIPEONFORK);
    }
    NonNull::new(start.cast()).expect("mmap does not return null")
}

/// Overwrites every region of this thread.
pub(crate) fn wipe_regions() {
    ARENA.with_borrow(|arena| {
        for region in &arena.regions {
            // SAFETY: regions stay mapped for the life of the process; the caller promises that nobody uses them.
            unsafe { std::slice::from_raw_parts_mut(region.as_ptr(), REGION) }.zeroize();
        }
    });
}

/// Bytes that this thread's arena has mapped.
#[cfg(test)]
pub(crate) fn mapped_bytes() -> usize {
    ARENA.with_borrow(|arena| arena.regions.len() * REGION)
}
