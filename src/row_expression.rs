//! SQL expressions over a row, as a caller gives them to a job: parsed by PostgreSQL, checked, and written out again, so
//! that what runs is what was checked and nothing can be smuggled in beside it.
//!
//! They are stored and may be run later by somebody with more rights: so they call PostgreSQL's own functions only,
//! which cannot be a trap.

use std::ffi::{CStr, CString, c_void};

use pgrx::pg_sys::panic::ErrorReport;
use pgrx::pg_sys::{self, NodeTag, Oid, ParseExprKind};
use pgrx::prelude::PgSqlErrorCode as Code;
use pgrx::{PgList, PgRelation};

use crate::arguments::{InServerEncoding, from_utf8, to_utf8};
use crate::errors::throw;

/// What an expression is for, which decides its type and what it may depend on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The row's identity: text, and always the same for the same row, or values could not be opened again.
    Aad,
    /// The version of what is stored, as the application notes it.
    Version,
    /// Which rows.
    Filter,
}

impl Purpose {
    /// The purpose of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "aad" => Purpose::Aad,
            "version" => Purpose::Version,
            "where_clause" => Purpose::Filter,
            _ => return None,
        })
    }

    fn result(self) -> (Oid, &'static str) {
        match self {
            Purpose::Aad => (pg_sys::TEXTOID, "text"),
            Purpose::Version => (pg_sys::INT4OID, "integer"),
            Purpose::Filter => (pg_sys::BOOLOID, "boolean"),
        }
    }
}

/// Writes `expression` over a row of `table`, which is called `t` in the result.
///
/// Raises for everything that is not one expression of the purpose's type over the row's own columns. `changed` are
/// columns that the caller is about to change.
pub fn checked<'a>(table: Oid, expression: &str, purpose: Purpose, changed: &[String]) -> &'a CStr {
    // SAFETY: raises where there is no such table.
    let relation = unsafe { PgRelation::with_lock(table, pg_sys::AccessShareLock as pg_sys::LOCKMODE) };
    let raw = parse(table, expression);
    // SAFETY: `raw` is an expression of the raw parser; the parse state and everything made with it live in the current
    // memory context, and the relation is open until the end.
    unsafe {
        let state = pg_sys::make_parsestate(std::ptr::null_mut());
        let item = pg_sys::addRangeTableEntryForRelation(
            state,
            relation.as_ptr(),
            pg_sys::AccessShareLock as i32,
            std::ptr::null_mut(),
            false,
            true,
        );
        pg_sys::addNSItemToQuery(state, item, false, true, true);
        let node = pg_sys::transformExpr(state, raw, ParseExprKind::EXPR_KIND_CHECK_CONSTRAINT);
        let node = coerced(state, node, purpose);
        pg_sys::assign_expr_collations(state, node);
        let mut check = Check { table, purpose, changed };
        check_node(node, (&raw mut check).cast());
        if purpose == Purpose::Aad && pg_sys::contain_mutable_functions(node) {
            refuse_mutable()
        }
        let context = pg_sys::deparse_context_for(c"t".as_ptr(), table);
        // With the casts that PostgreSQL added: then every function and operator in it is found by its exact types, and
        // one of another schema that fits better cannot take its place.
        CStr::from_ptr(pg_sys::deparse_expression(node, context, true, true))
    }
}

