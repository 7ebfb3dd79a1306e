//! What decrypting costs at least: a value is copied and opened with an expanded key that is at hand. No format, no
//! choice of a key, no rights, no errors. For benchmarks only: the key is a constant.
//!
//! A stored value is filler, nonce, ciphertext and tag. With as much filler as an envelope has header, it is as long as
//! an envelope, and reading the table costs the same.
#![allow(missing_docs)]

// The extension's own, which is a library for PostgreSQL and for nobody else.
#[path = "../../../src/fetch.rs"]
mod fetch;

use std::cell::OnceCell;
use std::ffi::c_void;

use pgrx::prelude::*;
use pgrx::varlena::{set_varsize_4b, varatt_is_1b_e, varatt_is_4b_c, vardata_any, varsize_any_exhdr};
use vod_tender_aead::{ExpandedKey, rust_crypto};
use vod_tender_core::envelope::{NONCE_BYTES, Payload};
use vod_tender_core::random::SessionRandom;

::pgrx::pg_module_magic!(name, version);

const KEY: [u8; 32] = [0x42; 32];

thread_local! {
    static OWN: OnceCell<ExpandedKey> = const { OnceCell::new() };
    static RUST_CRYPTO: OnceCell<rust_crypto::ExpandedKey> = const { OnceCell::new() };
}

/// Filler, and the value sealed.
#[pg_extern(strict, volatile, parallel_safe)]
fn floor_seal(value: &[u8], padding: i32) -> Vec<u8> {
    let filler = usize::try_from(padding).expect("padding is not negative");
    let nonce = SessionRandom::from_system().expect("the system has randomness").nonce();
    let mut stored = vec![0; filler];
    stored.extend_from_slice(&nonce);
    stored.extend_from_slice(value);
    let key = ExpandedKey::new(&KEY);
    let tag = key.seal(&nonce, &[], &mut stored[filler + NONCE_BYTES..]).expect("the value is not too long");
    stored.extend_from_slice(&tag);
    stored
}

// The functions that open are C functions by hand. NULL is what does not open, so that nothing can fail in between.
extension_sql!(
    r#"
CREATE FUNCTION floor_open(value bytea, padding integer) RETURNS bytea
    LANGUAGE c STRICT IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'floor_open';
CREATE FUNCTION floor_open_ahead(value bytea, padding integer) RETURNS bytea
    LANGUAGE c STRICT IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'floor_open_ahead';
CREATE FUNCTION floor_open_rust_crypto(value bytea, padding integer) RETURNS bytea
    LANGUAGE c STRICT IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'floor_open_rust_crypto';
"#,
    name = "floor_open"
);

/// Opens with the library that the extension uses, unless it was built with another one.
///
/// # Safety
/// For PostgreSQL to call, as `floor_open(bytea, integer)`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn floor_open(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let open = |payload: Payload<'_>, out: &mut [u8]| {
        OWN.with(|key| key.get_or_init(|| ExpandedKey::new(&KEY)).open(payload.nonce, &[], out, payload.tag).is_ok())
    };
    // SAFETY: as promised by the caller.
    unsafe { call(fcinfo, open) }
}

/// Like [`floor_open`], and has the processor load the next row's value, as the extension does: reading a value from
/// memory is a good part of a floor that does not.
///
/// # Safety
/// For PostgreSQL to call, as `floor_open_ahead(bytea, integer)`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn floor_open_ahead(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: the arguments are there and not null, and the first is a bytea, as promised by the caller.
    unsafe {
        let value = (*(*fcinfo).args.as_ptr()).value.cast_mut_ptr::<pg_sys::varlena>();
        if !is_elsewhere(value) {
            fetch::value(stored(value));
        }
        floor_open(fcinfo)
    }
}

/// Opens with RustCrypto's library.
///
/// # Safety
/// For PostgreSQL to call, as `floor_open_rust_crypto(bytea, integer)`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn floor_open_rust_crypto(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let open = |payload: Payload<'_>, out: &mut [u8]| {
        RUST_CRYPTO.with(|key| {
            let key = key.get_or_init(|| rust_crypto::ExpandedKey::new(&KEY));
            key.open(payload.nonce, &[], out, payload.tag).is_ok()
        })
    };
    // SAFETY: as promised by the caller.
    unsafe { call(fcinfo, open) }
}

/// Version 1 of PostgreSQL's calling convention, the only one there is.
static CONVENTION: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };

#[unsafe(no_mangle)]
pub extern "C-unwind" fn pg_finfo_floor_open() -> &'static pg_sys::Pg_finfo_record {
    &CONVENTION
}

#[unsafe(no_mangle)]
pub extern "C-unwind" fn pg_finfo_floor_open_ahead() -> &'static pg_sys::Pg_finfo_record {
    &CONVENTION
}

#[unsafe(no_mangle)]
pub extern "C-unwind" fn pg_finfo_floor_open_rust_crypto() -> &'static pg_sys::Pg_finfo_record {
    &CONVENTION
}

unsafe extern "C-unwind" {
    // Not pgrx's own, which sets a point to return to before every call. These frames hold nothing to drop.
    fn palloc(size: usize) -> *mut c_void;
    fn pg_detoast_datum_packed(value: *mut pg_sys::varlena) -> *mut pg_sys::varlena;
}

/// Unboxes the arguments, copies the ciphertext into the result, and has `open` decrypt it there.
///
/// # Safety
/// `fcinfo` is that of a strict function of a `bytea` and an `integer` that returns a `bytea`.
unsafe fn call(fcinfo: pg_sys::FunctionCallInfo, open: impl FnOnce(Payload<'_>, &mut [u8]) -> bool) -> pg_sys::Datum {
    // SAFETY: the arguments are there and not null, and have those types; palloc gives as much as is asked for or does
    // not return, and all of it is written before a slice is made of it.
    unsafe {
        let arguments = (*fcinfo).args.as_ptr();
        let mut value = (*arguments).value.cast_mut_ptr::<pg_sys::varlena>();
        let padding = (*arguments.add(1)).value.value() as u32 as usize;
        if is_elsewhere(value) {
            value = pg_detoast_datum_packed(value);
        }
        if let Some(Ok(payload)) = stored(value).get(padding..).map(Payload::parse) {
            let size = pg_sys::VARHDRSZ + payload.ciphertext.len();
            let result = palloc(size).cast::<pg_sys::varlena>();
            set_varsize_4b(result, size as i32);
            let out = result.cast::<u8>().add(pg_sys::VARHDRSZ);
            std::ptr::copy_nonoverlapping(payload.ciphertext.as_ptr(), out, payload.ciphertext.len());
            if open(payload, std::slice::from_raw_parts_mut(out, payload.ciphertext.len())) {
                return pg_sys::Datum::from(result);
            }
        }
        (*fcinfo).isnull = true;
        pg_sys::Datum::null()
    }
}

/// Whether a value is compressed, or in the TOAST table.
///
/// # Safety
/// `value` is a varlena.
unsafe fn is_elsewhere(value: *const pg_sys::varlena) -> bool {
    // SAFETY: as promised by the caller.
    unsafe { varatt_is_1b_e(value) || varatt_is_4b_c(value) }
}

/// The bytes of a value that is here.
///
/// # Safety
/// `value` is a varlena, is neither compressed nor elsewhere, and lives as long as the result is used.
unsafe fn stored<'a>(value: *const pg_sys::varlena) -> &'a [u8] {
    // SAFETY: as promised by the caller.
    unsafe { std::slice::from_raw_parts(vardata_any(value).cast::<u8>(), varsize_any_exhdr(value)) }
}
