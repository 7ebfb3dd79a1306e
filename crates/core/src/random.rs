//! The session's random source: a generator in user space, seeded from the operating system.
//!
//! Obligation on the caller: make one for each process, after fork, and never use one made by another process.
//! Its state lies in memory that a forked child reads as zero, so a parent's state cannot be continued there; the
//! owner (the surface's session) checks the process id before every use and makes a new one.

use rand::rngs::{StdRng, SysRng};
use rand::{Rng, SeedableRng, TryRng};
use vod_tender_secret_memory::{Locked, burn_stack};

use crate::error::{Error, Result};

/// A cryptographically secure generator for nonces.
pub struct SessionRandom(Locked<StdRng>);

impl SessionRandom {
    /// Seeds a generator with 32 bytes from the operating system.
    pub fn from_system() -> Result<Self> {
        let generator = StdRng::try_from_rng(&mut SysRng).map_err(|_| Error::Random)?;
        let random = SessionRandom(Locked::new(generator));
        burn_stack();
        Ok(random)
    }

    /// 12 fresh bytes. Obligation: use them for one message under one key.
    pub fn nonce(&mut self) -> [u8; 12] {
        let mut nonce = [0; 12];
        self.0.fill_bytes(&mut nonce);
        nonce
    }
}

/// Fills `bytes` from the operating system: for keys and salts, which are few.
pub fn fill_from_system(bytes: &mut [u8]) -> Result<()> {
    SysRng.try_fill_bytes(bytes).map_err(|_| Error::Random)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_million_nonces_are_distinct() {
        let mut random = SessionRandom::from_system().unwrap();
        let nonces: HashSet<_> = (0..1_000_000).map(|_| random.nonce()).collect();
        assert_eq!(nonces.len(), 1_000_000);
    }

    #[test]
    fn two_sessions_differ() {
        let mut one = SessionRandom::from_system().unwrap();
        let mut two = SessionRandom::from_system().unwrap();
        assert_ne!(one.nonce(), two.nonce());
    }
}