/// One expression, as the raw parser gives it.
fn parse(mut table: Oid, expression: &str) -> *mut pg_sys::Node {
    let only_one = || -> ! {
        refuse(Code::ERRCODE_SYNTAX_ERROR, "it is not a single expression", "For example: provider || '/' || channel")
    };
    // The line break ends a comment that the expression may end with.
    let statement = format!("SELECT ({expression}\n)");
    let statement = match from_utf8(statement.as_bytes()) {
        InServerEncoding::Same => statement.into_bytes(),
        InServerEncoding::Converted(bytes) => bytes,
        InServerEncoding::Impossible => refuse(
            Code::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
            "it has characters that the database's encoding lacks",
            "",
        ),
    };
    let Ok(statement) = CString::new(statement) else { only_one() };
    // SAFETY: the parser gives a list of RawStmt nodes, each with a statement; nodes are read after their tag was.
    unsafe {
        let list = pg_sys::raw_parser(statement.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
        let statements = PgList::<pg_sys::RawStmt>::from_pg(list);
        let (1, Some(first)) = (statements.len(), statements.get_ptr(0)) else { only_one() };
        if (*(*first).stmt).type_ != NodeTag::T_SelectStmt {
            only_one()
        }
        let select = &*(*first).stmt.cast::<pg_sys::SelectStmt>();
        let is_bare = select.op == pg_sys::SetOperation::SETOP_NONE
            && [
                select.distinctClause,
                select.fromClause,
                select.groupClause,
                select.windowClause,
                select.valuesLists,
                select.sortClause,
                select.lockingClause,
            ]
            .iter()
            .all(|clause| clause.is_null())
            && [select.whereClause, select.havingClause, select.limitOffset, select.limitCount]
                .iter()
                .all(|clause| clause.is_null())
            && select.intoClause.is_null()
            && select.withClause.is_null();
        let targets = PgList::<pg_sys::ResTarget>::from_pg(select.targetList);
        let (true, 1, Some(target)) = (is_bare, targets.len(), targets.get_ptr(0)) else { only_one() };
        if !(*target).name.is_null() || !(*target).indirection.is_null() {
            only_one()
        }
        check_raw((*target).val, (&raw mut table).cast());
        (*target).val
    }
}

/// Refuses, before PostgreSQL looks at it any closer, what could make it read a literal as a type that is not its own:
/// that runs the type's input function and, for a domain, what its owner wrote. Gives `false`.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn check_raw(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    if node.is_null() {
        return false;
    }
    // SAFETY: the context is the table's OID; a node is read as what its tag says.
    unsafe {
        match (*node).type_ {
            NodeTag::T_TypeCast => {
                let cast = &*node.cast::<pg_sys::TypeCast>();
                check_type_name(cast.typeName);
                if !cast.arg.is_null() && (*cast.arg).type_ == NodeTag::T_ColumnRef {
                    // A column's value is only written out.
                    return false;
                }
            }
            NodeTag::T_FuncCall => {
                let name = (*node.cast::<pg_sys::FuncCall>()).funcname;
                check_qualification(name);
                // A type's name can be called like a function.
                check_type_name(pg_sys::makeTypeNameFromNameList(name));
            }
            NodeTag::T_A_Expr => check_qualification((*node.cast::<pg_sys::A_Expr>()).name),
            NodeTag::T_ColumnRef => check_column(*context.cast::<Oid>(), &*node.cast::<pg_sys::ColumnRef>()),
            _ => {}
        }
        pg_sys::raw_expression_tree_walker(node, Some(check_raw), context)
    }
}

/// # Safety
/// `name` is a type's name out of the raw parser.
unsafe fn check_type_name(name: *mut pg_sys::TypeName) {
    // SAFETY: as promised; looking up a type by name takes no parse state.
    unsafe {
        let found = pg_sys::LookupTypeName(std::ptr::null_mut(), name, std::ptr::null_mut(), true);
        if !found.is_null() {
            let oid = pg_sys::typeTypeId(found);
            pg_sys::ReleaseSysCache(found);
            check_type(oid);
        }
    }
}

/// Functions and operators of another schema take literals as their own types. What is not qualified is found in
/// pg_catalog: the search_path has nothing else.
///
/// # Safety
/// `name` is a list of strings out of the raw parser.
unsafe fn check_qualification(name: *mut pg_sys::List) {
    // SAFETY: as promised.
    unsafe {
        let parts = PgList::<pg_sys::Node>::from_pg(name);
        if parts.len() > 1 && parts.get_ptr(0).is_none_or(|schema| string(schema) != Some(c"pg_catalog")) {
            refuse_function()
        }
    }
}

/// # Safety
/// `node` is of the raw parser, and lives as long as the result is used.
unsafe fn string<'a>(node: *mut pg_sys::Node) -> Option<&'a CStr> {
    // SAFETY: as promised; the tag says what it is.
    unsafe { ((*node).type_ == NodeTag::T_String).then(|| CStr::from_ptr((*node.cast::<pg_sys::String>()).sval)) }
}

