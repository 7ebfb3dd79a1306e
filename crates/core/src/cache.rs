//! The session's DEKs: bounded in number, age, uses and bytes; overwritten when they go.

mod sealing;

pub use sealing::{MadeFor, SealingCache, SealingKey};

use std::rc::Rc;

use lru::LruCache;

use crate::access::Seen;
use crate::context::Context;
use crate::envelope::FLAGS_AT;
use crate::keyring::{Kek, Keyring};
use crate::policy::Limits;
use crate::seal::ExpandedKey;
use crate::stats::SessionStats;

/// Which KEK a cached DEK came through, as it was configured then.
#[derive(Clone)]
pub struct KekIdentity {
    /// Its name.
    pub name: String,
    uri: String,
    context: Context,
}

impl KekIdentity {
    /// Identity of a configured KEK.
    pub fn of(kek: &Kek) -> Self {
        KekIdentity { name: kek.name.clone(), uri: kek.uri.clone(), context: kek.context.clone() }
    }

    fn still_opens(&self, keyring: &Keyring) -> bool {
        keyring.still_opens(&self.name, &self.uri, &self.context)
    }
}

/// A DEK that was unwrapped, ready to open payloads.
pub struct OpenedKey {
    /// The payload's key.
    pub key: Rc<ExpandedKey>,
    /// The envelope's context.
    pub context: Context,
    /// The KEK that it came through.
    pub kek: KekIdentity,
    /// The KEK id that its wrap records; none in the literal form.
    pub kek_id: Option<Box<str>>,
    /// Other KEKs that this id belongs to: see [`Keyring::owners`].
    pub owners: Vec<String>,
    /// When it was unwrapped.
    pub born_ms: u64,
    /// Who opened something with it last.
    pub seen: Seen,
}

impl OpenedKey {
    fn has_owners_of(&self, keyring: &Keyring) -> bool {
        let kek_id = self.kek_id.as_deref();
        kek_id.is_none_or(|kek_id| keyring.owners_by_name(&self.kek.name, kek_id, &self.context) == self.owners)
    }
}

/// Unwrapped DEKs by header; the one unused for longest goes first.
pub struct OpenedCache {
    entries: LruCache<Box<[u8]>, Rc<OpenedKey>>,
    /// Not later than the birth of the oldest entry.
    oldest_ms: u64,
    name: Vec<u8>,
}

impl OpenedCache {
    /// An empty cache.
    pub fn new() -> Self {
        OpenedCache { entries: LruCache::unbounded(), oldest_ms: u64::MAX, name: Vec::new() }
    }

    /// The entry for a header, or for a literal form's blob. Flags do not count: one DEK serves with and without aad.
    pub fn get(
        &mut self,
        header: &[u8],
        now_ms: u64,
        limits: &Limits,
        stats: &mut SessionStats,
    ) -> Option<Rc<OpenedKey>> {
        Self::write_name(&mut self.name, header);
        let entry = self.entries.get(self.name.as_slice())?;
        if is_young(entry.born_ms, now_ms, limits) {
            return Some(Rc::clone(entry));
        }
        self.entries.pop(self.name.as_slice());
        stats.cache_expiries += 1;
        None
    }

    /// Keeps an entry, within the limits.
    pub fn put(&mut self, header: &[u8], opened: Rc<OpenedKey>, limits: &Limits, stats: &mut SessionStats) {
        Self::write_name(&mut self.name, header);
        self.oldest_ms = self.oldest_ms.min(opened.born_ms);
        self.entries.put(self.name.as_slice().into(), opened);
        self.evict(limits, stats);
    }

    /// Drops what is too old; gives whether anything was.
    pub fn expire(&mut self, now_ms: u64, limits: &Limits, stats: &mut SessionStats) -> bool {
        let evicted = self.evict(limits, stats);
        if self.entries.is_empty() || is_young(self.oldest_ms, now_ms, limits) {
            return evicted;
        }
        let before = self.entries.len();
        let mut oldest_ms = u64::MAX;
        self.entries.retain(|_, entry| {
            let keep = is_young(entry.born_ms, now_ms, limits);
            if keep {
                oldest_ms = oldest_ms.min(entry.born_ms);
            }
            keep
        });
        self.oldest_ms = oldest_ms;
        stats.cache_expiries += (before - self.entries.len()) as u64;
        evicted || before > self.entries.len()
    }

    /// Drops what is too much; gives whether anything was.
    fn evict(&mut self, limits: &Limits, stats: &mut SessionStats) -> bool {
        let before = self.entries.len();
        while self.entries.len() > limits.cache_entries {
            self.entries.pop_lru();
            stats.cache_evictions += 1;
        }
        before > self.entries.len()
    }

    /// Drops what `keyring` no longer allows.
    pub fn retain(&mut self, keyring: &Keyring) {
        self.entries.retain(|_, entry| entry.kek.still_opens(keyring) && entry.has_owners_of(keyring));
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        *self = Self::new();
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What an entry is found by: two headers with one name share it.
    pub fn name(header: &[u8]) -> Vec<u8> {
        let mut name = Vec::new();
        Self::write_name(&mut name, header);
        name
    }

    fn write_name(name: &mut Vec<u8>, header: &[u8]) {
        name.clear();
        name.extend_from_slice(header);
        // The literal form's blob has no flags; it never begins with the magic, so names cannot collide.
        if header.starts_with(&crate::envelope::MAGIC)
            && let Some(flags) = name.get_mut(FLAGS_AT)
        {
            *flags = 0;
        }
    }
}

impl Default for OpenedCache {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether something born then is still within the age limit.
pub(crate) fn is_young(born_ms: u64, now_ms: u64, limits: &Limits) -> bool {
    now_ms.saturating_sub(born_ms) < limits.max_age_ms
}
