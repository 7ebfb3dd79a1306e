//! The configured keys: the only ones that are ever called.

use std::collections::HashSet;
use std::rc::Rc;

use crate::context::Context;
use crate::envelope::{NONCE_BYTES, TAG_BYTES};
use crate::error::{Error, Result};
use crate::legacy::LegacyKeys;
use crate::provider::KeyProvider;

/// Name of the KEK that the server's environment configures.
pub const ENVIRONMENT_KEY: &str = "default";

/// Name of the legacy keys where rights are granted and uses are recorded; no KEK may have it.
pub const LEGACY_KEY: &str = "legacy";

/// What a KEK may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    /// Encrypts and decrypts.
    Active,
    /// Decrypts what exists.
    DecryptOnly,
    /// Nothing.
    Disabled,
}

impl KeyState {
    /// The state of this name in the catalog.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "active" => Some(KeyState::Active),
            "decrypt_only" => Some(KeyState::DecryptOnly),
            "disabled" => Some(KeyState::Disabled),
            _ => None,
        }
    }

    /// The state's name in the catalog.
    pub fn name(self) -> &'static str {
        match self {
            KeyState::Active => "active",
            KeyState::DecryptOnly => "decrypt_only",
            KeyState::Disabled => "disabled",
        }
    }
}

/// One configured KEK.
pub struct Kek {
    /// Its name, which envelopes carry.
    pub name: String,
    /// Where it is; compared to see whether a cached DEK still belongs to it.
    pub uri: String,
    /// Pairs added to every caller's context.
    pub context: Context,
    /// Whether an envelope must carry `context` to be opened with this KEK. Without it, two KEKs of the catalog
    /// that share a key and differ in context (tenants) could open each other's envelopes by a forged key name.
    pub requires_context: bool,
    /// What it may be used for.
    pub state: KeyState,
    /// The way to it.
    pub provider: Rc<dyn KeyProvider>,
}

impl Kek {
    fn refused(&self) -> Error {
        Error::KeyState { name: self.name.clone(), state: self.state.name() }
    }
}

/// The legacy keys, as configured.
#[derive(Default)]
pub enum Legacy {
    /// None is configured.
    #[default]
    Absent,
    /// These.
    Keys(LegacyKeys),
    /// One is configured and cannot be used, for this reason.
    Broken(&'static str),
}

/// Everything that is configured.
#[derive(Default)]
pub struct Keyring {
    /// All KEKs; no name twice.
    pub keks: Vec<Kek>,
    /// Name of the KEK for callers that name none.
    pub default_key: String,
    /// The legacy keys.
    pub legacy: Legacy,
    /// The values that nobody has a reason to open.
    pub honey: Honey,
}

/// Values that are watched, known by nonce and tag: those stay when a value is rewrapped.
#[derive(Default)]
pub struct Honey(HashSet<[u8; HONEY_BYTES]>);

/// Bytes of a nonce and a tag.
const HONEY_BYTES: usize = NONCE_BYTES + TAG_BYTES;

impl Honey {
    /// What a value is known by: nonce ‖ tag of its payload (nonce ‖ ciphertext ‖ tag).
    pub fn mark(payload: &[u8]) -> Option<[u8; HONEY_BYTES]> {
        let (nonce, rest) = payload.split_first_chunk::<NONCE_BYTES>()?;
        let tag = rest.last_chunk::<TAG_BYTES>()?;
        let mut mark = [0; HONEY_BYTES];
        mark[..NONCE_BYTES].copy_from_slice(nonce);
        mark[NONCE_BYTES..].copy_from_slice(tag);
        Some(mark)
    }

    /// Watches one more; `false` for what is no mark.
    pub fn add(&mut self, mark: &[u8]) -> bool {
        mark.try_into().is_ok_and(|mark| {
            self.0.insert(mark);
            true
        })
    }

    /// Whether the value with this payload is watched.
    #[inline]
    pub fn has(&self, payload: &[u8]) -> bool {
        !self.0.is_empty() && Self::mark(payload).is_some_and(|mark| self.0.contains(&mark))
    }
}

impl Keyring {
    /// The KEK to encrypt with.
    pub fn for_encrypting(&self, name: Option<&str>) -> Result<&Kek> {
        if name.is_none() && self.keks.is_empty() {
            return Err(Error::NothingConfigured);
        }
        let kek = match name {
            Some(name) => self.find(name).map_err(|_| Error::UnknownGivenKey)?,
            None => self.find(&self.default_key)?,
        };
        if kek.state == KeyState::Active { Ok(kek) } else { Err(kek.refused()) }
    }

    /// The KEK to decrypt with.
    pub fn for_decrypting(&self, name: &str) -> Result<&Kek> {
        let kek = self.find(name)?;
        if kek.state == KeyState::Disabled { Err(kek.refused()) } else { Ok(kek) }
    }

    /// Whether there is a KEK of that name.
    pub fn is_configured(&self, name: &str) -> bool {
        self.find(name).is_ok()
    }

    /// The KEK for envelopes that name none (the literal form).
    pub fn for_literal(&self) -> Result<&Kek> {
        if self.keks.is_empty() {
            return Err(Error::NothingConfigured);
        }
        self.for_decrypting(&self.default_key)
    }

    /// The legacy keys; an error when they are configured and cannot be used.
    pub fn legacy(&self) -> Result<Option<&LegacyKeys>> {
        match &self.legacy {
            Legacy::Absent => Ok(None),
            Legacy::Keys(keys) => Ok(Some(keys)),
            Legacy::Broken(reason) => Err(Error::LegacyKey(reason)),
        }
    }

    /// The legacy keys; an error when there are none.
    pub fn legacy_required(&self) -> Result<&LegacyKeys> {
        self.legacy()?.ok_or(Error::LegacyKey("no legacy key is configured"))
    }

    /// Whether `kek`, as it was when a DEK was cached, is still the same and may still decrypt.
    pub fn still_opens(&self, name: &str, uri: &str, context: &Context) -> bool {
        self.for_decrypting(name).is_ok_and(|kek| kek.uri == uri && kek.context == *context)
    }

    /// The other KEKs that the recorded id is known to belong to and that could open what has this context, where `kek` itself
    /// cannot tell: an alias may have stood for any key, so that an envelope that names it may be theirs.
    pub fn owners(&self, kek: &Kek, kek_id: &str, context: &Context) -> Vec<String> {
        if kek.provider.is_current(kek_id).is_some() {
            return Vec::new();
        }
        let opens =
            |other: &&Kek| other.name != kek.name && (!other.requires_context || context.includes(&other.context));
        let owns = |other: &&Kek| other.provider.is_current(kek_id) == Some(true);
        self.keks.iter().filter(opens).filter(owns).map(|other| other.name.clone()).collect()
    }

    /// The same for a KEK by name; nobody's, where it is not configured.
    pub fn owners_by_name(&self, name: &str, kek_id: &str, context: &Context) -> Vec<String> {
        self.find(name).map_or_else(|_| Vec::new(), |kek| self.owners(kek, kek_id, context))
    }

    fn find(&self, name: &str) -> Result<&Kek> {
        self.keks.iter().find(|kek| kek.name == name).ok_or_else(|| Error::UnknownKey(name.to_owned()))
    }
}
