//! Where a result is written: memory that the caller owns, asked for once its size is known.

use zeroize::{Zeroize, Zeroizing};

use crate::error::Result;

/// Memory for one result.
pub trait Sink {
    /// Gives `len` bytes to write the result into; called once for each result. [`crate::Error::TooLarge`] when
    /// the caller cannot hold so many.
    fn buffer(&mut self, len: usize) -> Result<&mut [u8]>;

    /// The result is the first `len` bytes of the buffer. What lies behind them holds no secret.
    fn truncate(&mut self, len: usize);
}

impl Sink for Vec<u8> {
    fn buffer(&mut self, len: usize) -> Result<&mut [u8]> {
        self.zeroize();
        self.resize(len, 0);
        Ok(self)
    }

    fn truncate(&mut self, len: usize) {
        Vec::truncate(self, len);
    }
}

impl Sink for Zeroizing<Vec<u8>> {
    fn buffer(&mut self, len: usize) -> Result<&mut [u8]> {
        Sink::buffer(&mut **self, len)
    }

    fn truncate(&mut self, len: usize) {
        Vec::truncate(self, len);
    }
}
