//! This backend's session: made on first use, checked by process id, brought up to date with every statement.

use std::borrow::Borrow;
use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::rc::Rc;

use pgrx::pg_sys;
use vod_tender_core::access::{Function, Gate};
use vod_tender_core::keyring::Keyring;
use vod_tender_core::policy::Policy;
use vod_tender_core::session::{Run, Session};
use vod_tender_core::stats::CallLog;
use vod_tender_core::stored::Kind;
use vod_tender_core::{Error, Result};
use vod_tender_providers::Services;
use vod_tender_providers::secret_file::FileStamp;

use crate::audit::{Announcer, Audit};
use crate::errors::sqlstate_text;
use crate::process::CoarseClock;
use crate::server_log::{self, Level};
use crate::wait::Waiter;
use crate::{callers, catalog, configuration, process, settings};

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
    gate: Gate,
    audit: Rc<RefCell<Audit>>,
}

thread_local! {
    // Dropped by `at_exit` and never by the thread's own end: the runtime must not be dropped that late.
    static BACKEND: RefCell<Option<ManuallyDrop<Backend>>> = const { RefCell::new(None) };
}

/// Runs `work` with this backend's session, up to date, for the roles in effect. `kind` is the type of the value at
/// hand. The error may be boxed: a large one is moved about also where there is none.
pub fn with<T, E: From<Error> + Borrow<Error>>(
    function: Function,
    kind: Kind,
    work: impl FnOnce(&mut Session, &mut Run<'_, Waiter>) -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    BACKEND.with_borrow_mut(|slot| {
        let backend = Backend::current(slot)?;
        backend.refresh();
        backend.audit.borrow_mut().callers.enter(&mut backend.gate);
        // Not when a call ends: its caller may have a failure to note.
        if backend.gate.is_full() {
            let audit = Rc::clone(&backend.audit);
            audit.borrow_mut().write(&mut backend.gate, None);
        }
        let before = backend.gate.begin(function);
        let mut run = Run::new(&backend.keyring, &backend.policy, &mut backend.waiter, &mut backend.gate);
        let result = work(&mut backend.session, &mut run);
        backend.note(result.as_ref().err().map(E::borrow), kind);
        if function == Function::Other {
            backend.gate.resume(before);
        }
        result
    })
}

/// Notes that the last call failed with this SQLSTATE, because of that key if one is named, where its caller handles the failure.
pub fn failed(sqlstate: &str, key: Option<&str>) {
    BACKEND.with_borrow_mut(|slot| {
        if let Some(backend) = Backend::existing(slot) {
            backend.gate.failed(sqlstate, key);
        }
    });
}

/// Writes down what the transaction that ends has used.
pub fn end_transaction(committed: Option<bool>) {
    BACKEND.with(|slot| {
        // An error that unwinds gives the session up before the transaction ends.
        let Ok(mut slot) = slot.try_borrow_mut() else {
            return server_log::write(
                Level::Alarm,
                "vod_tender_crypto audit of a transaction is lost: its session is in use",
            );
        };
        if let Some(backend) = Backend::existing(&mut slot) {
            backend.session.begin_statement();
            let audit = Rc::clone(&backend.audit);
            audit.borrow_mut().end_transaction(&mut backend.gate, committed);
        }
    });
}

/// Runs `work` with this backend's part of the audit.
pub fn with_audit<T>(work: impl FnOnce(&mut Audit) -> T) -> Result<T> {
    BACKEND.with_borrow_mut(|slot| {
        let backend = Backend::current(slot)?;
        let mut audit = backend.audit.borrow_mut();
        Ok(work(&mut audit))
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
        if let Some(backend) = Backend::existing(slot) {
            backend.clear();
        }
    });
}

impl Backend {
    /// The session that this process has made, if it has.
    fn existing(slot: &mut Option<ManuallyDrop<Backend>>) -> Option<&mut Backend> {
        slot.as_deref_mut().filter(|backend| backend.process == process::id())
    }

    #[inline(always)]
    fn current(slot: &mut Option<ManuallyDrop<Backend>>) -> Result<&mut Backend> {
        // What another process made is left alone: its secrets read as zero here, its sockets are not ours to close.
        if slot.as_ref().is_none_or(|backend| backend.process != process::id()) {
            Backend::make(slot)?;
        }
        Ok(slot.as_mut().expect("it was just made"))
    }

