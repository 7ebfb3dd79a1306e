//! A session, its keys, and a key service in memory that counts its calls.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::future::{poll_fn, ready};
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll, Waker};

use crate::access::{Gate, Privilege, Rights};
use crate::armor;
use crate::context::Context;
use crate::dek::Dek;
use crate::envelope::{Envelope, Wrap};
use crate::error::Result;
use crate::keyring::{Kek, KeyState, Keyring, Legacy};
use crate::legacy::LegacyKeys;
use crate::policy::{Clock, Policy};
use crate::provider::{Fault, KeyProvider, ProviderError, ProviderFuture, Wait, WrappedDek, WrappedRef};
use crate::session::{Reading, Run, Sealing, Session};
use crate::stored::Value;

#[derive(Default)]
pub(super) struct FakeClock(Rc<Cell<u64>>);

impl Clock for FakeClock {
    fn now_ms(&self) -> u64 {
        self.0.get()
    }
}

/// Polls until the answer is there: the fake service answers with the second poll.
#[derive(Default)]
pub(super) struct Polling {
    /// How often it polls before it gives up, as when a query is cancelled.
    pub(super) patience: Option<usize>,
}

impl Wait for Polling {
    fn wait<T>(&mut self, mut future: ProviderFuture<'_, T>) -> std::result::Result<T, ProviderError> {
        for _ in 0..self.patience.unwrap_or(100_000) {
            if let Poll::Ready(result) = future.as_mut().poll(&mut TaskContext::from_waker(Waker::noop())) {
                return result;
            }
        }
        assert!(self.patience.is_some(), "the fake service always answers");
        Err(ProviderError::new(Fault::Unreachable, "the call was interrupted"))
    }
}

#[derive(Default)]
pub(super) struct Service {
    pub(super) generated: Cell<u64>,
    pub(super) unwrapped: Cell<u64>,
    pub(super) wrapped: Cell<u64>,
    pub(super) moved: Cell<u64>,
    pub(super) deks: RefCell<HashMap<Vec<u8>, Kept>>,
    stored: Cell<u64>,
    pub(super) refuses: Cell<bool>,
    /// Whether it unwraps to other DEKs than it wrapped.
    pub(super) swaps: Cell<bool>,
    /// How many calls it answers before it fails in that way, if it does.
    pub(super) fails_after: Cell<Option<(u64, Fault)>>,
    /// KEKs (by id) that fail in a way of their own.
    pub(super) failing: RefCell<HashMap<String, Fault>>,
    /// Most calls that were under way at a time.
    pub(super) peak: Cell<usize>,
    under_way: Cell<usize>,
    /// The wrapped DEKs that are being asked about.
    asked: RefCell<HashSet<Vec<u8>>>,
}

/// A call that the service works on.
struct UnderWay<'a>(&'a Service, Option<&'a [u8]>);

impl<'a> UnderWay<'a> {
    fn begin(service: &'a Service, wrapped: Option<&'a [u8]>) -> Self {
        service.under_way.set(service.under_way.get() + 1);
        service.peak.set(service.peak.get().max(service.under_way.get()));
        if let Some(wrapped) = wrapped {
            assert!(service.asked.borrow_mut().insert(wrapped.to_vec()), "two calls for one wrapped DEK");
        }
        UnderWay(service, wrapped)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.set(self.0.under_way.get() - 1);
        self.1.map(|wrapped| self.0.asked.borrow_mut().remove(wrapped));
    }
}

