//! What can go wrong, in kinds that a caller can tell apart.
//!
//! No variant carries a plaintext, a key or a credential: texts are fixed, and names come from the configuration or from
//! a well-formed envelope, never from a caller's argument.

use crate::provider::{Fault, ProviderError};
use crate::seal::TagMismatch;

/// Result with the crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on a stored value failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The value is not an encoding that this version reads.
    #[error("malformed envelope")]
    Malformed(Malformed),
    /// A tag, a commitment or a context does not fit.
    #[error("value does not verify")]
    Unverified(Mismatch),
    /// The value is neither an envelope nor direct ciphertext under a configured key, and the policy refuses plaintext.
    #[error("value is not encrypted, and reading plaintext is refused")]
    PlaintextRefused,
    /// The same, for a value that looks like direct ciphertext: its key may be missing.
    #[error("value is not an envelope, and no configured legacy key opens it")]
    DirectOrPlaintextRefused,
    /// The value to encrypt is an envelope.
    #[error("value is an envelope already")]
    AlreadyEnvelope,
    /// The stated version is not 0, 1 or 2.
    #[error("version must be 0, 1 or 2")]
    UnknownVersion,
    /// The caller stated version 0 or 1, and the value is an envelope.
    #[error("value is an envelope, but version {0} was stated")]
    VersionMismatch(i32),
    /// The caller stated version 0, and the value is direct ciphertext: a legacy key opens it.
    #[error("value is direct ciphertext, but version 0 was stated")]
    StatedPlaintext,
    /// A context that cannot be used.
    #[error("unusable context: {0}")]
    BadContext(&'static str),
    /// The caller named a KEK that is not configured. The name is not repeated: a value may have been passed for it.
    #[error("the given key is not configured")]
    UnknownGivenKey,
    /// An argument is not text in UTF-8.
    #[error("argument is not valid UTF-8")]
    ArgumentNotText,
    /// The decrypted bytes are not text.
    #[error("decrypted value is not text")]
    NotText,
    /// No KEK of that name is configured.
    #[error("key \"{0}\" is not configured")]
    UnknownKey(String),
    /// The KEK is configured and must not be used that way.
    #[error("key \"{name}\" is {state}")]
    KeyState {
        /// The KEK's name.
        name: String,
        /// `disabled` or `decrypt_only`.
        state: &'static str,
    },
    /// Rewrapping would put the envelope under a key that could not open it, because its context is another.
    #[error("the envelope's context does not include what key \"{0}\" requires")]
    KeyContext(String),
    /// The caller may not use the key that way.
    #[error("permission denied to {privilege} with key \"{key}\"")]
    NotGranted {
        /// The key's name.
        key: String,
        /// `encrypt`, `decrypt` or `rewrap`.
        privilege: &'static str,
    },
    /// The use of a key must be recorded and could not be.
    #[error("the use of a key could not be recorded")]
    NotAudited(String),
    /// Nothing is configured to encrypt with.
    #[error("no key is configured to encrypt with")]
    NothingConfigured,
    /// The legacy key is needed and is missing or unusable.
    #[error("{0}")]
    LegacyKey(&'static str),
    /// A form that is read and never written cannot be rewrapped.
    #[error("this form of envelope cannot be rewrapped")]
    NotRewrappable,
    /// The result does not fit.
    #[error("value is too large")]
    TooLarge,
    /// The operating system's random source failed.
    #[error("the system's random source failed")]
    Random,
    /// The key service, or the way to it.
    #[error("key \"{key}\": {source}")]
    Service {
        /// The KEK's name.
        key: String,
        /// What its provider said.
        source: ProviderError,
    },
}

impl Error {
    /// What a reader of plaintext is warned with, where the policy says so.
    pub const PLAINTEXT_WARNING: &'static str = "a value that is not encrypted was read";

    /// Whether this says something about the value at hand, and the next value may fare better. `target` is the KEK
    /// that the job encrypts or wraps with: what is wrong with that one concerns every value.
    pub fn concerns_one_value(&self, target: Option<&str>) -> bool {
        match self {
            Error::Malformed(_)
            | Error::PlaintextRefused
            | Error::DirectOrPlaintextRefused
            | Error::UnknownVersion
            | Error::VersionMismatch(_)
            | Error::StatedPlaintext
            | Error::ArgumentNotText
            | Error::NotText
            | Error::UnknownKey(_)
            | Error::KeyContext(_)
            | Error::NotRewrappable
            | Error::TooLarge => true,
            Error::NotGranted { key, .. } => Some(key.as_str()) != target,
            Error::Unverified(mismatch) => *mismatch != Mismatch::RoundTrip,
            Error::KeyState { name, .. } => Some(name.as_str()) != target,
            Error::Service { key, source } => match source.fault {
                Fault::Unverified => true,
                Fault::Throttled | Fault::Unreachable | Fault::BadAnswer => false,
                Fault::Denied | Fault::Disabled | Fault::InvalidState | Fault::NotFound | Fault::Misconfigured => {
                    Some(key.as_str()) != target
                }
            },
            Error::AlreadyEnvelope
            | Error::BadContext(_)
            | Error::UnknownGivenKey
            | Error::NothingConfigured
            | Error::LegacyKey(_)
            | Error::NotAudited(_)
            | Error::Random => false,
        }
    }
}

impl Error {
    /// The configured key that it is about, where it names one.
    pub fn key(&self) -> Option<&str> {
        match self {
            Error::KeyContext(key) => Some(key),
            Error::KeyState { name: key, .. } | Error::NotGranted { key, .. } | Error::Service { key, .. } => Some(key),
            _ => None,
        }
    }
}

impl From<Box<Error>> for Error {
    fn from(boxed: Box<Error>) -> Self {
        *boxed
    }
}

impl From<Malformed> for Error {
    fn from(malformed: Malformed) -> Self {
        if malformed == Malformed::NO_MEMORY { Error::TooLarge } else { Error::Malformed(malformed) }
    }
}

impl Malformed {
    /// Not a fault of the encoding: there is no memory to decode it into. Becomes [`Error::TooLarge`].
    pub const NO_MEMORY: Malformed = Malformed("it does not fit into memory");
}

/// What about an encoding is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

/// What does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Tag of an envelope's payload.
    #[error("The payload's tag does not fit the key, the context and the given aad.")]
    Payload,
    /// The envelope was bound to an aad and none was given.
    #[error("The envelope is bound to an aad, and none was given.")]
    AadMissing,
    /// The envelope was made without an aad and one was given.
    #[error("The envelope is not bound to an aad, and one was given.")]
    AadUnexpected,
    /// The unwrapped DEK is not the one the header commits to.
    #[error("The unwrapped data key is not the one that the envelope commits to.")]
    Commitment,
    /// The caller expected another context.
    #[error("The envelope's context does not include the given one.")]
    Context,
    /// The envelope's context lacks what the KEK requires.
    #[error("The envelope's context does not include the one that its key requires.")]
    KeyContext,
    /// Tag of a direct ciphertext.
    #[error("The tag fits none of the legacy keys.")]
    Legacy,
    /// A sealed value did not open to what was sealed.
    #[error("A value just encrypted did not decrypt to the same bytes; nothing was stored.")]
    RoundTrip,
}
impl From<TagMismatch> for Error {
    /// Of an envelope's payload.
    fn from(_: TagMismatch) -> Self {
        Error::Unverified(Mismatch::Payload)
    }
}
