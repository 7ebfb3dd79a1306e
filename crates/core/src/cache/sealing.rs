//! The DEKs that the session made and encrypts with.

use std::collections::VecDeque;
use std::rc::Rc;

use crate::access::Seen;
use crate::cache::{Bounded, KekIdentity, OpenedKey, is_young};
use crate::context::Context;
use crate::keyring::Keyring;
use crate::policy::{DEK_USES_CAP, Limits};
use crate::seal::ExpandedKey;

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
    /// The KEK id that its wrap records.
    pub kek_id: Box<str>,
    /// The envelope's context.
    pub context: Context,
    /// Who encrypted something with it last.
    pub seen: Seen,
    born_ms: u64,
    uses: u64,
    bytes: u64,
    /// Whether somebody encrypts with it by now.
    taken_up: bool,
    made_for: MadeFor,
}

/// How long a DEK is kept that was made ahead and is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MadeFor {
    /// Until the statement ends that made it: whether there is another one nobody knows.
    Statement,
    /// As long as others: a job commits as it goes.
    Job,
}

impl SealingKey {
    /// A key that was not used yet.
    pub fn new(
        key: Rc<ExpandedKey>,
        headers: [Vec<u8>; 2],
        (kek, kek_id): (KekIdentity, &str),
        context: Context,
        born_ms: u64,
        made_for: MadeFor,
    ) -> Self {
        let armored = [crate::armor::armored_head(&headers[0]), crate::armor::armored_head(&headers[1])];
        let (kek_id, seen) = (kek_id.into(), Seen::default());
        SealingKey {
            key,
            headers,
            armored,
            kek,
            kek_id,
            context,
            seen,
            born_ms,
            uses: 0,
            bytes: 0,
            taken_up: false,
            made_for,
        }
    }

    /// Whether somebody encrypts with it by now.
    pub fn is_taken_up(&self) -> bool {
        self.taken_up
    }

