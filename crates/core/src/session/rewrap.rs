//! Rewrapping: the same payload, its DEK under another KEK or the newest version of its own.

use std::collections::HashMap;
use std::num::NonZeroUsize;

use lru::LruCache;

use crate::access::{Admitted, Privilege};
use crate::armor;
use crate::cache::is_young;
use crate::envelope::{COMMITMENT_BYTES, Header, Wrap};
use crate::error::{Error, Result};
use crate::keyring::Kek;
use crate::policy::Limits;
use crate::provider::{Fault, Wait, WrappedDek, WrappedRef};
use crate::seal::Derived;
use crate::session::decrypt::{copy, more_telling, usable_kek};
use crate::session::{Run, Session, one_of};
use crate::sink::Sink;
use crate::stored::{Kind, Stored, Value};

impl Session {
    /// Puts an envelope's DEK under the KEK `key`, or the default one, at its newest version. Gives whether anything
    /// changed; what is up to date comes back as it is, and no service is called for it.
    pub fn rewrap<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        value: Value<'_>,
        key: Option<&str>,
        sink: &mut dyn Sink,
    ) -> Result<bool> {
        let (header, payload) = match Stored::parse(value)? {
            Stored::Envelope { header, payload } => (header, payload),
            Stored::Literal { .. } => return Err(Error::NotRewrappable),
            Stored::Other(_) => return Err(crate::error::Malformed("not an envelope").into()),
        };
        let Some((header, moved)) = self.rewrapped_header(run, key, &header)? else {
            return copy(value.bytes(), sink).map(|()| false);
        };
        write(value.kind(), &header, &payload, sink)?;
        moved.into_iter().for_each(|admitted| run.gate.done(admitted));
        self.stats.deks_rewrapped += 1;
        Ok(true)
    }

    /// The header with its DEK under the KEK `key`, and which keys were used for that; `None` when it is there already.
    pub(super) fn rewrapped_header<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        key: Option<&str>,
        header: &[u8],
    ) -> Result<Option<(Vec<u8>, Vec<Admitted>)>> {
        let header = Header::parse(header)?;
        let target = run.keyring.for_encrypting(key)?;
        run.gate.require(Privilege::Rewrap, &target.name)?;
        if target.requires_context && !header.context.includes(&target.context) {
            return Err(Error::KeyContext(target.name.clone()));
        }
        let own = header.wraps.iter().position(|wrap| wrap.key_name == target.name);
        if own.is_some_and(|own| self.is_current(run, target, header.wraps[own].kek_id)) {
            return Ok(None);
        }
        let to = run.gate.admit_anew(Privilege::Rewrap, &target.name, &header.context)?;
        let (source, from, fresh) = self.rewrapped(run, target, &header, own)?;
        let mut moved = vec![to];
        if own != Some(source) {
            moved.push(from);
        }
        if own == Some(source) && header.wraps[source].kek_id == fresh.kek_id {
            return Ok(None);
        }
        let mut wraps = header.wraps.clone();
        wraps[own.unwrap_or(source)] =
            Wrap { key_name: &target.name, kek_id: &fresh.kek_id, wrapped_dek: &fresh.bytes };
        header.with_wraps(&wraps).map(|header| Some((header, moved)))
    }

    fn is_current<W>(&mut self, run: &Run<'_, W>, target: &Kek, kek_id: &str) -> bool {
        let now = self.clock.now_ms();
        target.provider.is_current(kek_id).unwrap_or_else(|| {
            self.rewraps.newest(&target.name, now, &run.policy.limits).is_some_and(|newest| newest == kek_id)
        })
    }

    /// The DEK under `target`, and through which wrap it was reached: its own wrap first, then the others in order.
    fn rewrapped<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        target: &Kek,
        header: &Header<'_>,
        own: Option<usize>,
    ) -> Result<(usize, Admitted, WrappedDek)> {
        let order = own.into_iter().chain((0..header.wraps.len()).filter(|&at| Some(at) != own));
        let mut failure = None;
        for at in order {
            // A wrap that replaces another one must be seen to hold the payload's DEK.
            let replaces_own = own.is_some_and(|own| own != at);
            match self.rewrap_one(run, target, header, &header.wraps[at], replaces_own) {
                Ok((from, fresh)) => return Ok((at, from, fresh)),
                // Its own wrap may be good, only not now: it is not to be replaced.
                Err(error) if Some(at) == own && is_passing(&error) => return Err(error),
                Err(error) => failure = Some(more_telling(failure, error)),
            }
        }
        Err(failure.expect("a header has at least one wrap"))
    }

    fn rewrap_one<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        target: &Kek,
        header: &Header<'_>,
        wrap: &Wrap<'_>,
        must_check: bool,
    ) -> Result<(Admitted, WrappedDek)> {
        let source = usable_kek(run, wrap.key_name, &header.context)?;
        // By the right to rewrap alone: what moves inside a key service is not opened here.
        run.gate.require(Privilege::Rewrap, &source.name)?;
        run.gate.require_move(&source.name, &target.name)?;
        one_of(&run.keyring.owners(source, wrap.kek_id, &header.context), |owner| {
            run.gate.require(Privilege::Rewrap, owner)?;
            run.gate.require_move(owner, &target.name)
        })?;
        let from = run.gate.admit_anew(Privilege::Rewrap, &source.name, &header.context)?;
        let now = self.clock.now_ms();
        let limits = run.policy.limits;
        let commitment = must_check.then_some(header.commitment);
        let known = self.rewraps.get(&target.name, wrap, commitment, now, &limits);
        // What was learned before the target's key was replaced is of no use.
        if let Some(known) = known.filter(|known| target.provider.is_current(&known.kek_id) != Some(false)) {
            return Ok((from, known.clone()));
        }
        let wrapped = WrappedRef { kek_id: Some(wrap.kek_id), bytes: wrap.wrapped_dek };
        let inside = match must_check {
            true => None,
            false => run.call(target, target.provider.rewrap_from(&*source.provider, wrapped, &header.context))?,
        };
        let fresh = match inside {
            Some(fresh) => fresh,
            None => {
                let dek = run.call(source, source.provider.unwrap(wrapped, &header.context))?;
                // A DEK that is not the payload's must not replace the one that is.
                Derived::from_dek(&dek).committed(header.commitment)?;
                run.call(target, target.provider.wrap(&dek, &header.context))?
            }
        };
        self.rewraps.put(&target.name, wrap, commitment, &fresh, now, &limits);
        Ok((from, fresh))
    }
}

