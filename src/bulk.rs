//! What the jobs of `sql/` call: whole arrays of values in, whole arrays out, so that the cost of a call is paid once for
//! a batch and nothing but stored forms passes through PL/pgSQL.

use pgrx::prelude::*;

#[pg_schema]
mod vod_tender_crypto {
    use std::collections::HashMap;

    use pgrx::prelude::*;
    use pgrx::{Array, default};
    use vod_tender_core::Error;
    use vod_tender_core::session::{BulkOperation, BulkTask};
    use vod_tender_core::stored::{Kind, Value, head};

    use super::invalid;

    use crate::arguments::{ContextIn, TextIn};
    use crate::backend;
    use crate::errors::{raise, sqlstate_text};
    use crate::results::{BytesOut, TextOut, Varlena};
    use crate::row_expression::{self, Purpose};

    /// One batch of a column: the new values (NULL where nothing is to be written), the SQLSTATE of what failed
    /// (no array when nothing did), and the KEK ids of what is under a new one (one element when all are the same). Raises when it is not a value's fault.
    #[allow(clippy::too_many_arguments, clippy::type_complexity)]
    #[pg_extern(name = "convert_batch", volatile, parallel_restricted)]
    fn convert_batch_text<'a>(
        operation: TextIn<'a>,
        stored: Array<'a, TextIn<'a>>,
        aads: Option<Array<'a, TextIn<'a>>>,
        versions: Option<Array<'a, i32>>,
        key: Option<TextIn<'a>>,
        context: Option<ContextIn>,
        check_wraps: default!(bool, "true"),
    ) -> TableIterator<
        'static,
        (
            name!(converted, Vec<Option<TextOut>>),
            name!(failed, Option<Vec<Option<String>>>),
            name!(kek_ids, Vec<Option<String>>),
        ),
    > {
        let stored: Vec<_> = stored.iter().collect();
        let values = stored.iter().map(|text| text.as_ref().map(|text| text.get().map(Value::Text)));
        let batch = Batch { operation: named(&operation), key, context, check_wraps, aads, versions };
        let (converted, failed, kek_ids) = batch.convert(values, TextOut);
        TableIterator::once((converted, failed, kek_ids))
    }

    /// The same for `bytea`.
    #[allow(clippy::too_many_arguments, clippy::type_complexity)]
    #[pg_extern(name = "convert_batch", volatile, parallel_restricted)]
    fn convert_batch_bytea<'a>(
        operation: TextIn<'a>,
        stored: Array<'a, &'a [u8]>,
        aads: Option<Array<'a, TextIn<'a>>>,
        versions: Option<Array<'a, i32>>,
        key: Option<TextIn<'a>>,
        context: Option<ContextIn>,
        check_wraps: default!(bool, "true"),
    ) -> TableIterator<
        'static,
        (
            name!(converted, Vec<Option<BytesOut>>),
            name!(failed, Option<Vec<Option<String>>>),
            name!(kek_ids, Vec<Option<String>>),
        ),
    > {
        let stored: Vec<_> = stored.iter().collect();
        let values = stored.iter().map(|bytes| bytes.map(|bytes| Some(Value::Bytes(bytes))));
        let batch = Batch { operation: named(&operation), key, context, check_wraps, aads, versions };
        let (converted, failed, kek_ids) = batch.convert(values, BytesOut);
        TableIterator::once((converted, failed, kek_ids))
    }

    struct Batch<'a> {
        operation: BulkOperation,
        key: Option<TextIn<'a>>,
        context: Option<ContextIn>,
        check_wraps: bool,
        aads: Option<Array<'a, TextIn<'a>>>,
        versions: Option<Array<'a, i32>>,
    }

    type Converted<T> = (Vec<Option<T>>, Option<Vec<Option<String>>>, Vec<Option<String>>);

    impl Batch<'_> {
        /// An element is `None` for NULL, and `Some(None)` for what is not UTF-8.
        fn convert<'v, T>(
            &self,
            values: impl Iterator<Item = Option<Option<Value<'v>>>>,
            boxed: impl Fn(Varlena) -> T,
        ) -> Converted<T> {
            let task = BulkTask {
                operation: self.operation,
                key: self.key.as_ref().map(TextIn::as_str),
                context: self.context.as_ref().map(ContextIn::context),
                check_wraps: self.check_wraps,
            };
            let mut aads = self.aads.as_ref().map(|aads| aads.iter());
            let mut versions = self.versions.as_ref().map(|versions| versions.iter());
            let (mut converted, mut failed, mut kek_ids) = (Vec::new(), Vec::new(), Vec::new());
            // A DEK that its key service refused is not asked for again with every value that needs it.
            let mut refused = HashMap::new();
            for value in values {
                let aad = aads.as_mut().map(|aads| aads.next().flatten());
                let version = versions.as_mut().and_then(|versions| versions.next().flatten());
                let one = match value {
                    None => One::Unchanged,
                    Some(value) => convert_one(task, value, aad.as_ref(), version, &mut refused),
                };
                let (new, code, kek_id) = match one {
                    One::Unchanged => (None, None, None),
                    One::New(new, kek_id) => (Some(boxed(new)), None, kek_id),
                    One::Failed(code) => (None, Some(code), None),
                };
                converted.push(new);
                failed.push(code);
                kek_ids.push(kek_id);
            }
            let any_failed = failed.iter().any(Option::is_some);
            let mut known = kek_ids.iter().flatten();
            let first = known.next();
            if known.all(|kek_id| Some(kek_id) == first) {
                kek_ids = vec![first.cloned()];
            }
            (converted, any_failed.then_some(failed), kek_ids)
        }
    }

    enum One {
        Unchanged,
        New(Varlena, Option<String>),
        Failed(String),
    }

    /// `aad` is `Some(None)` when an expression for it gave NULL: then nothing is made, for it would be bound to no row.
    fn convert_one(
        task: BulkTask<'_>,
        value: Option<Value<'_>>,
        aad: Option<&Option<TextIn<'_>>>,
        version: Option<i32>,
        refused: &mut HashMap<Vec<u8>, String>,
    ) -> One {
        const NULL_VALUE_NOT_ALLOWED: &str = "22004";
        let Some(value) = value else { return One::Failed(sqlstate_text(&Error::ArgumentNotText, Kind::Text)) };
        let aad = match aad {
            None => None,
            Some(Some(aad)) => match aad.get() {
                Some(aad) => Some(aad),
                None => return One::Failed(sqlstate_text(&Error::ArgumentNotText, Kind::Text)),
            },
            Some(None) => return One::Failed(NULL_VALUE_NOT_ALLOWED.to_owned()),
        };
        if let Some(code) = head(value).and_then(|head| refused.get(head)) {
            return One::Failed(code.clone());
        }
        let mut out = Varlena::default();
        let outcome = backend::with(|session, run| {
            let target = match task.operation {
                BulkOperation::Migrate | BulkOperation::Rewrap => run.keyring.for_encrypting(task.key).ok(),
                BulkOperation::Downgrade | BulkOperation::Verify => None,
            };
            let target = target.map(|kek| kek.name.as_str());
            match session.convert(run, task, value, aad, version, &mut out) {
                Ok(changed) => Ok(Ok(changed)),
                Err(error) if error.concerns_one_value(target) => Ok(Err(error)),
                Err(error) => Err(error),
            }
        });
        match outcome.unwrap_or_else(|error| raise(&error, value.kind())) {
            Ok(false) => One::Unchanged,
            Ok(true) => {
                let new = written(&mut out, value.kind());
                let kek_id = backend::with(|session, run| session.assure(run, task, new));
                let kek_id = kek_id.unwrap_or_else(|error| raise(&error, value.kind()));
                One::New(out, kek_id)
            }
            Err(error) => {
                let code = sqlstate_text(&error, value.kind());
                if let (Error::Service { .. }, Some(head)) = (&error, head(value)) {
                    refused.insert(head.to_vec(), code.clone());
                }
                One::Failed(code)
            }
        }
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

    /// Whether the operation has something to do with a stored value. Calls no key service.
    #[pg_extern(name = "is_due", stable, parallel_restricted)]
    fn is_due_text(
        stored: Option<TextIn<'_>>,
        operation: TextIn<'_>,
        key: Option<TextIn<'_>>,
        newest_kek_id: Option<TextIn<'_>>,
    ) -> bool {
        // What is no text at all is due, to be reported.
        stored.is_some_and(|stored| {
            stored.get().is_none_or(|stored| is_due(Value::Text(stored), &operation, &key, &newest_kek_id))
        })
    }

    /// The same for `bytea`.
    #[pg_extern(name = "is_due", stable, parallel_restricted)]
    fn is_due_bytea(
        stored: Option<&[u8]>,
        operation: TextIn<'_>,
        key: Option<TextIn<'_>>,
        newest_kek_id: Option<TextIn<'_>>,
    ) -> bool {
        stored.is_some_and(|stored| is_due(Value::Bytes(stored), &operation, &key, &newest_kek_id))
    }

    fn is_due(
        value: Value<'_>,
        operation: &TextIn<'_>,
        key: &Option<TextIn<'_>>,
        newest_kek_id: &Option<TextIn<'_>>,
    ) -> bool {
        let (key, newest) = (key.as_ref().map(TextIn::as_str), newest_kek_id.as_ref().map(TextIn::as_str));
        backend::with(|session, run| session.is_due(run, named(operation), value, key, newest))
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
        let found = backend::with(|session, run| match named(&operation) {
            BulkOperation::Migrate => session.target(run, key, context).map(|name| (Some(name), None)),
            BulkOperation::Rewrap => session.newest_kek_id(run, key).map(|(name, newest)| (Some(name), newest)),
            BulkOperation::Downgrade => run.keyring.legacy_required().map(|_| (None, None)),
            BulkOperation::Verify => Ok((None, None)),
        });
        TableIterator::once(found.unwrap_or_else(|error| raise(&error, Kind::Text)))
    }

    /// Has the key service make, together, the DEKs that the next `needed` values of a job will be encrypted under; when
    /// it has to be asked at all, for `wanted` values.
    #[pg_extern(volatile, parallel_restricted)]
    fn prepare_keys(
        operation: TextIn<'_>,
        needed: i64,
        wanted: i64,
        key: Option<TextIn<'_>>,
        context: Option<ContextIn>,
        check_wraps: bool,
    ) {
        let task = BulkTask {
            operation: named(&operation),
            key: key.as_ref().map(TextIn::as_str),
            context: context.as_ref().map(ContextIn::context),
            check_wraps,
        };
        if task.operation == BulkOperation::Migrate {
            let count = |values: i64| u64::try_from(values).unwrap_or_default();
            backend::with(|session, run| session.make_deks_ahead(run, task, count(needed), count(wanted)))
                .unwrap_or_else(|error| raise(&error, Kind::Text));
        }
    }

    /// What a stored value is under, as a label to group by: `{"version": 2, "wraps": [["KEY", "KEK ID"]]}`. NULL for
    /// what holds nothing; version NULL for what claims to be an envelope and is malformed. Calls no key service.
    #[pg_extern(name = "stored_under", stable, parallel_restricted)]
    fn stored_under_text(stored: Option<TextIn<'_>>) -> Option<String> {
        match stored?.get() {
            Some(stored) => label(Value::Text(stored)),
            None => Some(PLAINTEXT_LABEL.to_owned()),
        }
    }

    /// The same for `bytea`.
    #[pg_extern(name = "stored_under", stable, parallel_restricted)]
    fn stored_under_bytea(stored: Option<&[u8]>) -> Option<String> {
        label(Value::Bytes(stored?))
    }

    const PLAINTEXT_LABEL: &str = r#"{"version":0,"wraps":[]}"#;

    fn label(value: Value<'_>) -> Option<String> {
        if value.bytes().is_empty() {
            return None;
        }
        let under = backend::with(|session, run| session.stored_under(run, value));
        let under = under.unwrap_or_else(|error| raise(&error, value.kind()));
        Some(serde_json::to_string(&under).unwrap_or_default())
    }

    /// An expression over a row of `target`, checked and written out again with the row called `t`. `{column}` in it
    /// stands for `column_name`; `changed` are the columns that the caller rewrites.
    #[pg_extern(stable, parallel_restricted)]
    fn row_expression(
        target: pg_sys::Oid,
        expression: TextIn<'_>,
        purpose: TextIn<'_>,
        column_name: Option<TextIn<'_>>,
        changed: Array<'_, TextIn<'_>>,
    ) -> String {
        let Some(purpose) = Purpose::from_name(purpose.as_str()) else {
            invalid("unknown purpose of an expression", "Purposes are aad, version and where_clause.")
        };
        let column = column_name.as_ref().map(TextIn::as_str).unwrap_or_default();
        // It stands inside a literal, where a quote is doubled.
        let expression = expression.as_str().replace("{column}", &column.replace('\'', "''"));
        let changed: Vec<_> = changed.iter().flatten().map(|name| name.as_str().to_owned()).collect();
        row_expression::checked(target, &expression, purpose, &changed)
    }
}

use crate::administration::invalid;
