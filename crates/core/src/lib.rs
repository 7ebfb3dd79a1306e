//! Envelope encryption of column values: format, authenticated encryption, data-key policy and cache.
//!
//! A value flows one way: stored bytes → [`stored`] (which form is it) → [`envelope`] (parsed once) → [`keyring`]
//! (which key, may it be used) → [`session`] (cached DEK, or ask the [`provider`]) → [`seal`] (open) → result.
//!
//! This crate knows no PostgreSQL, no async runtime and no network. Its words are those of `docs/FORMAT.md`.
#![forbid(unsafe_code)]

pub mod access;
pub mod armor;
pub mod cache;
pub mod context;
pub mod dek;
pub mod envelope;
pub mod error;
pub mod info;
pub mod keyring;
pub mod legacy;
pub mod policy;
pub mod provider;
pub mod random;
pub mod seal;
pub mod session;
pub mod sink;
pub mod stats;
pub mod stored;

pub use error::{Error, Result};
