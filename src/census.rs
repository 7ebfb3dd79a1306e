//! Counting what a column holds, by a direct scan: no statement is planned or run for it, so that nothing of the table's
//! owner (functions in indexes, statistics or constraints) runs with the rights of a superuser who counts every table.

use pgrx::prelude::*;

#[pg_schema]
mod vod_tender_crypto {
    use std::collections::HashMap;

    use pgrx::pg_sys::panic::ErrorReport;
    use pgrx::prelude::*;
    use pgrx::{FromDatum, PgMemoryContexts};
    use vod_tender_core::access::Function;
    use vod_tender_core::envelope::Header;
    use vod_tender_core::stored::{Stored, Value};

    use crate::arguments::to_utf8;
    use crate::errors::{raise, throw};
    use crate::{backend, process};

    /// How many values of a column are stored under what: `{"version": 2, "wraps": [["KEY", "KEK ID"]]}`. What holds nothing
    /// is not counted; version NULL for what claims to be an envelope and is malformed. Calls no key service.
    #[pg_extern(stable, parallel_restricted)]
    fn count_stored(
        relation: pg_sys::Oid,
        column: i16,
    ) -> TableIterator<'static, (name!(under, String), name!(value_count, i64))> {
        let mut counts: HashMap<String, i64> = HashMap::new();
        scan(relation, column, |value| {
            if let Some(label) = label(value) {
                *counts.entry(label).or_default() += 1;
            }
        });
        TableIterator::new(counts)
    }

    /// How many envelopes of a column are bound to an aad, and how many are not.
    #[pg_extern(stable, parallel_restricted)]
    fn count_bound(
        relation: pg_sys::Oid,
        column: i16,
    ) -> TableIterator<'static, (name!(bound, i64), name!(unbound, i64))> {
        let (mut bound, mut unbound) = (0, 0);
        scan(relation, column, |value| {
            let is_bound = match value.map(Stored::parse) {
                Some(Ok(Stored::Envelope { header, .. })) => Header::parse(&header).map(|header| header.has_aad).ok(),
                Some(Ok(Stored::Literal { .. })) => Some(false),
                _ => None,
            };
            match is_bound {
                Some(true) => bound += 1,
                Some(false) => unbound += 1,
                None => {}
            }
        });
        TableIterator::once((bound, unbound))
    }

    /// Calls `look` with each value of a column; with `None` for text of no encoding. A table that is gone has none.
    fn scan(relation: pg_sys::Oid, column: i16, mut look: impl FnMut(Option<Value<'_>>)) {
        // SAFETY: the steps of a sequential scan, in order; an error in between leaves all of it to PostgreSQL's own clean-up
        // of the transaction. A value is looked at before the next one is fetched, in memory that is given back then.
        unsafe {
            let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
            let table = pg_sys::try_table_open(relation, lock);
            if table.is_null() {
                return;
            }
            let base = check_readable(table, column);
            let (none, snapshot) = (std::ptr::null_mut(), pg_sys::GetActiveSnapshot());
            let scan = pg_sys::systable_beginscan(table, pg_sys::InvalidOid, false, snapshot, 0, none);
            let mut memory = PgMemoryContexts::new("vod_tender_crypto census");
            loop {
                process::process_interrupts();
                let tuple = pg_sys::systable_getnext(scan);
                if tuple.is_null() {
                    break;
                }
                memory.switch_to(|_| {
                    let mut is_null = true;
                    let stored = pg_sys::SPI_getbinval(tuple, (*table).rd_att, i32::from(column), &mut is_null);
                    if let Some(stored) = <&[u8]>::from_datum(stored, is_null) {
                        match base {
                            pg_sys::BYTEAOID => look(Some(Value::Bytes(stored))),
                            // What pads a char(n) is no part of its value.
                            pg_sys::BPCHAROID => look(to_utf8(trimmed(stored)).as_deref().map(Value::Text)),
                            _ => look(to_utf8(stored).as_deref().map(Value::Text)),
                        }
                    }
                });
                memory.reset();
            }
            pg_sys::systable_endscan(scan);
            pg_sys::table_close(table, lock);
        }
    }

    fn trimmed(stored: &[u8]) -> &[u8] {
        let end = stored.iter().rposition(|&byte| byte != b' ').map_or(0, |last| last + 1);
        &stored[..end]
    }

    /// Raises where the caller may not read all of the column, or it holds no text and no bytea; gives its type.
    ///
    /// # Safety
    /// The table is open.
    unsafe fn check_readable(table: pg_sys::Relation, column: i16) -> pg_sys::Oid {
        const RLS_ENABLED: i32 = 2;
        // SAFETY: as promised; looks at the catalog caches.
        unsafe {
            let (relation, user) = ((*table).rd_id, pg_sys::GetUserId());
            let select = pg_sys::ACL_SELECT as pg_sys::AclMode;
            let may_read = pg_sys::pg_class_aclcheck(relation, user, select) == pg_sys::AclResult::ACLCHECK_OK
                || pg_sys::pg_attribute_aclcheck(relation, column, user, select) == pg_sys::AclResult::ACLCHECK_OK;
            if !may_read || pg_sys::check_enable_rls(relation, pg_sys::InvalidOid, true) == RLS_ENABLED {
                let code = PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE;
                throw(ErrorReport::new(code, "permission denied to read the column".to_owned(), "vod_tender_crypto"))
            }
            let kind = (*(*table).rd_rel).relkind as u8;
            let stores = [pg_sys::RELKIND_RELATION, pg_sys::RELKIND_MATVIEW].contains(&kind);
            let base = match column > 0 && stores {
                true => pg_sys::getBaseType(pg_sys::get_atttype(relation, column)),
                false => pg_sys::InvalidOid,
            };
            if ![pg_sys::TEXTOID, pg_sys::VARCHAROID, pg_sys::BPCHAROID, pg_sys::BYTEAOID].contains(&base) {
                let code = PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH;
                throw(ErrorReport::new(code, "not a column of text or bytea".to_owned(), "vod_tender_crypto"))
            }
            base
        }
    }

    fn label(value: Option<Value<'_>>) -> Option<String> {
        // Text of no encoding is nothing that was encrypted.
        let Some(value) = value else { return Some(r#"{"version":0,"wraps":[]}"#.to_owned()) };
        if value.bytes().is_empty() {
            return None;
        }
        let under = backend::with(Function::Other, value.kind(), |session, run| session.stored_under(run, value));
        let under = under.unwrap_or_else(|error| raise(&error, value.kind()));
        Some(serde_json::to_string(&under).unwrap_or_default())
    }
}
