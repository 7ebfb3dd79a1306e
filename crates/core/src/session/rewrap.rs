//! Rewrapping: the same payload, its DEK under another KEK or the newest version of its own.

use std::collections::HashMap;

use crate::access::{Admitted, Privilege};
use crate::armor;
use crate::cache::{Bounded, is_young};
use crate::context::Context;
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
        let (target, own) = match self.wrap_to_renew(run, key, &header)? {
            Some(to_renew) => to_renew,
            None => return Ok(None),
        };
        let to = run.gate.admit_anew(Privilege::Rewrap, &target.name, &header.context)?;
        let (source, from, fresh) = self.rewrapped(run, target, &header, own)?;
        let mut moved = vec![to];
        if own != Some(source) {
            moved.push(from);
        }
        if own == Some(source) && header.wraps[source].kek_id == fresh.kek_id {
            return Ok(None);
        }
        renewed(&header, own.unwrap_or(source), target, &fresh).map(|header| Some((header, moved)))
    }

    /// The KEK `key`, and which wrap of a header is under it, if one is; `None` when that is up to date.
    pub(super) fn wrap_to_renew<'a, W>(
        &self,
        run: &Run<'a, W>,
        key: Option<&str>,
        header: &Header<'_>,
    ) -> Result<Option<(&'a Kek, Option<usize>)>> {
        let target = run.keyring.for_encrypting(key)?;
        run.gate.require(Privilege::Rewrap, &target.name)?;
        if target.requires_context && !header.context.includes(&target.context) {
            return Err(Error::KeyContext(target.name.clone()));
        }
        let own = header.wraps.iter().position(|wrap| wrap.key_name == target.name);
        let is_current = own.is_some_and(|own| self.is_current(run, target, header.wraps[own].kek_id));
        Ok((!is_current).then_some((target, own)))
    }

    pub(super) fn is_current<W>(&self, run: &Run<'_, W>, target: &Kek, kek_id: &str) -> bool {
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
        let mut failure = None;
        for at in order(header, own) {
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
        let source = source(run, target, header, wrap)?;
        let from = run.gate.admit_anew(Privilege::Rewrap, &source.name, &header.context)?;
        let now = self.clock.now_ms();
        let limits = run.policy.limits;
        let name = RewrapMemo::name(&target.name, wrap, header, must_check);
        if let Some(known) = self.rewraps.known(target, &name, now, &limits) {
            return Ok((from, known.clone()));
        }
        let moving =
            Moving { target, source, wrap, context: &header.context, commitment: header.commitment, must_check };
        let moved = run.call(source, Box::pin(async { Ok(moving.moved().await) }))?;
        let fresh = moved?;
        self.rewraps.put(&target.name, name, &fresh, now, &limits);
        Ok((from, fresh))
    }
}

/// In which order a header's wraps are tried: its own first.
pub(super) fn order(header: &Header<'_>, own: Option<usize>) -> impl Iterator<Item = usize> + use<> {
    own.into_iter().chain((0..header.wraps.len()).filter(move |&at| Some(at) != own))
}

/// The KEK of a wrap, if the caller may move from it to `target`. By the right to rewrap alone: what moves inside a key
/// service is not opened here.
pub(super) fn source<'a, W>(run: &Run<'a, W>, target: &Kek, header: &Header<'_>, wrap: &Wrap<'_>) -> Result<&'a Kek> {
    let source = usable_kek(run, wrap.key_name, &header.context)?;
    run.gate.require(Privilege::Rewrap, &source.name)?;
    run.gate.require_move(&source.name, &target.name)?;
    one_of(&run.keyring.owners(source, wrap.kek_id, &header.context), |owner| {
        run.gate.require(Privilege::Rewrap, owner)?;
        run.gate.require_move(owner, &target.name)
    })?;
    Ok(source)
}

/// The header with a fresh wrap in the place of an old one.
pub(super) fn renewed(header: &Header<'_>, at: usize, target: &Kek, fresh: &WrappedDek) -> Result<Vec<u8>> {
    let mut wraps = header.wraps.clone();
    wraps[at] = Wrap { key_name: &target.name, kek_id: &fresh.kek_id, wrapped_dek: &fresh.bytes };
    header.with_wraps(&wraps)
}

