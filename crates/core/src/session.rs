//! One session's encrypting and decrypting: finds the DEK in the cache or asks the key service, and opens or seals.

mod ahead;
mod bulk;
mod cached;
mod convert;
mod decrypt;
mod encrypt;
mod heads;
mod legacy;
mod prefetch;
mod rewrap;
mod rewrap_ahead;
#[cfg(test)]
mod tests;
mod together;

pub use bulk::{BulkOperation, BulkTask};
pub use decrypt::{ReadAs, Reading};
pub use encrypt::Sealing;
pub use together::Prefetched;

use crate::access::{Admitted, Gate, Privilege, Seen};
use crate::cache::{OpenedCache, SealingCache};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::keyring::{Kek, Keyring};
use crate::policy::{Clock, Policy};
use crate::provider::{ProviderFuture, Wait};
use crate::random::SessionRandom;
use crate::stats::SessionStats;

use bulk::Assured;
use heads::Heads;
use rewrap::RewrapMemo;
use vod_tender_secret_memory::burn_stack;

/// What a session keeps: its random source, its DEKs, its counters.
///
/// Obligation on the owner: one session for each process, made after fork.
pub struct Session {
    random: SessionRandom,
    clock: Box<dyn Clock>,
    opened: OpenedCache,
    sealing: SealingCache,
    rewraps: RewrapMemo,
    assured: Assured,
    heads: Heads,
    stats: SessionStats,
    /// Who opened or sealed with the legacy keys last.
    legacy_opened: Seen,
    legacy_sealed: Seen,
    /// Associated data of the value at hand: header prefix and aad, one behind the other.
    associated: Vec<u8>,
    /// Payload of the value at hand, as ciphertext.
    sealed: Vec<u8>,
}

/// Bytes that are kept from one value to the next.
const KEPT_BYTES: usize = 1 << 20;

/// What an operation runs with: the keys and policies of this statement, and a way to wait.
pub struct Run<'a, W> {
    /// The configured keys.
    pub keyring: &'a Keyring,
    /// The policies.
    pub policy: &'a Policy,
    /// Waits for key services.
    pub wait: &'a mut W,
    /// Lets the caller through to the keys.
    pub gate: &'a mut Gate,
    /// What becomes of the plaintext that is opened.
    purpose: Purpose<'a>,
}

/// What becomes of a plaintext.
#[derive(Debug, Clone, Copy)]
enum Purpose<'a> {
    /// The caller gets it.
    Read,
    /// It is sealed again under this key (or under none), and nobody sees it.
    Move(&'a str),
    /// It is compared with what the session sealed itself.
    Check,
}

/// Refuses what is granted for none of these keys. No keys ask for nothing.
fn one_of(keys: &[String], granted: impl Fn(&str) -> Result<()>) -> Result<()> {
    let mut refusal = Ok(());
    for key in keys {
        match granted(key) {
            Ok(()) => return Ok(()),
            refused if refusal.is_ok() => refusal = refused,
            Err(_) => {}
        }
    }
    refusal
}

/// Sets the associated data of the value at hand, if there is memory.
fn bind<'a>(associated: &'a mut Vec<u8>, prefix: &[u8], aad: &str) -> Result<&'a [u8]> {
    associated.clear();
    associated.try_reserve(prefix.len().saturating_add(aad.len())).map_err(|_| Error::TooLarge)?;
    associated.extend_from_slice(prefix);
    associated.extend_from_slice(aad.as_bytes());
    Ok(associated)
}

impl<'a, W> Run<'a, W> {
    /// What the caller runs an operation with.
    pub fn new(keyring: &'a Keyring, policy: &'a Policy, wait: &'a mut W, gate: &'a mut Gate) -> Self {
        Run { keyring, policy, wait, gate, purpose: Purpose::Read }
    }

