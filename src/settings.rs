//! Every setting: what it is for, its range, and who may change it.
//!
//! What chooses keys, files, formats or how long a secret is kept is for superusers. What only bounds how long the
//! caller's own statement waits is for everyone.

use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgrx::guc::{GucContext, GucEnum, GucFlags, GucRegistry, GucSetting, PostgresGucEnum};
use pgrx::pg_sys;
use vod_tender_core::context::Context;
use vod_tender_core::envelope::is_key_name;
use vod_tender_core::policy::{self, Limits, Policy};
use vod_tender_providers::CallLimits;

#[derive(Clone, Copy, PostgresGucEnum)]
enum WriteFormat {
    #[name = c"auto"]
    Auto,
    #[name = c"envelope"]
    Envelope,
    #[name = c"direct"]
    Direct,
}

#[derive(Clone, Copy, PostgresGucEnum)]
enum PlaintextReads {
    #[name = c"refuse"]
    Refuse,
    #[name = c"warn"]
    Warn,
    #[name = c"allow"]
    Allow,
}

/// Where records of the use of keys go.
#[derive(Clone, Copy, PartialEq, Eq, PostgresGucEnum)]
pub enum AuditMode {
    /// Nowhere.
    #[name = c"off"]
    Off,
    /// The server's log.
    #[name = c"log"]
    Log,
    /// The table `vod_tender_crypto.audit_record`.
    #[name = c"table"]
    Table,
}

static AUDIT: GucSetting<AuditMode> = GucSetting::<AuditMode>::new(AuditMode::Off);
static AUDIT_REQUIRED: GucSetting<bool> = GucSetting::<bool>::new(false);
static AUDIT_QUEUE_LIMIT: GucSetting<i32> = GucSetting::<i32>::new(1024);
static DEFAULT_KEY: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c"default"));
static ENCRYPTION_CONTEXT: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"{\"Application\":\"vod-tender\",\"Purpose\":\"oauth-token\"}"));
static LEGACY_KEY_FILE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static WRITE_FORMAT: GucSetting<WriteFormat> = GucSetting::<WriteFormat>::new(WriteFormat::Auto);
static PLAINTEXT_READS: GucSetting<PlaintextReads> = GucSetting::<PlaintextReads>::new(PlaintextReads::Refuse);
static DEK_MAX_USES: GucSetting<i32> = GucSetting::<i32>::new(1000);
static DEK_MAX_AGE: GucSetting<i32> = GucSetting::<i32>::new(300);
static DEK_MAX_BYTES: GucSetting<i32> = GucSetting::<i32>::new(1024 * 1024);
static DEK_CACHE_ENTRIES: GucSetting<i32> = GucSetting::<i32>::new(1000);
static KMS_CONNECT_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(2_000);
static KMS_ATTEMPT_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(5_000);
static KMS_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(15_000);
static KMS_MAX_ATTEMPTS: GucSetting<i32> = GucSetting::<i32>::new(4);
static KMS_CONCURRENCY: GucSetting<i32> = GucSetting::<i32>::new(32);
static KMS_RETRY_BACKOFF: GucSetting<i32> = GucSetting::<i32>::new(200);

/// Set whenever a setting changed, also by a rollback.
static CHANGED: AtomicBool = AtomicBool::new(true);

/// Whether a setting changed since this was last asked.
pub fn take_changed() -> bool {
    CHANGED.swap(false, Ordering::Relaxed)
}

/// Whether a setting changed since [`take_changed`].
pub fn changed() -> bool {
    CHANGED.load(Ordering::Relaxed)
}

/// The policies that hold now.
pub fn policy() -> Policy {
    Policy {
        plaintext_reads: match PLAINTEXT_READS.get() {
            PlaintextReads::Refuse => policy::PlaintextReads::Refuse,
            PlaintextReads::Warn => policy::PlaintextReads::Warn,
            PlaintextReads::Allow => policy::PlaintextReads::Allow,
        },
        write_format: match WRITE_FORMAT.get() {
            WriteFormat::Auto => policy::WriteFormat::Auto,
            WriteFormat::Envelope => policy::WriteFormat::Envelope,
            WriteFormat::Direct => policy::WriteFormat::Direct,
        },
        limits: Limits {
            max_uses: positive(&DEK_MAX_USES),
            max_age_ms: positive(&DEK_MAX_AGE) * 1000,
            max_bytes: positive(&DEK_MAX_BYTES) * 1024,
            cache_entries: positive(&DEK_CACHE_ENTRIES) as usize,
        },
        concurrency: positive(&KMS_CONCURRENCY) as usize,
    }
}