impl Service {
    fn fault(&self, kek_id: &str) -> std::result::Result<(), ProviderError> {
        let failed = |fault| Err(ProviderError::new(fault, "as told"));
        if let Some(&fault) = self.failing.borrow().get(kek_id) {
            return failed(fault);
        }
        match self.fails_after.get() {
            Some((0, fault)) => failed(fault),
            Some((left, fault)) => {
                self.fails_after.set(Some((left - 1, fault)));
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// A DEK, the context it is bound to, and the id of the KEK that wrapped it.
type Kept = ([u8; 32], Context, String);

/// A KEK whose id is `id`; `moves` says whether the service can rewrap by itself.
pub(super) struct FakeKek {
    pub(super) service: Rc<Service>,
    pub(super) id: RefCell<String>,
    pub(super) moves: bool,
    pub(super) tells: bool,
}

impl FakeKek {
    fn store(&self, dek: [u8; 32], context: &Context) -> WrappedDek {
        let mut deks = self.service.deks.borrow_mut();
        let bytes = format!("wrapped {}", self.service.stored.replace(self.service.stored.get() + 1)).into_bytes();
        deks.insert(bytes.clone(), (dek, context.clone(), self.id.borrow().clone()));
        WrappedDek { kek_id: self.id.borrow().clone(), bytes }
    }

    fn load(&self, wrapped: WrappedRef<'_>, context: &Context) -> std::result::Result<[u8; 32], ProviderError> {
        if self.service.refuses.get() {
            return Err(ProviderError::new(Fault::Denied, "no"));
        }
        match self.service.deks.borrow().get(wrapped.bytes) {
            Some((_, bound, _)) if self.service.swaps.get() && bound == context => Ok([7; 32]),
            // The literal form names no id.
            Some((dek, bound, id)) if bound == context && wrapped.kek_id.is_none_or(|named| named == id) => Ok(*dek),
            _ => Err(ProviderError::new(Fault::Unverified, "no such wrapped DEK")),
        }
    }
}

impl FakeKek {
    /// One call: begins with the first poll and is answered with the second, so that others come beside it.
    fn call<'a, T: 'a>(
        &'a self,
        counted: &'a Cell<u64>,
        wrapped: Option<&'a [u8]>,
        work: impl FnOnce() -> std::result::Result<T, ProviderError> + 'a,
    ) -> ProviderFuture<'a, T> {
        Box::pin(async move {
            counted.set(counted.get() + 1);
            let _under_way = UnderWay::begin(&self.service, wrapped);
            let mut polled = false;
            poll_fn(|task| {
                if std::mem::replace(&mut polled, true) {
                    return Poll::Ready(());
                }
                task.waker().wake_by_ref();
                Poll::Pending
            })
            .await;
            let id = self.id.borrow().clone();
            self.service.fault(&id)?;
            work()
        })
    }
}

impl KeyProvider for FakeKek {
    fn generate<'a>(&'a self, context: &'a Context) -> ProviderFuture<'a, (Dek, WrappedDek)> {
        self.call(&self.service.generated, None, || {
            let mut bytes = [0; 32];
            crate::random::fill_from_system(&mut bytes).unwrap();
            Ok((Dek::copied(&bytes).unwrap(), self.store(bytes, context)))
        })
    }

    fn unwrap<'a>(&'a self, wrapped: WrappedRef<'a>, context: &'a Context) -> ProviderFuture<'a, Dek> {
        let load = move || self.load(wrapped, context).map(|dek| Dek::copied(&dek).unwrap());
        self.call(&self.service.unwrapped, Some(wrapped.bytes), load)
    }

    fn wrap<'a>(&'a self, dek: &'a Dek, context: &'a Context) -> ProviderFuture<'a, WrappedDek> {
        self.call(&self.service.wrapped, None, || Ok(self.store(*dek.expose(), context)))
    }

    fn rewrap_from<'a>(
        &'a self,
        _source: &'a dyn KeyProvider,
        wrapped: WrappedRef<'a>,
        context: &'a Context,
    ) -> ProviderFuture<'a, Option<WrappedDek>> {
        if !self.moves {
            return Box::pin(ready(Ok(None)));
        }
        let load = move || self.load(wrapped, context).map(|dek| Some(self.store(dek, context)));
        self.call(&self.service.moved, Some(wrapped.bytes), load)
    }

    fn is_current(&self, kek_id: &str) -> Option<bool> {
        self.tells.then(|| *self.id.borrow() == kek_id)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

pub(super) fn head(value: &[u8]) -> &[u8] {
    Envelope::parse(value).unwrap().header.bytes
}

pub(super) fn heads(values: &[Vec<u8>]) -> Vec<&[u8]> {
    values.iter().map(|value| head(value)).collect()
}

/// The value with other wraps.
pub(super) fn with_wraps<'a>(value: &'a [u8], change: impl FnOnce(&mut Vec<Wrap<'a>>)) -> Vec<u8> {
    let header = Envelope::parse(value).unwrap().header;
    let mut wraps = header.wraps.clone();
    change(&mut wraps);
    [header.with_wraps(&wraps).unwrap(), value[header.bytes.len()..].to_vec()].concat()
}

pub(super) struct World {
    pub(super) service: Rc<Service>,
    pub(super) keyring: Keyring,
    pub(super) policy: Policy,
    pub(super) session: Session,
    pub(super) time: Rc<Cell<u64>>,
    pub(super) wait: Polling,
    pub(super) gate: Gate,
}

impl World {
    pub(super) fn new() -> Self {
        let service = Rc::new(Service::default());
        let time = Rc::new(Cell::new(1_000_000));
        let session = Session::new(Box::new(FakeClock(Rc::clone(&time)))).unwrap();
        let keyring = Keyring { default_key: "main".into(), ..Keyring::default() };
        let mut gate = Gate::new(Box::new(()));
        gate.enter(0, Rc::new(Rights::all()));
        let (policy, wait) = (Policy::default(), Polling::default());
        let mut world = World { service, keyring, policy, session, time, wait, gate };
        world.add("main", "id-1", "{}", false, true);
        world
    }

    pub(super) fn add(&mut self, name: &str, id: &str, context: &str, moves: bool, tells: bool) -> Rc<FakeKek> {
        let kek = Rc::new(FakeKek { service: Rc::clone(&self.service), id: RefCell::new(id.into()), moves, tells });
        self.keyring.keks.push(Kek {
            name: name.into(),
            uri: format!("fake://{name}"),
            context: Context::from_json(context).unwrap(),
            requires_context: true,
            state: KeyState::Active,
            provider: Rc::clone(&kek) as Rc<dyn KeyProvider>,
        });
        kek
    }

    pub(super) fn with_legacy(mut self) -> Self {
        let mut keys = LegacyKeys::default();
        assert!(keys.add_base64(&armor::encode(&[5; 32])));
        self.keyring.legacy = Legacy::Keys(keys);
        self
    }

    /// Another caller, with these rights and no others.
    pub(super) fn enter(&mut self, party: u32, granted: &[(&str, Privilege)]) {
        let mut rights = Rights::default();
        granted.iter().for_each(|(key, privilege)| rights.grant(key, *privilege));
        self.gate.enter(party, Rc::new(rights));
    }

    /// So many values under `key`, each under a DEK of its own.
    pub(super) fn made(&mut self, count: usize, key: &str) -> Vec<Vec<u8>> {
        self.policy.concurrency = 4;
        let limits = std::mem::replace(&mut self.policy.limits.max_uses, 1);
        let sealing = Sealing { key: Some(key), ..Sealing::default() };
        let values = (0..count).map(|n| self.encrypt_bytes(&[n as u8], sealing).unwrap()).collect();
        self.policy.limits.max_uses = limits;
        self.session.begin_statement();
        self.service.peak.set(0);
        values
    }

    pub(super) fn fresh_session(&mut self) {
        self.session = Session::new(Box::new(FakeClock(Rc::clone(&self.time)))).unwrap();
    }

    pub(super) fn split(&mut self) -> (&mut Session, Run<'_, Polling>) {
        (&mut self.session, Run::new(&self.keyring, &self.policy, &mut self.wait, &mut self.gate))
    }

    pub(super) fn encrypt(&mut self, plaintext: &str, sealing: Sealing<'_>) -> Result<String> {
        let (session, mut run) = self.split();
        let mut out = Vec::new();
        session.encrypt(&mut run, Value::Text(plaintext), sealing, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    pub(super) fn encrypt_bytes(&mut self, plaintext: &[u8], sealing: Sealing<'_>) -> Result<Vec<u8>> {
        let (session, mut run) = self.split();
        let mut out = Vec::new();
        session.encrypt(&mut run, Value::Bytes(plaintext), sealing, &mut out)?;
        Ok(out)
    }

    pub(super) fn decrypt(&mut self, value: &str, reading: Reading<'_>) -> Result<String> {
        let (session, mut run) = self.split();
        let mut out = Vec::new();
        session.decrypt(&mut run, Value::Text(value), reading, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    pub(super) fn decrypt_bytes(&mut self, value: &[u8], reading: Reading<'_>) -> Result<Vec<u8>> {
        let (session, mut run) = self.split();
        let mut out = Vec::new();
        session.decrypt(&mut run, Value::Bytes(value), reading, &mut out)?;
        Ok(out)
    }

    pub(super) fn upgrade(&mut self, value: &str, version: Option<i32>) -> Result<String> {
        let (session, mut run) = self.split();
        let mut out = Vec::new();
        session.upgrade(&mut run, Value::Text(value), Sealing::default(), version, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    pub(super) fn downgrade(&mut self, value: &str, version: Option<i32>) -> Result<String> {
        let (session, mut run) = self.split();
        let mut out = Vec::new();
        session.downgrade(&mut run, Value::Text(value), None, version, &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    pub(super) fn rewrap(&mut self, value: &[u8], key: Option<&str>) -> Result<(Vec<u8>, bool)> {
        let (session, mut run) = self.split();
        let mut out = Vec::new();
        let changed = session.rewrap(&mut run, Value::Bytes(value), key, &mut out)?;
        Ok((out, changed))
    }
}