    /// The same, for the session to check what it made. Ends with what is returned, however that ends.
    fn checking(&mut self) -> Run<'_, W> {
        self.with(Purpose::Check)
    }

    /// The same, for what is opened only to be sealed under the key `to`.
    fn moving<'b>(&'b mut self, to: &'b str) -> Run<'b, W> {
        self.with(Purpose::Move(to))
    }

    /// The same under other policies.
    fn under<'b>(&'b mut self, policy: &'b Policy) -> Run<'b, W> {
        Run { policy, ..self.with(self.purpose) }
    }

    fn with<'b>(&'b mut self, purpose: Purpose<'b>) -> Run<'b, W> {
        Run { keyring: self.keyring, policy: self.policy, wait: self.wait, gate: self.gate, purpose }
    }

    /// Refuses what is granted for none of the keys that an envelope may belong to.
    fn require_of_an_owner(&self, owners: &[String]) -> Result<()> {
        one_of(owners, |owner| match self.purpose {
            Purpose::Read => self.gate.require(Privilege::Decrypt, owner),
            Purpose::Move(to) => self.gate.require_move(owner, to),
            Purpose::Check => Ok(()),
        })
    }

    /// Refuses what [`Run::admit_opening`] would refuse, and announces nothing: no key is used.
    fn require_opening(&self, key: &str, owners: &[String]) -> Result<()> {
        self.require_of_an_owner(owners)?;
        match self.purpose {
            Purpose::Read => self.gate.require(Privilege::Decrypt, key),
            Purpose::Move(to) => self.gate.require_move(key, to),
            Purpose::Check => Ok(()),
        }
    }

    /// Lets something be opened with a key. Obligation: before anything of it is handed out, with a cached key too.
    #[inline(always)]
    fn admit_opening(&mut self, seen: &Seen, key: &str, owners: &[String], context: &Context) -> Result<Admitted> {
        if !owners.is_empty() {
            self.require_of_an_owner(owners)?;
        }
        match self.purpose {
            Purpose::Read => self.gate.admit(seen, Privilege::Decrypt, key, context),
            Purpose::Move(to) => self.gate.admit_move(seen, key, to, context),
            Purpose::Check => Ok(Admitted::CHECK),
        }
    }
}

impl<W: Wait> Run<'_, W> {
    /// Waits for a call to the service of `kek`.
    fn call<T>(&mut self, kek: &Kek, future: ProviderFuture<'_, T>) -> Result<T> {
        self.wait.wait(future).map_err(|source| Error::Service { key: kek.name.clone(), source })
    }
}

impl Session {
    /// A session with nothing in its caches.
    pub fn new(clock: Box<dyn Clock>) -> Result<Self> {
        Ok(Session {
            random: SessionRandom::from_system()?,
            clock,
            opened: OpenedCache::new(),
            sealing: SealingCache::new(),
            rewraps: RewrapMemo::default(),
            assured: Assured::default(),
            heads: Heads::default(),
            stats: SessionStats::default(),
            legacy_opened: Seen::default(),
            legacy_sealed: Seen::default(),
            associated: Vec::new(),
            sealed: Vec::new(),
        })
    }

    /// The counters.
    pub fn stats(&self) -> &SessionStats {
        &self.stats
    }

    /// Number of DEKs kept for decrypting.
    pub fn cached_deks(&self) -> usize {
        self.opened.len()
    }

    /// Drops every DEK. What they encrypted stays readable: through the key service.
    pub fn clear(&mut self) {
        self.opened.clear();
        self.sealing.clear();
        self.count_unused();
        self.rewraps.clear();
        self.assured = Assured::default();
        self.heads = Heads::default();
        self.sealed = Vec::new();
        self.associated = Vec::new();
        // Opening and sealing spill round keys onto the stack; doing this for each value would cost more than the value.
        burn_stack();
    }

    /// Gives back the memory of a large value, and of a large aad.
    fn trim(&mut self) {
        for kept in [&mut self.sealed, &mut self.associated] {
            if kept.capacity() > KEPT_BYTES {
                *kept = Vec::new();
            }
        }
    }

    /// Drops what is too old. Call it when a statement begins.
    pub fn expire(&mut self, policy: &Policy) {
        let now = self.clock.now_ms();
        let opened = self.opened.expire(now, &policy.limits, &mut self.stats);
        let sealing = self.sealing.expire(now, &policy.limits);
        self.count_unused();
        if opened || sealing {
            burn_stack();
        }
    }

    /// Wipes the DEKs that were made ahead for a statement and that it did not use. Call it when a statement begins, and
    /// when a transaction ends.
    pub fn begin_statement(&mut self) {
        if self.sealing.begin_statement() {
            burn_stack();
        }
        self.count_unused();
    }

    fn count_unused(&mut self) {
        self.stats.deks_unused += self.sealing.take_unused();
    }

    /// Drops what the new keys no longer allow. Call it when the keys have changed.
    pub fn keys_changed(&mut self, keyring: &Keyring) {
        self.opened.retain(keyring);
        self.sealing.retain(keyring);
        self.count_unused();
        self.rewraps.clear();
        self.assured = Assured::default();
        burn_stack();
    }
}
