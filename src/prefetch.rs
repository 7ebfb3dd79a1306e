//! Fetching data keys before the values that need them are read or rewrapped: many calls together instead of one after
//! the other.

use std::collections::HashSet;
use std::rc::Rc;

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use pgrx::{Array, default};
use vod_tender_core::access::Function;
use vod_tender_core::session::{Run, Session};
use vod_tender_core::stored::{Kind, Value};

use crate::arguments::TextIn;
use crate::backend;
use crate::errors::{invalid, raise};
use crate::process;
use crate::wait::Waiter;

/// Fetches the data keys of these values into the session's cache, for `envelope_decrypt` or, with the operation `rewrap`,
/// for `rewrap` to a key. Gives how many it fetched.
#[pg_extern(name = "envelope_prefetch", cost = 1000, volatile, parallel_restricted)]
fn envelope_prefetch_text<'a>(
    values: Option<Array<'a, TextIn<'a>>>,
    operation: default!(Option<TextIn<'a>>, "'decrypt'"),
    key: default!(Option<TextIn<'a>>, "NULL"),
) -> Option<i64> {
    let values = values?;
    let heads = heads(Kind::Text, values.iter().flatten(), |value| value.get().map(Value::Text));
    Some(fetch(&borrowed(&heads), &operation, &key))
}

/// The same for `bytea`.
#[pg_extern(name = "envelope_prefetch", cost = 1000, volatile, parallel_restricted)]
fn envelope_prefetch_bytea<'a>(
    values: Option<Array<'a, &'a [u8]>>,
    operation: default!(Option<TextIn<'a>>, "'decrypt'"),
    key: default!(Option<TextIn<'a>>, "NULL"),
) -> Option<i64> {
    let values = values?;
    let heads = heads(Kind::Bytes, values.iter().flatten(), |value| Some(Value::Bytes(value)));
    Some(fetch(&borrowed(&heads), &operation, &key))
}

#[pg_schema]
mod vod_tender_crypto {
    use pgrx::Array;
    use pgrx::prelude::*;
    use vod_tender_core::session::Session;
    use vod_tender_core::stored::Value;

    use crate::arguments::TextIn;

    /// What of a stored value the key service must see, as `needed_head` gives it to jobs: for those who may use a key. NULL
    /// also for what is too long to be fetched ahead.
    #[pg_extern(name = "stored_head", stable, parallel_restricted)]
    fn stored_head_text(stored: Option<TextIn<'_>>) -> Option<Vec<u8>> {
        super::head_of(Value::Text(stored?.get()?), Session::fetchable_head)
    }

    /// The same for `bytea`.
    #[pg_extern(name = "stored_head", stable, parallel_restricted)]
    fn stored_head_bytea(stored: Option<&[u8]>) -> Option<Vec<u8>> {
        super::head_of(Value::Bytes(stored?), Session::fetchable_head)
    }

    /// `envelope_prefetch` for what `stored_head` gave of values: NULL is nothing.
    #[pg_extern(cost = 1000, volatile, parallel_restricted)]
    fn prefetch_heads<'a>(
        heads: Option<Array<'a, &'a [u8]>>,
        operation: Option<TextIn<'a>>,
        key: Option<TextIn<'a>>,
    ) -> i64 {
        let heads: Vec<_> = heads.iter().flat_map(Array::iter).flatten().collect();
        super::fetch(&heads, &operation, &key)
    }
}

/// What `find` finds of a value that a key service must see. Uses no key.
pub fn head_of(
    value: Value<'_>,
    find: impl FnOnce(&mut Session, &Run<'_, Waiter>, Value<'_>) -> Head,
) -> Option<Vec<u8>> {
    let found = backend::with(Function::Other, value.kind(), |session, run| Ok(find(session, run, value)));
    found.unwrap_or_else(|error| raise(&error, value.kind())).map(|head| head.to_vec())
}

type Head = Option<Rc<[u8]>>;

/// What the key service must see of the values, each once. What is no envelope, or malformed, needs nothing.
fn heads<V>(
    kind: Kind,
    values: impl Iterator<Item = V>,
    value: impl for<'v> Fn(&'v V) -> Option<Value<'v>>,
) -> Vec<Rc<[u8]>> {
    /// Values that are looked at before an interrupt is.
    const AT_ONCE: usize = 1000;
    let (mut heads, mut seen) = (Vec::new(), HashSet::new());
    let mut values = values.peekable();
    while values.peek().is_some() {
        let found = backend::with(Function::Other, kind, |session, run| {
            for each in values.by_ref().take(AT_ONCE) {
                let Some(value) = value(&each) else { continue };
                let Some(head) = session.fetchable_head(run, value) else { continue };
                if seen.insert(Rc::clone(&head)) {
                    heads.push(head);
                }
            }
            Ok(())
        });
        found.unwrap_or_else(|error| raise(&error, kind));
        process::process_interrupts();
    }
    heads
}

fn borrowed(heads: &[Rc<[u8]>]) -> Vec<&[u8]> {
    heads.iter().map(|head| &**head).collect()
}

fn fetch(heads: &[&[u8]], operation: &Option<TextIn<'_>>, key: &Option<TextIn<'_>>) -> i64 {
    let key = key.as_ref().map(TextIn::as_str);
    let function = match (operation.as_ref().map(TextIn::as_str), key) {
        (Some("decrypt"), None) => Function::Prefetch,
        (Some("decrypt"), Some(_)) => invalid("a key is given to prefetch for decrypting", "Values name their keys."),
        (Some("rewrap"), _) => Function::PrefetchRewraps,
        _ => invalid("unknown operation to prefetch for", "Operations are decrypt and rewrap."),
    };
    let fetched = backend::with(function, Kind::Text, |session, run| match function {
        Function::PrefetchRewraps => session.prefetch_rewraps(run, key, heads),
        _ => session.prefetch(run, heads),
    });
    let fetched = fetched.unwrap_or_else(|error| raise(&error, Kind::Text));
    if fetched.left_out > 0 {
        let message = "data keys were left out: the session keeps no more";
        ErrorReport::new(PgSqlErrorCode::ERRCODE_WARNING, message, "vod_tender_crypto")
            .set_hint("Raise vod_tender_crypto.dek_cache_entries, or prefetch a part at a time.")
            .report(PgLogLevel::WARNING);
    }
    fetched.deks as i64
}