/// A DEK's way from one KEK to another.
pub(super) struct Moving<'a> {
    pub target: &'a Kek,
    pub source: &'a Kek,
    pub wrap: &'a Wrap<'a>,
    pub context: &'a Context,
    pub commitment: &'a [u8; COMMITMENT_BYTES],
    /// Whether the DEK must be seen to be the payload's.
    pub must_check: bool,
}

impl Moving<'_> {
    pub(super) async fn moved(&self) -> Result<WrappedDek> {
        let Moving { target, source, wrap, context, .. } = *self;
        let failed = |kek: &Kek, source| Error::Service { key: kek.name.clone(), source };
        let wrapped = WrappedRef { kek_id: Some(wrap.kek_id), bytes: wrap.wrapped_dek };
        if !self.must_check {
            let inside = target.provider.rewrap_from(&*source.provider, wrapped, context).await;
            if let Some(fresh) = inside.map_err(|failure| failed(target, failure))? {
                return Ok(fresh);
            }
        }
        let dek = source.provider.unwrap(wrapped, context).await.map_err(|failure| failed(source, failure))?;
        // A DEK that is not the payload's must not replace the one that is.
        Derived::from_dek(&dek).committed(self.commitment)?;
        target.provider.wrap(&dek, context).await.map_err(|failure| failed(target, failure))
    }
}

pub(super) fn is_passing(error: &Error) -> bool {
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
#[derive(Default)]
pub(super) struct RewrapMemo {
    moved: Bounded<(WrappedDek, u64)>,
    newest: HashMap<String, (String, u64)>,
}

impl RewrapMemo {
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The KEK id that the service used when it last wrapped for `target` in a rewrap of this session. Only rewraps
    /// count, not encryptions: after an alias was pointed elsewhere, the first rewrap must ask.
    pub(super) fn newest(&self, target: &str, now_ms: u64, limits: &Limits) -> Option<&str> {
        let (kek_id, born_ms) = self.newest.get(target)?;
        is_young(*born_ms, now_ms, limits).then_some(kek_id)
    }

    /// Notes what the service said when it was asked for nothing but that.
    pub(super) fn note_newest(&mut self, target: &str, kek_id: &str, now_ms: u64) {
        self.newest.insert(target.to_owned(), (kek_id.to_owned(), now_ms));
    }

    /// What a wrap was moved to, if that was seen.
    pub(super) fn known(&mut self, target: &Kek, name: &[u8], now_ms: u64, limits: &Limits) -> Option<&WrappedDek> {
        let (fresh, born_ms) = self.moved.get(name)?;
        // What was learned before the target's key was replaced is of no use.
        let is_of_use = is_young(*born_ms, now_ms, limits) && target.provider.is_current(&fresh.kek_id) != Some(false);
        is_of_use.then_some(fresh)
    }

    pub(super) fn put(&mut self, target: &str, name: Box<[u8]>, fresh: &WrappedDek, now_ms: u64, limits: &Limits) {
        self.moved.put(name, (fresh.clone(), now_ms), limits.cache_entries);
        self.note_newest(target, &fresh.kek_id, now_ms);
    }

    /// Forgets what a wrap was moved to.
    pub(super) fn remove(&mut self, name: &[u8]) {
        self.moved.remove(name);
    }

    /// What a move is remembered by: all that its answer depends on, and the header's commitment, so that what is found out
    /// about a forged header concerns no other one. What must be seen to hold the DEK that it commits to has another name
    /// than what is moved unseen.
    pub(super) fn name(target: &str, wrap: &Wrap<'_>, header: &Header<'_>, must_check: bool) -> Box<[u8]> {
        let parts = [
            target.as_bytes(),
            wrap.key_name.as_bytes(),
            wrap.kek_id.as_bytes(),
            header.context.encoded(),
            header.commitment,
            &[u8::from(must_check)],
            wrap.wrapped_dek,
        ];
        let lengths = parts.iter().map(|part| part.len() as u32);
        let mut name: Vec<u8> = lengths.flat_map(u32::to_be_bytes).collect();
        parts.iter().for_each(|part| name.extend_from_slice(part));
        name.into()
    }
}
