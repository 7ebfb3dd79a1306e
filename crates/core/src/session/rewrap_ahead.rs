//! Rewrapping many DEKs together: what single rewraps need afterwards is at hand then.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::ops::ControlFlow;

use crate::access::{Admitted, Privilege};
use crate::envelope::{Header, MAGIC, Wrap};
use crate::error::{Error, Mismatch, Result};
use crate::keyring::Kek;
use crate::provider::{Wait, WrappedDek, WrappedRef};
use crate::seal::Derived;
use crate::session::decrypt::more_telling;
use crate::session::rewrap::{Moving, RewrapMemo, is_passing, order, renewed, source};
use crate::session::together::{
    Asked, Down, Failed, Group, Outcome, Prefetched, check_stopped, lanes, next_round, together,
};
use crate::session::{Run, Session};

/// Where DEKs go.
#[derive(Clone, Copy)]
pub(super) struct Destination<'a> {
    /// Name of the KEK; the default one when there is none.
    pub key: Option<&'a str>,
    pub asked: Asked,
    /// Whether the key service opens each fresh wrap once before anything under it is stored.
    pub check_wraps: bool,
}

impl Session {
    /// Has the key service put the DEKs of these headers under the KEK `key`, each distinct wrapped DEK once, many at a
    /// time, so that [`Session::rewrap`] of values with these headers calls nothing.
    pub fn prefetch_rewraps<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        key: Option<&str>,
        heads: &[&[u8]],
    ) -> Result<Prefetched> {
        let to = Destination { key, asked: Asked::ByCaller, check_wraps: false };
        self.move_ahead(run, to, heads).map(Outcome::prefetched)
    }

    /// The same, and what failed. An error is about more than one of the heads.
    pub(super) fn move_ahead<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        to: Destination<'_>,
        heads: &[&[u8]],
    ) -> Result<Outcome> {
        let target = run.keyring.for_encrypting(to.key)?;
        let mut outcome = Outcome::default();
        let mut due = self.due(run, target, to, heads, &mut outcome)?;
        let down = Down::default();
        if !self.knows_newest(run, target) && due.len() > 1 {
            // One alone: its answer tells what is up to date.
            let others = due.split_off(1);
            self.move_all(run, target, to, &down, due, &mut outcome)?;
            due = others;
            due.retain(|head| !self.is_up_to_date(run, target, head));
        }
        self.move_all(run, target, to, &down, due, &mut outcome)?;
        Ok(outcome)
    }

    fn knows_newest<W>(&self, run: &Run<'_, W>, target: &Kek) -> bool {
        let newest = || self.rewraps.newest(&target.name, self.clock.now_ms(), &run.policy.limits);
        target.provider.is_current("").is_some() || newest().is_some()
    }

    fn is_up_to_date<W>(&self, run: &Run<'_, W>, target: &Kek, head: &Due<'_, '_>) -> bool {
        head.own.is_some_and(|own| self.is_current(run, target, head.header.wraps[own].kek_id))
    }

    /// The heads that are to be moved, if the caller may move them: asked before anything is called.
    fn due<'h, 'k, W>(
        &mut self,
        run: &Run<'k, W>,
        target: &Kek,
        to: Destination<'_>,
        heads: &[&'h [u8]],
        outcome: &mut Outcome,
    ) -> Result<Vec<Due<'h, 'k>>> {
        let mut seen: HashMap<&[u8], Option<usize>> = HashMap::new();
        let mut due: Vec<Due<'_, '_>> = Vec::new();
        for (place, &head) in heads.iter().enumerate() {
            if let Some(known) = seen.get(head) {
                known.iter().for_each(|&at| due[at].places.push(place));
                continue;
            }
            let found = Due::new(self, run, to.key, place, head);
            seen.insert(head, matches!(found, Ok(Some(_))).then_some(due.len()));
            match found {
                Ok(found) => due.extend(found),
                Err(refused @ Error::NotGranted { .. }) if to.asked == Asked::ByCaller => return Err(refused),
                Err(error) if error.concerns_one_value(Some(&target.name)) => outcome.fail(&[place], &error),
                Err(error) => return Err(error),
            }
        }
        // More would push out what was learned before it is used.
        let room = run.policy.limits.cache_entries.max(1).min(due.len());
        outcome.left_out.extend(due.drain(room..).flat_map(|head| head.places));
        Ok(due)
    }

    fn move_all<'h, 'k, W: Wait>(
        &mut self,
        run: &mut Run<'k, W>,
        target: &'k Kek,
        to: Destination<'_>,
        down: &Down,
        mut due: Vec<Due<'h, 'k>>,
        outcome: &mut Outcome,
    ) -> Result<()> {
        // A round for each wrap that has to be tried: most envelopes have one.
        while !due.is_empty() {
            let failed = self.move_round(run, target, to, down, due, outcome)?;
            due = next_round(run, failed, Some(&target.name), outcome, |head, run, failure| {
                head.through_another_wrap(run, target, failure)
            })?;
        }
        Ok(())
    }

    /// Has the DEKs moved, each from the wrap at hand; gives what failed.
    fn move_round<'h, 'k, W: Wait>(
        &mut self,
        run: &mut Run<'k, W>,
        target: &'k Kek,
        to: Destination<'_>,
        down: &Down,
        due: Vec<Due<'h, 'k>>,
        outcome: &mut Outcome,
    ) -> Result<Vec<Failed<Due<'h, 'k>, Failure>>> {
        let (limits, concurrency) = (run.policy.limits, run.policy.concurrency);
        let mut lanes = lanes(due, Due::call, Move::default);
        lanes.iter_mut().for_each(|lane| lane.retain_mut(|group| !self.is_at_hand(run, target, to, group)));
        for Group { heads, with } in lanes.iter_mut().flatten() {
            let context = &heads[0].header.context;
            with.to = run.gate.admit_anew(Privilege::Rewrap, &target.name, context)?;
            with.from = run.gate.admit_anew(Privilege::Rewrap, &heads[0].source.name, context)?;
        }
        let Session { rewraps, assured, clock, .. } = self;
        let Run { wait, gate, .. } = run;
        let (mut failed, mut stopped_by) = (Vec::new(), None);
        let answered = |group: Group<Due<'h, 'k>, Move>, answer: std::result::Result<WrappedDek, Failure>| {
            let Group { heads, with } = group;
            let head = &heads[0];
            let failure = match answer {
                Ok(fresh) => {
                    // What was known says nothing of what is up to date now.
                    if with.known.is_none() {
                        rewraps.put(&target.name, head.moved_name(target), &fresh, clock.now_ms(), &limits);
                    }
                    if !head.is_renewed_by(&fresh) {
                        return ControlFlow::Continue(());
                    }
                    outcome.deks += 1;
                    if to.asked == Asked::ByCaller {
                        gate.done(with.to);
                        (head.own != Some(head.at)).then(|| gate.done(with.from));
                        return ControlFlow::Continue(());
                    }
                    for head in &heads {
                        match head.renewed(target, &fresh) {
                            Ok(header) => assured.put(&header, to.check_wraps, &limits),
                            Err(error) => outcome.fail(&head.places, &error),
                        }
                    }
                    return ControlFlow::Continue(());
                }
                Err(failure) => failure,
            };
            if let Failure::OfHead(_) = failure {
                rewraps.remove(&head.moved_name(target));
            }
            if failure.error().concerns_one_value(Some(&target.name)) {
                (to.asked == Asked::ByCaller).then(|| gate.refused(with.from, failure.error()));
            } else {
                if let Error::Service { key, source } = failure.error() {
                    down.note(&head.source.name, key, source);
                }
                if heads.iter().any(|head| head.ends_with(&failure)) {
                    stopped_by.get_or_insert((with.from, failure.error().clone()));
                }
            }
            let of = |head| Failed { head, admitted: with.from, failure: failure.clone() };
            failed.extend(heads.into_iter().map(of));
            if stopped_by.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let ask = async |group: &Group<Due<'h, 'k>, Move>| match down.of(&group.heads[0].source.name) {
            Some((key, source)) => Err(Failure::OfWrap(Error::Service { key, source })),
            None => group.moved(target, to.check_wraps).await,
        };
        let made = wait.wait(Box::pin(async {
            together(lanes, concurrency, ask, answered).await;
            Ok(())
        }));
        made.map_err(|source| Error::Service { key: target.name.clone(), source })?;
        check_stopped(run.gate, stopped_by)?;
        Ok(failed)
    }

    /// Whether nothing has to be called for a group any more.
    fn is_at_hand<W>(
        &mut self,
        run: &Run<'_, W>,
        target: &Kek,
        to: Destination<'_>,
        group: &mut Group<Due<'_, '_>, Move>,
    ) -> bool {
        let head = &group.heads[0];
        let (now, limits) = (self.clock.now_ms(), run.policy.limits);
        let Some(known) = self.rewraps.known(target, &head.moved_name(target), now, &limits) else {
            return false;
        };
        let knows = |head: &Due<'_, '_>| {
            let renewed = head.renewed(target, known);
            renewed.is_ok_and(|header| self.assured.knows(&header, to.check_wraps))
        };
        let is_at_hand = !to.check_wraps || group.heads.iter().all(knows);
        group.with.known = Some(known.clone());
        is_at_hand
    }
}

/// A head whose DEK is to be moved, and the wrap that it is moved from.
struct Due<'h, 'k> {
    /// Where the caller's list has it.
    places: Vec<usize>,
    header: Header<'h>,
    /// Which wrap is the target's.
    own: Option<usize>,
    at: usize,
    /// The wraps that were not tried yet.
    others: VecDeque<usize>,
    source: &'k Kek,
    failure: Option<Error>,
}

/// What goes with heads whose DEK one call moves.
struct Move {
    /// What the DEK was moved to before.
    known: Option<WrappedDek>,
    to: Admitted,
    from: Admitted,
}

impl Default for Move {
    fn default() -> Self {
        Move { known: None, to: Admitted::CHECK, from: Admitted::CHECK }
    }
}

/// How a move failed.
#[derive(Clone)]
enum Failure {
    /// Another wrap may do.
    OfWrap(Error),
    /// What came is of no use.
    OfHead(Error),
}

impl Failure {
    fn error(&self) -> &Error {
        let (Failure::OfWrap(error) | Failure::OfHead(error)) = self;
        error
    }
}

impl<'h, 'k> Due<'h, 'k> {
    /// `None` for what is up to date.
    fn new<W>(
        session: &Session,
        run: &Run<'k, W>,
        key: Option<&str>,
        place: usize,
        head: &'h [u8],
    ) -> Result<Option<Self>> {
        if !head.starts_with(&MAGIC) {
            return Err(Error::NotRewrappable);
        }
        let header = Header::parse(head)?;
        let Some((target, own)) = session.wrap_to_renew(run, key, &header)? else { return Ok(None) };
        let mut others = order(&header, own).collect();
        let mut failure = None;
        let (at, source) = next_source(run, target, &header, &mut others, &mut failure)?;
        Ok(Some(Due { places: vec![place], header, own, at, others, source, failure }))
    }

    /// The same head from its next wrap that the caller may move from; what is wrong with it when there is none.
    fn through_another_wrap<W>(
        mut self,
        run: &Run<'k, W>,
        target: &Kek,
        failure: Failure,
    ) -> std::result::Result<Self, (Vec<usize>, Error)> {
        if self.ends_with(&failure) {
            return Err((self.places, failure.error().clone()));
        }
        self.failure = Some(more_telling(self.failure.take(), failure.error().clone()));
        match next_source(run, target, &self.header, &mut self.others, &mut self.failure) {
            Ok((at, source)) => Ok(Due { at, source, ..self }),
            Err(error) => Err((self.places, error)),
        }
    }

    /// Whether no other wrap is tried after a failure. Its own wrap may be good, only not now: it is not to be replaced.
    fn ends_with(&self, failure: &Failure) -> bool {
        match failure {
            Failure::OfWrap(error) => self.others.is_empty() || (self.own == Some(self.at) && is_passing(error)),
            Failure::OfHead(_) => true,
        }
    }

    fn wrap(&self) -> &Wrap<'h> {
        &self.header.wraps[self.at]
    }

    /// What its call depends on: the wrapped DEK, under which KEK and context it is, and what it must be seen to be.
    fn call(&self) -> (&'h [u8], impl Hash + Eq + use<'h, 'k>) {
        let Wrap { kek_id, wrapped_dek, .. } = *self.wrap();
        let Header { context, commitment, .. } = &self.header;
        (wrapped_dek, (self.source.name.as_str(), kek_id, *commitment, self.must_check(), context.clone()))
    }

    fn moved_name(&self, target: &Kek) -> Box<[u8]> {
        RewrapMemo::name(&target.name, self.wrap(), &self.header, self.must_check())
    }

    /// Whether the DEK must be seen to be the payload's: a wrap that replaces another one must hold that.
    fn must_check(&self) -> bool {
        self.own.is_some_and(|own| own != self.at)
    }

    fn is_renewed_by(&self, fresh: &WrappedDek) -> bool {
        self.own != Some(self.at) || self.wrap().kek_id != fresh.kek_id
    }

    fn renewed(&self, target: &Kek, fresh: &WrappedDek) -> Result<Vec<u8>> {
        renewed(&self.header, self.own.unwrap_or(self.at), target, fresh)
    }
}