    /// The same DEK, for opening what it sealed.
    pub fn opened(&self, keyring: &Keyring) -> OpenedKey {
        OpenedKey {
            key: Rc::clone(&self.key),
            context: self.context.clone(),
            kek: self.kek.clone(),
            kek_id: Some(self.kek_id.clone()),
            owners: keyring.owners_by_name(&self.kek.name, &self.kek_id, &self.context),
            born_ms: self.born_ms,
            seen: Seen::default(),
        }
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

/// The keys at hand for one KEK and one context, in the order in which they are used.
#[derive(Default)]
struct Ready {
    keys: VecDeque<SealingKey>,
    /// How many were taken up in that statement, since it last had to begin small.
    taken_up: u64,
    statement: u64,
}

/// DEKs for encrypting, by KEK and the caller's context. Of each several may be ready; they are used one after the other.
pub struct SealingCache {
    entries: Bounded<Ready>,
    name: Vec<u8>,
    /// Number of the statement at hand.
    statement: u64,
    /// Whether keys were made for it.
    made_for_statement: bool,
    /// Keys that went without having been used.
    unused: u64,
}

impl SealingCache {
    /// An empty cache.
    pub fn new() -> Self {
        SealingCache {
            entries: Bounded::default(),
            name: Vec::new(),
            statement: 0,
            made_for_statement: false,
            unused: 0,
        }
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
        let ready = self.entries.get(&self.name)?;
        while ready.keys.front().is_some_and(|key| !key.can_take(bytes, now_ms, limits)) {
            if ready.keys.pop_front().is_some_and(|key| !key.taken_up) {
                // Made faster than they are used: they grow too old.
                ready.taken_up = 0;
                self.unused += 1;
            }
        }
        ready.keys.front_mut()
    }

    /// Notes that the key which [`SealingCache::get`] gives is used from now on.
    pub fn take_up(&mut self, kek: &str, context: &Context) -> Option<&SealingKey> {
        Self::write_name(&mut self.name, kek, context);
        let ready = self.entries.get(&self.name)?;
        ready.see(self.statement);
        let key = ready.keys.front_mut()?;
        ready.taken_up += u64::from(!key.taken_up);
        key.taken_up = true;
        Some(key)
    }

    /// How many keys the statement at hand has taken up, since it last had to begin small: as many more it may want.
    pub fn taken_up(&mut self, kek: &str, context: &Context) -> u64 {
        Self::write_name(&mut self.name, kek, context);
        let ready = self.entries.peek(&self.name);
        ready.filter(|ready| ready.statement == self.statement).map_or(0, |ready| ready.taken_up)
    }

    /// Not all keys could be made that were asked for.
    pub fn begin_small(&mut self, kek: &str, context: &Context) {
        Self::write_name(&mut self.name, kek, context);
        if let Some(ready) = self.entries.get(&self.name) {
            ready.taken_up = 0;
        }
    }

    /// How many small values the keys at hand can take.
    pub fn ready_for(&mut self, kek: &str, context: &Context, now_ms: u64, limits: &Limits) -> u64 {
        let usable = self.ready(kek, context).filter(|key| key.can_take(0, now_ms, limits));
        usable.map(|key| limits.max_uses.min(DEK_USES_CAP) - key.uses).sum()
    }

    /// Number of keys at hand, for all KEKs and contexts.
    pub(crate) fn at_hand(&self) -> usize {
        self.entries.values().map(|ready| ready.keys.len()).sum()
    }

    /// The headers of the keys at hand.
    pub fn headers(&mut self, kek: &str, context: &Context) -> Vec<Vec<u8>> {
        self.ready(kek, context).flat_map(|key| key.headers.clone()).collect()
    }

    fn ready(&mut self, kek: &str, context: &Context) -> impl Iterator<Item = &SealingKey> {
        Self::write_name(&mut self.name, kek, context);
        self.entries.peek(&self.name).into_iter().flat_map(|ready| &ready.keys)
    }

    /// Keeps a fresh key.
    pub fn put(&mut self, kek: &str, context: &Context, key: SealingKey, limits: &Limits) {
        Self::write_name(&mut self.name, kek, context);
        self.made_for_statement |= key.made_for == MadeFor::Statement;
        if let Some(ready) = self.entries.get(&self.name) {
            ready.keys.push_back(key);
            return;
        }
        let ready = Ready { keys: VecDeque::from([key]), ..Ready::default() };
        let evicted = self.entries.put(self.name.as_slice().into(), ready, limits.cache_entries);
        self.unused += evicted.iter().map(|ready| unused(&ready.keys)).sum::<u64>();
    }

    /// Begins another statement: drops what the one before had made and did not use. Gives whether anything was dropped.
    pub fn begin_statement(&mut self) -> bool {
        self.statement += 1;
        std::mem::take(&mut self.made_for_statement)
            && self.keep(|key| key.taken_up || key.made_for != MadeFor::Statement)
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
        self.entries.retain(|Ready { keys, .. }| {
            let (before, unused_before) = (keys.len(), unused(keys));
            keys.retain(&wanted);
            dropped |= keys.len() < before;
            self.unused += unused_before - unused(keys);
            !keys.is_empty()
        });
        dropped
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.keep(|_| false);
    }

    /// How many keys went without having been used, since this was last asked.
    pub fn take_unused(&mut self) -> u64 {
        std::mem::take(&mut self.unused)
    }

    fn write_name(name: &mut Vec<u8>, kek: &str, context: &Context) {
        name.clear();
        name.push(kek.len() as u8);
        name.extend_from_slice(kek.as_bytes());
        name.extend_from_slice(context.encoded());
    }
}

impl Ready {
    fn see(&mut self, statement: u64) {
        if self.statement != statement {
            self.statement = statement;
            self.taken_up = 0;
        }
    }
}

fn unused(keys: &VecDeque<SealingKey>) -> u64 {
    keys.iter().filter(|key| !key.taken_up).count() as u64
}

impl Default for SealingCache {
    fn default() -> Self {
        Self::new()
    }
}
