//! This backend's session: made on first use, checked by process id, brought up to date with every statement.

use std::cell::RefCell;
use std::mem::ManuallyDrop;

use pgrx::pg_sys;
use vod_tender_core::Result;
use vod_tender_core::keyring::Keyring;
use vod_tender_core::policy::Policy;
use vod_tender_core::session::{Run, Session};
use vod_tender_core::stats::CallLog;
use vod_tender_providers::Services;
use vod_tender_providers::secret_file::FileStamp;

use crate::process::CoarseClock;
use crate::wait::Waiter;
use crate::{catalog, configuration, process, settings};

/// Everything that a backend keeps between calls.
pub struct Backend {
    process: i32,
    statement: i64,
    session: Session,
    keyring: Keyring,
    policy: Policy,
    legacy_file: Option<(String, Option<FileStamp>)>,
    services: Services,
    waiter: Waiter,
    calls: CallLog,
}

thread_local! {
    // Dropped by `at_exit` and never by the thread's own end: the runtime must not be dropped that late.
    static BACKEND: RefCell<Option<ManuallyDrop<Backend>>> = const { RefCell::new(None) };
}

/// Runs `work` with this backend's session, up to date.
pub fn with<T>(work: impl FnOnce(&mut Session, &mut Run<'_, Waiter>) -> Result<T>) -> Result<T> {
    BACKEND.with_borrow_mut(|slot| {
        let backend = Backend::current(slot)?;
        backend.refresh();
        let mut run = Run { keyring: &backend.keyring, policy: backend.policy, wait: &mut backend.waiter };
        work(&mut backend.session, &mut run)
    })
}

/// This session's counters, as a JSON object.
pub fn statistics() -> Result<serde_json::Value> {
    BACKEND.with_borrow_mut(|slot| {
        let backend = Backend::current(slot)?;
        let mut counters = serde_json::to_value(backend.session.stats()).unwrap_or_default();
        counters["cached_deks"] = backend.session.cached_deks().into();
        let sum = backend.calls.sum();
        counters["call_count"] = sum.calls.into();
        counters["call_total_ms"] = sum.total_ms.into();
        counters["call_max_ms"] = sum.max_ms.into();
        counters["calls"] = calls_by_service(&backend.calls);
        Ok(counters)
    })
}

/// Wipes every DEK, and closes every connection: their buffers hold answers of key services.
pub fn clear() {
    BACKEND.with_borrow_mut(|slot| {
        if let Some(backend) = slot.as_mut().filter(|backend| backend.process == process::id()) {
            backend.clear();
        }
    });
}

impl Backend {
    fn current(slot: &mut Option<ManuallyDrop<Backend>>) -> Result<&mut Backend> {
        // What another process made is left alone: its secrets read as zero here, its sockets are not ours to close.
        if slot.as_ref().is_none_or(|backend| backend.process != process::id()) {
            *slot = Some(ManuallyDrop::new(Backend::new()?));
        }
        Ok(slot.as_mut().expect("it was just made"))
    }

    fn clear(&mut self) {
        self.session.clear();
        self.services.forget();
        self.waiter.forget();
    }

    fn new() -> Result<Self> {
        let calls = CallLog::default();
        let backend = Backend {
            process: process::id(),
            statement: i64::MIN,
            session: Session::new(Box::new(CoarseClock))?,
            keyring: Keyring::default(),
            policy: Policy::default(),
            legacy_file: None,
            services: Services::new(calls.clone()),
            waiter: Waiter::default(),
            calls,
        };
        catalog::watch();
        catalog::set_changed();
        // SAFETY: registers a function for the end of this process; it is in this library, which stays loaded.
        unsafe { pg_sys::before_shmem_exit(Some(at_exit), pg_sys::Datum::null()) };
        Ok(backend)
    }

    /// Takes in changed keys and settings: with every statement of the client, and whenever PostgreSQL said within
    /// one that something changed. In between it costs three loads.
    fn refresh(&mut self) {
        let statement = process::statement();
        if statement == self.statement && !catalog::changed() && !settings::changed() {
            return;
        }
        catalog::receive_changes();
        let settings_changed = settings::take_changed();
        if settings_changed {
            self.policy = settings::policy();
            self.services.set_limits(settings::call_limits());
        }
        let legacy_file = configuration::legacy_file_stamp();
        if catalog::take_changed() || settings_changed || legacy_file != self.legacy_file {
            // If reading fails, the flag says that it must be read again; a change that comes meanwhile sets it too.
            catalog::set_unread(true);
            self.keyring = configuration::read_keyring(&self.services);
            catalog::set_unread(false);
            self.legacy_file = legacy_file;
            self.session.keys_changed(&self.keyring);
        }
        self.session.expire(&self.policy);
        self.statement = statement;
    }
}

fn calls_by_service(calls: &CallLog) -> serde_json::Value {
    let mut services = serde_json::json!({});
    for ((service, operation, outcome), totals) in calls.totals() {
        services[service][operation][outcome] = serde_json::to_value(totals).unwrap_or_default();
    }
    services
}

/// Wipes the secrets when the session ends, also when it ends in the middle of a call.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn at_exit(_code: std::ffi::c_int, _argument: pg_sys::Datum) {
    BACKEND.with(|slot| match slot.try_borrow_mut() {
        Ok(mut slot) => {
            if let Some(backend) = slot.take().filter(|backend| backend.process == process::id()) {
                let mut backend = ManuallyDrop::into_inner(backend);
                backend.clear();
            }
        }
        // SAFETY: the process ends here; whoever holds the session does not run again.
        Err(_) => unsafe { vod_tender_secret_memory::wipe_all() },
    });
}