fn next_source<'k, W>(
    run: &Run<'k, W>,
    target: &Kek,
    header: &Header<'_>,
    others: &mut VecDeque<usize>,
    failure: &mut Option<Error>,
) -> Result<(usize, &'k Kek)> {
    while let Some(at) = others.pop_front() {
        match source(run, target, header, &header.wraps[at]) {
            Ok(source) => return Ok((at, source)),
            Err(error) => *failure = Some(more_telling(failure.take(), error)),
        }
    }
    Err(failure.take().expect("a header has at least one wrap"))
}

impl Group<Due<'_, '_>, Move> {
    /// Calls the service: to move the DEK, and on demand to open what came of that.
    async fn moved(&self, target: &Kek, check_wraps: bool) -> std::result::Result<WrappedDek, Failure> {
        let head = &self.heads[0];
        let Header { context, commitment, .. } = &head.header;
        let fresh = match &self.with.known {
            Some(known) => known.clone(),
            None => {
                let (wrap, source, must_check) = (head.wrap(), head.source, head.must_check());
                let moving = Moving { target, source, wrap, context, commitment, must_check };
                moving.moved().await.map_err(Failure::OfWrap)?
            }
        };
        if check_wraps && head.is_renewed_by(&fresh) {
            let wrapped = WrappedRef { kek_id: Some(&fresh.kek_id), bytes: &fresh.bytes };
            let failed = |source| Failure::OfHead(Error::Service { key: target.name.clone(), source });
            let dek = target.provider.unwrap(wrapped, context).await.map_err(failed)?;
            if !Derived::from_dek(&dek).is_committed(commitment) {
                return Err(Failure::OfHead(Error::Unverified(Mismatch::Commitment)));
            }
        }
        Ok(fresh)
    }
}
