//! Reading the table `vod_tender_crypto.kek`, and noticing that it changed.
//!
//! It is read by a direct scan: any role's call needs the keys, and no role needs rights on the table for it. The scan
//! runs no SQL, so no search path, operator or rule of the caller's can interfere.

use std::borrow::Cow;
use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use pgrx::{FromDatum, pg_sys};

use crate::arguments::to_utf8;

/// One configured KEK as the table has it.
pub struct KekRow {
    /// The key's name.
    pub name: String,
    /// Its URI.
    pub uri: String,
    /// Its context as JSON.
    pub context: String,
    /// Its state.
    pub state: String,
}

/// Set by PostgreSQL's invalidation messages when the table changed.
static CHANGED: AtomicBool = AtomicBool::new(true);
/// Set while the table is being read, and left set when that fails.
static UNREAD: AtomicBool = AtomicBool::new(false);
/// The table, once it was looked up.
static TABLE: AtomicU32 = AtomicU32::new(0);

/// Whether the table changed since [`take_changed`].
pub fn changed() -> bool {
    CHANGED.load(Ordering::Relaxed) || UNREAD.load(Ordering::Relaxed)
}

/// Whether the table changed since this was last asked.
pub fn take_changed() -> bool {
    CHANGED.swap(false, Ordering::Relaxed) || UNREAD.load(Ordering::Relaxed)
}

/// Says that reading begins (true) or has come to its end (false).
pub fn set_unread(unread: bool) {
    UNREAD.store(unread, Ordering::Relaxed);
}

/// Says that the table must be read again.
pub fn set_changed() {
    CHANGED.store(true, Ordering::Relaxed);
}

/// Asks PostgreSQL to tell about changes. Once for each process.
pub fn watch() {
    // SAFETY: the callback touches atomics only.
    unsafe { pg_sys::CacheRegisterRelcacheCallback(Some(table_changed), pg_sys::Datum::null()) };
}

/// Takes in what other sessions have committed.
pub fn receive_changes() {
    // SAFETY: called within a transaction, between PostgreSQL's own steps.
    unsafe { pg_sys::AcceptInvalidationMessages() };
}

/// Tells all sessions, once this transaction commits, that a table changed.
pub fn announce_change(table: pg_sys::Oid) {
    // SAFETY: the oid is that of a table that is open in the trigger that calls this.
    unsafe { pg_sys::CacheInvalidateRelcacheByRelid(table) };
}

unsafe extern "C-unwind" fn table_changed(_argument: pg_sys::Datum, table: pg_sys::Oid) {
    let known = TABLE.load(Ordering::Relaxed);
    let table = table.to_u32();
    if known == 0 || table == 0 || table == known {
        CHANGED.store(true, Ordering::Relaxed);
    }
}

/// All rows, as last committed or as this transaction has them.
pub fn read_keks() -> Vec<KekRow> {
    // SAFETY: the steps of a sequential scan, in order; an error in between leaves all of it to PostgreSQL's own
    // clean-up of the transaction. The tuple is copied into Rust strings before the next one is fetched.
    unsafe {
        let schema = pg_sys::get_namespace_oid(c"vod_tender_crypto".as_ptr(), true);
        let table = pg_sys::get_relname_relid(c"kek".as_ptr(), schema);
        TABLE.store(table.to_u32(), Ordering::Relaxed);
        if table == pg_sys::InvalidOid {
            return Vec::new();
        }
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let relation = pg_sys::table_open(table, lock);
        // Without a snapshot of ours the scan takes a fresh one, in parallel mode and under REPEATABLE READ too: a key
        // that was disabled must not serve on.
        let scan = pg_sys::systable_beginscan(
            relation,
            pg_sys::InvalidOid,
            false,
            std::ptr::null_mut(),
            0,
            std::ptr::null_mut(),
        );
        let mut rows = Vec::new();
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            rows.extend(read_row(tuple, (*relation).rd_att));
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(relation, lock);
        rows
    }
}

/// # Safety
/// The tuple is of the table, and the description the table's.
unsafe fn read_row(tuple: pg_sys::HeapTuple, description: pg_sys::TupleDesc) -> Option<KekRow> {
    // SAFETY: as promised; the arrays have a place for every column.
    unsafe {
        let columns = usize::try_from((*description).natts).ok()?;
        let mut values = vec![pg_sys::Datum::null(); columns];
        let mut nulls = vec![true; columns];
        pg_sys::heap_deform_tuple(tuple, description, values.as_mut_ptr(), nulls.as_mut_ptr());
        let column = |name: &CStr| {
            let at = usize::try_from(pg_sys::SPI_fnumber(description, name.as_ptr())).ok()?.checked_sub(1)?;
            (!nulls[at]).then(|| values[at])
        };
        let text = |name| column(name).and_then(|datum| <&[u8]>::from_datum(datum, false)).map(readable);
        let context = column(c"context").and_then(|datum| {
            pgrx::direct_function_call::<&CStr>(pg_sys::jsonb_out, &[Some(datum)]).map(|json| readable(json.to_bytes()))
        });
        Some(KekRow { name: text(c"name")?, uri: text(c"uri")?, context: context?, state: text(c"state")? })
    }
}

/// Text of the server's encoding. What has no form in UTF-8 becomes something that no key can use, so that the row is
/// kept and says so.
fn readable(bytes: &[u8]) -> String {
    to_utf8(bytes).map_or_else(|| "\u{fffd}".to_owned(), Cow::into_owned)
}
