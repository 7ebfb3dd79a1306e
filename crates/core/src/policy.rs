//! What the administrator allows: how plaintext is treated, what is written, how long a DEK is used.

/// What reading a value that is not encrypted does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PlaintextReads {
    /// An error.
    #[default]
    Refuse,
    /// The value, and a warning.
    Warn,
    /// The value.
    Allow,
}

/// What encrypting writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WriteFormat {
    /// An envelope when a KEK is configured, else direct when a legacy key is, else an error.
    #[default]
    Auto,
    /// Version 2.
    Envelope,
    /// Version 1.
    Direct,
}

/// A monotonic clock in milliseconds. Coarse is enough: ages are minutes.
pub trait Clock {
    /// Milliseconds since some fixed moment.
    fn now_ms(&self) -> u64;
}

/// The hard cap on values under one DEK: random 96-bit nonces stay distinct below it (NIST SP 800-38D, 8.3).
pub const DEK_USES_CAP: u64 = 1 << 32;

/// Limits on the use and the life of DEKs in one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Values encrypted under one DEK, at most [`DEK_USES_CAP`].
    pub max_uses: u64,
    /// Milliseconds that a DEK is kept, for encrypting and for decrypting.
    pub max_age_ms: u64,
    /// Plaintext bytes encrypted under one DEK.
    pub max_bytes: u64,
    /// DEKs kept for decrypting, and as many for encrypting.
    pub cache_entries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { max_uses: 1000, max_age_ms: 300_000, max_bytes: 1 << 30, cache_entries: 1000 }
    }
}

/// All policies that an operation follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// How plaintext is treated.
    pub plaintext_reads: PlaintextReads,
    /// What is written.
    pub write_format: WriteFormat,
    /// How DEKs are used.
    pub limits: Limits,
    /// Calls to a key service that one session has under way at a time, at least 1.
    pub concurrency: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            plaintext_reads: PlaintextReads::default(),
            write_format: WriteFormat::default(),
            limits: Limits::default(),
            concurrency: 32,
        }
    }
}