/// A column stands for itself where its type is PostgreSQL's own, or an enum; others are cast first.
///
/// # Safety
/// `column` is of the raw parser.
unsafe fn check_column(table: Oid, column: &pg_sys::ColumnRef) {
    // SAFETY: as promised; the catalog is looked up by name.
    unsafe {
        let parts = PgList::<pg_sys::Node>::from_pg(column.fields);
        let Some(name) = parts.get_ptr(parts.len().saturating_sub(1)).and_then(|name| string(name)) else { return };
        let number = pg_sys::get_attnum(table, name.as_ptr());
        if number > 0 {
            let oid = pg_sys::get_atttype(table, number);
            if pg_sys::get_typtype(oid) as u8 != pg_sys::TYPTYPE_ENUM {
                check_type(oid);
            }
        }
    }
}

fn check_type(oid: Oid) {
    if oid.to_u32() >= pg_sys::FirstNormalObjectId {
        refuse(
            Code::ERRCODE_FEATURE_NOT_SUPPORTED,
            "it makes a value of a type that is not PostgreSQL's own",
            "Cast the column to text and compare that.",
        )
    }
}

/// # Safety
/// `node` is a transformed expression of `state`.
unsafe fn coerced(state: *mut pg_sys::ParseState, node: *mut pg_sys::Node, purpose: Purpose) -> *mut pg_sys::Node {
    let (wanted, name) = purpose.result();
    // SAFETY: as promised by the caller.
    let coerced = unsafe {
        let coercion = match purpose {
            Purpose::Aad => pg_sys::CoercionContext::COERCION_IMPLICIT,
            _ => pg_sys::CoercionContext::COERCION_ASSIGNMENT,
        };
        let form = pg_sys::CoercionForm::COERCE_IMPLICIT_CAST;
        pg_sys::coerce_to_target_type(state, node, pg_sys::exprType(node), wanted, -1, coercion, form, -1)
    };
    if coerced.is_null() {
        refuse(Code::ERRCODE_DATATYPE_MISMATCH, &format!("it is not of type {name}"), "")
    }
    coerced
}

struct Check<'a> {
    table: Oid,
    purpose: Purpose,
    changed: &'a [String],
}

