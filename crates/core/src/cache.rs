//! The session's DEKs: bounded in number, age, uses and bytes; overwritten when they go.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::rc::Rc;

use lru::LruCache;

use crate::access::Seen;
use crate::context::Context;
use crate::envelope::{FLAG_AAD, FLAGS_AT, MAGIC, PAYLOAD_OVERHEAD};
use crate::keyring::{Kek, Keyring};
use crate::policy::{DEK_USES_CAP, Limits};
use crate::seal::ExpandedKey;
use crate::stats::SessionStats;

/// Which KEK a cached DEK came through, as it was configured then.
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

    /// The entry for a header, or for a literal form's blob; it may be too old. Flags do not count: one DEK serves with and
    /// without aad.
    #[inline]
    pub fn get(&mut self, header: &[u8]) -> Option<Rc<OpenedKey>> {
        if let Some((name, entry)) = self.entries.peek_mru()
            && is_named(header, name)
        {
            return Some(Rc::clone(entry));
        }
        Self::write_name(&mut self.name, header);
        self.entries.get(self.name.as_slice()).map(Rc::clone)
    }

    /// The entry, if it is not too old.
    pub fn get_young(
        &mut self,
        header: &[u8],
        now_ms: u64,
        limits: &Limits,
        stats: &mut SessionStats,
    ) -> Option<Rc<OpenedKey>> {
        let entry = self.get(header)?;
        if is_young(entry.born_ms, now_ms, limits) {
            return Some(entry);
        }
        self.remove(header, stats);
        None
    }

    /// The header of a binary envelope, and its entry, if it is the one that was asked for last: the next value is likely to
    /// have the same, and then comparing finds where it ends.
    #[inline]
    pub fn latest<'a>(&self, envelope: &'a [u8]) -> Option<(&'a [u8], Rc<OpenedKey>)> {
        let (name, entry) = self.entries.peek_mru()?;
        let header = envelope.get(..name.len())?;
        let has_payload = envelope.len() - header.len() >= PAYLOAD_OVERHEAD;
        (has_payload && name.starts_with(&MAGIC) && is_named(header, name)).then(|| (header, Rc::clone(entry)))
    }

    /// Drops an entry that is too old.
    pub fn remove(&mut self, header: &[u8], stats: &mut SessionStats) {
        Self::write_name(&mut self.name, header);
        if self.entries.pop(self.name.as_slice()).is_some() {
            stats.cache_expiries += 1;
        }
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

    fn write_name(name: &mut Vec<u8>, header: &[u8]) {
        name.clear();
        name.extend_from_slice(header);
        // The literal form's blob has no flags; it never begins with the magic, so names cannot collide.
        if header.starts_with(&MAGIC) {
            name[FLAGS_AT] &= !FLAG_AAD;
        }
    }
}

/// Whether [`OpenedCache`] has a header, or a literal form's blob, under this name.
#[inline]
fn is_named(header: &[u8], name: &[u8]) -> bool {
    if header.len() != name.len() {
        return false;
    }
    if !header.starts_with(&MAGIC) || header.len() <= FLAGS_AT {
        return header == name;
    }
    header[FLAGS_AT] & !FLAG_AAD == name[FLAGS_AT]
        && header[..FLAGS_AT] == name[..FLAGS_AT]
        && header[FLAGS_AT + 1..] == name[FLAGS_AT + 1..]
}

impl Default for OpenedCache {
    fn default() -> Self {
        Self::new()
    }
}

/// A DEK that this session made and encrypts with.
pub struct SealingKey {
    /// The payload's key.
    pub key: Rc<ExpandedKey>,
    /// Header without and with the aad flag, in binary.
    pub headers: [Vec<u8>; 2],
    /// The same, armored, up to the second colon.
    pub armored: [String; 2],
    /// The KEK that wrapped it.
    pub kek: KekIdentity,
    /// The envelope's context.
    pub context: Context,
    /// Who encrypted something with it last.
    pub seen: Seen,
    born_ms: u64,
    uses: u64,
    bytes: u64,
}

impl SealingKey {
    /// A key that was not used yet.
    pub fn new(key: Rc<ExpandedKey>, headers: [Vec<u8>; 2], kek: KekIdentity, context: Context, born_ms: u64) -> Self {
        let armored = [crate::armor::armored_head(&headers[0]), crate::armor::armored_head(&headers[1])];
        SealingKey { key, headers, armored, kek, context, seen: Seen::default(), born_ms, uses: 0, bytes: 0 }
    }

