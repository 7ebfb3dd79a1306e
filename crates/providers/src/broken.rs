//! A KEK whose configuration cannot be used: every use of it says why, and the other KEKs keep working.

use std::any::Any;
use std::future::ready;

use vod_tender_core::context::Context;
use vod_tender_core::dek::Dek;
use vod_tender_core::provider::{Fault, KeyProvider, ProviderError, ProviderFuture, WrappedDek, WrappedRef};

/// See the module's own words.
pub struct BrokenKek {
    /// What is wrong, in words that follow the key's name.
    pub why: String,
}

impl BrokenKek {
    fn refuse<'a, T: 'a>(&self) -> ProviderFuture<'a, T> {
        Box::pin(ready(Err(ProviderError::new(Fault::Misconfigured, self.why.clone()))))
    }
}

impl KeyProvider for BrokenKek {
    fn generate<'a>(&'a self, _context: &'a Context) -> ProviderFuture<'a, (Dek, WrappedDek)> {
        self.refuse()
    }

    fn unwrap<'a>(&'a self, _wrapped: WrappedRef<'a>, _context: &'a Context) -> ProviderFuture<'a, Dek> {
        self.refuse()
    }

    fn wrap<'a>(&'a self, _dek: &'a Dek, _context: &'a Context) -> ProviderFuture<'a, WrappedDek> {
        self.refuse()
    }

    fn rewrap_from<'a>(
        &'a self,
        _source: &'a dyn KeyProvider,
        _wrapped: WrappedRef<'a>,
        _context: &'a Context,
    ) -> ProviderFuture<'a, Option<WrappedDek>> {
        self.refuse()
    }

    fn is_current(&self, _kek_id: &str) -> Option<bool> {
        None
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
