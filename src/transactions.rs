//! What procedures that commit as they go need of PostgreSQL's transactions and locks.

use pgrx::prelude::*;

#[pg_schema]
mod vod_tender_crypto {
    use pgrx::pg_sys::panic::ErrorReport;
    use pgrx::prelude::*;

    use crate::errors::throw;
    use crate::results::TextOut;

    /// Locks a relation that has rows of its own, against being renamed, rewritten or replaced until the transaction ends,
    /// and gives its name for a statement. By OID: whoever owns it could put a view in the place of a name. Whoever has no
    /// right on it gets no lock either, as with LOCK TABLE.
    #[pg_extern(volatile, parallel_restricted)]
    fn lock_relation(relation: pg_sys::Oid, for_writing: bool) -> TextOut {
        lock(relation, for_writing, &WITH_ROWS)
    }

    /// The same for reading whatever can be selected from.
    #[pg_extern(volatile, parallel_restricted)]
    fn lock_readable(relation: pg_sys::Oid) -> TextOut {
        lock(relation, false, &[&WITH_ROWS[..], &[pg_sys::RELKIND_VIEW, pg_sys::RELKIND_FOREIGN_TABLE]].concat())
    }

    const WITH_ROWS: [u8; 3] = [pg_sys::RELKIND_RELATION, pg_sys::RELKIND_MATVIEW, pg_sys::RELKIND_PARTITIONED_TABLE];

    fn lock(relation: pg_sys::Oid, for_writing: bool, kinds: &[u8]) -> TextOut {
        let mode = if for_writing { pg_sys::RowExclusiveLock } else { pg_sys::AccessShareLock };
        // SAFETY: takes the lock and looks the relation up in the catalog caches, which are up to date once it is held.
        let name = unsafe {
            pg_sys::LockRelationOid(relation, mode as pg_sys::LOCKMODE);
            let kind = pg_sys::get_rel_relkind(relation) as u8;
            if !kinds.contains(&kind) {
                let code = PgSqlErrorCode::ERRCODE_UNDEFINED_TABLE;
                throw(ErrorReport::new(code, "the table is gone".to_owned(), "vod_tender_crypto"))
            }
            check_may_lock(relation, for_writing);
            let schema = pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relation));
            let name = pg_sys::quote_qualified_identifier(schema, pg_sys::get_rel_name(relation));
            std::ffi::CStr::from_ptr(name).to_bytes()
        };
        TextOut::in_server_encoding(name)
    }

    /// Raises where the caller could neither read the relation (or a column of it) nor write it.
    ///
    /// # Safety
    /// The relation exists and is locked.
    unsafe fn check_may_lock(relation: pg_sys::Oid, for_writing: bool) {
        let writes = pg_sys::ACL_INSERT | pg_sys::ACL_UPDATE | pg_sys::ACL_DELETE | pg_sys::ACL_TRUNCATE;
        let reads = if for_writing { 0 } else { pg_sys::ACL_SELECT };
        let rights = (writes | reads) as pg_sys::AclMode;
        // SAFETY: looks at the catalog caches.
        let allowed = unsafe {
            let user = pg_sys::GetUserId();
            pg_sys::pg_class_aclcheck(relation, user, rights) == pg_sys::AclResult::ACLCHECK_OK
                || pg_sys::pg_attribute_aclcheck_all(relation, user, rights, pg_sys::AclMaskHow::ACLMASK_ANY)
                    == pg_sys::AclResult::ACLCHECK_OK
        };
        if !allowed {
            let code = PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE;
            throw(ErrorReport::new(code, "permission denied to lock the table".to_owned(), "vod_tender_crypto"))
        }
    }

    /// Raises inside a transaction block, where a procedure cannot commit.
    #[pg_extern(volatile, parallel_restricted)]
    fn check_may_commit() {
        // SAFETY: looks at the transaction's state.
        if unsafe { pg_sys::IsTransactionBlock() } {
            let code = PgSqlErrorCode::ERRCODE_ACTIVE_SQL_TRANSACTION;
            let message = "a job commits as it goes and cannot run inside a transaction block".to_owned();
            throw(
                ErrorReport::new(code, message, "vod_tender_crypto").set_hint("CALL it by itself, with autocommit on."),
            )
        }
    }
}
