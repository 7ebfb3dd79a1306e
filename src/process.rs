//! Facts about this process that PostgreSQL keeps.

use std::ptr::{read_volatile, write_volatile};

use pgrx::pg_sys;
use vod_tender_core::policy::Clock;

/// This process's id, as PostgreSQL set it after fork.
pub fn id() -> i32 {
    // SAFETY: an int that PostgreSQL sets once after fork.
    unsafe { pg_sys::MyProcPid }
}

// Not through pgrx, whose guard costs more than this: it returns a variable and raises nothing.
unsafe extern "C" {
    fn GetCurrentStatementStartTimestamp() -> pg_sys::TimestampTz;
}

/// When the statement that the client sent began; changes with every one.
pub fn statement() -> i64 {
    // SAFETY: as above.
    unsafe { GetCurrentStatementStartTimestamp() }
}

/// Whether PostgreSQL has something to do that [`process_interrupts`] would do now.
pub fn interrupts_pending() -> bool {
    // SAFETY: flags that signal handlers set, read as such; the counters belong to this thread.
    unsafe {
        read_volatile(&raw const pg_sys::InterruptPending) != 0
            && pg_sys::InterruptHoldoffCount == 0
            && pg_sys::CritSectionCount == 0
    }
}

/// Whether what is pending ends the statement or the session.
pub fn will_be_interrupted() -> bool {
    // SAFETY: as above.
    unsafe {
        read_volatile(&raw const pg_sys::ProcDiePending) != 0
            || (read_volatile(&raw const pg_sys::QueryCancelPending) != 0 && pg_sys::QueryCancelHoldoffCount == 0)
            || transaction_timeout_pending()
    }
}

/// PostgreSQL 17 has a timeout that ends the session.
#[cfg(any(feature = "pg17", feature = "pg18"))]
fn transaction_timeout_pending() -> bool {
    // SAFETY: as above.
    unsafe { read_volatile(&raw const pg_sys::TransactionTimeoutPending) != 0 }
}

#[cfg(any(feature = "pg15", feature = "pg16"))]
fn transaction_timeout_pending() -> bool {
    false
}

/// Waits for so long, and does what becomes pending meanwhile. May raise an error, or end the process.
pub fn sleep_interruptibly(time: std::time::Duration) {
    let events = (pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH) as std::ffi::c_int;
    // SAFETY: this process's own latch.
    unsafe {
        pg_sys::WaitLatch(pg_sys::MyLatch, events, time.as_millis() as std::ffi::c_long, wait_event());
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    process_interrupts();
}

/// Does what is pending. May raise an error, or end the process.
pub fn process_interrupts() {
    pgrx::check_for_interrupts!();
}

/// Shows a wait for a key service in `pg_stat_activity` for as long as it lives.
pub struct WaitEvent;

impl WaitEvent {
    /// Begins the wait.
    pub fn begin() -> Self {
        // SAFETY: PostgreSQL keeps the pointer valid for the life of the process.
        unsafe { write_volatile(pg_sys::my_wait_event_info, wait_event()) };
        WaitEvent
    }
}

impl Drop for WaitEvent {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { write_volatile(pg_sys::my_wait_event_info, 0) };
    }
}

/// PostgreSQL 15 and 16 know one wait event for all extensions.
#[cfg(any(feature = "pg15", feature = "pg16"))]
fn wait_event() -> u32 {
    pg_sys::PG_WAIT_EXTENSION
}

#[cfg(any(feature = "pg17", feature = "pg18"))]
fn wait_event() -> u32 {
    use std::sync::OnceLock;
    static EVENT: OnceLock<u32> = OnceLock::new();
    // SAFETY: a C string; PostgreSQL gives the same id to the same name in every session.
    *EVENT.get_or_init(|| unsafe { pg_sys::WaitEventExtensionNew(c"VodTenderKeyService".as_ptr()) })
}

/// The kernel's coarse monotonic clock, a few nanoseconds to read.
pub struct CoarseClock;

impl Clock for CoarseClock {
    fn now_ms(&self) -> u64 {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes the struct it is given.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut now) };
        now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
    }
}
