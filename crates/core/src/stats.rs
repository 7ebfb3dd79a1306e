//! This session's counters.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::provider::ProviderError;

/// Counters since the session began.
#[derive(Debug, Default, Clone, Serialize)]
pub struct SessionStats {
    /// Values whose DEK was in the cache.
    pub cache_hits: u64,
    /// Values whose DEK had to be unwrapped.
    pub cache_misses: u64,
    /// DEKs for decrypting that went because the cache was full.
    pub cache_evictions: u64,
    /// DEKs for decrypting that went because of their age.
    pub cache_expiries: u64,
    /// DEKs made for encrypting.
    pub deks_made: u64,
    /// Of them, those that were made ahead and went without having been used.
    pub deks_unused: u64,
    /// Values encrypted, as envelope or directly.
    pub values_encrypted: u64,
    /// Values decrypted, from envelope or directly.
    pub values_decrypted: u64,
    /// Wrapped DEKs moved to another KEK or version.
    pub deks_rewrapped: u64,
}

/// Calls to key services by (service, operation, outcome), and under which ids the services logged them. Clones share both.
#[derive(Debug, Default, Clone)]
pub struct CallLog(Rc<RefCell<BTreeMap<CallKey, CallTotals>>>, Rc<RefCell<Vec<String>>>);

/// Request ids that are kept until they are taken.
const MOST_REQUESTS: usize = 64;

type CallKey = (&'static str, &'static str, &'static str);

/// Number and time of calls.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub struct CallTotals {
    /// How many.
    pub calls: u64,
    /// Milliseconds of all of them.
    pub total_ms: f64,
    /// Milliseconds of the longest.
    pub max_ms: f64,
}

impl CallLog {
    /// Notes that a call begins. It counts as `cancelled` when it is dropped before [`Call::end`].
    pub fn begin(&self, service: &'static str, operation: &'static str) -> Call {
        Call { log: self.clone(), service, operation, outcome: "cancelled", began: Instant::now() }
    }

    /// Notes the id under which a service logged a request.
    pub fn note_request(&self, id: &str) {
        let mut requests = self.1.borrow_mut();
        if requests.len() < MOST_REQUESTS {
            requests.push(id.to_owned());
        }
    }

    /// Whether there is something to [`CallLog::take_requests`].
    #[inline]
    pub fn has_requests(&self) -> bool {
        !self.1.borrow().is_empty()
    }

    /// The ids since this was last asked.
    pub fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut self.1.borrow_mut())
    }

    /// Number and time of all calls.
    pub fn sum(&self) -> CallTotals {
        self.0.borrow().values().fold(CallTotals::default(), |sum, totals| CallTotals {
            calls: sum.calls + totals.calls,
            total_ms: sum.total_ms + totals.total_ms,
            max_ms: sum.max_ms.max(totals.max_ms),
        })
    }

    /// All counts so far.
    pub fn totals(&self) -> BTreeMap<CallKey, CallTotals> {
        self.0.borrow().clone()
    }
}

/// One call under way.
pub struct Call {
    log: CallLog,
    service: &'static str,
    operation: &'static str,
    outcome: &'static str,
    began: Instant,
}

impl Call {
    /// Notes how the call ended, and passes that on.
    pub fn end<T>(mut self, result: Result<T, ProviderError>) -> Result<T, ProviderError> {
        self.outcome = result.as_ref().map_or_else(|error| error.fault.as_str(), |_| "ok");
        result
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        let mut log = self.log.0.borrow_mut();
        log.entry((self.service, self.operation, self.outcome)).or_default().add(took);
    }
}

impl CallTotals {
    fn add(&mut self, took: Duration) {
        let ms = took.as_secs_f64() * 1e3;
        self.calls += 1;
        self.total_ms += ms;
        self.max_ms = self.max_ms.max(ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Fault;

    #[test]
    fn outcomes_are_told_apart() {
        let log = CallLog::default();
        let _ = log.begin("s", "op").end(Ok(()));
        let _ = log.begin("s", "op").end::<()>(Err(ProviderError::new(Fault::Denied, "")));
        drop(log.begin("s", "op"));
        let totals = log.totals();
        assert_eq!(totals.len(), 3);
        for outcome in ["ok", "denied", "cancelled"] {
            assert_eq!(totals[&("s", "op", outcome)].calls, 1);
        }
        assert_eq!(log.sum().calls, 3);
    }
}
