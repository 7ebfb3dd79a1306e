//! The functions that people call on values: thin, one core call each. Two of a kind, for `text` and for `bytea`.
//!
//! Their cost tells the planner to run cheaper filters first: a call may wait for a key service.

use pgrx::prelude::*;
use pgrx::{JsonB, default};
use vod_tender_core::Error;
use vod_tender_core::access::Function;
use vod_tender_core::info::describe;
use vod_tender_core::session::{ReadAs, Reading, Run, Sealing, Session};
use vod_tender_core::stored::{self, Kind, Value};

use crate::arguments::{BytesIn, ContextIn, StoredText, TextIn, to_utf8};
use crate::backend;
use crate::errors::raise;
use crate::results::{BytesOut, TextOut, Varlena};
use crate::wait::Waiter;

#[pg_extern(name = "envelope_encrypt", cost = 1000, volatile, parallel_restricted)]
fn envelope_encrypt_text<'a>(
    plaintext: Option<TextIn<'a>>,
    key: default!(Option<TextIn<'a>>, "NULL"),
    context: default!(Option<ContextIn>, "NULL"),
    aad: default!(Option<TextIn<'a>>, "NULL"),
) -> Option<TextOut> {
    encrypt(Value::Text(plaintext?.as_str()), &key, &context, &aad).map(TextOut)
}

#[pg_extern(name = "envelope_encrypt", cost = 1000, volatile, parallel_restricted)]
fn envelope_encrypt_bytea<'a>(
    plaintext: Option<BytesIn<'a>>,
    key: default!(Option<TextIn<'a>>, "NULL"),
    context: default!(Option<ContextIn>, "NULL"),
    aad: default!(Option<TextIn<'a>>, "NULL"),
) -> Option<BytesOut> {
    encrypt(Value::Bytes(plaintext?.0), &key, &context, &aad).map(BytesOut)
}

#[pg_extern(name = "envelope_decrypt", cost = 1000, stable, parallel_restricted)]
fn envelope_decrypt_text<'a>(
    value: Option<StoredText<'a>>,
    aad: default!(Option<TextIn<'a>>, "NULL"),
    context: default!(Option<ContextIn>, "NULL"),
    version: default!(Option<i32>, "NULL"),
) -> Option<TextOut> {
    let (StoredText(stored), reading) = (value?, reading(&aad, &context, version));
    let out = run(Function::Decrypt, Kind::Text, |session, run, out| {
        // Session::decrypt() in two steps: for the first it need not be text.
        if session.decrypt_cached(run, Kind::Text, stored, reading, out)? {
            return Ok(());
        }
        let text = to_utf8(stored).ok_or(Error::ArgumentNotText)?;
        Ok(session.decrypt_any(run, Value::Text(&text), reading, out).map(warn_if_plaintext)?)
    });
    out.map(TextOut)
}

#[pg_extern(name = "envelope_decrypt", cost = 1000, stable, parallel_restricted)]
fn envelope_decrypt_bytea<'a>(
    value: Option<BytesIn<'a>>,
    aad: default!(Option<TextIn<'a>>, "NULL"),
    context: default!(Option<ContextIn>, "NULL"),
    version: default!(Option<i32>, "NULL"),
) -> Option<BytesOut> {
    let (value, reading) = (Value::Bytes(value?.0), reading(&aad, &context, version));
    let out = run(Function::Decrypt, Kind::Bytes, |session, run, out| {
        session.decrypt(run, value, reading, out).map(warn_if_plaintext)
    });
    out.map(BytesOut)
}

#[pg_extern(name = "rewrap", cost = 1000, volatile, parallel_restricted)]
fn rewrap_text<'a>(value: Option<TextIn<'a>>, key: default!(Option<TextIn<'a>>, "NULL")) -> Option<TextOut> {
    rewrap(Value::Text(value?.as_str()), &key).map(TextOut)
}

#[pg_extern(name = "rewrap", cost = 1000, volatile, parallel_restricted)]
fn rewrap_bytea<'a>(value: Option<BytesIn<'a>>, key: default!(Option<TextIn<'a>>, "NULL")) -> Option<BytesOut> {
    rewrap(Value::Bytes(value?.0), &key).map(BytesOut)
}

#[pg_extern(name = "envelope_upgrade", cost = 1000, volatile, parallel_restricted)]
fn envelope_upgrade_text<'a>(
    value: Option<TextIn<'a>>,
    key: default!(Option<TextIn<'a>>, "NULL"),
    context: default!(Option<ContextIn>, "NULL"),
    aad: default!(Option<TextIn<'a>>, "NULL"),
    version: default!(Option<i32>, "NULL"),
) -> Option<TextOut> {
    upgrade(Value::Text(value?.as_str()), &key, &context, &aad, version).map(TextOut)
}

#[pg_extern(name = "envelope_upgrade", cost = 1000, volatile, parallel_restricted)]
fn envelope_upgrade_bytea<'a>(
    value: Option<BytesIn<'a>>,
    key: default!(Option<TextIn<'a>>, "NULL"),
    context: default!(Option<ContextIn>, "NULL"),
    aad: default!(Option<TextIn<'a>>, "NULL"),
    version: default!(Option<i32>, "NULL"),
) -> Option<BytesOut> {
    upgrade(Value::Bytes(value?.0), &key, &context, &aad, version).map(BytesOut)
}

#[pg_extern(name = "envelope_downgrade", cost = 1000, volatile, parallel_restricted)]
fn envelope_downgrade_text<'a>(
    value: Option<TextIn<'a>>,
    aad: default!(Option<TextIn<'a>>, "NULL"),
    version: default!(Option<i32>, "NULL"),
) -> Option<TextOut> {
    downgrade(Value::Text(value?.as_str()), &aad, version).map(TextOut)
}

#[pg_extern(name = "envelope_downgrade", cost = 1000, volatile, parallel_restricted)]
fn envelope_downgrade_bytea<'a>(
    value: Option<BytesIn<'a>>,
    aad: default!(Option<TextIn<'a>>, "NULL"),
    version: default!(Option<i32>, "NULL"),
) -> Option<BytesOut> {
    downgrade(Value::Bytes(value?.0), &aad, version).map(BytesOut)
}

#[pg_extern(name = "envelope_version", stable, parallel_restricted)]
fn envelope_version_text(value: Option<TextIn<'_>>) -> Option<i32> {
    version(Value::Text(value?.as_str()))
}

#[pg_extern(name = "envelope_version", stable, parallel_restricted)]
fn envelope_version_bytea(value: Option<BytesIn<'_>>) -> Option<i32> {
    version(Value::Bytes(value?.0))
}

#[pg_extern(name = "envelope_info", stable, parallel_restricted)]
fn envelope_info_text(value: Option<TextIn<'_>>) -> Option<JsonB> {
    info(Value::Text(value?.as_str()))
}

#[pg_extern(name = "envelope_info", stable, parallel_restricted)]
fn envelope_info_bytea(value: Option<BytesIn<'_>>) -> Option<JsonB> {
    info(Value::Bytes(value?.0))
}

#[pg_extern(name = "is_envelope", immutable, parallel_safe)]
fn is_envelope_text(value: Option<TextIn<'_>>) -> Option<bool> {
    // For CHECK constraints: whatever is stored gives an answer and no error.
    Some(value?.get().is_some_and(|text| stored::is_envelope(Value::Text(text))))
}

#[pg_extern(name = "is_envelope", immutable, parallel_safe)]
fn is_envelope_bytea(value: Option<BytesIn<'_>>) -> Option<bool> {
    Some(stored::is_envelope(Value::Bytes(value?.0)))
}

/// Wipes this session's data keys and closes its connections to key services.
#[pg_extern(volatile, parallel_restricted)]
fn envelope_cache_clear() {
    backend::clear();
}

fn encrypt(
    plaintext: Value<'_>,
    key: &Option<TextIn<'_>>,
    context: &Option<ContextIn>,
    aad: &Option<TextIn<'_>>,
) -> Option<Varlena> {
    let sealing = sealing(key, context, aad);
    run(Function::Encrypt, plaintext.kind(), |session, run, out| Ok(session.encrypt(run, plaintext, sealing, out)?))
}

fn rewrap(value: Value<'_>, key: &Option<TextIn<'_>>) -> Option<Varlena> {
    run(Function::Rewrap, value.kind(), |session, run, out| Ok(session.rewrap(run, value, text(key), out).map(drop)?))
}

fn upgrade(
    value: Value<'_>,
    key: &Option<TextIn<'_>>,
    context: &Option<ContextIn>,
    aad: &Option<TextIn<'_>>,
    version: Option<i32>,
) -> Option<Varlena> {
    let sealing = sealing(key, context, aad);
    run(Function::Upgrade, value.kind(), |session, run, out| {
        Ok(session.upgrade(run, value, sealing, version, out).map(warn_if_plaintext)?)
    })
}

fn downgrade(value: Value<'_>, aad: &Option<TextIn<'_>>, version: Option<i32>) -> Option<Varlena> {
    run(Function::Downgrade, value.kind(), |session, run, out| {
        Ok(session.downgrade(run, value, text(aad), version, out).map(warn_if_plaintext)?)
    })
}

fn version(value: Value<'_>) -> Option<i32> {
    let kind = value.kind();
    let version = backend::with(Function::Other, kind, |session, run| session.version(run, value));
    Some(version.unwrap_or_else(|error| raise(&error, kind)))
}

fn info(value: Value<'_>) -> Option<JsonB> {
    let info =
        backend::with(Function::Other, value.kind(), |session, run| describe(value, session.version(run, value)?));
    let info = info.unwrap_or_else(|error| raise(&error, value.kind()));
    Some(JsonB(serde_json::to_value(info).unwrap_or_default()))
}

fn reading<'a>(aad: &'a Option<TextIn<'_>>, context: &'a Option<ContextIn>, version: Option<i32>) -> Reading<'a> {
    Reading { aad: text(aad), context: context.as_ref().map(ContextIn::context), version }
}

fn sealing<'a>(
    key: &'a Option<TextIn<'_>>,
    context: &'a Option<ContextIn>,
    aad: &'a Option<TextIn<'_>>,
) -> Sealing<'a> {
    Sealing { key: text(key), context: context.as_ref().map(ContextIn::context), aad: text(aad) }
}

fn text<'a>(argument: &'a Option<TextIn<'_>>) -> Option<&'a str> {
    argument.as_ref().map(TextIn::as_str)
}

fn run(
    function: Function,
    kind: Kind,
    work: impl FnOnce(&mut Session, &mut Run<'_, Waiter>, &mut Varlena) -> Result<(), Box<Error>>,
) -> Option<Varlena> {
    let mut out = Varlena::default();
    match backend::with(function, kind, |session, run| work(session, run, &mut out)) {
        Ok(()) => Some(out),
        Err(error) => raise(&error, kind),
    }
}

#[inline]
fn warn_if_plaintext(read_as: ReadAs) {
    if read_as == ReadAs::PlaintextWithWarning {
        warn();
    }
}

#[inline(never)]
fn warn() {
    warning!("{}", Error::PLAINTEXT_WARNING);
}
