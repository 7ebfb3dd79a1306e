//! One audit record as JSON. It names who, what and under which key; nothing in it is secret.

use serde_json::{Map, Value, json};
use vod_tender_core::access::{Outcome, Tally, Use};

use crate::callers::{self, Caller};

/// What is known of how a transaction ended.
#[derive(Debug, Clone, Copy)]
pub enum Ending {
    /// It is not over.
    Unknown,
    /// It is.
    Known {
        /// Whether what it wrote is stored.
        committed: bool,
    },
}

/// The record in one line of ASCII.
pub fn json(caller: Option<&Caller>, used: &Use, tally: &Tally, ending: Ending) -> String {
    // SAFETY: reads the clock.
    let now = callers::unix_us(unsafe { pgrx::pg_sys::GetCurrentTimestamp() });
    let mut entry = Map::new();
    let mut put = |name: &str, value: Value| entry.insert(name.to_owned(), value);
    put("at_us", now.into());
    if let Some(caller) = caller {
        put("database", caller.database.as_str().into());
        put("session_user", caller.session_user.as_str().into());
        put("outer_user", caller.outer_user.as_str().into());
        put("current_user", caller.current_user.as_str().into());
        put("application_name", caller.application_name.as_str().into());
        put("client", caller.client.as_deref().into());
        put("transaction_us", caller.transaction_us.into());
        put("query_id", caller.query_id.into());
    }
    put("pid", crate::process::id().into());
    put("function", used.function.name().into());
    put("operation", used.privilege.name().into());
    put("key", used.key.as_str().into());
    put("context", json!(used.context.to_map()));
    let (outcome, sqlstate) = match (&used.outcome, ending) {
        (Outcome::Honey, _) => ("honey", None),
        // What stays if nothing follows.
        (Outcome::Done, Ending::Unknown) => ("interrupted", None),
        (Outcome::Done, Ending::Known { .. }) => ("ok", None),
        (Outcome::Failed(sqlstate), _) => ("failed", Some(sqlstate.as_str())),
    };
    put("outcome", outcome.into());
    put("sqlstate", sqlstate.into());
    put("values", if outcome == "interrupted" { Value::Null } else { tally.values.into() });
    put("requests", json!(tally.requests));
    if let Ending::Known { committed } = ending {
        put("committed", committed.into());
    }
    ascii(&Value::Object(entry).to_string())
}

/// JSON, or other text, with every character beyond ASCII written as JSON escapes it: no encoding changes it.
pub fn ascii(text: &str) -> String {
    let mut ascii = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii() && !character.is_ascii_control() {
            ascii.push(character);
        } else {
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}
