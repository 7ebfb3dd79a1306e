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
        /// Whether what it wrote is stored; nothing when others decide, or when it goes on.
        committed: Option<bool>,
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
        put("session_user_name", caller.session_user.as_str().into());
        put("outer_user_name", caller.outer_user.as_str().into());
        put("current_user_name", caller.current_user.as_str().into());
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
    let outcome = match (&used.outcome, ending) {
        (Outcome::Honey, _) => "honey",
        // What stays if nothing follows.
        (Outcome::Done, Ending::Unknown) => "interrupted",
        (Outcome::Done, Ending::Known { .. }) => "ok",
        (Outcome::Failed(_), _) => "failed",
    };
    put("outcome", outcome.into());
    put("sqlstate", if let Outcome::Failed(sqlstate) = &used.outcome { sqlstate.as_str().into() } else { Value::Null });
    put("value_count", if let Ending::Unknown = ending { Value::Null } else { tally.values.into() });
    put("key_service_requests", json!(tally.requests));
    if let Ending::Known { committed } = ending {
        put("committed", committed.into());
    }
    ascii(&Value::Object(entry).to_string())
}

/// When a record was written, microseconds since 1970.
pub fn time(entry: &str) -> Option<i64> {
    serde_json::from_str::<Value>(entry).ok()?.get("at_us")?.as_i64()
}

/// A record in which characters beyond ASCII are spelt out: for databases whose encoding may not have them. PostgreSQL would
/// refuse to read anything of a record with one that it cannot convert.
pub fn without_escapes(entry: &str) -> String {
    let mut spelt = String::with_capacity(entry.len());
    let mut characters = entry.chars();
    while let Some(character) = characters.next() {
        spelt.push(character);
        if character != '\\' {
            continue;
        }
        match characters.next() {
            Some('u') => {
                let digits: String = characters.by_ref().take(4).collect();
                let is_ascii = u32::from_str_radix(&digits, 16).is_ok_and(|code| code < 0x80);
                spelt.push_str(if is_ascii { "u" } else { "\\u" });
                spelt.push_str(&digits);
            }
            Some(other) => spelt.push(other),
            None => {}
        }
    }
    spelt
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
