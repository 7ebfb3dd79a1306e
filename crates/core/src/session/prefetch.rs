//! Unwrapping many DEKs together, before the values that need them are read.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::rc::Rc;

use crate::access::{Admitted, Seen};
use crate::cache::{KekIdentity, OpenedKey, name_of};
use crate::context::Context;
use crate::dek::Dek;
use crate::envelope::{Header, MAGIC, Wrap};
use crate::error::{Error, Mismatch, Result};
use crate::keyring::Kek;
use crate::provider::{ProviderError, Wait, WrappedRef};
use crate::seal::{Derived, ExpandedKey};
use crate::session::decrypt::{check_kek_context, more_telling};
use crate::session::together::{
    Asked, Down, Failed, Group, Outcome, Prefetched, check_stopped, lanes, next_round, together,
};
use crate::session::{Run, Session};

impl Session {
    /// Fetches the DEKs that values with these headers (or these blobs of the literal form; see [`Session::needed_head`])
    /// need to be decrypted: each distinct wrapped DEK once, many at a time. What is at hand is not asked for again, and
    /// what a service refuses about a single value is left for whoever reads that value.
    pub fn prefetch<W: Wait>(&mut self, run: &mut Run<'_, W>, heads: &[&[u8]]) -> Result<Prefetched> {
        self.fetch(run, Asked::ByCaller, heads).map(Outcome::prefetched)
    }

    /// The same, and what failed. An error is about more than one of the heads.
    pub(super) fn fetch<W: Wait>(&mut self, run: &mut Run<'_, W>, asked: Asked, heads: &[&[u8]]) -> Result<Outcome> {
        let mut outcome = Outcome::default();
        let mut wanted = self.wanted(run, asked, heads, &mut outcome)?;
        let down = Down::default();
        // A round for each wrap that has to be tried: most envelopes have one.
        while !wanted.is_empty() {
            let failed = self.fetch_round(run, asked, &down, wanted, &mut outcome)?;
            wanted = next_round(run, failed, None, &mut outcome, Wanted::through_another_wrap)?;
        }
        Ok(outcome)
    }

