//! Arguments as the core wants them: text in UTF-8 whatever the server's encoding, contexts parsed.

use std::borrow::Cow;
use std::ffi::{CStr, c_int};
use std::sync::OnceLock;

use pgrx::callconv::{Arg, ArgAbi};
use pgrx::datum::{Datum, UnboxDatum};
use pgrx::{impl_sql_translatable, pg_sys, varlena};
use vod_tender_core::Error;
use vod_tender_core::context::Context;
use vod_tender_core::stored::Kind;

use crate::errors::raise;
use crate::fetch;

/// The content of a varlena, unpacked where it is stored compressed or elsewhere; nothing for NULL.
///
/// # Safety
/// The datum is a varlena that lives for `'a`, in a memory context that does.
unsafe fn content<'a>(datum: Option<pg_sys::Datum>) -> &'a [u8] {
    let Some(datum) = datum else { return &[] };
    let mut varlena = datum.cast_mut_ptr::<pg_sys::varlena>();
    // SAFETY: as promised by the caller. Most values are plain, and for those PostgreSQL need not be asked: a call through
    // pgrx's guard costs as much as opening a small value.
    unsafe {
        if varlena::varatt_is_4b_c(varlena) || varlena::varatt_is_1b_e(varlena) {
            varlena = pg_sys::pg_detoast_datum_packed(varlena);
        }
        let content = varlena::varlena_to_byte_slice(varlena);
        // Shorter ones are no envelopes, but names and aads.
        if content.len() > 128 {
            fetch::value(content);
        }
        content
    }
}

/// A `bytea` argument.
pub struct BytesIn<'fcx>(pub &'fcx [u8]);

impl_sql_translatable!(BytesIn<'_>, "bytea");

// SAFETY: `bytea` arguments are varlena datums, which is what is unboxed.
unsafe impl<'fcx> ArgAbi<'fcx> for BytesIn<'fcx> {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: the argument is a bytea, and the bytes live as long as the call.
        BytesIn(unsafe { content(arg.unbox_arg_using_from_datum()) })
    }
}

/// A `text` argument as it is stored.
pub struct StoredText<'fcx>(pub &'fcx [u8]);

impl_sql_translatable!(StoredText<'_>, "text");

// SAFETY: `text` arguments are varlena datums, which is what is unboxed.
unsafe impl<'fcx> ArgAbi<'fcx> for StoredText<'fcx> {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: the argument is a text, and the bytes live as long as the call.
        StoredText(unsafe { content(arg.unbox_arg_using_from_datum()) })
    }
}

/// A `text` argument, in UTF-8; borrowed from the argument where that is possible.
pub struct TextIn<'fcx>(Option<Cow<'fcx, str>>);

impl TextIn<'_> {
    /// The text; an error when it is not UTF-8, which only a database in SQL_ASCII can hold.
    pub fn as_str(&self) -> &str {
        self.get().unwrap_or_else(|| raise(&Error::ArgumentNotText, Kind::Text))
    }

    /// The text, if it is UTF-8.
    pub fn get(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

impl_sql_translatable!(TextIn<'_>, "text");

// SAFETY: `text` arguments are varlena datums, which is what is unboxed.
unsafe impl<'fcx> ArgAbi<'fcx> for TextIn<'fcx> {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: the argument is a text, and the bytes live as long as the call.
        TextIn(to_utf8(unsafe { content(arg.unbox_arg_using_from_datum()) }))
    }
}

// SAFETY: an element of a `text` array is a varlena, which is what is unboxed.
unsafe impl UnboxDatum for TextIn<'_> {
    type As<'src>
        = TextIn<'src>
    where
        Self: 'src;

    unsafe fn unbox<'src>(datum: Datum<'src>) -> TextIn<'src>
    where
        Self: 'src,
    {
        // SAFETY: as above; the bytes live as long as the array.
        TextIn(to_utf8(unsafe { <&[u8]>::unbox(datum) }))
    }
}

