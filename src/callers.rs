//! Who calls: the roles in effect, what they may do with each key, and how they are named in the audit.

use std::collections::HashMap;
use std::ffi::CStr;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use pgrx::{FromDatum, pg_sys};
use vod_tender_core::access::{Gate, Party, Rights};

use crate::arguments::to_utf8;
use crate::catalog::{self, GrantRow};

/// The roles in effect for a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Roles {
    /// Who logged in, or what SET SESSION AUTHORIZATION made of it.
    session: pg_sys::Oid,
    /// The same after SET ROLE: who calls, whatever SECURITY DEFINER functions are in between.
    outer: pg_sys::Oid,
    /// Whose rights the statement has: the owner of the SECURITY DEFINER function that it is in, or the caller.
    current: pg_sys::Oid,
}

// Not through pgrx, whose guard costs more than these: they return a variable and raise nothing.
unsafe extern "C" {
    fn GetSessionUserId() -> pg_sys::Oid;
    fn GetOuterUserId() -> pg_sys::Oid;
    fn GetUserId() -> pg_sys::Oid;
}

impl Roles {
    fn now() -> Self {
        // SAFETY: as above.
        unsafe { Roles { session: GetSessionUserId(), outer: GetOuterUserId(), current: GetUserId() } }
    }
}

/// One caller of a transaction, by name, for the audit: names cannot be looked up any more when it is over.
#[derive(Debug, Clone)]
pub struct Caller {
    roles: Roles,
    /// Name of the session's user.
    pub session_user: String,
    /// Name of the outer user.
    pub outer_user: String,
    /// Name of the current user.
    pub current_user: String,
    /// What the application calls itself.
    pub application_name: String,
    /// Address and port of the client; none over a Unix socket.
    pub client: Option<String>,
    /// The database's name.
    pub database: String,
    /// When the transaction began, microseconds since 1970.
    pub transaction_us: i64,
    /// The query's id, where PostgreSQL computes one.
    pub query_id: Option<i64>,
}

/// The callers of a transaction, and what each pair of roles may do.
#[derive(Default)]
pub struct Callers {
    grants: Option<Grants>,
    rights: HashMap<(u32, u32), Rc<Rights>>,
    present: Option<Roles>,
    callers: Vec<Caller>,
}

/// The table of grants, and who owns the keys.
struct Grants {
    owner: pg_sys::Oid,
    rows: Vec<GrantRow>,
}

/// Set when roles or memberships changed.
static ROLES_CHANGED: AtomicBool = AtomicBool::new(true);

/// Whether roles or memberships changed since [`take_changed`].
pub fn changed() -> bool {
    ROLES_CHANGED.load(Ordering::Relaxed)
}

/// Whether they changed since this was last asked.
pub fn take_changed() -> bool {
    ROLES_CHANGED.swap(false, Ordering::Relaxed)
}

/// Asks PostgreSQL to tell about changes. Once for each process.
pub fn watch() {
    use pg_sys::SysCacheIdentifier::{AUTHMEMROLEMEM, AUTHOID, DATABASEOID};
    // A database's owner is a member of pg_database_owner.
    for cache in [AUTHOID, AUTHMEMROLEMEM, DATABASEOID] {
        // SAFETY: the callback touches an atomic only.
        unsafe { pg_sys::CacheRegisterSyscacheCallback(cache as _, Some(roles_changed), pg_sys::Datum::null()) };
    }
}

unsafe extern "C-unwind" fn roles_changed(_argument: pg_sys::Datum, _cache: std::ffi::c_int, _hash: u32) {
    ROLES_CHANGED.store(true, Ordering::Relaxed);
}

impl Callers {
    /// Tells the gate who calls. Costs three loads where that is who called last.
    #[inline(always)]
    pub fn enter(&mut self, gate: &mut Gate) {
        let roles = Roles::now();
        if self.present != Some(roles) {
            self.enter_anew(gate, roles);
        }
    }

    #[cold]
    fn enter_anew(&mut self, gate: &mut Gate, roles: Roles) {
        let party = match self.callers.iter().position(|caller| caller.roles == roles) {
            Some(at) => at,
            None => {
                self.callers.push(Caller::of(roles));
                self.callers.len() - 1
            }
        };
        gate.enter(party as Party, self.rights(roles));
        self.present = Some(roles);
    }

    /// Forgets what anybody may do.
    pub fn rights_changed(&mut self) {
        self.grants = None;
        self.rights.clear();
        self.present = None;
    }

    /// Forgets the callers so far: the transaction is over.
    pub fn forget(&mut self) {
        self.present = None;
        self.callers.clear();
    }

