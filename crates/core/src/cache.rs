//! The session's DEKs: bounded in number, age, uses and bytes; overwritten when they go.

mod bounded;
mod sealing;

pub(crate) use bounded::{Bounded, MOST_HEAD_BYTES};
pub use sealing::{MadeFor, SealingCache, SealingKey};

use std::borrow::Cow;
use std::hash::{BuildHasher, Hasher};
use std::rc::{Rc, Weak};

use crate::access::Seen;
use crate::context::Context;
use crate::envelope::{FLAG_AAD, FLAGS_AT, MAGIC, PAYLOAD_OVERHEAD};
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

/// Hashes headers, and heads of armored envelopes, by their last bytes: they are of the commitment, so they differ where the
/// DEKs do, and the rest is compared. Whoever stores many headers with one commitment slows down his own values only.
#[derive(Default)]
pub(crate) struct ByCommitment(lru::DefaultHasher);

/// A hasher of the last bytes of what it is given.
pub(crate) struct LastBytes<H>(H);

impl BuildHasher for ByCommitment {
    type Hasher = LastBytes<<lru::DefaultHasher as BuildHasher>::Hasher>;

    fn build_hasher(&self) -> Self::Hasher {
        LastBytes(self.0.build_hasher())
    }
}

impl<H: Hasher> Hasher for LastBytes<H> {
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        const MOST: usize = 16;
        self.0.write(bytes.last_chunk::<MOST>().map_or(bytes, |last| last));
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.0.finish()
    }
}

/// Unwrapped DEKs by header; the one unused for longest goes first.
pub struct OpenedCache {
    entries: Bounded<Rc<OpenedKey>, ByCommitment>,
    /// Not later than the birth of the oldest entry.
    oldest_ms: u64,
}

impl OpenedCache {
    /// An empty cache.
    pub fn new() -> Self {
        OpenedCache { entries: Bounded::default(), oldest_ms: u64::MAX }
    }

    /// The entry for a header, or for a literal form's blob; it may be too old. Flags do not count: one DEK serves with and
    /// without aad.
    pub fn get(&mut self, header: &[u8]) -> Option<Rc<OpenedKey>> {
        if let Some((name, entry)) = self.entries.latest()
            && is_named(header, name)
        {
            return Some(Rc::clone(entry));
        }
        self.entries.get(&name_of(header)).map(|entry| Rc::clone(entry))
    }

    /// The same for a header whose entry was found before; `found` is that entry, and becomes the one that is found
    /// now. If it is the one that was asked for last, no headers need to be compared: a `Weak` keeps its address taken
    /// also after the cache has dropped the entry and overwritten the key, so that an equal address is the same entry.
    #[inline]
    pub fn get_found(&mut self, header: &[u8], found: &mut Weak<OpenedKey>) -> Option<Rc<OpenedKey>> {
        if let Some((_, entry)) = self.entries.latest()
            && std::ptr::eq(found.as_ptr(), Rc::as_ptr(entry))
        {
            return Some(Rc::clone(entry));
        }
        let entry = self.get(header)?;
        *found = Rc::downgrade(&entry);
        Some(entry)
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
    #[inline(always)]
    pub fn latest<'a>(&self, envelope: &'a [u8]) -> Option<(&'a [u8], Rc<OpenedKey>)> {
        let (name, entry) = self.entries.latest()?;
        let header = envelope.get(..name.len())?;
        let has_payload = envelope.len() - header.len() >= PAYLOAD_OVERHEAD;
        (has_payload && name.starts_with(&MAGIC) && is_named(header, name)).then(|| (header, Rc::clone(entry)))
    }

    /// Drops an entry that is too old.
    pub fn remove(&mut self, header: &[u8], stats: &mut SessionStats) {
        stats.cache_expiries += u64::from(self.entries.remove(&name_of(header)));
    }

    /// Keeps an entry, within the limits.
    pub fn put(&mut self, header: &[u8], opened: Rc<OpenedKey>, limits: &Limits, stats: &mut SessionStats) {
        self.oldest_ms = self.oldest_ms.min(opened.born_ms);
        let evicted = self.entries.put(name_of(header).into(), opened, limits.cache_entries);
        stats.cache_evictions += evicted.len() as u64;
    }

    /// Drops what is too old; gives whether anything was.
    pub fn expire(&mut self, now_ms: u64, limits: &Limits, stats: &mut SessionStats) -> bool {
        let evicted = self.entries.evict(limits.cache_entries).len();
        stats.cache_evictions += evicted as u64;
        if self.is_empty() || is_young(self.oldest_ms, now_ms, limits) {
            return evicted > 0;
        }
        let before = self.entries.len();
        let mut oldest_ms = u64::MAX;
        self.entries.retain(|entry| {
            let keep = is_young(entry.born_ms, now_ms, limits);
            if keep {
                oldest_ms = oldest_ms.min(entry.born_ms);
            }
            keep
        });
        self.oldest_ms = oldest_ms;
        stats.cache_expiries += (before - self.entries.len()) as u64;
        evicted > 0 || before > self.entries.len()
    }

    /// Drops what `keyring` no longer allows.
    pub fn retain(&mut self, keyring: &Keyring) {
        self.entries.retain(|entry| entry.kek.still_opens(keyring) && entry.has_owners_of(keyring));
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
        self.len() == 0
    }
}

/// Under what [`OpenedCache`] has a header, or a literal form's blob: without the aad's flag. A blob has no flags; it never
/// begins with the magic, so names cannot collide.
#[inline]
pub(crate) fn name_of(header: &[u8]) -> Cow<'_, [u8]> {
    match header.get(FLAGS_AT) {
        Some(flags) if flags & FLAG_AAD != 0 && header.starts_with(&MAGIC) => {
            let mut name = header.to_vec();
            name[FLAGS_AT] &= !FLAG_AAD;
            Cow::Owned(name)
        }
        _ => Cow::Borrowed(header),
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

/// Whether something born then is still within the age limit.
pub(crate) fn is_young(born_ms: u64, now_ms: u64, limits: &Limits) -> bool {
    now_ms.saturating_sub(born_ms) < limits.max_age_ms
}
