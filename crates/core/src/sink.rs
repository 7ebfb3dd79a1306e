//! Where a result is written: memory that the caller owns, asked for once its size is known.

use zeroize::{Zeroize, Zeroizing};

use crate::error::{Error, Result};
use crate::seal::{ExpandedKey, Sealed};

/// Memory for one result.
pub trait Sink {
    /// Gives `len` bytes to write the result into; the last call counts, for a reader that guessed wrong asks again.
    /// [`crate::Error::TooLarge`] when the caller cannot hold so many.
    fn buffer(&mut self, len: usize) -> Result<&mut [u8]>;

    /// Gives memory that holds a copy of `bytes`, to work on in place.
    fn copied(&mut self, bytes: &[u8]) -> Result<&mut [u8]> {
        let buffer = self.buffer(bytes.len())?;
        buffer.copy_from_slice(bytes);
        Ok(buffer)
    }

    /// Gives memory that holds what was sealed, opened.
    fn opened(&mut self, key: &ExpandedKey, sealed: Sealed<'_>) -> Result<&mut [u8]> {
        let Sealed { nonce, associated, ciphertext, tag } = sealed;
        let buffer = self.copied(ciphertext)?;
        key.open(nonce, associated, buffer, tag)?;
        Ok(buffer)
    }
}

impl Sink for Vec<u8> {
    fn buffer(&mut self, len: usize) -> Result<&mut [u8]> {
        self.zeroize();
        self.try_reserve_exact(len).map_err(|_| Error::TooLarge)?;
        self.resize(len, 0);
        Ok(self)
    }
}

impl Sink for Zeroizing<Vec<u8>> {
    fn buffer(&mut self, len: usize) -> Result<&mut [u8]> {
        Sink::buffer(&mut **self, len)
    }
}