fn is_passing(error: &Error) -> bool {
    let Error::Service { source, .. } = error else { return false };
    matches!(source.fault, Fault::Throttled | Fault::Unreachable | Fault::Denied)
}

fn write(kind: Kind, header: &[u8], payload: &[u8], sink: &mut dyn Sink) -> Result<()> {
    match kind {
        Kind::Bytes => {
            let out = sink.buffer(header.len() + payload.len())?;
            let (start, rest) = out.split_at_mut(header.len());
            start.copy_from_slice(header);
            rest.copy_from_slice(payload);
        }
        Kind::Text => {
            let head = armor::armored_head(header);
            let out = sink.buffer(armor::armored_length(&head, payload.len())?)?;
            armor::write_armored(&head, payload, out);
        }
    }
    Ok(())
}

/// What rewrapping learned: each distinct wrapped DEK is moved once, and what a KEK's newest id is. Holds no secret.
pub(super) struct RewrapMemo {
    moved: LruCache<Box<[u8]>, (WrappedDek, u64)>,
    newest: HashMap<String, (String, u64)>,
}

impl Default for RewrapMemo {
    fn default() -> Self {
        RewrapMemo { moved: LruCache::unbounded(), newest: HashMap::new() }
    }
}

impl RewrapMemo {
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The KEK id that the service used when it last wrapped for `target` in a rewrap of this session. Only rewraps
    /// count, not encryptions: after an alias was pointed elsewhere, the first rewrap must ask.
    fn newest(&self, target: &str, now_ms: u64, limits: &Limits) -> Option<&str> {
        let (kek_id, born_ms) = self.newest.get(target)?;
        is_young(*born_ms, now_ms, limits).then_some(kek_id)
    }

    fn get(
        &mut self,
        target: &str,
        wrap: &Wrap<'_>,
        commitment: Option<&[u8; COMMITMENT_BYTES]>,
        now_ms: u64,
        limits: &Limits,
    ) -> Option<&WrappedDek> {
        let (fresh, born_ms) = self.moved.get(&name(target, wrap, commitment))?;
        is_young(*born_ms, now_ms, limits).then_some(fresh)
    }

    fn put(
        &mut self,
        target: &str,
        wrap: &Wrap<'_>,
        commitment: Option<&[u8; COMMITMENT_BYTES]>,
        fresh: &WrappedDek,
        now_ms: u64,
        limits: &Limits,
    ) {
        let capacity = NonZeroUsize::new(limits.cache_entries).unwrap_or(NonZeroUsize::MIN);
        while self.moved.len() >= capacity.get() {
            self.moved.pop_lru();
        }
        self.moved.put(name(target, wrap, commitment), (fresh.clone(), now_ms));
        self.newest.insert(target.to_owned(), (fresh.kek_id.clone(), now_ms));
    }
}

/// What was seen to hold the DEK that a header commits to has another name than what was moved unseen.
fn name(target: &str, wrap: &Wrap<'_>, commitment: Option<&[u8; COMMITMENT_BYTES]>) -> Box<[u8]> {
    let commitment = commitment.map_or(&[][..], |commitment| &commitment[..]);
    let parts = [target.as_bytes(), wrap.key_name.as_bytes(), commitment, wrap.wrapped_dek];
    let lengths = parts.iter().map(|part| part.len() as u32);
    let mut name: Vec<u8> = lengths.flat_map(u32::to_be_bytes).collect();
    parts.iter().for_each(|part| name.extend_from_slice(part));
    name.into()
}
