//! The fixed schema `vod_tender_crypto`: what its tables and SQL functions need from Rust.

use pgrx::prelude::*;

#[pg_schema]
mod vod_tender_crypto {
    use pgrx::prelude::*;
    use pgrx::{AllocatedByRust, JsonB};
    use vod_tender_core::Error;
    use vod_tender_core::envelope::is_key_name;
    use vod_tender_core::error::Malformed;
    use vod_tender_core::keyring::{Honey, LEGACY_KEY};
    use vod_tender_core::stored::{Kind, Stored, Value, direct_shape};
    use vod_tender_providers::KekUri;

    use crate::arguments::{ContextIn, TextIn};
    use crate::errors::{invalid, raise};
    use crate::{audit, backend, catalog};

    /// True for what can be a row of the table `kek`; an error that says why for everything else.
    #[pg_extern(immutable, parallel_safe)]
    fn check_key(name: Option<TextIn<'_>>, uri: Option<TextIn<'_>>, context: Option<ContextIn>) -> bool {
        let (Some(name), Some(uri), Some(context)) = (&name, &uri, &context) else {
            invalid("a key has a name, a URI and a context", "The context may be '{}'.")
        };
        // Raises where the JSON is no context.
        context.context();
        if name.as_str() == LEGACY_KEY {
            invalid("unusable name for a key", "legacy is the name of the legacy keys, where rights are granted.")
        }
        if !is_key_name(name.as_str()) {
            invalid(
                "unusable name for a key",
                "A name has 1 to 63 of the characters A-Z a-z 0-9 _ . - and begins with a letter or a digit.",
            );
        }
        if let Err(error) = KekUri::parse(uri.as_str()) {
            invalid(
                &format!("unusable URI for key \"{}\": {error}", name.as_str()),
                "For example: aws-kms://arn:aws:kms:REGION:ACCOUNT:key/ID, aws-kms://alias/NAME?region=REGION, \
                 or local:///ABSOLUTE/PATH.",
            );
        }
        true
    }

    /// Tells every session that a table changed that sessions keep in memory: fires on each statement that changes it.
    #[pg_trigger]
    fn kek_changed<'a>(
        trigger: &'a PgTrigger<'a>,
    ) -> Result<Option<PgHeapTuple<'a, AllocatedByRust>>, std::convert::Infallible> {
        if let Ok(table) = trigger.relation() {
            catalog::announce_change(table.oid());
        }
        catalog::set_changed();
        Ok(None)
    }

    /// What a honey value is known by: nonce and tag of its payload.
    #[pg_extern(name = "honey_mark", immutable, parallel_safe)]
    fn honey_mark_text(value: TextIn<'_>) -> Vec<u8> {
        honey_mark(Value::Text(value.as_str()))
    }

    /// The same for `bytea`.
    #[pg_extern(name = "honey_mark", immutable, parallel_safe)]
    fn honey_mark_bytea(value: &[u8]) -> Vec<u8> {
        honey_mark(Value::Bytes(value))
    }

    fn honey_mark(value: Value<'_>) -> Vec<u8> {
        let kind = value.kind();
        let mark = Stored::parse(value).map_err(Error::from).and_then(|stored| match stored {
            Stored::Envelope { payload, .. } => Ok(Honey::mark(&payload)),
            Stored::Literal { payload, .. } => Ok(Honey::mark(&payload)),
            Stored::Other(value) => direct_shape(value).map(|sealed| Honey::mark(&sealed)),
        });
        match mark {
            Ok(Some(mark)) => mark.to_vec(),
            Ok(None) => raise(&Malformed("no payload").into(), kind),
            Err(error) => raise(&error, kind),
        }
    }

    /// Waits until the records of all transactions that have ended are in the table. Gives whether they were queued for it.
    #[pg_extern(volatile, parallel_restricted)]
    fn flush_audit() -> bool {
        audit::flush().unwrap_or_else(|error| raise(&error, Kind::Text))
    }

    /// This session's counters.
    #[pg_extern(volatile, parallel_restricted)]
    fn session_stats() -> JsonB {
        JsonB(backend::statistics().unwrap_or_else(|error| raise(&error, Kind::Text)))
    }
}
