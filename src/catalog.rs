//! Reading the table `vod_tender_crypto.kek`, and noticing that it changed.
//!
//! It is read by a direct scan: any role's call needs the keys, and no role needs rights on the table for it. The scan
//! runs no SQL, so no search path, operator or rule of the caller's can interfere.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use pgrx::heap_tuple::PgHeapTuple;
use pgrx::{JsonB, PgTupleDesc, pg_sys};

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
        // The newest state also under REPEATABLE READ: a key that was disabled must not serve on.
        let newest = if pg_sys::IsInParallelMode() { pg_sys::GetActiveSnapshot() } else { pg_sys::GetLatestSnapshot() };
        let snapshot = pg_sys::RegisterSnapshot(newest);
        let no_index = pg_sys::InvalidOid;
        let scan = pg_sys::systable_beginscan(relation, no_index, false, snapshot, 0, std::ptr::null_mut());
        let mut rows = Vec::new();
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let description = PgTupleDesc::from_pg_is_copy(pg_sys::CreateTupleDescCopy((*relation).rd_att));
            rows.extend(read_row(&PgHeapTuple::from_heap_tuple(description, tuple)));
        }
        pg_sys::systable_endscan(scan);
        pg_sys::UnregisterSnapshot(snapshot);
        pg_sys::table_close(relation, lock);
        rows
    }
}

fn read_row<A: pgrx::WhoAllocated>(tuple: &PgHeapTuple<'_, A>) -> Option<KekRow> {
    let text = |column: &str| tuple.get_by_name::<String>(column).ok().flatten();
    let context = tuple.get_by_name::<JsonB>("context").ok().flatten().map(|json| json.0.to_string());
    Some(KekRow {
        name: text("name")?,
        uri: text("uri")?,
        context: context.unwrap_or_else(|| "{}".to_owned()),
        state: text("state")?,
    })
}
