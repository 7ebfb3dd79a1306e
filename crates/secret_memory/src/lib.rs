//! Memory for secrets.
//!
//! [`Locked<T>`] is a box whose bytes live in pages that are locked into memory where the system allows it, left
//! out of core dumps, read as zero in a forked child, and are overwritten when the box is dropped.
//! [`burn_stack`] overwrites what deeper calls left on the stack.
//!
//! This crate holds the project's only memory tricks, so that `vod_tender_core` can forbid `unsafe`.

mod arena;

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use arena::Slot;

/// A box for a secret of type `T`.
///
/// The box belongs to the thread that made it: it is neither `Send` nor `Sync`, and so is what holds it.
pub struct Locked<T> {
    slot: Slot,
    // `NonNull` keeps the auto traits of a raw pointer; `T` is owned.
    owns: PhantomData<(NonNull<T>, T)>,
}

impl<T> Locked<T> {
    /// Moves `value` into locked memory. The move may leave a copy on the stack: for types that are cheap to fill
    /// in place use [`Locked::filled`], otherwise call [`burn_stack`] afterwards.
    pub fn new(value: T) -> Self {
        let slot = Slot::take(size_of::<T>(), align_of::<T>());
        // SAFETY: the slot is at least as large and as aligned as T, and nobody else points to it.
        unsafe { slot.pointer().cast::<T>().write(value) };
        Locked { slot, owns: PhantomData }
    }
}

impl<const N: usize> Locked<[u8; N]> {
    /// `N` zero bytes in locked memory, filled in place by `fill`. Nothing is kept when `fill` fails.
    pub fn filled<E>(fill: impl FnOnce(&mut [u8; N]) -> Result<(), E>) -> Result<Self, E> {
        let slot = Slot::take(N, 1);
        // SAFETY: the slot holds at least N bytes and nobody else points to it; zero bytes are a valid array.
        unsafe { slot.pointer().write_bytes(0, N) };
        let mut locked = Locked { slot, owns: PhantomData };
        fill(&mut locked)?;
        Ok(locked)
    }
}

impl<T> Deref for Locked<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the constructors initialised the slot with a T, which only `self` reaches.
        unsafe { self.slot.pointer().cast::<T>().as_ref() }
    }
}

impl<T> DerefMut for Locked<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { self.slot.pointer().cast::<T>().as_mut() }
    }
}

impl<T> Drop for Locked<T> {
    fn drop(&mut self) {
        // SAFETY: the slot holds an initialised T that nobody uses after this; the slot is wiped by its own drop.
        unsafe { self.slot.pointer().cast::<T>().drop_in_place() };
    }
}

impl<T> fmt::Debug for Locked<T> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Locked(..)")
    }
}

/// Bytes of memory that `count` boxes of type `T` lock.
pub const fn locked_bytes<T>(count: usize) -> usize {
    arena::mapped_for(size_of::<T>(), count)
}

/// Overwrites every secret of this thread, wherever it is held.
///
/// # Safety
/// No [`Locked`] of this thread is used afterwards, nor dropped if its type's destructor looks at its bytes. For a
/// process that is about to end.
pub unsafe fn wipe_all() {
    arena::wipe_regions();
}

/// Bytes of stack that [`burn_stack`] overwrites: more than a key expansion, an HKDF or the decoding of a key
/// service's answer uses below its caller.
const BURN: usize = 48 * 1024;

/// Overwrites the stack below the caller, where calls that have returned may have left copies of a secret.
#[inline(never)]
pub fn burn_stack() {
    let mut below = [0u8; BURN];
    zeroize::Zeroize::zeroize(&mut below[..]);
    std::hint::black_box(&below);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_secret_is_overwritten() {
        let locked = Locked::<[u8; 32]>::filled(|bytes| {
            bytes.fill(0xA5);
            Ok::<_, ()>(())
        })
        .unwrap();
        let address = locked.as_ptr();
        drop(locked);
        // SAFETY: arena pages stay mapped for the life of the process; this reads bytes of a free slot.
        let left = unsafe { std::slice::from_raw_parts(address, 32) };
        assert!(left.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_failed_fill_leaves_nothing() {
        let mut address = std::ptr::null();
        let failed = Locked::<[u8; 32]>::filled(|bytes| {
            bytes.fill(0x5A);
            address = bytes.as_ptr();
            Err("no")
        });
        assert!(failed.is_err());
        // SAFETY: as above.
        let left = unsafe { std::slice::from_raw_parts(address, 32) };
        assert!(left.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn slots_do_not_overlap_and_are_used_again() {
        let boxes: Vec<_> = (0..5000u32).map(|n| Locked::new([n; 40])).collect();
        assert!(boxes.iter().enumerate().all(|(n, held)| held.iter().all(|&x| x == n as u32)));
        let before = arena::mapped_bytes();
        assert_eq!(locked_bytes::<[u32; 40]>(5000), before);
        drop(boxes);
        let again: Vec<_> = (0..5000u32).map(|n| Locked::new([n; 40])).collect();
        assert_eq!(arena::mapped_bytes(), before);
        drop(again);
    }

    #[test]
    fn values_larger_than_a_region_are_refused_at_once() {
        assert!(std::panic::catch_unwind(|| Locked::new([0u8; 1 << 20])).is_err());
    }

    #[test]
    fn a_forked_child_reads_zeros() {
        let secret = Locked::new([0x77u8; 64]);
        // SAFETY: the child calls nothing but reads of its own memory and _exit.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            let seen = secret.iter().any(|&byte| byte != 0);
            // SAFETY: ends the child at once, without destructors.
            unsafe { libc::_exit(i32::from(seen)) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        unsafe { libc::waitpid(child, &mut status, 0) };
        assert_eq!(status, 0, "the child saw the parent's secret");
    }

    #[test]
    fn the_stack_is_overwritten() {
        #[inline(never)]
        fn leave_something() -> usize {
            let mut secret = [0u8; 256];
            secret.fill(std::hint::black_box(0xC3));
            std::hint::black_box(&secret).as_ptr() as usize
        }
        let address = leave_something();
        burn_stack();
        // SAFETY: the address is within this thread's mapped stack, below the current frame; it is only read.
        let left = unsafe { std::slice::from_raw_parts(address as *const u8, 256) };
        assert!(left.iter().filter(|&&byte| byte == 0xC3).count() < 8);
    }
}