/// The bounds on calls that hold now.
pub fn call_limits() -> CallLimits {
    let ms = |setting| Duration::from_millis(positive(setting));
    CallLimits {
        connect: ms(&KMS_CONNECT_TIMEOUT),
        attempt: ms(&KMS_ATTEMPT_TIMEOUT),
        overall: ms(&KMS_TIMEOUT),
        attempts: positive(&KMS_MAX_ATTEMPTS) as u32,
        backoff: ms(&KMS_RETRY_BACKOFF),
    }
}

/// Where records of the use of keys go.
pub fn audit() -> AuditMode {
    AUDIT.get()
}

/// Whether nothing is decrypted or encrypted that could not be recorded.
pub fn audit_required() -> bool {
    AUDIT_REQUIRED.get()
}

/// Most bytes of a database's queue of records.
pub fn audit_queue_bytes() -> u64 {
    positive(&AUDIT_QUEUE_LIMIT) << 20
}

/// Name of the key for callers that name none.
pub fn default_key() -> String {
    text(&DEFAULT_KEY)
}

/// The context of the environment's KEK, as JSON.
pub fn encryption_context() -> String {
    text(&ENCRYPTION_CONTEXT)
}

/// Path of the file of legacy keys, if there is one.
pub fn legacy_key_file() -> Option<String> {
    Some(text(&LEGACY_KEY_FILE)).filter(|path| !path.is_empty())
}

fn positive(setting: &'static GucSetting<i32>) -> u64 {
    u64::from(setting.get().max(1).unsigned_abs())
}