    /// One of the callers so far.
    pub fn caller(&self, party: Party) -> Option<&Caller> {
        self.callers.get(party as usize)
    }

    /// What is granted to the outer user and to the current one: a function that runs as its owner gives its caller no key
    /// of the owner's, and its owner none of the caller's.
    fn rights(&mut self, roles: Roles) -> Rc<Rights> {
        let pair = (roles.outer.to_u32(), roles.current.to_u32());
        if let Some(rights) = self.rights.get(&pair) {
            return Rc::clone(rights);
        }
        let grants = self.grants.get_or_insert_with(|| {
            let (owner, rows) = catalog::read_grants();
            Grants { owner, rows }
        });
        let rights = match roles.outer == roles.current {
            true => grants.of(roles.outer),
            false => grants.of(roles.outer).meet(&grants.of(roles.current)),
        };
        let rights = Rc::new(rights);
        self.rights.insert(pair, Rc::clone(&rights));
        rights
    }
}

impl Grants {
    fn of(&self, role: pg_sys::Oid) -> Rights {
        if has_privileges_of(role, self.owner) {
            return Rights::all();
        }
        let mut rights = Rights::default();
        for row in self.rows.iter().filter(|row| has_privileges_of(role, row.role)) {
            rights.grant(&row.key, row.privilege);
        }
        rights
    }
}

/// Whether a role has another one's rights, by PostgreSQL's rules of membership and inheritance.
fn has_privileges_of(role: pg_sys::Oid, other: pg_sys::Oid) -> bool {
    // SAFETY: looks at catalog caches; there is a transaction.
    other != pg_sys::InvalidOid && unsafe { pg_sys::has_privs_of_role(role, other) }
}

impl Caller {
    fn of(roles: Roles) -> Self {
        // SAFETY: within a transaction; each function gives a C string in this memory context or null, each variable is a C
        // string of PostgreSQL's.
        unsafe {
            let user = |role| text(pg_sys::GetUserNameFromId(role, true)).unwrap_or_else(|| role.to_u32().to_string());
            let query_id = pg_sys::pgstat_get_my_query_id() as i64;
            Caller {
                roles,
                session_user: user(roles.session),
                outer_user: user(roles.outer),
                current_user: user(roles.current),
                application_name: text(pg_sys::application_name).unwrap_or_default(),
                client: client(),
                database: text(pg_sys::get_database_name(pg_sys::MyDatabaseId)).unwrap_or_default(),
                transaction_us: unix_us(pg_sys::GetCurrentTransactionStartTimestamp()),
                query_id: (query_id != 0).then_some(query_id),
            }
        }
    }
}

/// Who calls, in a sentence for an error.
pub fn who() -> String {
    let roles = Roles::now();
    // SAFETY: within a transaction; gives a C string in this memory context or null.
    let user = |role| unsafe { text(pg_sys::GetUserNameFromId(role, true)) }.unwrap_or_default();
    match roles.outer == roles.current {
        true => format!("The calling role is \"{}\".", user(roles.outer)),
        false => format!(
            "The calling role is \"{}\", in a function that runs as \"{}\"; both need the privilege.",
            user(roles.outer),
            user(roles.current)
        ),
    }
}

/// # Safety
/// `string` is null or a C string.
unsafe fn text(string: *const std::ffi::c_char) -> Option<String> {
    if string.is_null() {
        return None;
    }
    // SAFETY: as promised by the caller.
    let bytes = unsafe { CStr::from_ptr(string) }.to_bytes();
    Some(to_utf8(bytes).map_or_else(|| String::from_utf8_lossy(bytes).into_owned(), std::borrow::Cow::into_owned))
}

fn client() -> Option<String> {
    // SAFETY: SQL functions without arguments, the last with one inet; NULL becomes None.
    unsafe {
        let address = pgrx::direct_function_call_as_datum(pg_sys::inet_client_addr, &[])?;
        let port = pgrx::direct_function_call::<i32>(pg_sys::inet_client_port, &[]).unwrap_or_default();
        let address = pgrx::direct_function_call_as_datum(pg_sys::inet_out, &[Some(address)])?;
        let address = <&CStr>::from_datum(address, false)?.to_string_lossy().into_owned();
        Some(format!("{address}:{port}"))
    }
}

/// PostgreSQL's timestamp, microseconds since 2000, as microseconds since 1970.
pub fn unix_us(timestamp: pg_sys::TimestampTz) -> i64 {
    const FROM_1970_TO_2000_US: i64 = 10_957 * 86_400 * 1_000_000;
    timestamp + FROM_1970_TO_2000_US
}
