//! What decrypting costs at least: a value is copied and opened with an expanded key that is at hand. No format, no
//! choice of a key, no rights, no errors. For benchmarks only: the key is a constant.
//!
//! A stored value is filler, nonce, ciphertext and tag. With as much filler as an envelope has header, it is as long as
//! an envelope, and reading the table costs the same.
#![allow(missing_docs)]

use std::cell::OnceCell;
use std::ffi::c_void;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use pgrx::prelude::*;
use pgrx::varlena::{set_varsize_4b, varatt_is_1b_e, varatt_is_4b_c, vardata_any, varsize_any_exhdr};
use vod_tender_core::envelope::{NONCE_BYTES, Payload};
use vod_tender_core::random::SessionRandom;
use vod_tender_core::seal::ExpandedKey;

::pgrx::pg_module_magic!(name, version);

const KEY: [u8; 32] = [0x42; 32];

thread_local! {
    static EXPANDED: OnceCell<ExpandedKey> = const { OnceCell::new() };
    static EXPANDED_BY_AWS_LC: OnceCell<LessSafeKey> = const { OnceCell::new() };
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
CREATE FUNCTION floor_open_aws_lc(value bytea, padding integer) RETURNS bytea
    LANGUAGE c STRICT IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'floor_open_aws_lc';
"#,
    name = "floor_open"
);

/// Opens with the library and the code that the extension uses.
///
/// # Safety
/// For PostgreSQL to call, as `floor_open(bytea, integer)`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn floor_open(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let open = |payload: Payload<'_>, out: &mut [u8]| {
        out.copy_from_slice(payload.ciphertext);
        EXPANDED.with(|key| {
            let key = key.get_or_init(|| ExpandedKey::new(&KEY));
            key.open(payload.nonce, &[], out, payload.tag).is_ok()
        })
    };
    // SAFETY: as promised by the caller.
    unsafe { call(fcinfo, open) }
}

/// Opens with AWS-LC, which needs no copy: it decrypts from one place to the other.
///
/// # Safety
/// For PostgreSQL to call, as `floor_open_aws_lc(bytea, integer)`.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn floor_open_aws_lc(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let open = |payload: Payload<'_>, out: &mut [u8]| {
        EXPANDED_BY_AWS_LC.with(|key| {
            let key = key
                .get_or_init(|| LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &KEY).expect("the key has 32 bytes")));
            let nonce = Nonce::assume_unique_for_key(*payload.nonce);
            key.open_separate_gather(nonce, Aad::empty(), payload.ciphertext, payload.tag, out).is_ok()
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
pub extern "C-unwind" fn pg_finfo_floor_open_aws_lc() -> &'static pg_sys::Pg_finfo_record {
    &CONVENTION
}

unsafe extern "C-unwind" {
    // Not pgrx's own, which sets a point to return to before every call. These frames hold nothing to drop.
    fn palloc(size: usize) -> *mut c_void;
    fn pg_detoast_datum_packed(value: *mut pg_sys::varlena) -> *mut pg_sys::varlena;
}

/// Unboxes the arguments, allocates the result, and has `open` fill it.
///
/// # Safety
/// `fcinfo` is that of a strict function of a `bytea` and an `integer` that returns a `bytea`.
unsafe fn call(fcinfo: pg_sys::FunctionCallInfo, open: impl FnOnce(Payload<'_>, &mut [u8]) -> bool) -> pg_sys::Datum {
    // SAFETY: the arguments are there and not null, and have those types; palloc gives as much as is asked for or does
    // not return, and every byte of the result is written before it is read.
    unsafe {
        let arguments = (*fcinfo).args.as_ptr();
        let mut value = (*arguments).value.cast_mut_ptr::<pg_sys::varlena>();
        let padding = (*arguments.add(1)).value.value() as u32 as usize;
        if varatt_is_1b_e(value) || varatt_is_4b_c(value) {
            value = pg_detoast_datum_packed(value);
        }
        let stored = std::slice::from_raw_parts(vardata_any(value).cast::<u8>(), varsize_any_exhdr(value));
        if let Some(Ok(payload)) = stored.get(padding..).map(Payload::parse) {
            let size = pg_sys::VARHDRSZ + payload.ciphertext.len();
            let result = palloc(size).cast::<pg_sys::varlena>();
            set_varsize_4b(result, size as i32);
            let out = result.cast::<u8>().add(pg_sys::VARHDRSZ);
            if open(payload, std::slice::from_raw_parts_mut(out, size - pg_sys::VARHDRSZ)) {
                return pg_sys::Datum::from(result);
            }
        }
        (*fcinfo).isnull = true;
        pg_sys::Datum::null()
    }
}
