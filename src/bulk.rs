//! What the jobs of `sql/` call, value by value inside one UPDATE: nothing but stored forms passes through SQL, and no
//! key service is called while rows are locked.

use pgrx::prelude::*;

#[pg_schema]
mod vod_tender_crypto {
    use std::cell::RefCell;
    use std::collections::HashMap;

    use pgrx::Array;
    use pgrx::prelude::*;
    use vod_tender_core::Error;
    use vod_tender_core::access::Function;
    use vod_tender_core::envelope::Header;
    use vod_tender_core::provider::NoCalls;
    use vod_tender_core::session::{BulkOperation, BulkTask, Run, Session};
    use vod_tender_core::sink::Sink;
    use vod_tender_core::stored::{Kind, Value};

    use crate::arguments::{ContextIn, TextIn};
    use crate::backend;
    use crate::bulk_task::Task;
    use crate::errors::{invalid, raise, sqlstate_text};
    use crate::prefetch::head_of;
    use crate::results::{BytesOut, TextOut, Varlena};
    use crate::row_expression::{self, Purpose};

    /// Does a job's work on one value: gives the new one, the same one where nothing is to be done, and NULL for NULL and
    /// for what fails, which `conversion_error` explains. Calls no key service: what it needs was fetched by
    /// `prepare_batch`, so that nothing waits while rows are locked. Raises when it is not the value's fault.
    #[pg_extern(name = "convert_value", volatile, parallel_restricted, cost = 100)]
    fn convert_value_text<'a>(
        task: TextIn<'a>,
        stored: Option<TextIn<'a>>,
        aad: Option<TextIn<'a>>,
        version: Option<i32>,
    ) -> Option<TextOut> {
        let stored = stored?;
        let value = Value::Text(stored.get()?);
        converted(&Task::of(&task), value, &aad, version).map(|new| TextOut(new.unwrap_or_else(|| copy(value))))
    }

    /// The same for `bytea`.
    #[pg_extern(name = "convert_value", volatile, parallel_restricted, cost = 100)]
    fn convert_value_bytea<'a>(
        task: TextIn<'a>,
        stored: Option<&'a [u8]>,
        aad: Option<TextIn<'a>>,
        version: Option<i32>,
    ) -> Option<BytesOut> {
        let value = Value::Bytes(stored?);
        converted(&Task::of(&task), value, &aad, version).map(|new| BytesOut(new.unwrap_or_else(|| copy(value))))
    }

    /// Why `convert_value` fails for a value: an SQLSTATE, or `retry` when what it needs was not fetched. NULL when it
    /// does not fail. For the operation `verify`, which locks nothing, it calls key services itself.
    #[pg_extern(name = "conversion_error", volatile, parallel_restricted, cost = 100)]
    fn conversion_error_text<'a>(
        task: TextIn<'a>,
        stored: Option<TextIn<'a>>,
        aad: Option<TextIn<'a>>,
        version: Option<i32>,
    ) -> Option<String> {
        let stored = stored?;
        let Some(text) = stored.get() else { return Some(sqlstate_text(&Error::ArgumentNotText, Kind::Text)) };
        failure(&Task::of(&task), Value::Text(text), &aad, version)
    }

    /// The same for `bytea`.
    #[pg_extern(name = "conversion_error", volatile, parallel_restricted, cost = 100)]
    fn conversion_error_bytea<'a>(
        task: TextIn<'a>,
        stored: Option<&'a [u8]>,
        aad: Option<TextIn<'a>>,
        version: Option<i32>,
    ) -> Option<String> {
        failure(&Task::of(&task), Value::Bytes(stored?), &aad, version)
    }

    /// What of a stored value the key service must see before it can be converted: its header, or the blob of the
    /// literal form. NULL when nothing.
    #[pg_extern(name = "needed_head", stable, parallel_restricted)]
    fn needed_head_text(stored: Option<TextIn<'_>>) -> Option<Vec<u8>> {
        head_of(Value::Text(stored?.get()?), Session::needed_head)
    }

    /// The same for `bytea`.
    #[pg_extern(name = "needed_head", stable, parallel_restricted)]
    fn needed_head_bytea(stored: Option<&[u8]>) -> Option<Vec<u8>> {
        head_of(Value::Bytes(stored?), Session::needed_head)
    }

    /// The same, but NULL also for what the session has fetched, and for what is too long to be fetched with others.
    #[pg_extern(name = "unfetched_head", stable, parallel_restricted)]
    fn unfetched_head_text(stored: Option<TextIn<'_>>) -> Option<Vec<u8>> {
        head_of(Value::Text(stored?.get()?), Session::unfetched_head)
    }

    /// The same for `bytea`.
    #[pg_extern(name = "unfetched_head", stable, parallel_restricted)]
    fn unfetched_head_bytea(stored: Option<&[u8]>) -> Option<Vec<u8>> {
        head_of(Value::Bytes(stored?), Session::unfetched_head)
    }

    /// Fetches from the key service what the next batch of a job needs: DEKs for `needed` values (and when it has to be
    /// asked at all, for `wanted`), and what `heads` stand for. What the service refuses about a head is kept for
    /// `conversion_error`; raises for everything else.
    #[pg_extern(volatile, parallel_restricted)]
    fn prepare_batch<'a>(task: TextIn<'a>, heads: Option<Array<'a, &'a [u8]>>, needed: i64, wanted: i64) {
        let task = Task::of(&task);
        let task = task.bulk();
        REFUSED.with_borrow_mut(HashMap::clear);
        if task.operation == BulkOperation::Migrate {
            let count = |values: i64| u64::try_from(values).unwrap_or_default();
            let made = backend::with(Function::MigrateJob, Kind::Text, |session, run| {
                session.make_deks_ahead(run, task, count(needed), count(wanted))
            });
            made.unwrap_or_else(|error| raise(&error, Kind::Text));
        }
        let heads: Vec<_> = heads.iter().flat_map(Array::iter).flatten().collect();
        let refused = backend::with(function(task.operation), Kind::Text, |session, run| {
            let refused = session.prepare_heads(run, task, &heads)?;
            // What fails from here on is no matter of the last of these calls.
            run.gate.begin(function(task.operation));
            Ok(refused)
        });
        for (place, error) in refused.unwrap_or_else(|error| raise(&error, Kind::Text)) {
            refuse(heads[place], &error);
        }
    }

    /// The KEK id of an envelope's first wrap under a key, or of its first wrap; NULL for what is no envelope.
    #[pg_extern(name = "kek_id", stable, parallel_restricted)]
    fn kek_id_text(stored: Option<TextIn<'_>>, key: Option<TextIn<'_>>) -> Option<String> {
        kek_id(Value::Text(stored?.get()?), &key)
    }

    /// The same for `bytea`.
    #[pg_extern(name = "kek_id", stable, parallel_restricted)]
    fn kek_id_bytea(stored: Option<&[u8]>, key: Option<TextIn<'_>>) -> Option<String> {
        kek_id(Value::Bytes(stored?), &key)
    }

    fn kek_id(value: Value<'_>, key: &Option<TextIn<'_>>) -> Option<String> {
        let key = key.as_ref().map(TextIn::as_str);
        backend::with(Function::Other, value.kind(), |session, run| session.kek_id(run, value, key))
            .unwrap_or_else(|error| raise(&error, value.kind()))
    }

    /// Why a value has no new form.
    #[derive(Clone)]
    struct Failure {
        /// An SQLSTATE, or [`RETRY`].
        code: String,
        /// The key that it is about.
        key: Option<String>,
    }

    impl Failure {
        fn of(error: &Error, kind: Kind) -> Self {
            Failure { code: sqlstate_text(error, kind), key: error.key().map(str::to_owned) }
        }

        /// Tells the audit.
        fn note(&self) {
            if self.code != RETRY {
                backend::failed(&self.code, self.key.as_deref());
            }
        }
    }

    thread_local! {
        /// Failures by head: what a key service refused is not asked for again with every value that needs it. Lives for one
        /// batch; holds no secret.
        static REFUSED: RefCell<HashMap<Vec<u8>, Failure>> = RefCell::new(HashMap::new());
    }

    fn refuse(head: &[u8], error: &Error) {
        let mut failure = Failure::of(error, Kind::Text);
        let first_wrap = || Some(Header::parse(head).ok()?.wraps[0].key_name.to_owned());
        failure.key = failure.key.or_else(first_wrap);
        REFUSED.with_borrow_mut(|refused| refused.insert(head.to_vec(), failure));
    }

    fn refused(value: Value<'_>) -> Option<Failure> {
        if REFUSED.with_borrow(HashMap::is_empty) {
            return None;
        }
        let head = head_of(value, Session::needed_head)?;
        REFUSED.with_borrow(|refused| refused.get(&head).cloned())
    }

    /// Whether another value may fare better. What is wrong with the KEK that new values are made under is wrong for all.
    fn is_values_fault<W>(task: BulkTask<'_>, run: &Run<'_, W>, error: &Error) -> bool {
        error.concerns_one_value(task.target(run.keyring))
    }

    /// What the audit calls a job.
    fn function(operation: BulkOperation) -> Function {
        match operation {
            BulkOperation::Migrate => Function::MigrateJob,
            BulkOperation::Rewrap => Function::RewrapJob,
            BulkOperation::Downgrade => Function::DowngradeJob,
            BulkOperation::Verify => Function::Verify,
        }
    }

    /// The new value, if there is one, and the audit knows of the failure if there is none.
    fn converted(
        task: &Task,
        value: Value<'_>,
        aad: &Option<TextIn<'_>>,
        version: Option<i32>,
    ) -> Option<Option<Varlena>> {
        convert(task, value, aad, version).inspect_err(Failure::note).ok()
    }

    /// Why there is none. Jobs ask after `convert_value` failed, and has noted it; verify() asks this alone.
    fn failure(task: &Task, value: Value<'_>, aad: &Option<TextIn<'_>>, version: Option<i32>) -> Option<String> {
        let failure = convert(task, value, aad, version).err();
        if task.operation == BulkOperation::Verify {
            failure.iter().for_each(Failure::note);
        }
        failure.map(|failure| failure.code)
    }

    const RETRY: &str = "retry";

    /// The new value, if there is one; or why there is none.
    fn convert(
        task: &Task,
        value: Value<'_>,
        aad: &Option<TextIn<'_>>,
        version: Option<i32>,
    ) -> std::result::Result<Option<Varlena>, Failure> {
        const NULL_VALUE_NOT_ALLOWED: &str = "22004";
        let aad = aad.as_ref().and_then(TextIn::get);
        if task.aad_given && aad.is_none() {
            // The expression gave NULL, or no text: the value would be bound to no row.
            return Err(Failure { code: NULL_VALUE_NOT_ALLOWED.to_owned(), key: None });
        }
        let task = task.bulk();
        if task.operation == BulkOperation::Verify
            && let Some(failure) = refused(value)
        {
            return Err(failure);
        }
        let outcome = backend::with(function(task.operation), value.kind(), |session, run| {
            let mut out = Varlena::default();
            if task.operation == BulkOperation::Verify {
                let verified = session.convert(run, task, value, aad, version, &mut out);
                return Ok(verified.map(|_| None).map_err(|error| (is_values_fault(task, run, &error), false, error)));
            }
            let mut no_calls = NoCalls::default();
            let mut run = Run::new(run.keyring, run.policy, &mut no_calls, run.gate);
            let converted = session.convert(&mut run, task, value, aad, version, &mut out).and_then(|changed| {
                if changed {
                    session.assure(&mut run, task, written(&mut out, value.kind()))?;
                }
                Ok(changed.then_some(out))
            });
            let fault = converted.map_err(|error| (is_values_fault(task, &run, &error), error));
            Ok(fault.map_err(|(is_values, error)| (is_values, no_calls.was_asked, error)))
        });
        let (is_values_fault, not_prepared, error) = match outcome.unwrap_or_else(|error| raise(&error, value.kind())) {
            Ok(new) => return Ok(new),
            Err(failure) => failure,
        };
        if not_prepared {
            return Err(refused(value).unwrap_or_else(|| Failure { code: RETRY.to_owned(), key: None }));
        }
        if let (BulkOperation::Verify, Error::Service { .. }) = (task.operation, &error)
            && let Some(head) = head_of(value, Session::fetchable_head)
        {
            refuse(&head, &error);
        }
        if !is_values_fault {
            raise(&error, value.kind())
        }
        Err(Failure::of(&error, value.kind()))
    }

    fn copy(value: Value<'_>) -> Varlena {
        let mut out = Varlena::default();
        if let Err(error) = out.copied(value.bytes()) {
            raise(&error, value.kind());
        }
        out
    }

    fn written(out: &mut Varlena, kind: Kind) -> Value<'_> {
        let bytes = &*out.content();
        match kind {
            Kind::Bytes => Value::Bytes(bytes),
            Kind::Text => Value::Text(std::str::from_utf8(bytes).expect("an encoded value is ASCII")),
        }
    }

    fn named(operation: &TextIn<'_>) -> BulkOperation {
        BulkOperation::from_name(operation.as_str()).unwrap_or_else(|| {
            invalid("unknown operation", "Operations are migrate, rewrap_table, downgrade and verify.")
        })
    }

    /// Whether a job has something to do with a stored value. Calls no key service.
    #[pg_extern(name = "is_due", stable, parallel_restricted)]
    fn is_due_text(task: TextIn<'_>, stored: Option<TextIn<'_>>) -> bool {
        // What is no text at all is due, to be reported.
        stored.is_some_and(|stored| stored.get().is_none_or(|stored| is_due(&Task::of(&task), Value::Text(stored))))
    }

    /// The same for `bytea`.
    #[pg_extern(name = "is_due", stable, parallel_restricted)]
    fn is_due_bytea(task: TextIn<'_>, stored: Option<&[u8]>) -> bool {
        stored.is_some_and(|stored| is_due(&Task::of(&task), Value::Bytes(stored)))
    }

    fn is_due(task: &Task, value: Value<'_>) -> bool {
        let (key, newest) = (task.key.as_deref(), task.newest_kek_id.as_deref());
        backend::with(Function::Other, value.kind(), |session, run| {
            session.is_due(run, task.operation, value, key, newest)
        })
        .unwrap_or_else(|error| raise(&error, value.kind()))
    }

    /// Name of the KEK that a job uses, and its id now where only the key service knows it. Raises where the KEK or
    /// the legacy key that the operation needs cannot be used.
    #[pg_extern(volatile, parallel_restricted)]
    fn job_key(
        operation: TextIn<'_>,
        key: Option<TextIn<'_>>,
        context: Option<ContextIn>,
    ) -> TableIterator<'static, (name!(key_name, Option<String>), name!(newest_kek_id, Option<String>))> {
        let (key, context) = (key.as_ref().map(TextIn::as_str), context.as_ref().map(ContextIn::context));
        let operation = named(&operation);
        let found = backend::with(function(operation), Kind::Text, |session, run| match operation {
            BulkOperation::Migrate => session.target(run, key, context).map(|name| (Some(name), None)),
            BulkOperation::Rewrap => session.newest_kek_id(run, key).map(|(name, newest)| (Some(name), newest)),
            BulkOperation::Downgrade => session.check_way_back(run).map(|()| (None, None)),
            BulkOperation::Verify => Ok((None, None)),
        });
        TableIterator::once(found.unwrap_or_else(|error| raise(&error, Kind::Text)))
    }

    /// An expression over a row of `target`, checked and written out again with the row called `t`. `{column}` in it
    /// stands for `column_name`; `changed` are the columns that the caller rewrites.
    #[pg_extern(stable, parallel_restricted)]
    #[search_path(pg_catalog, pg_temp)]
    fn row_expression(
        target: pg_sys::Oid,
        expression: TextIn<'_>,
        purpose: TextIn<'_>,
        column_name: Option<TextIn<'_>>,
        changed: Array<'_, TextIn<'_>>,
    ) -> TextOut {
        let Some(purpose) = Purpose::from_name(purpose.as_str()) else {
            invalid("unknown purpose of an expression", "Purposes are aad, version and where_clause.")
        };
        let column = column_name.as_ref().map(TextIn::as_str).unwrap_or_default();
        // It stands inside a literal, where a quote is doubled.
        let expression = expression.as_str().replace("{column}", &column.replace('\'', "''"));
        let changed: Vec<_> = changed.iter().flatten().map(|name| name.as_str().to_owned()).collect();
        let checked = row_expression::checked(target, &expression, purpose, &changed);
        TextOut::in_server_encoding(checked.to_bytes())
    }
}
