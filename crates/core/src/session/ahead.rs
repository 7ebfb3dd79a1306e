//! DEKs for values that are about to be encrypted, made together.

use std::ops::ControlFlow;

use crate::access::Privilege;
use crate::cache::MadeFor;
use crate::context::Context;
use crate::dek::Dek;
use crate::error::{Error, Mismatch, Result};
use crate::keyring::Kek;
use crate::policy::Policy;
use crate::provider::{ProviderError, Wait, WrappedDek, WrappedRef};
use crate::session::encrypt::sealing_key;
use crate::session::together::together;
use crate::session::{BulkTask, Run, Session};

/// DEKs that serve no more values than this are made ahead of what a statement is seen to need. Where one serves many, the
/// calls that are saved by not making what may stay unused are worth more than the time.
const FEW_USES: u64 = 100;

/// A fresh DEK, and what its service opened its wrapped form to.
struct Fresh {
    dek: Dek,
    wrapped: WrappedDek,
    reopened: Option<Dek>,
}

/// What to make.
struct Order<'a> {
    kek: &'a Kek,
    /// The caller's pairs; the KEK's are added.
    own_context: &'a Context,
    count: u64,
    /// Whether the service opens each wrapped DEK before the DEK is used.
    check_wraps: bool,
    made_for: MadeFor,
}

impl Session {
    /// Sees to it that a key is ready for a value of so many bytes, and that the session can open what it seals.
    ///
    /// A statement that needs one DEK after the other, because each serves few values, gets as many more at once as it has
    /// used: what it leaves unused is then never more than what it used.
    pub(super) fn make_ready<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        kek: &Kek,
        own_context: &Context,
        bytes: usize,
        now_ms: u64,
    ) -> Result<()> {
        let limits = run.policy.limits;
        match self.sealing.get(&kek.name, own_context, bytes, now_ms, &limits) {
            Some(key) if key.is_taken_up() => return Ok(()),
            Some(_) => {}
            None => {
                run.gate.require(Privilege::Encrypt, &kek.name)?;
                let count = match limits.max_uses {
                    0..=FEW_USES => {
                        // Of all contexts together no more than the session keeps for opening.
                        let room = limits.cache_entries.saturating_sub(self.sealing.at_hand()) as u64;
                        self.sealing.taken_up(&kek.name, own_context).min(room).clamp(1, most_ahead(run.policy))
                    }
                    _ => 1,
                };
                let made_for = MadeFor::Statement;
                let failure = self.make(run, Order { kek, own_context, count, check_wraps: false, made_for })?;
                if let Some(failure) = failure {
                    if self.sealing.get(&kek.name, own_context, 0, now_ms, &limits).is_none() {
                        return Err(failure);
                    }
                    self.sealing.begin_small(&kek.name, own_context);
                }
            }
        }
        if let Some(key) = self.sealing.take_up(&kek.name, own_context) {
            self.opened.put(&key.headers[0], key.opened(run.keyring).into(), &limits, &mut self.stats);
        }
        Ok(())
    }

    /// Sees to it that `needed` values can be encrypted for the task without waiting for the key service. When DEKs are
    /// to be made for that, it makes enough for `wanted` values, many at a time.
    ///
    /// Where the task asks for it, the service opens each wrapped DEK before the DEK is used.
    pub fn make_deks_ahead<W: Wait>(
        &mut self,
        run: &mut Run<'_, W>,
        task: BulkTask<'_>,
        needed: u64,
        wanted: u64,
    ) -> Result<()> {
        let kek = run.keyring.for_encrypting(task.key)?;
        run.gate.require(Privilege::Encrypt, &kek.name)?;
        let empty = Context::empty();
        let own_context = task.context.unwrap_or(&empty);
        let now = self.clock.now_ms();
        let limits = run.policy.limits;
        // Also what the session made for others: every key at hand may be used for the task.
        for header in self.sealing.headers(&kek.name, own_context) {
            self.assure_header(run, task, &header)?;
        }
        let ready = self.sealing.ready_for(&kek.name, own_context, now, &limits);
        if ready >= needed {
            return Ok(());
        }
        let count = (wanted.max(needed) - ready).div_ceil(limits.max_uses).min(most_ahead(run.policy));
        let (check_wraps, made_for) = (task.check_wraps, MadeFor::Job);
        match self.make(run, Order { kek, own_context, count, check_wraps, made_for })? {
            Some(failure) if self.sealing.ready_for(&kek.name, own_context, now, &limits) < needed => Err(failure),
            _ => Ok(()),
        }
    }

    /// Makes DEKs, many at a time. What came is kept also when some of the calls fail, so that a service that throttles is
    /// not asked for the same again; then the failure is given.
    fn make<W: Wait>(&mut self, run: &mut Run<'_, W>, order: Order<'_>) -> Result<Option<Error>> {
        let Order { kek, own_context, check_wraps, made_for, .. } = order;
        let context = &kek.context.with(own_context)?;
        let Session { sealing, assured, clock, stats, .. } = self;
        let (limits, concurrency) = (run.policy.limits, run.policy.concurrency);
        let mut failure = None;
        let mut keep = |fresh: Fresh| {
            let is_checked = fresh.reopened.is_some();
            if fresh.reopened.is_some_and(|reopened| !reopened.is_same(&fresh.dek)) {
                return Err(Error::Unverified(Mismatch::RoundTrip));
            }
            let key = sealing_key(kek, context.clone(), fresh.dek, &fresh.wrapped, clock.now_ms(), made_for)?;
            stats.deks_made += 1;
            if made_for == MadeFor::Job {
                key.headers.iter().for_each(|header| assured.put(header, is_checked, &limits));
            }
            sealing.put(&kek.name, own_context, key, &limits);
            Ok(())
        };
        let answered = |(), made: std::result::Result<Fresh, ProviderError>| {
            let service = |source| Error::Service { key: kek.name.clone(), source };
            match made.map_err(service).and_then(&mut keep) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure = Some(match failure.take() {
                        // That something is wrong with the keys tells more than that the service is busy.
                        Some(first @ Error::Unverified(_)) => first,
                        _ => error,
                    });
                    ControlFlow::Break(())
                }
            }
        };
        let lanes = (0..order.count).map(|_| vec![()]).collect();
        run.call(
            kek,
            Box::pin(async {
                together(lanes, concurrency, async |()| make_one(kek, context, check_wraps).await, answered).await;
                Ok(())
            }),
        )?;
        match failure {
            Some(failure @ Error::Service { .. }) => Ok(Some(failure)),
            Some(failure) => Err(failure),
            None => Ok(None),
        }
    }
}

/// Most DEKs that are made in one go.
fn most_ahead(policy: &Policy) -> u64 {
    const ROUNDS: usize = 4;
    policy.concurrency.saturating_mul(ROUNDS).min(policy.limits.cache_entries).max(1) as u64
}

async fn make_one(kek: &Kek, context: &Context, check: bool) -> std::result::Result<Fresh, ProviderError> {
    let (dek, wrapped) = kek.provider.generate(context).await?;
    let reopened = match check {
        true => {
            let wrapped = WrappedRef { kek_id: Some(&wrapped.kek_id), bytes: &wrapped.bytes };
            Some(kek.provider.unwrap(wrapped, context).await?)
        }
        false => None,
    };
    Ok(Fresh { dek, wrapped, reopened })
}
