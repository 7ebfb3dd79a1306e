//! The one map from what went wrong to what PostgreSQL reports: SQLSTATE, message, DETAIL, HINT.
//!
//! Nothing here can name a plaintext, a key or a credential: the errors do not carry them.

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::PgSqlErrorCode;
use vod_tender_core::Error;
use vod_tender_core::error::Mismatch;
use vod_tender_core::provider::Fault;
use vod_tender_core::stored::Kind;

use crate::callers;

/// Raises an error as PostgreSQL's ERROR. `kind` is the type of the value at hand.
#[track_caller]
pub fn raise(error: &Error, kind: Kind) -> ! {
    let mut report = ErrorReport::new(sqlstate(error, kind), error.to_string(), "vod_tender_crypto");
    if let Some(detail) = detail(error) {
        report = report.set_detail(detail);
    }
    if let Some(hint) = hint(error) {
        report = report.set_hint(hint);
    }
    throw(report)
}

/// The SQLSTATE of an error, five characters.
pub fn sqlstate_text(error: &Error, kind: Kind) -> String {
    let code = sqlstate(error, kind) as i32;
    // Five groups of six bits, the first character in the lowest.
    (0..5).map(|at| char::from(((code >> (6 * at)) & 0x3f) as u8 + b'0')).collect()
}

/// Raises for an argument that cannot be used.
pub fn invalid(message: &str, hint: &str) -> ! {
    let code = PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE;
    throw(ErrorReport::new(code, message.to_owned(), "vod_tender_crypto").set_hint(hint))
}

/// Unwinds to pgrx's guard, which raises the error in PostgreSQL. Not a panic: that would run the panic hook, which
/// adds a backtrace to the client's DETAIL where the server's environment asks for backtraces.
pub fn throw(report: ErrorReport) -> ! {
    std::panic::resume_unwind(Box::new(report))
}

fn sqlstate(error: &Error, kind: Kind) -> PgSqlErrorCode {
    use PgSqlErrorCode as Code;
    match error {
        Error::Malformed(_) if kind == Kind::Text => Code::ERRCODE_INVALID_TEXT_REPRESENTATION,
        Error::Malformed(_) => Code::ERRCODE_INVALID_BINARY_REPRESENTATION,
        Error::Unverified(_) => Code::ERRCODE_EXTERNAL_ROUTINE_INVOCATION_EXCEPTION,
        Error::NotText | Error::ArgumentNotText => Code::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
        Error::PlaintextRefused
        | Error::DirectOrPlaintextRefused
        | Error::AlreadyEnvelope
        | Error::UnknownVersion
        | Error::VersionMismatch(_)
        | Error::StatedPlaintext
        | Error::BadContext(_)
        | Error::KeyContext(_)
        | Error::NotRewrappable => Code::ERRCODE_INVALID_PARAMETER_VALUE,
        Error::UnknownKey(_) | Error::UnknownGivenKey => Code::ERRCODE_UNDEFINED_OBJECT,
        Error::KeyState { .. } | Error::NothingConfigured | Error::LegacyKey(_) => {
            Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE
        }
        Error::TooLarge => Code::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
        Error::NotGranted { .. } => Code::ERRCODE_INSUFFICIENT_PRIVILEGE,
        Error::NotAudited(_) => Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
        Error::Random => Code::ERRCODE_INTERNAL_ERROR,
        Error::Service { source, .. } => match source.fault {
            Fault::Denied => Code::ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
            Fault::Throttled => Code::ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
            Fault::Disabled | Fault::InvalidState | Fault::Misconfigured => {
                Code::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE
            }
            Fault::NotFound => Code::ERRCODE_UNDEFINED_OBJECT,
            Fault::Unverified | Fault::BadAnswer => Code::ERRCODE_EXTERNAL_ROUTINE_INVOCATION_EXCEPTION,
            Fault::Unreachable => Code::ERRCODE_CONNECTION_FAILURE,
        },
    }
}

fn detail(error: &Error) -> Option<String> {
    match error {
        Error::Malformed(what) => Some(format!("Not well-formed: {what}.")),
        Error::Unverified(mismatch) => Some(mismatch.to_string()),
        Error::NotAudited(why) => Some(format!("The audit's queue: {why}.")),
        Error::NotGranted { .. } => Some(callers::who()),
        Error::Service { source, .. } => source.trace.clone(),
        _ => None,
    }
}

fn hint(error: &Error) -> Option<&'static str> {
    Some(match error {
        Error::PlaintextRefused => {
            "If the column still holds plaintext, convert it with envelope_upgrade(value, version => 0), or set \
             vod_tender_crypto.plaintext_reads until it is converted."
        }
        Error::AlreadyEnvelope => "envelope_upgrade() leaves envelopes as they are and can be run twice.",
        Error::StatedPlaintext => {
            "Pass version => 1, or NULL to recognise the version. Taken for plaintext, its ciphertext would be encrypted."
        }
        Error::VersionMismatch(_) => "Pass version => 2, or NULL to recognise the version.",
        Error::BadContext(_) => "For example: '{\"tenant\": \"a\"}'.",
        Error::KeyContext(_) => "Decrypt the value and encrypt it again under that key.",
        Error::NotRewrappable => {
            "It records no key. Decrypt the value with envelope_decrypt() and encrypt it with envelope_encrypt()."
        }
        Error::DirectOrPlaintextRefused => {
            "It has the shape of the legacy format. If its legacy key was removed or replaced, configure that key again. \
             Do not convert it as plaintext: that would encrypt the ciphertext."
        }
        Error::UnknownKey(_) | Error::UnknownGivenKey => {
            "Configured keys are in vod_tender_crypto.kek; vod_tender_crypto.add_key() adds one. The setting \
             vod_tender_crypto.default_key names the one used when none is given."
        }
        Error::KeyState { .. } => "vod_tender_crypto.set_key_state() changes a key's state.",
        Error::NothingConfigured => {
            "Add a key with vod_tender_crypto.add_key(), or set KMS_KEY_ID or ENCRYPTION_KEY in the server's environment."
        }
        Error::LegacyKey(_) => {
            "The legacy key comes from ENCRYPTION_KEY in the server's environment or from \
             vod_tender_crypto.legacy_key_file."
        }
        Error::NotGranted { .. } => {
            "vod_tender_crypto.grant_key() gives privileges on keys; legacy is the legacy keys' name."
        }
        Error::NotAudited(_) => {
            "vod_tender_crypto.audit_required refuses what cannot be recorded. Make room in the data directory, or raise \
             vod_tender_crypto.audit_queue_limit or max_worker_processes."
        }
        Error::Unverified(Mismatch::AadMissing) => "Pass the aad that the value was encrypted with.",
        Error::Unverified(Mismatch::AadUnexpected) => "Omit aad for values that were encrypted without one.",
        Error::Unverified(Mismatch::Legacy) => {
            "The value was changed, or it was encrypted under a legacy key that is not configured."
        }
        Error::Service { source, .. } => return service_hint(source.fault),
        _ => return None,
    })
}

fn service_hint(fault: Fault) -> Option<&'static str> {
    Some(match fault {
        Fault::Denied => "Check the server's credentials and the key's policy.",
        Fault::Throttled => {
            "Run it again later, or raise the service's quota. A larger vod_tender_crypto.dek_max_uses makes fewer calls."
        }
        Fault::Disabled => "Enable the key in the key service.",
        Fault::InvalidState => "If the key is pending deletion, cancel the deletion in the key service.",
        Fault::Unreachable => {
            "Check the network, the endpoint and the region; vod_tender_crypto.kms_timeout bounds the wait."
        }
        _ => return None,
    })
}
