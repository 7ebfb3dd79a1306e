//! What a key service must be able to do. Implementations are in `vod_tender_providers`.

use std::any::Any;
use std::future::Future;
use std::pin::Pin;

use crate::context::Context;
use crate::dek::Dek;

/// A call under way. Dropping it cancels it.
pub type ProviderFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, ProviderError>> + 'a>>;

/// One KEK in one key service.
///
/// Obligations of an implementation: it sends nothing before its future is polled; dropping the future leaves no
/// call running; it calls only the endpoint it was made for, whatever an envelope says; it checks the key id that
/// the service returns; no plaintext DEK stays behind in memory that it does not wipe.
pub trait KeyProvider {
    /// Makes a fresh DEK and wraps it under the newest version of the KEK.
    fn generate<'a>(&'a self, context: &'a Context) -> ProviderFuture<'a, (Dek, WrappedDek)>;

    /// Unwraps a DEK.
    fn unwrap<'a>(&'a self, wrapped: WrappedRef<'a>, context: &'a Context) -> ProviderFuture<'a, Dek>;

    /// Wraps a DEK that exists.
    fn wrap<'a>(&'a self, dek: &'a Dek, context: &'a Context) -> ProviderFuture<'a, WrappedDek>;

    /// Moves a wrapped DEK from `source` to this KEK inside the service, so that the DEK does not come here.
    /// `None` when one service cannot reach both: then the caller unwraps and wraps.
    fn rewrap_from<'a>(
        &'a self,
        source: &'a dyn KeyProvider,
        wrapped: WrappedRef<'a>,
        context: &'a Context,
    ) -> ProviderFuture<'a, Option<WrappedDek>>;

    /// Whether a DEK wrapped now would carry this KEK id; `None` when only the service knows.
    fn is_current(&self, kek_id: &str) -> Option<bool>;

    /// For an implementation of [`KeyProvider::rewrap_from`] to recognise its own kind.
    fn as_any(&self) -> &dyn Any;
}

/// A wrapped DEK that a provider has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedDek {
    /// The KEK's id in the provider's words, 1 to 2048 bytes of printable ASCII.
    pub kek_id: String,
    /// 1 to 4096 opaque bytes.
    pub bytes: Vec<u8>,
}

/// A wrapped DEK out of an envelope.
#[derive(Debug, Clone, Copy)]
pub struct WrappedRef<'a> {
    /// The KEK's id as recorded; `None` in the literal form, which records none.
    pub kek_id: Option<&'a str>,
    /// Opaque bytes.
    pub bytes: &'a [u8],
}

/// How a key service failed. The message is the provider's own wording, with no secret in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ProviderError {
    /// What kind of failure it is.
    pub fault: Fault,
    /// One line for a person.
    pub message: String,
    /// The service's own error code and the id under which it logged the request.
    pub trace: Option<String>,
}

impl ProviderError {
    /// A failure that no service has an id for.
    pub fn new(fault: Fault, message: impl Into<String>) -> Self {
        ProviderError { fault, message: message.into(), trace: None }
    }
}

/// The kinds of failure of a key service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Credentials or policy.
    Denied,
    /// Throttled, also after all attempts.
    Throttled,
    /// The key is disabled.
    Disabled,
    /// The key is pending deletion, or in another state that forbids its use.
    InvalidState,
    /// The service does not know the key.
    NotFound,
    /// The wrapped DEK does not verify under this key and context.
    Unverified,
    /// No answer within the time, or no way there, after all attempts.
    Unreachable,
    /// What is configured here cannot work: a file's mode, an address.
    Misconfigured,
    /// The service answered something that must not be trusted: another key's id, a DEK of another length.
    BadAnswer,
}

impl Fault {
    /// A short name for statistics.
    pub fn as_str(self) -> &'static str {
        match self {
            Fault::Denied => "denied",
            Fault::Throttled => "throttled",
            Fault::Disabled => "disabled",
            Fault::InvalidState => "invalid_state",
            Fault::NotFound => "not_found",
            Fault::Unverified => "unverified",
            Fault::Unreachable => "unreachable",
            Fault::Misconfigured => "misconfigured",
            Fault::BadAnswer => "bad_answer",
        }
    }
}

/// Runs a provider's future to its end; what makes an operation block.
///
/// An implementation may unwind out of [`Wait::wait`] (a cancelled query does); it drops the future first.
pub trait Wait {
    /// Waits for `future`.
    fn wait<T>(&mut self, future: ProviderFuture<'_, T>) -> Result<T, ProviderError>;
}

/// Answers every call by failing: what is needed while rows are locked must have been fetched before.
#[derive(Debug, Default)]
pub struct NoCalls {
    /// Whether a call was asked for.
    pub was_asked: bool,
}

impl Wait for NoCalls {
    fn wait<T>(&mut self, _future: ProviderFuture<'_, T>) -> Result<T, ProviderError> {
        self.was_asked = true;
        // Not a failure that may pass: a wrap that could not be moved from is then passed by again, for the one that could.
        Err(ProviderError::new(Fault::BadAnswer, "not fetched before the rows were locked"))
    }
}