    #[cold]
    fn make(slot: &mut Option<ManuallyDrop<Backend>>) -> Result<()> {
        *slot = Some(ManuallyDrop::new(Backend::new()?));
        Ok(())
    }

    /// Writes down what was used in a transaction that the session's end ends.
    fn end(&mut self) {
        if let Ok(mut audit) = self.audit.try_borrow_mut() {
            audit.end_transaction(&mut self.gate, Some(false));
        }
    }

    fn clear(&mut self) {
        self.session.clear();
        self.services.forget();
        self.waiter.forget();
    }

    fn new() -> Result<Self> {
        let calls = CallLog::default();
        let audit = Rc::new(RefCell::new(Audit::default()));
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
            gate: Gate::new(Box::new(Announcer(Rc::clone(&audit)))),
            audit,
        };
        catalog::watch();
        callers::watch();
        catalog::set_changed();
        // SAFETY: registers a function for the end of this process; it is in this library, which stays loaded.
        unsafe {
            pg_sys::before_shmem_exit(Some(at_exit), pg_sys::Datum::null());
            pg_sys::RegisterXactCallback(Some(at_transaction_end), std::ptr::null_mut());
        }
        Ok(backend)
    }

    /// Takes in changed keys and settings: with every statement of the client, and whenever PostgreSQL said within
    /// one that something changed. In between it costs four loads.
    #[inline(always)]
    fn refresh(&mut self) {
        let statement = process::statement();
        if statement != self.statement || catalog::changed() || settings::changed() || callers::changed() {
            self.take_in_changes(statement);
        }
    }

    #[cold]
    fn take_in_changes(&mut self, statement: i64) {
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
            self.rights_changed();
        }
        if callers::take_changed() {
            self.rights_changed();
        }
        self.session.expire(&self.policy);
        if statement != self.statement {
            self.session.begin_statement();
        }
        self.statement = statement;
    }

    /// Notes how a call went.
    #[inline(always)]
    fn note(&mut self, error: Option<&Error>, kind: Kind) {
        if error.is_some() || self.calls.has_requests() || self.gate.has_alarms() {
            self.note_more(error, kind);
        }
    }

    #[cold]
    fn note_more(&mut self, error: Option<&Error>, kind: Kind) {
        let requests = self.calls.take_requests();
        if let Some(error) = error {
            self.gate.failed(&sqlstate_text(error, kind), error.key());
        }
        if !requests.is_empty() {
            self.gate.note_requests(requests);
        }
        if self.gate.has_alarms() {
            self.audit.borrow_mut().alarms(&mut self.gate);
        }
    }

    fn rights_changed(&mut self) {
        self.gate.forget();
        self.audit.borrow_mut().callers.rights_changed();
    }
}

fn calls_by_service(calls: &CallLog) -> serde_json::Value {
    let mut services = serde_json::json!({});
    for ((service, operation, outcome), totals) in calls.totals() {
        services[service][operation][outcome] = serde_json::to_value(totals).unwrap_or_default();
    }
    services
}

/// Writes the audit records when a transaction has ended. Whatever happened, it does not fail.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn at_transaction_end(event: pg_sys::XactEvent::Type, _argument: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::*;
    match event {
        XACT_EVENT_COMMIT => end_transaction(Some(true)),
        XACT_EVENT_ABORT | XACT_EVENT_PARALLEL_ABORT => end_transaction(Some(false)),
        // Somebody else decides.
        XACT_EVENT_PREPARE | XACT_EVENT_PARALLEL_COMMIT => end_transaction(None),
        _ => {}
    }
}

/// Wipes the secrets when the session ends, also when it ends in the middle of a call.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn at_exit(_code: std::ffi::c_int, _argument: pg_sys::Datum) {
    BACKEND.with(|slot| match slot.try_borrow_mut() {
        Ok(mut slot) => {
            if let Some(backend) = slot.take().filter(|backend| backend.process == process::id()) {
                let mut backend = ManuallyDrop::into_inner(backend);
                backend.end();
                backend.clear();
            }
        }
        // SAFETY: the process ends here, in the middle of a wait; whoever holds the session does not run again.
        Err(_) => unsafe {
            if let Some(backend) = (*slot.as_ptr()).as_mut() {
                backend.end();
            }
            vod_tender_secret_memory::wipe_all();
        },
    });
}
