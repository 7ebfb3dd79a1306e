//! The server's log, for lines that no client sees and that carry no statement.

use std::ffi::{CString, c_char, c_int};

use pgrx::pg_sys;

// As PostgreSQL's elog.c has them; pgrx's ereport! cannot leave out the statement.
unsafe extern "C-unwind" {
    fn errstart(elevel: c_int, domain: *const c_char) -> bool;
    fn errmsg_internal(format: *const c_char, ...) -> c_int;
    fn errhidestmt(hide: bool) -> c_int;
    fn errhidecontext(hide: bool) -> c_int;
    fn errfinish(file: *const c_char, line: c_int, function: *const c_char);
}

/// How loud a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// LOG.
    Note,
    /// WARNING.
    Alarm,
}

/// Writes one line into the server's log, in any state of the transaction. `text` is ASCII without line breaks.
///
/// PostgreSQL looks for interrupts when it has reported something. They wait until the caller has given up what it holds.
pub fn write(level: Level, text: &str) {
    let Ok(text) = CString::new(text) else { return };
    let elevel = match level {
        Level::Note => pg_sys::LOG_SERVER_ONLY,
        Level::Alarm => pg_sys::WARNING,
    };
    let _quiet = Quiet::begin();
    // SAFETY: the calls of one report below ERROR, in PostgreSQL's order, with C strings; should one raise all the same, the
    // guard makes a panic of it, which unwinds.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            if errstart(elevel as c_int, std::ptr::null()) {
                errmsg_internal(c"%s".as_ptr(), text.as_ptr());
                errhidestmt(true);
                errhidecontext(true);
                errfinish(c"vod_tender_crypto".as_ptr(), 0, c"audit".as_ptr());
            }
        });
    }
}

/// For as long as it lives no interrupt is processed and nothing below ERROR goes to the client.
struct Quiet {
    threshold: c_int,
}

impl Quiet {
    fn begin() -> Self {
        // SAFETY: variables of this thread's.
        unsafe {
            pg_sys::InterruptHoldoffCount += 1;
            let threshold = pg_sys::client_min_messages;
            pg_sys::client_min_messages = pg_sys::PGERROR as c_int;
            Quiet { threshold }
        }
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // SAFETY: as above. An error that was raised meanwhile has set the count to 0.
        unsafe {
            pg_sys::client_min_messages = self.threshold;
            pg_sys::InterruptHoldoffCount = pg_sys::InterruptHoldoffCount.saturating_sub(1);
        }
    }
}