/// Looks at a node and all below it; raises for what is not allowed, else gives `false`.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn check_node(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    if node.is_null() {
        return false;
    }
    // SAFETY: the context is the `Check` that the walk was begun with; a node is read as what its tag says.
    unsafe {
        let check = &*context.cast::<Check<'_>>();
        match (*node).type_ {
            NodeTag::T_Var => check.column(&*node.cast::<pg_sys::Var>()),
            NodeTag::T_SubLink | NodeTag::T_Query | NodeTag::T_Param => {
                refuse(Code::ERRCODE_FEATURE_NOT_SUPPORTED, "it refers to more than the row", "")
            }
            NodeTag::T_List => {}
            NodeTag::T_CoerceViaIO => {
                check_type(pg_sys::exprType(node));
                // Its functions take C strings, which no other may.
                pg_sys::expression_tree_walker(node, Some(check_node), context);
                check.written_out(pg_sys::exprType((*node.cast::<pg_sys::CoerceViaIO>()).arg.cast()));
                return false;
            }
            _ => check_type(pg_sys::exprType(node)),
        }
        pg_sys::check_functions_in_node(node, Some(check_function), context);
        pg_sys::expression_tree_walker(node, Some(check_node), context)
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn check_function(function: Oid, context: *mut c_void) -> bool {
    if function.to_u32() >= pg_sys::FirstNormalObjectId {
        refuse_function()
    }
    // SAFETY: these look the function up in the catalog cache.
    let (volatility, parallel, is_set, takes_anything) = unsafe {
        let (mut types, mut count) = (std::ptr::null_mut(), 0);
        let result = pg_sys::get_func_signature(function, &raw mut types, &raw mut count);
        let arguments = if count > 0 { std::slice::from_raw_parts(types, count as usize) } else { &[] };
        let is_pseudo = |oid: &Oid| pg_sys::get_typtype(*oid) as u8 == pg_sys::TYPTYPE_PSEUDO;
        (
            pg_sys::func_volatile(function) as u8,
            pg_sys::func_parallel(function) as u8,
            pg_sys::get_func_retset(function),
            arguments.iter().chain([&result]).any(is_pseudo),
        )
    };
    // SAFETY: the context is the `Check` that the walk was begun with.
    let purpose = unsafe { (*context.cast::<Check<'_>>()).purpose };
    if purpose == Purpose::Aad && volatility != pg_sys::PROVOLATILE_IMMUTABLE {
        refuse_mutable()
    }
    // Those that may run other SQL are volatile or not safe in parallel workers.
    if volatility == pg_sys::PROVOLATILE_VOLATILE || parallel != pg_sys::PROPARALLEL_SAFE || is_set {
        refuse(
            Code::ERRCODE_INVALID_OBJECT_DEFINITION,
            "it calls a function that is volatile, returns a set or is not safe in parallel workers",
            "",
        )
    }
    // Those that take values of any type, or their text form beside a type's name, call that type's functions or casts.
    // SAFETY: looks the name up in the catalog cache.
    let name = unsafe { CStr::from_ptr(pg_sys::get_func_name(function)) };
    if takes_anything || name.to_bytes().starts_with(b"pg_input_") {
        refuse(
            Code::ERRCODE_FEATURE_NOT_SUPPORTED,
            &format!("it calls a function that takes or makes values of any type ({})", name.to_string_lossy()),
            "Cast columns to text and use functions on text.",
        )
    }
    false
}

impl Check<'_> {
    /// A value of this type is written out as text. For an aad that must not depend on a setting, whatever PostgreSQL
    /// says of the type's output function: floating point, bytea and geometric types have settings.
    fn written_out(&self, oid: Oid) {
        const STEADY: [Oid; 15] = [
            pg_sys::BOOLOID,
            pg_sys::INT2OID,
            pg_sys::INT4OID,
            pg_sys::INT8OID,
            pg_sys::NUMERICOID,
            pg_sys::TEXTOID,
            pg_sys::VARCHAROID,
            pg_sys::BPCHAROID,
            pg_sys::NAMEOID,
            pg_sys::CHAROID,
            pg_sys::UUIDOID,
            pg_sys::OIDOID,
            pg_sys::INETOID,
            pg_sys::CIDROID,
            pg_sys::MACADDROID,
        ];
        // SAFETY: looks the type up in the catalog cache.
        let is_enum = unsafe { pg_sys::get_typtype(oid) as u8 == pg_sys::TYPTYPE_ENUM };
        // SAFETY: as above.
        let base = unsafe { pg_sys::getBaseType(oid) };
        if self.purpose == Purpose::Aad && !is_enum && !STEADY.contains(&base) {
            refuse(
                Code::ERRCODE_INVALID_OBJECT_DEFINITION,
                "it writes out a value in a form that a setting can change",
                "Use encode() for bytea; other types are no identity of a row.",
            )
        }
    }

    fn column(&self, var: &pg_sys::Var) {
        if var.varattno <= 0 {
            refuse(Code::ERRCODE_FEATURE_NOT_SUPPORTED, "it refers to a system column or to the whole row", "")
        }
        if self.purpose != Purpose::Aad {
            return;
        }
        // SAFETY: looks the column up in the catalog cache; the table is open.
        let (name, generated) = unsafe {
            let name = CStr::from_ptr(pg_sys::get_attname(self.table, var.varattno, false));
            (to_utf8(name.to_bytes()).unwrap_or_default(), pg_sys::get_attgenerated(self.table, var.varattno) != 0)
        };
        if generated || self.changed.iter().any(|changed| *changed == name) {
            refuse(
                Code::ERRCODE_INVALID_OBJECT_DEFINITION,
                &format!("column \"{name}\" may change when the value is rewritten"),
                "An aad is made of columns that identify the row and stay as they are.",
            )
        }
    }
}

fn refuse_mutable() -> ! {
    refuse(
        Code::ERRCODE_INVALID_OBJECT_DEFINITION,
        "it does not give the same for the same row under every setting",
        "Use || on text, and cast what is not text with ::text; a time with AT TIME ZONE 'UTC' first.",
    )
}

fn refuse_function() -> ! {
    refuse(
        Code::ERRCODE_INSUFFICIENT_PRIVILEGE,
        "it calls a function that is not PostgreSQL's own",
        "The expression may be run by others later: only built-in functions and operators are allowed.",
    )
}

fn refuse(code: Code, why: &str, hint: &str) -> ! {
    let report = ErrorReport::new(code, why.to_owned(), "vod_tender_crypto");
    throw(if hint.is_empty() { report } else { report.set_hint(hint) })
}