/// A `jsonb` argument that is a context. Boxed, because most calls give none: what is not there is then not moved about.
pub struct ContextIn(Box<Result<Context, Error>>);

impl ContextIn {
    /// The context; an error when the JSON is not one.
    pub fn context(&self) -> &Context {
        (*self.0).as_ref().unwrap_or_else(|error| raise(error, Kind::Text))
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
        ContextIn(Box::new(json.ok_or(Error::ArgumentNotText).and_then(|json| Context::from_json(&json))))
    }
}

/// Bytes in the server's encoding as UTF-8; `None` when they have no such form.
pub fn to_utf8(bytes: &[u8]) -> Option<Cow<'_, str>> {
    if bytes.is_ascii() {
        // SAFETY: ASCII is UTF-8. Asked first because most values are, and the general check takes several times as long.
        return Some(Cow::Borrowed(unsafe { std::str::from_utf8_unchecked(bytes) }));
    }
    if stores_utf8() {
        return std::str::from_utf8(bytes).ok().map(Cow::Borrowed);
    }
    let utf8 = convert(bytes, server_encoding(), UTF8)?;
    String::from_utf8(utf8).ok().map(Cow::Owned)
}

/// A `text` result in the server's encoding.
pub enum InServerEncoding {
    /// UTF-8 as it is.
    Same,
    /// Other bytes.
    Converted(Vec<u8>),
    /// The server's encoding has no such characters.
    Impossible,
}

/// Whether UTF-8 is stored as it is, whatever the text.
#[inline]
pub fn stores_utf8() -> bool {
    server_is(pg_sys::pg_enc::PG_UTF8) || server_is(pg_sys::pg_enc::PG_SQL_ASCII)
}

/// UTF-8 in the server's encoding.
pub fn from_utf8(text: &[u8]) -> InServerEncoding {
    if stores_utf8() || text.is_ascii() {
        return InServerEncoding::Same;
    }
    convert(text, UTF8, server_encoding()).map_or(InServerEncoding::Impossible, InServerEncoding::Converted)
}

const UTF8: c_int = pg_sys::pg_enc::PG_UTF8 as c_int;

/// Converts between encodings; `None` where that is not possible. PostgreSQL's usual functions for this quote the bytes
/// that they cannot convert in their error, and those may be a secret's.
fn convert(bytes: &[u8], from: c_int, to: c_int) -> Option<Vec<u8>> {
    let length = c_int::try_from(bytes.len()).ok()?;
    // No encoding needs more than four times the bytes; one more is for the end of the C string.
    let room = length.checked_mul(4)?.checked_add(1)?;
    let mut converted = Vec::new();
    converted.try_reserve_exact(room as usize).ok()?;
    converted.resize(room as usize, 0u8);
    // SAFETY: PostgreSQL reads `length` bytes and writes at most `room`, a C string; `noError` keeps it from raising.
    let consumed = unsafe {
        let procedure = pg_sys::FindDefaultConversionProc(from, to);
        if procedure == pg_sys::InvalidOid {
            return None;
        }
        let (source, target) = (bytes.as_ptr().cast_mut(), converted.as_mut_ptr());
        pg_sys::pg_do_encoding_conversion_buf(procedure, from, to, source, length, target, room, true)
    };
    let end = converted.iter().position(|&byte| byte == 0)?;
    converted.truncate(end);
    (consumed == length).then_some(converted)
}

fn server_encoding() -> c_int {
    // A backend serves one database, so it is asked once; asking costs as much as opening a small value.
    static ENCODING: OnceLock<c_int> = OnceLock::new();
    // SAFETY: returns a static.
    *ENCODING.get_or_init(|| unsafe { pg_sys::GetDatabaseEncoding() })
}

fn server_is(encoding: pg_sys::pg_enc::Type) -> bool {
    server_encoding() == encoding as c_int
}
