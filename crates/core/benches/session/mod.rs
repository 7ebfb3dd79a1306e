//! A session as a backend has it, with a key service in memory: what the benchmarks of the core run.
#![allow(missing_docs)]

use std::any::Any;
use std::future::ready;
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll, Waker};

use vod_tender_core::access::{Function, Gate, Rights};
use vod_tender_core::context::Context;
use vod_tender_core::dek::Dek;
use vod_tender_core::error::Result;
use vod_tender_core::keyring::{Kek, KeyState, Keyring};
use vod_tender_core::policy::{Clock, Limits, Policy};
use vod_tender_core::provider::{KeyProvider, ProviderError, ProviderFuture, Wait, WrappedDek, WrappedRef};
use vod_tender_core::random::fill_from_system;
use vod_tender_core::session::{Reading, Run, Sealing, Session};
use vod_tender_core::sink::Sink;
use vod_tender_core::stored::{Kind, Value};

const NAME: &str = "default";
/// As long as AWS KMS's, so that headers are.
const KEK_ID: &str = "arn:aws:kms:eu-west-1:111122223333:key/01234567-89ab-cdef-0123-456789abcdef";
const WRAPPED_BYTES: usize = 184;

/// A session with one key, its way to it, and room for one result.
pub struct Bench {
    session: Session,
    keyring: Keyring,
    policy: Policy,
    gate: Gate,
    wait: AtOnce,
    out: Room,
}

impl Bench {
    /// A session whose DEKs serve for `uses` values each.
    pub fn new(uses: u64) -> Self {
        let kek = Kek {
            name: NAME.into(),
            uri: "memory://".into(),
            context: Context::from_json(r#"{"Application":"vod-tender","Purpose":"oauth-token"}"#).expect("a context"),
            requires_context: true,
            state: KeyState::Active,
            provider: Rc::new(InMemory),
        };
        let limits = Limits { max_uses: uses, max_bytes: u64::MAX, max_age_ms: u64::MAX, cache_entries: 1000 };
        let mut gate = Gate::new(Box::new(()));
        gate.enter(0, Rc::new(Rights::all()));
        Bench {
            session: Session::new(Box::new(Stopped)).expect("the system has randomness"),
            keyring: Keyring { default_key: NAME.into(), keks: vec![kek], ..Keyring::default() },
            policy: Policy { limits, ..Policy::default() },
            gate,
            wait: AtOnce,
            out: Room(Vec::new(), 0),
        }
    }

    /// Envelopes of `count` values of `size` bytes, under `deks` DEKs in turn, which the session has at hand.
    pub fn stored(kind: Kind, size: usize, count: usize, deks: usize) -> (Self, Vec<Owned>) {
        let mut bench = Bench::new(count.div_ceil(deks) as u64);
        let plaintext = plaintext(kind, size);
        let made: Vec<Vec<u8>> = (0..count).map(|_| bench.encrypt(plaintext.as_value()).to_vec()).collect();
        // Neighbours have different DEKs, as the rows of a table that many sessions have written.
        let order = (0..count).map(|n| (n % deks) * (count / deks) + n / deks);
        let stored = order.map(|n| Owned::new(kind, made[n].clone())).collect();
        (bench, stored)
    }

    pub fn encrypt(&mut self, plaintext: Value<'_>) -> &[u8] {
        self.run(Function::Encrypt, |session, run, out| session.encrypt(run, plaintext, Sealing::default(), out))
    }

    pub fn decrypt(&mut self, stored: Value<'_>) -> &[u8] {
        self.run(Function::Decrypt, |session, run, out| {
            Ok(session.decrypt(run, stored, Reading::default(), out).map(drop)?)
        })
    }

    fn run(
        &mut self,
        function: Function,
        work: impl FnOnce(&mut Session, &mut Run<'_, AtOnce>, &mut Room) -> Result<()>,
    ) -> &[u8] {
        self.gate.begin(function);
        let mut run = Run::new(&self.keyring, &self.policy, &mut self.wait, &mut self.gate);
        work(&mut self.session, &mut run, &mut self.out).expect("it works");
        &self.out.0[..self.out.1]
    }
}

/// A value that is kept. Text was checked to be text before it is measured.
pub enum Owned {
    Bytes(Vec<u8>),
    Text(String),
}

impl Owned {
    fn new(kind: Kind, bytes: Vec<u8>) -> Self {
        match kind {
            Kind::Bytes => Owned::Bytes(bytes),
            Kind::Text => Owned::Text(String::from_utf8(bytes).expect("it is text")),
        }
    }

    pub fn as_value(&self) -> Value<'_> {
        match self {
            Owned::Bytes(bytes) => Value::Bytes(bytes),
            Owned::Text(text) => Value::Text(text),
        }
    }
}

pub fn plaintext(kind: Kind, size: usize) -> Owned {
    Owned::new(kind, (0..size).map(|n| b'a' + (n % 26) as u8).collect())
}

/// Memory for a result, as palloc has it at hand: neither allocated nor cleared for each value.
struct Room(Vec<u8>, usize);

impl Sink for Room {
    fn buffer(&mut self, len: usize) -> Result<&mut [u8]> {
        if self.0.len() < len {
            self.0.resize(len, 0);
        }
        self.1 = len;
        Ok(&mut self.0[..len])
    }
}

/// A clock that does not go on.
struct Stopped;

impl Clock for Stopped {
    fn now_ms(&self) -> u64 {
        1
    }
}

/// A key service that hides nothing: what it wraps is the DEK and filler.
struct InMemory;

impl KeyProvider for InMemory {
    fn generate<'a>(&'a self, _context: &'a Context) -> ProviderFuture<'a, (Dek, WrappedDek)> {
        let mut bytes = [0; 32];
        fill_from_system(&mut bytes).expect("the system has randomness");
        let mut wrapped = vec![0; WRAPPED_BYTES];
        wrapped[..32].copy_from_slice(&bytes);
        let dek = Dek::copied(&bytes).expect("32 bytes");
        Box::pin(ready(Ok((dek, WrappedDek { kek_id: KEK_ID.into(), bytes: wrapped }))))
    }

    fn unwrap<'a>(&'a self, wrapped: WrappedRef<'a>, _context: &'a Context) -> ProviderFuture<'a, Dek> {
        Box::pin(ready(Ok(Dek::copied(&wrapped.bytes[..32]).expect("32 bytes"))))
    }

    fn wrap<'a>(&'a self, _dek: &'a Dek, _context: &'a Context) -> ProviderFuture<'a, WrappedDek> {
        unreachable!("no benchmark rewraps")
    }

    fn rewrap_from<'a>(
        &'a self,
        _source: &'a dyn KeyProvider,
        _wrapped: WrappedRef<'a>,
        _context: &'a Context,
    ) -> ProviderFuture<'a, Option<WrappedDek>> {
        unreachable!("no benchmark rewraps")
    }

    fn is_current(&self, kek_id: &str) -> Option<bool> {
        Some(kek_id == KEK_ID)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Polls once: the service answers at once.
struct AtOnce;

impl Wait for AtOnce {
    fn wait<T>(&mut self, mut future: ProviderFuture<'_, T>) -> std::result::Result<T, ProviderError> {
        match future.as_mut().poll(&mut TaskContext::from_waker(Waker::noop())) {
            Poll::Ready(result) => result,
            Poll::Pending => unreachable!("the service answers at once"),
        }
    }
}
