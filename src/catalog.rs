//! Reading the tables of keys, of rights on them and of watched values, and noticing that they changed.
//!
//! They are read by direct scans: any role's call needs them, and no role needs rights on the tables for it. A scan runs
//! no SQL, so no search path, operator or rule of the caller's can interfere.

use std::borrow::Cow;
use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use pgrx::{FromDatum, pg_sys};
use vod_tender_core::access::Privilege;
use vod_tender_core::keyring::Honey;

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

/// One right on a key as the table has it.
pub struct GrantRow {
    /// The key's name.
    pub key: String,
    /// Whose right it is.
    pub role: pg_sys::Oid,
    /// What for.
    pub privilege: Privilege,
}

/// Set by PostgreSQL's invalidation messages when one of the tables changed.
static CHANGED: AtomicBool = AtomicBool::new(true);
/// Set while the tables are being read, and left set when that fails.
static UNREAD: AtomicBool = AtomicBool::new(false);

/// A table that is read here.
struct Table {
    name: &'static CStr,
    /// Its OID, once it was looked up.
    oid: AtomicU32,
}

static KEK: Table = Table { name: c"kek", oid: AtomicU32::new(0) };
static KEY_GRANT: Table = Table { name: c"key_grant", oid: AtomicU32::new(0) };
static HONEY: Table = Table { name: c"honey", oid: AtomicU32::new(0) };

/// Whether a table changed since [`take_changed`].
pub fn changed() -> bool {
    CHANGED.load(Ordering::Relaxed) || UNREAD.load(Ordering::Relaxed)
}

/// Whether a table changed since this was last asked.
pub fn take_changed() -> bool {
    CHANGED.swap(false, Ordering::Relaxed) || UNREAD.load(Ordering::Relaxed)
}

/// Says that reading begins (true) or has come to its end (false).
pub fn set_unread(unread: bool) {
    UNREAD.store(unread, Ordering::Relaxed);
}

/// Says that the tables must be read again.
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
    let table = table.to_u32();
    let known = [&KEK, &KEY_GRANT, &HONEY].map(|each| each.oid.load(Ordering::Relaxed));
    if table == 0 || known.contains(&0) || known.contains(&table) {
        CHANGED.store(true, Ordering::Relaxed);
    }
}

/// All keys, as last committed or as this transaction has them.
pub fn read_keks() -> Vec<KekRow> {
    let read = |row: &Row| {
        let context = row.column(c"context").and_then(|datum| {
            // SAFETY: the column is a jsonb, whose output function gives a C string in this memory context.
            let json = unsafe { pgrx::direct_function_call::<&CStr>(pg_sys::jsonb_out, &[Some(datum)]) };
            json.map(|json| readable(json.to_bytes()))
        });
        Some(KekRow { name: row.text(c"name")?, uri: row.text(c"uri")?, context: context?, state: row.text(c"state")? })
    };
    KEK.read(read).1
}

/// Owner of the table of keys, who may use all of them; and everybody else's rights.
pub fn read_grants() -> (pg_sys::Oid, Vec<GrantRow>) {
    let read = |row: &Row| {
        let role = row.column(c"role").map(|datum| pg_sys::Oid::from(datum.value() as u32))?;
        Some(GrantRow { key: row.text(c"key")?, role, privilege: Privilege::from_name(&row.text(c"privilege")?)? })
    };
    let (owner, _) = KEK.read(|_| None::<()>);
    (owner, KEY_GRANT.read(read).1)
}

/// The values that are watched.
pub fn read_honey() -> Honey {
    let mut honey = Honey::default();
    HONEY.read(|row| {
        // SAFETY: the column is a bytea.
        let mark = row.column(c"mark").and_then(|datum| unsafe { <&[u8]>::from_datum(datum, false) });
        mark.map(|mark| honey.add(mark))
    });
    honey
}

impl Table {
    /// Its owner, and what `read` makes of each row.
    fn read<T>(&self, mut read: impl FnMut(&Row) -> Option<T>) -> (pg_sys::Oid, Vec<T>) {
        // SAFETY: the steps of a sequential scan, in order; an error in between leaves all of it to PostgreSQL's own
        // clean-up of the transaction. What is made of a tuple is Rust's own before the next one is fetched.
        unsafe {
            let schema = pg_sys::get_namespace_oid(c"vod_tender_crypto".as_ptr(), true);
            let table = pg_sys::get_relname_relid(self.name.as_ptr(), schema);
            self.oid.store(table.to_u32(), Ordering::Relaxed);
            if table == pg_sys::InvalidOid {
                return (pg_sys::InvalidOid, Vec::new());
            }
            let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
            let relation = pg_sys::table_open(table, lock);
            let owner = (*(*relation).rd_rel).relowner;
            // Without a snapshot of ours the scan takes a fresh one, in parallel mode and under REPEATABLE READ too: a key
            // that was disabled, or a right that was revoked, must not serve on.
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
                rows.extend(read(&Row { tuple, description: (*relation).rd_att }));
            }
            pg_sys::systable_endscan(scan);
            pg_sys::table_close(relation, lock);
            (owner, rows)
        }
    }
}

/// A row of a table that is being scanned.
struct Row {
    tuple: pg_sys::HeapTuple,
    description: pg_sys::TupleDesc,
}

impl Row {
    /// The column's value, unless it is NULL or there is no such column.
    fn column(&self, name: &CStr) -> Option<pg_sys::Datum> {
        // SAFETY: the tuple is of the table, and the description the table's.
        unsafe {
            let number = pg_sys::SPI_fnumber(self.description, name.as_ptr());
            let mut is_null = true;
            let datum = (number > 0).then(|| pg_sys::SPI_getbinval(self.tuple, self.description, number, &mut is_null));
            datum.filter(|_| !is_null)
        }
    }

    /// The value of a `text` column.
    fn text(&self, name: &CStr) -> Option<String> {
        // SAFETY: the column is a text.
        self.column(name).and_then(|datum| unsafe { <&[u8]>::from_datum(datum, false) }).map(readable)
    }
}

/// Text of the server's encoding. What has no form in UTF-8 becomes something that no key can use, so that the row is
/// kept and says so.
fn readable(bytes: &[u8]) -> String {
    to_utf8(bytes).map_or_else(|| "\u{fffd}".to_owned(), Cow::into_owned)
}