fn text(setting: &'static GucSetting<Option<CString>>) -> String {
    setting.get().map(|value| value.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Tells PostgreSQL about all of them.
pub fn define() {
    let none = GucFlags::default();
    // Keys, files and formats.
    define_text(
        c"vod_tender_crypto.default_key",
        c"Name of the key that encrypts when a caller names none.",
        &DEFAULT_KEY,
        none,
        Some(check_key_name),
    );
    define_text(
        c"vod_tender_crypto.encryption_context",
        c"Context of the key that the server's environment configures, as a JSON object of strings.",
        &ENCRYPTION_CONTEXT,
        none,
        Some(check_context),
    );
    define_text(
        c"vod_tender_crypto.legacy_key_file",
        c"File of legacy keys, base64 of 32 bytes a line; all are read with, the first one writes.",
        &LEGACY_KEY_FILE,
        GucFlags::SUPERUSER_ONLY,
        None,
    );
    define_choice(
        c"vod_tender_crypto.write_format",
        c"What encrypting writes: envelopes, the legacy format (direct), or what is configured (auto).",
        &WRITE_FORMAT,
    );
    define_choice(
        c"vod_tender_crypto.plaintext_reads",
        c"What reading a value that is not encrypted does: refuse, warn or allow.",
        &PLAINTEXT_READS,
    );
    // Who used which key. Whoever could turn it off could read unseen.
    define_choice(
        c"vod_tender_crypto.audit",
        c"Where the use of keys is recorded: off, the server's log, or a table.",
        &AUDIT,
    );
    GucRegistry::define_bool_guc(
        c"vod_tender_crypto.audit_required",
        c"Refuses to decrypt and encrypt what cannot be recorded first.",
        c"",
        &AUDIT_REQUIRED,
        GucContext::Suset,
        none,
    );
    define_number(
        c"vod_tender_crypto.audit_queue_limit",
        c"Room for records of one database that are not in the table yet.",
        &AUDIT_QUEUE_LIMIT,
        1..=1_048_576,
        GucContext::Suset,
        GucFlags::UNIT_MB,
    );
    // How long a DEK serves: longer means fewer calls, and more values or time exposed by one DEK.
    for (name, about, setting, range, unit) in [
        (
            c"vod_tender_crypto.dek_max_uses",
            c"Values that one data key encrypts; 1 makes a fresh one for every value.",
            &DEK_MAX_USES,
            1..=i32::MAX,
            none,
        ),
        (
            c"vod_tender_crypto.dek_max_age",
            c"How long a session keeps a data key, for encrypting and for decrypting.",
            &DEK_MAX_AGE,
            1..=86_400,
            GucFlags::UNIT_S,
        ),
        (
            c"vod_tender_crypto.dek_max_bytes",
            c"Plaintext that one data key encrypts.",
            &DEK_MAX_BYTES,
            1..=i32::MAX,
            GucFlags::UNIT_KB,
        ),
        (
            c"vod_tender_crypto.dek_cache_entries",
            c"Data keys that a session keeps for decrypting.",
            &DEK_CACHE_ENTRIES,
            1..=1_000_000,
            none,
        ),
    ] {
        define_number(name, about, setting, range, GucContext::Suset, unit);
    }
    // How long a statement waits for a key service.
    for (name, about, setting, range, unit) in [
        (
            c"vod_tender_crypto.kms_connect_timeout",
            c"How long connecting to a key service may take.",
            &KMS_CONNECT_TIMEOUT,
            1..=600_000,
            GucFlags::UNIT_MS,
        ),
        (
            c"vod_tender_crypto.kms_attempt_timeout",
            c"How long one attempt of a call to a key service may take.",
            &KMS_ATTEMPT_TIMEOUT,
            1..=600_000,
            GucFlags::UNIT_MS,
        ),
        (
            c"vod_tender_crypto.kms_timeout",
            c"How long a call to a key service may take, with all attempts and pauses.",
            &KMS_TIMEOUT,
            1..=600_000,
            GucFlags::UNIT_MS,
        ),
        (
            c"vod_tender_crypto.kms_max_attempts",
            c"Attempts of a call to a key service, the first one included.",
            &KMS_MAX_ATTEMPTS,
            1..=20,
            none,
        ),
        (
            c"vod_tender_crypto.kms_concurrency",
            c"Calls to a key service that one session has under way at a time.",
            &KMS_CONCURRENCY,
            1..=256,
            none,
        ),
        (
            c"vod_tender_crypto.kms_retry_backoff",
            c"Longest pause before the second attempt; later ones double it, and all are jittered.",
            &KMS_RETRY_BACKOFF,
            1..=60_000,
            GucFlags::UNIT_MS,
        ),
    ] {
        define_number(name, about, setting, range, GucContext::Userset, unit);
    }
    // SAFETY: a C string, in the library's initialisation. A misspelt setting is then an error, not a placeholder.
    unsafe { pgrx::pg_sys::MarkGUCPrefixReserved(c"vod_tender_crypto".as_ptr()) };
}

type Name = &'static std::ffi::CStr;

fn define_text(
    name: Name,
    about: Name,
    setting: &'static GucSetting<Option<CString>>,
    flags: GucFlags,
    check: pg_sys::GucStringCheckHook,
) {
    // SAFETY: the hooks touch an atomic and their argument only.
    unsafe {
        GucRegistry::define_string_guc_with_hooks(
            name,
            about,
            c"",
            setting,
            GucContext::Suset,
            flags,
            check,
            Some(text_changed),
            None,
        );
    }
}

fn define_choice<T: GucEnum>(name: Name, about: Name, setting: &'static GucSetting<T>) {
    let flags = GucFlags::default();
    // SAFETY: as above.
    unsafe {
        GucRegistry::define_enum_guc_with_hooks(
            name,
            about,
            c"",
            setting,
            GucContext::Suset,
            flags,
            None,
            Some(number_changed),
            None,
        );
    }
}

fn define_number(
    name: Name,
    about: Name,
    setting: &'static GucSetting<i32>,
    range: std::ops::RangeInclusive<i32>,
    context: GucContext,
    unit: GucFlags,
) {
    // SAFETY: as above.
    unsafe {
        GucRegistry::define_int_guc_with_hooks(
            name,
            about,
            c"",
            setting,
            *range.start(),
            *range.end(),
            context,
            unit,
            None,
            Some(number_changed),
            None,
        );
    }
}

/// A context that cannot be used must not be set: it would close every value of the environment's key.
unsafe extern "C-unwind" fn check_context(
    new: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: PostgreSQL passes a pointer to the proposed value.
    unsafe { proposed(new) }.is_some_and(|json| Context::from_json(json).is_ok())
}

unsafe extern "C-unwind" fn check_key_name(
    new: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: as above.
    unsafe { proposed(new) }.is_some_and(is_key_name)
}

/// # Safety
/// `new` points to a C string, or to null, that lives as long as the result is used.
unsafe fn proposed<'a>(new: *mut *mut c_char) -> Option<&'a str> {
    // SAFETY: as promised by the caller.
    unsafe { (!(*new).is_null()).then(|| std::ffi::CStr::from_ptr(*new)) }.and_then(|text| text.to_str().ok())
}

unsafe extern "C-unwind" fn text_changed(_new: *const c_char, _extra: *mut c_void) {
    CHANGED.store(true, Ordering::Relaxed);
}

unsafe extern "C-unwind" fn number_changed(_new: c_int, _extra: *mut c_void) {
    CHANGED.store(true, Ordering::Relaxed);
}
