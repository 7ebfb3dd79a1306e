//! The fixed schema `vod_tender_crypto`: what its tables and SQL functions need from Rust.

use pgrx::prelude::*;

#[pg_schema]
mod vod_tender_crypto {
    use pgrx::prelude::*;
    use pgrx::{AllocatedByRust, JsonB};
    use vod_tender_core::envelope::is_key_name;
    use vod_tender_core::stored::Kind;
    use vod_tender_providers::KekUri;

    use crate::arguments::{ContextIn, TextIn};
    use crate::errors::{invalid, raise};
    use crate::{backend, catalog};

    /// True for what can be a row of the table `kek`; an error that says why for everything else.
    #[pg_extern(immutable, parallel_safe)]
    fn check_key(name: Option<TextIn<'_>>, uri: Option<TextIn<'_>>, context: Option<ContextIn>) -> bool {
        let (Some(name), Some(uri), Some(context)) = (&name, &uri, &context) else {
            invalid("a key has a name, a URI and a context", "The context may be '{}'.")
        };
        // Raises where the JSON is no context.
        context.context();
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

    /// Tells every session that the table `kek` changed: fires on each statement that changes it.
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

    /// This session's counters.
    #[pg_extern(volatile, parallel_restricted)]
    fn session_stats() -> JsonB {
        JsonB(backend::statistics().unwrap_or_else(|error| raise(&error, Kind::Text)))
    }
}
