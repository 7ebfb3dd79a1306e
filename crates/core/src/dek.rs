//! The data-encryption key: 32 secret bytes.

use std::fmt;

use subtle::ConstantTimeEq;
use vod_tender_secret_memory::Locked;

pub use vod_tender_aead::KEY_BYTES;

/// A data-encryption key. Filled in place in locked memory, overwritten on drop, never printed.
pub struct Dek(Locked<[u8; KEY_BYTES]>);

impl Dek {
    /// A DEK whose bytes `fill` writes in place.
    pub fn filled<E>(fill: impl FnOnce(&mut [u8; KEY_BYTES]) -> Result<(), E>) -> Result<Self, E> {
        Locked::filled(fill).map(Dek)
    }

    /// A copy of `bytes`; `None` unless there are 32. The caller wipes its own copy.
    pub fn copied(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; KEY_BYTES] = bytes.try_into().ok()?;
        Self::filled(|own| {
            own.copy_from_slice(bytes);
            Ok::<_, ()>(())
        })
        .ok()
    }

    /// The secret bytes. Obligation: feed them to a key derivation, a cipher or a wrapping, and copy them nowhere.
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// Whether both are the same key; in constant time.
    pub fn is_same(&self, other: &Dek) -> bool {
        self.expose().ct_eq(other.expose()).into()
    }
}

impl fmt::Debug for Dek {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Dek(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_nothing() {
        let dek = Dek::copied(&[0x41; 32]).unwrap();
        assert_eq!(format!("{dek:?}"), "Dek(..)");
    }

    #[test]
    fn only_32_bytes_make_a_dek() {
        assert!(Dek::copied(&[0; 31]).is_none());
        assert!(Dek::copied(&[0; 33]).is_none());
    }
}
