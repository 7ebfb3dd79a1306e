//! Results in PostgreSQL's own memory: allocated once, written in place, handed over without a copy.

use std::mem::MaybeUninit;

use pgrx::callconv::{BoxRet, FcInfo};
use pgrx::{impl_sql_translatable, pg_sys};
use vod_tender_core::Error;
use vod_tender_core::seal::{ExpandedKey, Sealed};
use vod_tender_core::sink::Sink;
use vod_tender_core::stored::Kind;

use crate::arguments::{InServerEncoding, from_utf8, stores_utf8, to_utf8};
use crate::errors::raise;

/// Bytes of a varlena's length word.
const HEADER: usize = pg_sys::VARHDRSZ;
/// Most bytes that PostgreSQL allocates at once.
const MAX_ALLOC: usize = 0x3fff_ffff;

/// A varlena under construction, in the current memory context.
#[derive(Default)]
pub struct Varlena {
    start: Option<std::ptr::NonNull<u8>>,
    length: usize,
}

// Not through pgrx, whose guard costs as much as the allocation: within PostgreSQL's limit of one allocation, and told to
// give null where there is no memory, it raises nothing.
unsafe extern "C" {
    fn MemoryContextAllocExtended(
        context: pg_sys::MemoryContext,
        size: pg_sys::Size,
        flags: std::ffi::c_int,
    ) -> *mut std::ffi::c_void;
}

impl Sink for Varlena {
    fn buffer(&mut self, len: usize) -> Result<&mut [u8], Error> {
        let start = self.allocate(len)?;
        // SAFETY: that many bytes were allocated, and all are initialised before a slice is made of them.
        unsafe {
            std::ptr::write_bytes(start, 0, len);
            Ok(std::slice::from_raw_parts_mut(start, len))
        }
    }

    fn copied(&mut self, bytes: &[u8]) -> Result<&mut [u8], Error> {
        let start = self.allocate(bytes.len())?;
        // SAFETY: as above; what was just allocated does not overlap anything.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len());
            Ok(std::slice::from_raw_parts_mut(start, bytes.len()))
        }
    }

    #[inline(always)]
    fn opened(&mut self, key: &ExpandedKey, sealed: Sealed<'_>) -> Result<&mut [u8], Error> {
        let start = self.allocate(sealed.ciphertext.len())?.cast::<MaybeUninit<u8>>();
        // SAFETY: that many bytes were allocated.
        let room = unsafe { std::slice::from_raw_parts_mut(start, sealed.ciphertext.len()) };
        Ok(key.open_into(sealed, room)?)
    }
}

impl Varlena {
    /// Room for `len` bytes that the caller must initialise before anything else is done with the result.
    #[inline(always)]
    fn allocate(&mut self, len: usize) -> Result<*mut u8, Error> {
        if len > MAX_ALLOC - HEADER {
            return Err(Error::TooLarge);
        }
        let flags = pg_sys::MCXT_ALLOC_NO_OOM as std::ffi::c_int;
        // SAFETY: the size is within PostgreSQL's limit. Where memory was given, the pointer stays within it.
        unsafe {
            let start = MemoryContextAllocExtended(pg_sys::CurrentMemoryContext, len + HEADER, flags).cast::<u8>();
            let Some(given) = std::ptr::NonNull::new(start) else { return Err(Error::TooLarge) };
            self.start = Some(given);
            self.length = len;
            Ok(start.add(HEADER))
        }
    }

    /// What was written.
    pub fn content(&mut self) -> &mut [u8] {
        match self.start {
            // SAFETY: what asked for the memory initialised that many bytes behind the header, also when it failed.
            Some(start) => unsafe { std::slice::from_raw_parts_mut(start.as_ptr().add(HEADER), self.length) },
            None => &mut [],
        }
    }

    /// Puts other bytes in place of the content, which is overwritten.
    fn replace(&mut self, bytes: &[u8]) {
        zeroize::Zeroize::zeroize(self.content());
        if let Err(error) = self.copied(bytes) {
            raise(&error, Kind::Text);
        }
    }

    fn into_datum(self) -> pg_sys::Datum {
        let start = self.start.expect("a result was written").as_ptr();
        // SAFETY: the allocation begins with room for the length word and holds `length` bytes behind it.
        unsafe { pgrx::varlena::set_varsize_4b(start.cast(), (self.length + HEADER) as i32) };
        pg_sys::Datum::from(start)
    }
}

/// A `bytea` result.
pub struct BytesOut(pub Varlena);

/// A `text` result: UTF-8, converted to the server's encoding when it is handed over.
pub struct TextOut(pub Varlena);

impl TextOut {
    /// A result that is in the server's encoding already.
    pub fn in_server_encoding(bytes: &[u8]) -> Self {
        match to_utf8(bytes) {
            Some(text) => {
                let mut out = Varlena::default();
                out.replace(text.as_bytes());
                TextOut(out)
            }
            None => raise(&Error::ArgumentNotText, Kind::Text),
        }
    }
}

impl_sql_translatable!(BytesOut, "bytea");
impl_sql_translatable!(TextOut, "text");

// SAFETY: the datum is a varlena in the memory context that the function was called in.
unsafe impl BoxRet for BytesOut {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> pgrx::datum::Datum<'fcx> {
        // SAFETY: as above.
        unsafe { fcinfo.return_raw_datum(self.0.into_datum()) }
    }
}

// SAFETY: as above.
unsafe impl BoxRet for TextOut {
    unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> pgrx::datum::Datum<'fcx> {
        // SAFETY: as above.
        unsafe { fcinfo.return_raw_datum(self.into_encoded()) }
    }
}

impl TextOut {
    #[inline]
    fn into_encoded(mut self) -> pg_sys::Datum {
        if !stores_utf8() {
            self.encode();
        }
        self.0.into_datum()
    }

    #[inline(never)]
    fn encode(&mut self) {
        match from_utf8(self.0.content()) {
            InServerEncoding::Same => {}
            InServerEncoding::Converted(bytes) => self.0.replace(&bytes),
            InServerEncoding::Impossible => {
                zeroize::Zeroize::zeroize(self.0.content());
                raise(&Error::NotText, Kind::Text)
            }
        }
    }
}