    /// Counts a value of so many bytes before it is sealed, so that a failure between cannot exceed the limits.
    pub fn count(&mut self, bytes: usize) {
        self.uses += 1;
        self.bytes = self.bytes.saturating_add(bytes as u64);
    }

    fn can_take(&self, bytes: usize, now_ms: u64, limits: &Limits) -> bool {
        // An unused key takes one value of any size: a value above the limit gets a DEK of its own.
        if self.uses == 0 {
            return is_young(self.born_ms, now_ms, limits);
        }
        self.uses < limits.max_uses.min(DEK_USES_CAP)
            && self.bytes.saturating_add(bytes as u64) <= limits.max_bytes
            && is_young(self.born_ms, now_ms, limits)
    }
}

/// DEKs for encrypting, by KEK and the caller's context. Of each several may be ready; they are used one after the other.
pub struct SealingCache {
    entries: LruCache<Box<[u8]>, VecDeque<SealingKey>>,
    name: Vec<u8>,
}

impl SealingCache {
    /// An empty cache.
    pub fn new() -> Self {
        SealingCache { entries: LruCache::unbounded(), name: Vec::new() }
    }

    /// The key for a value of so many bytes, if there is one that its limits still allow.
    pub fn get(
        &mut self,
        kek: &str,
        context: &Context,
        bytes: usize,
        now_ms: u64,
        limits: &Limits,
    ) -> Option<&mut SealingKey> {
        Self::write_name(&mut self.name, kek, context);
        let keys = self.entries.get_mut(self.name.as_slice())?;
        while keys.front().is_some_and(|key| !key.can_take(bytes, now_ms, limits)) {
            keys.pop_front();
        }
        keys.front_mut()
    }

    /// How many small values the keys at hand can take.
    pub fn ready_for(&mut self, kek: &str, context: &Context, now_ms: u64, limits: &Limits) -> u64 {
        Self::write_name(&mut self.name, kek, context);
        let keys = self.entries.peek(self.name.as_slice()).into_iter().flatten();
        let usable = keys.filter(|key| key.can_take(0, now_ms, limits));
        usable.map(|key| limits.max_uses.min(DEK_USES_CAP) - key.uses).sum()
    }

    /// The headers of the keys at hand.
    pub fn headers(&mut self, kek: &str, context: &Context) -> Vec<Vec<u8>> {
        Self::write_name(&mut self.name, kek, context);
        let keys = self.entries.peek(self.name.as_slice()).into_iter().flatten();
        keys.flat_map(|key| key.headers.clone()).collect()
    }

    /// Keeps a fresh key.
    pub fn put(&mut self, kek: &str, context: &Context, key: SealingKey, limits: &Limits) {
        Self::write_name(&mut self.name, kek, context);
        if let Some(keys) = self.entries.get_mut(self.name.as_slice()) {
            keys.push_back(key);
            return;
        }
        let capacity = NonZeroUsize::new(limits.cache_entries).unwrap_or(NonZeroUsize::MIN);
        while self.entries.len() >= capacity.get() {
            self.entries.pop_lru();
        }
        self.entries.put(self.name.as_slice().into(), VecDeque::from([key]));
    }

    /// Drops what is too old; gives whether anything was.
    pub fn expire(&mut self, now_ms: u64, limits: &Limits) -> bool {
        self.keep(|key| is_young(key.born_ms, now_ms, limits))
    }

    /// Drops what `keyring` no longer allows to encrypt with.
    pub fn retain(&mut self, keyring: &Keyring) {
        self.keep(|key| key.kek.still_opens(keyring) && keyring.for_encrypting(Some(&key.kek.name)).is_ok());
    }

    /// Drops all other keys; gives whether anything was dropped.
    fn keep(&mut self, wanted: impl Fn(&SealingKey) -> bool) -> bool {
        let mut dropped = false;
        self.entries.retain(|_, keys| {
            let before = keys.len();
            keys.retain(&wanted);
            dropped |= keys.len() < before;
            !keys.is_empty()
        });
        dropped
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        *self = Self::new();
    }

    fn write_name(name: &mut Vec<u8>, kek: &str, context: &Context) {
        name.clear();
        name.push(kek.len() as u8);
        name.extend_from_slice(kek.as_bytes());
        name.extend_from_slice(context.encoded());
    }
}

impl Default for SealingCache {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether something born then is still within the age limit.
pub(crate) fn is_young(born_ms: u64, now_ms: u64, limits: &Limits) -> bool {
    now_ms.saturating_sub(born_ms) < limits.max_age_ms
}
