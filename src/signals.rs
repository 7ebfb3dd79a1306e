//! Which thread may receive signals: only PostgreSQL's own, and only where it expects them.
//!
//! PostgreSQL's handlers must not run on a library's thread. New threads inherit the mask of the thread that starts
//! them, so signals are blocked on this thread whenever library code runs, and let in while it sleeps.

use std::cell::Cell;
use std::mem::MaybeUninit;

thread_local! {
    /// The mask to return to, on the thread that has blocked its signals.
    static OWN_MASK: Cell<Option<libc::sigset_t>> = const { Cell::new(None) };
}

/// Blocks all signals on this thread for as long as it lives.
pub struct Blocked(());

impl Blocked {
    /// Blocks them.
    pub fn begin() -> Self {
        OWN_MASK.set(Some(block_all()));
        Blocked(())
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        if let Some(mask) = OWN_MASK.take() {
            set(&mask);
        }
    }
}

/// Lets signals in while this thread sleeps; does nothing on other threads.
pub fn before_sleep() {
    if let Some(mask) = OWN_MASK.get() {
        set(&mask);
    }
}

/// Blocks signals again after [`before_sleep`]; does nothing on other threads.
pub fn after_sleep() {
    if OWN_MASK.get().is_some() {
        block_all();
    }
}

fn block_all() -> libc::sigset_t {
    let mut all = MaybeUninit::uninit();
    let mut own = MaybeUninit::uninit();
    // SAFETY: sigfillset initialises the first set; pthread_sigmask reads it and initialises the second.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), own.as_mut_ptr());
        own.assume_init()
    }
}

fn set(mask: &libc::sigset_t) {
    // SAFETY: reads a mask that pthread_sigmask wrote.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, std::ptr::null_mut()) };
}
