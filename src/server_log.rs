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
pub fn write(level: Level, text: &str) {
    let Ok(text) = CString::new(text) else { return };
    // SAFETY: the calls of one report below ERROR, which returns, in PostgreSQL's order, with C strings. A WARNING goes to
    // the client too unless the client's threshold is above it; the threshold is put back at once.
    unsafe {
        let threshold = pg_sys::client_min_messages;
        let elevel = match level {
            Level::Note => pg_sys::LOG_SERVER_ONLY as c_int,
            Level::Alarm => {
                pg_sys::client_min_messages = pg_sys::PGERROR as c_int;
                pg_sys::WARNING as c_int
            }
        };
        if errstart(elevel, std::ptr::null()) {
            errmsg_internal(c"%s".as_ptr(), text.as_ptr());
            errhidestmt(true);
            errhidecontext(true);
            errfinish(c"vod_tender_crypto".as_ptr(), 0, c"audit".as_ptr());
        }
        pg_sys::client_min_messages = threshold;
    }
}
