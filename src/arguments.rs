//! Arguments as the core wants them: text in UTF-8 whatever the server's encoding, contexts parsed.

use std::borrow::Cow;
use std::ffi::{CStr, c_int};

use pgrx::callconv::{Arg, ArgAbi};
use pgrx::{impl_sql_translatable, pg_sys};
use vod_tender_core::Error;
use vod_tender_core::context::Context;
use vod_tender_core::stored::Kind;

use crate::errors::raise;

/// A `text` argument, in UTF-8; borrowed from the argument where that is possible.
pub struct TextIn<'fcx>(Cow<'fcx, str>);

impl TextIn<'_> {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl_sql_translatable!(TextIn<'_>, "text");

// SAFETY: `text` arguments are varlena datums, which is what is unboxed.
unsafe impl<'fcx> ArgAbi<'fcx> for TextIn<'fcx> {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: the argument is a text, and the detoasted bytes live as long as the call.
        let bytes = unsafe { arg.unbox_arg_using_from_datum::<&'fcx [u8]>() }.unwrap_or_default();
        TextIn(to_utf8(bytes))
    }
}

/// A `jsonb` argument that is a context.
pub struct ContextIn(Context);

impl ContextIn {
    /// The context.
    pub fn context(&self) -> &Context {
        &self.0
    }
}

impl_sql_translatable!(ContextIn, "jsonb");

// SAFETY: `jsonb` arguments are passed on to PostgreSQL's own output function.
unsafe impl<'fcx> ArgAbi<'fcx> for ContextIn {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: the argument is a jsonb, whose output function gives a C string in this memory context.
        let json = unsafe {
            let datum = arg.unbox_arg_using_from_datum::<pg_sys::Datum>();
            pgrx::direct_function_call::<&CStr>(pg_sys::jsonb_out, &[datum])
        };
        let json = to_utf8(json.map(CStr::to_bytes).unwrap_or_default());
        ContextIn(Context::from_json(&json).unwrap_or_else(|error| raise(&error, Kind::Text)))
    }
}

/// Bytes in the server's encoding as UTF-8.
fn to_utf8(bytes: &[u8]) -> Cow<'_, str> {
    let utf8 = match std::str::from_utf8(bytes) {
        Ok(text) if server_is_utf8() || text.is_ascii() => return Cow::Borrowed(text),
        Ok(text) if server_is_ascii() => return Cow::Borrowed(text),
        Err(_) if server_is_ascii() => raise(&Error::NotText, Kind::Text),
        _ => convert(bytes, pg_sys::pg_server_to_any),
    };
    String::from_utf8(utf8).map(Cow::Owned).unwrap_or_else(|_| raise(&Error::NotText, Kind::Text))
}

/// UTF-8 in the server's encoding; `None` where it is the same already.
pub fn from_utf8(text: &[u8]) -> Option<Vec<u8>> {
    let same = server_is_utf8() || server_is_ascii() || text.is_ascii();
    (!same).then(|| convert(text, pg_sys::pg_any_to_server))
}

type Conversion = unsafe fn(*const std::ffi::c_char, c_int, c_int) -> *mut std::ffi::c_char;

fn convert(bytes: &[u8], conversion: Conversion) -> Vec<u8> {
    let utf8 = pg_sys::pg_enc::PG_UTF8 as c_int;
    // SAFETY: PostgreSQL reads `bytes.len()` bytes and gives them back, or a C string of its own, which is copied,
    // overwritten and freed.
    unsafe {
        let converted = conversion(bytes.as_ptr().cast(), bytes.len() as c_int, utf8);
        if converted.cast_const().cast() == bytes.as_ptr() {
            return bytes.to_vec();
        }
        let text = CStr::from_ptr(converted).to_bytes();
        let copy = text.to_vec();
        std::ptr::write_bytes(converted, 0, copy.len());
        pg_sys::pfree(converted.cast());
        copy
    }
}

fn server_encoding() -> c_int {
    // SAFETY: returns a static.
    unsafe { pg_sys::GetDatabaseEncoding() }
}

fn server_is_utf8() -> bool {
    server_encoding() == pg_sys::pg_enc::PG_UTF8 as c_int
}

fn server_is_ascii() -> bool {
    server_encoding() == pg_sys::pg_enc::PG_SQL_ASCII as c_int
}
