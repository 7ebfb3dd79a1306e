//! What is configured: the catalog's keys, the server's environment, the file of legacy keys.

use std::path::Path;
use std::rc::Rc;

use vod_tender_core::context::Context;
use vod_tender_core::keyring::{ENVIRONMENT_KEY, Kek, KeyState, Keyring, Legacy};
use vod_tender_core::legacy::LegacyKeys;
use vod_tender_core::provider::KeyProvider;
use vod_tender_providers::broken::BrokenKek;
use vod_tender_providers::secret_file::{self, FileStamp};
use vod_tender_providers::{KekUri, Services, UriError};

use crate::catalog::{self, KekRow};
use crate::settings;

/// The keys as configured now. A key whose configuration is bad is kept, and says so when it is used.
pub fn read_keyring(services: &Services) -> Keyring {
    let mut keks: Vec<_> = catalog::read_keks().into_iter().filter_map(|row| from_row(row, services)).collect();
    if !keks.iter().any(|kek| kek.name == ENVIRONMENT_KEY) {
        // Alone, no other key's envelopes can be passed off as its own, and the setting that gives its context may
        // change without closing what was written before. Beside others it is held to its context as they are.
        let requires_context = !keks.is_empty();
        keks.extend(from_environment(requires_context, services));
    }
    Keyring { keks, default_key: settings::default_key(), legacy: read_legacy(), honey: catalog::read_honey() }
}

fn from_row(row: KekRow, services: &Services) -> Option<Kek> {
    // The table's own constraints leave no other state; without one the key is not used at all.
    let state = KeyState::from_name(&row.state)?;
    Some(make_kek(row.name, row.uri.clone(), KekUri::parse(&row.uri), &row.context, state, true, services))
}

fn from_environment(requires_context: bool, services: &Services) -> Option<Kek> {
    let value = std::env::var_os("KMS_KEY_ID").filter(|value| !value.is_empty())?;
    let value = value.to_string_lossy().into_owned();
    let uri = KekUri::parse_environment(&value);
    let context = settings::encryption_context();
    Some(make_kek(ENVIRONMENT_KEY.to_owned(), value, uri, &context, KeyState::Active, requires_context, services))
}

fn make_kek(
    name: String,
    uri: String,
    parsed: Result<KekUri, UriError>,
    context: &str,
    state: KeyState,
    requires_context: bool,
    services: &Services,
) -> Kek {
    let broken = |why: String| Rc::new(BrokenKek { why }) as Rc<dyn KeyProvider>;
    let (provider, context) = match (parsed, Context::from_json(context)) {
        (Ok(parsed), Ok(context)) => (services.connect(&parsed), context),
        (Err(error), _) => (broken(format!("its URI cannot be used: {error}")), Context::empty()),
        (_, Err(error)) => (broken(format!("its configuration has an {error}")), Context::empty()),
    };
    Kek { name, uri, context, requires_context, state, provider }
}

/// The file's keys first, then the environment's: all read, the first one writes.
fn read_legacy() -> Legacy {
    let mut keys = LegacyKeys::default();
    if let Some(path) = settings::legacy_key_file() {
        let Ok(content) = secret_file::read(Path::new(&path)) else {
            return Legacy::Broken(
                "the legacy key file cannot be used: it must exist, belong to the server's user, and have mode 0600 or 0400",
            );
        };
        let Some(read) = legacy_keys_in(&content) else { return BAD_FILE };
        keys = read;
    }
    if let Some(value) = std::env::var_os("ENCRYPTION_KEY").filter(|value| !value.is_empty())
        && !value.to_str().is_some_and(|value| keys.add_base64(value.trim_end()))
    {
        return Legacy::Broken("ENCRYPTION_KEY in the server's environment is not base64 of 32 bytes");
    }
    if keys.is_empty() { Legacy::Absent } else { Legacy::Keys(keys) }
}

/// The keys in a legacy key file's content, unless something else stands there too.
pub fn legacy_keys_in(content: &[u8]) -> Option<LegacyKeys> {
    let mut keys = LegacyKeys::default();
    for line in std::str::from_utf8(content).ok()?.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
        if !keys.add_base64(line) {
            return None;
        }
    }
    // An empty file is a mistake: taken for "no legacy key", it would let ciphertext pass for plaintext.
    (!keys.is_empty()).then_some(keys)
}

const BAD_FILE: Legacy = Legacy::Broken("the legacy key file does not hold base64 of 32 bytes on every line");

/// What tells whether the legacy key file changed: its name and its stamp.
pub fn legacy_file_stamp() -> Option<(String, Option<FileStamp>)> {
    let path = settings::legacy_key_file()?;
    let stamp = secret_file::stamp(Path::new(&path));
    Some((path, stamp))
}
