//! Key services: one file per scheme. The URI's scheme names the provider, and the configured URI alone decides
//! what is called; nothing in an envelope does.
#![forbid(unsafe_code)]

pub mod aws_key;
#[cfg(feature = "aws-kms")]
pub mod aws_kms;
pub mod broken;
#[cfg(feature = "local")]
pub mod local;
pub mod secret_file;
pub mod secret_path;
pub mod uri;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use vod_tender_core::provider::KeyProvider;
use vod_tender_core::stats::CallLog;

pub use uri::{KekUri, UriError};

/// Bounds on one call to a key service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallLimits {
    /// Until a connection stands.
    pub connect: Duration,
    /// Until one attempt is answered.
    pub attempt: Duration,
    /// Until the call is over, with all its attempts and the pauses between them.
    pub overall: Duration,
    /// Attempts, the first one included.
    pub attempts: u32,
    /// Longest first pause between attempts; it doubles and is jittered.
    pub backoff: Duration,
}

impl Default for CallLimits {
    fn default() -> Self {
        CallLimits {
            connect: Duration::from_secs(2),
            attempt: Duration::from_secs(5),
            overall: Duration::from_secs(15),
            attempts: 4,
            backoff: Duration::from_millis(200),
        }
    }
}

/// All key services, as one session reaches them. Made after fork; clients are made on first use.
pub struct Services {
    calls: CallLog,
    limits: Rc<Cell<CallLimits>>,
    #[cfg(feature = "aws-kms")]
    aws: Rc<aws_kms::Clients>,
}

impl Services {
    /// No client yet; calls are counted in `calls`.
    pub fn new(calls: CallLog) -> Self {
        Services {
            calls,
            limits: Rc::default(),
            #[cfg(feature = "aws-kms")]
            aws: Rc::default(),
        }
    }

    /// Bounds for calls that begin from now on.
    pub fn set_limits(&self, limits: CallLimits) {
        self.limits.set(limits);
    }

    /// The KEK at `uri`. Calls nothing.
    pub fn connect(&self, uri: &KekUri) -> Rc<dyn KeyProvider> {
        match uri {
            #[cfg(feature = "local")]
            KekUri::Local(path) => Rc::new(local::LocalKek::new(path.clone(), self.calls.clone())),
            #[cfg(feature = "aws-kms")]
            KekUri::AwsKms(key) => Rc::new(aws_kms::AwsKms::new(
                key.clone(),
                Rc::clone(&self.aws),
                Rc::clone(&self.limits),
                self.calls.clone(),
            )),
        }
    }

    /// Closes all connections and forgets all credentials: their buffers hold answers of key services.
    pub fn forget(&self) {
        #[cfg(feature = "aws-kms")]
        self.aws.forget();
    }
}