    /// The heads whose DEKs are not at hand, and that the caller may have: asked before anything is called.
    fn wanted<'h, 'k, W>(
        &mut self,
        run: &Run<'k, W>,
        asked: Asked,
        heads: &[&'h [u8]],
        outcome: &mut Outcome,
    ) -> Result<Vec<Wanted<'h, 'k>>> {
        let (now, limits) = (self.clock.now_ms(), run.policy.limits);
        let mut seen: HashMap<Cow<'h, [u8]>, Option<usize>> = HashMap::new();
        let mut wanted: Vec<Wanted<'_, '_>> = Vec::new();
        let mut at_hand = 0;
        for (place, &head) in heads.iter().enumerate() {
            let name = name_of(head);
            if let Some(known) = seen.get(&name) {
                known.iter().for_each(|&at| wanted[at].places.push(place));
                continue;
            }
            if let Some(opened) = self.opened.get_young(head, now, &limits, &mut self.stats) {
                match run.require_opening(&opened.kek.name, &opened.owners) {
                    Ok(()) => {
                        at_hand += 1;
                        seen.insert(name, None);
                        continue;
                    }
                    // Another wrap may be for this caller.
                    Err(Error::NotGranted { .. }) => {}
                    Err(other) => return Err(other),
                }
            }
            match Wanted::new(run, place, head) {
                Ok(head) => {
                    seen.insert(name, Some(wanted.len()));
                    wanted.push(head);
                }
                Err(refused @ Error::NotGranted { .. }) if asked == Asked::ByCaller => return Err(refused),
                Err(error) if error.concerns_one_value(None) => outcome.fail(&[place], &error),
                Err(error) => return Err(error),
            }
        }
        // More would push out what was fetched before it is used.
        let room = limits.cache_entries.max(1).saturating_sub(at_hand).min(wanted.len());
        outcome.left_out.extend(wanted.drain(room..).flat_map(|head| head.places));
        Ok(wanted)
    }

    /// Has the DEKs unwrapped, each through the wrap at hand; gives what failed.
    fn fetch_round<'h, 'k, W: Wait>(
        &mut self,
        run: &mut Run<'k, W>,
        asked: Asked,
        down: &Down,
        wanted: Vec<Wanted<'h, 'k>>,
        outcome: &mut Outcome,
    ) -> Result<Vec<Failed<Wanted<'h, 'k>, Error>>> {
        let mut lanes = lanes(wanted, Wanted::call, || Admitted::CHECK);
        for group in lanes.iter_mut().flatten() {
            let head = &group.heads[0];
            group.with = run.admit_opening(&Seen::default(), &head.kek.name, &head.owners, &head.context)?;
        }
        let Some(first) = lanes.first().map(|lane| lane[0].heads[0].kek) else { return Ok(Vec::new()) };
        let (limits, concurrency) = (run.policy.limits, run.policy.concurrency);
        let Session { opened, clock, stats, .. } = self;
        let Run { wait, gate, .. } = run;
        let (mut failed, mut stopped_by) = (Vec::new(), None);
        let answered = |group: Group<Wanted<'h, 'k>, Admitted>, answer: std::result::Result<Dek, ProviderError>| {
            let Group { heads, with: admitted } = group;
            let failures = match answer {
                Ok(dek) => {
                    let (keys, others) = opened_keys(heads, dek, clock.now_ms());
                    if !keys.is_empty() {
                        outcome.deks += 1;
                        if asked == Asked::ByCaller {
                            gate.done(admitted);
                        }
                    }
                    keys.into_iter().for_each(|(head, key)| opened.put(head, Rc::new(key), &limits, stats));
                    let failure = Error::Unverified(Mismatch::Commitment);
                    if asked == Asked::ByCaller {
                        others.iter().for_each(|_| gate.refused(admitted, &failure));
                    }
                    others.into_iter().map(|head| Failed { head, admitted, failure: failure.clone() }).collect()
                }
                Err(source) => {
                    let kek = &heads[0].kek.name;
                    let error = Error::Service { key: kek.clone(), source: source.clone() };
                    if error.concerns_one_value(None) {
                        (asked == Asked::ByCaller).then(|| gate.refused(admitted, &error));
                    } else {
                        down.note(kek, kek, &source);
                        if heads.iter().any(Wanted::is_last_wrap) {
                            stopped_by.get_or_insert((admitted, error.clone()));
                        }
                    }
                    let of = |head| Failed { head, admitted, failure: error.clone() };
                    heads.into_iter().map(of).collect::<Vec<_>>()
                }
            };
            failed.extend(failures);
            if stopped_by.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let ask = async |group: &Group<Wanted<'h, 'k>, Admitted>| {
            let head = &group.heads[0];
            match down.of(&head.kek.name) {
                Some((_, failure)) => Err(failure),
                None => head.kek.provider.unwrap(head.wrapped(), &head.context).await,
            }
        };
        let made = wait.wait(Box::pin(async {
            together(lanes, concurrency, ask, answered).await;
            Ok(())
        }));
        made.map_err(|source| Error::Service { key: first.name.clone(), source })?;
        check_stopped(run.gate, stopped_by)?;
        Ok(failed)
    }
}

/// A head whose DEK is wanted, and the wrap that it is asked for through.
struct Wanted<'h, 'k> {
    /// Where the caller's list has it.
    places: Vec<usize>,
    head: &'h [u8],
    /// None for the literal form, which is a wrapped DEK and nothing else.
    header: Option<Header<'h>>,
    at: usize,
    kek: &'k Kek,
    owners: Vec<String>,
    context: Context,
    failure: Option<Error>,
}

impl<'h, 'k> Wanted<'h, 'k> {
    fn new<W>(run: &Run<'k, W>, place: usize, head: &'h [u8]) -> Result<Self> {
        let places = vec![place];
        if !head.starts_with(&MAGIC) {
            let kek = run.keyring.for_literal()?;
            run.require_opening(&kek.name, &[])?;
            let (owners, context) = (Vec::new(), kek.context.clone());
            return Ok(Wanted { places, head, header: None, at: 0, kek, owners, context, failure: None });
        }
        let header = Header::parse(head)?;
        let mut failure = None;
        let (at, kek, owners) = next_wrap(run, &header, 0, &mut failure)?;
        let context = header.context.clone();
        Ok(Wanted { places, head, header: Some(header), at, kek, owners, context, failure })
    }

    /// The same head through its next wrap that is for the caller; what is wrong with it when there is none.
    fn through_another_wrap<W>(
        mut self,
        run: &Run<'k, W>,
        error: Error,
    ) -> std::result::Result<Self, (Vec<usize>, Error)> {
        let Some(header) = &self.header else { return Err((self.places, error)) };
        self.failure = Some(more_telling(self.failure.take(), error));
        match next_wrap(run, header, self.at + 1, &mut self.failure) {
            Ok((at, kek, owners)) => Ok(Wanted { at, kek, owners, ..self }),
            Err(error) => Err((self.places, error)),
        }
    }

    /// Whether this is the DEK that the header commits to. The literal form commits to nothing.
    fn commits_to(&self, derived: Option<&Derived>) -> bool {
        let header = self.header.as_ref();
        header.is_none_or(|header| derived.is_some_and(|derived| derived.is_committed(header.commitment)))
    }

    fn is_last_wrap(&self) -> bool {
        self.header.as_ref().is_none_or(|header| self.at + 1 == header.wraps.len())
    }

    fn wrap(&self) -> Option<&Wrap<'h>> {
        self.header.as_ref().map(|header| &header.wraps[self.at])
    }

    /// What its call depends on: the wrapped DEK, and under which KEK and context it is.
    fn call(&self) -> (&'h [u8], (&'k str, Option<&'h str>, Context)) {
        let WrappedRef { kek_id, bytes } = self.wrapped();
        (bytes, (self.kek.name.as_str(), kek_id, self.context.clone()))
    }

    fn wrapped(&self) -> WrappedRef<'h> {
        match self.wrap() {
            Some(wrap) => WrappedRef { kek_id: Some(wrap.kek_id), bytes: wrap.wrapped_dek },
            None => WrappedRef { kek_id: None, bytes: self.head },
        }
    }
}

