//! Calls that are known together, made together: DEKs for values that are about to be encrypted.

use futures_util::StreamExt;
use futures_util::stream;

use crate::access::Privilege;
use crate::context::Context;
use crate::dek::Dek;
use crate::error::{Error, Mismatch, Result};
use crate::keyring::Kek;
use crate::provider::{ProviderError, Wait, WrappedDek, WrappedRef};
use crate::session::{BulkTask, Run, Session};

/// Most DEKs that are made ahead in one go.
const MOST_AHEAD: u64 = 64;

/// A fresh DEK, and what its service opened its wrapped form to.
struct Fresh {
    dek: Dek,
    wrapped: WrappedDek,
    reopened: Option<Dek>,
}

impl Session {
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
        let mut ready = self.sealing.ready_for(&kek.name, own_context, now, &limits);
        if ready >= needed {
            return Ok(());
        }
        let count =
            (wanted.max(needed) - ready).div_ceil(limits.max_uses).min(MOST_AHEAD.min(limits.cache_entries as u64));
        let context = kek.context.with(own_context)?;
        let concurrency = run.policy.concurrency;
        let made = run.call(
            kek,
            Box::pin(async {
                let calls = (0..count).map(|_| make_one(kek, &context, task.check_wraps));
                Ok(stream::iter(calls).buffer_unordered(concurrency).collect::<Vec<_>>().await)
            }),
        )?;
        // What came is kept also when some of the calls failed, so that a service that throttles is not asked for
        // the same again.
        let mut failure = None;
        for fresh in made {
            match fresh {
                Ok(fresh) => {
                    self.keep_fresh(run, kek, own_context, &context, fresh, now)?;
                    ready += limits.max_uses;
                }
                Err(source) => failure = Some(Error::Service { key: kek.name.clone(), source }),
            }
        }
        match failure {
            Some(failure) if ready < needed => Err(failure),
            _ => Ok(()),
        }
    }

    fn keep_fresh<W: Wait>(
        &mut self,
        run: &Run<'_, W>,
        kek: &Kek,
        own_context: &Context,
        context: &Context,
        fresh: Fresh,
        now_ms: u64,
    ) -> Result<()> {
        let checked = fresh.reopened.is_some();
        if fresh.reopened.is_some_and(|reopened| !reopened.is_same(&fresh.dek)) {
            return Err(Error::Unverified(Mismatch::RoundTrip));
        }
        let key = self.sealing_key(run, kek, context.clone(), fresh.dek, &fresh.wrapped, now_ms)?;
        for header in &key.headers {
            self.assured.put(header, checked, &run.policy.limits);
        }
        self.sealing.put(&kek.name, own_context, key, &run.policy.limits);
        Ok(())
    }
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