/// The first wrap from `from` on through which the caller may open a DEK.
fn next_wrap<'k, W>(
    run: &Run<'k, W>,
    header: &Header<'_>,
    from: usize,
    failure: &mut Option<Error>,
) -> Result<(usize, &'k Kek, Vec<String>)> {
    for (at, wrap) in header.wraps.iter().enumerate().skip(from) {
        match may_open(run, wrap, &header.context) {
            Ok((kek, owners)) => return Ok((at, kek, owners)),
            Err(error) => *failure = Some(more_telling(failure.take(), error)),
        }
    }
    Err(failure.take().expect("a header has at least one wrap"))
}

fn may_open<'k, W>(run: &Run<'k, W>, wrap: &Wrap<'_>, context: &Context) -> Result<(&'k Kek, Vec<String>)> {
    let kek = run.keyring.for_decrypting(wrap.key_name)?;
    let owners = run.keyring.owners(kek, wrap.kek_id, context);
    run.require_opening(&kek.name, &owners)?;
    check_kek_context(kek, context)?;
    Ok((kek, owners))
}

/// What a DEK opens, and the heads that do not commit to it.
fn opened_keys<'h, 'k>(heads: Vec<Wanted<'h, 'k>>, dek: Dek, now_ms: u64) -> (Opened<'h>, Vec<Wanted<'h, 'k>>) {
    let derived = heads[0].header.is_some().then(|| Derived::from_dek(&dek));
    let (fit, others): (Vec<_>, Vec<_>) = heads.into_iter().partition(|head| head.commits_to(derived.as_ref()));
    let key = Rc::new(derived.map_or_else(|| ExpandedKey::new(dek.expose()), |derived| derived.payload_key));
    let opened = |head: Wanted<'h, 'k>| {
        let kek_id = head.wrap().map(|wrap| wrap.kek_id.into());
        let (key, seen) = (Rc::clone(&key), Seen::default());
        let Wanted { head, kek, owners, context, .. } = head;
        let kek = KekIdentity::of(kek);
        (head, OpenedKey { key, context, kek, kek_id, owners, born_ms: now_ms, seen })
    };
    (fit.into_iter().map(opened).collect(), others)
}

/// Heads with the keys that they are opened with.
type Opened<'h> = Vec<(&'h [u8], OpenedKey)>;
