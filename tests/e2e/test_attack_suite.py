"""Attacks on values and keys by roles that may not: each test says the privilege it starts from, what it tries, and the
error that it ends in. The same attacks through other people's code are in test_attack_trojans.py, through settings in
test_attack_settings.py."""

from __future__ import annotations

import contextlib
import json

import psycopg
import pytest

from forgery import Envelope
from helpers import add_local_key, new_key, one
from roles import ALL, call_count, decrypted, direct, encrypted, execute_on_all
from sqlstate import INVALID_PARAMETER, MALFORMED_TEXT, NO_RIGHT, NOT_READY, UNKNOWN_KEY, UNVERIFIED, fails

PARALLEL = """
    SET min_parallel_table_scan_size = 0; SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0;
    SET max_parallel_workers_per_gather = 4; SET {mode} = on"""


@pytest.fixture
def admin(database):
    """A superuser's session."""
    with database.connect() as session:
        yield session


@pytest.fixture
def tenants(database, admin):
    """Two keys, a and b, each for its own tenant's context."""
    for name in "ab":
        add_local_key(database, admin, name, json.dumps({"tenant": name}), default=False)
    return database


def denied(privilege: str, key: str):
    """The block must be refused for want of this privilege on this key."""
    return fails(NO_RIGHT, f'permission denied to {privilege} with key "{key}"')


def switching(people, *roles: str) -> str:
    """A login role that has no rights itself and may SET ROLE to these."""
    return people.make("pooled", f"LOGIN NOINHERIT IN ROLE {', '.join(roles)}")


# -- without the right -------------------------------------------------------------------------------------------


def test_decrypting_without_execute(database, admin, people):
    """From: a login and the ciphertext. Tries: every function on values. Ends in: 42501, for each function."""
    value = encrypted(admin)
    nobody, reader = people.make("nobody"), people.may("default", "decrypt")
    with database.connect(reader) as user:
        assert decrypted(user, value) == "token"
    with database.connect(nobody) as user:
        for function in ("envelope_encrypt", "envelope_decrypt", "rewrap", "envelope_upgrade", "envelope_downgrade"):
            with fails(NO_RIGHT, f"permission denied for function {function}"):
                one(user, f"SELECT {function}(%s::text)", value)


def test_a_denied_role_causes_no_call_to_the_key_service(database, admin, people, kms):
    """From: EXECUTE on everything, no key. Tries: every use of a key. Ends in: 42501, and the key service hears nothing."""
    admin.execute("SELECT vod_tender_crypto.add_key('aws', %s)", [kms.kek_uri()])
    add_local_key(database, admin, "mine", default=False)
    value, mine = encrypted(admin, key="aws"), encrypted(admin, key="mine")
    role = people.may("mine", *ALL)
    heard = len(kms.requests)
    with database.connect(role) as user:
        for call in (f"envelope_decrypt('{value}')", "envelope_encrypt('x'::text, key => 'aws')",
                     "envelope_upgrade('x'::text, key => 'aws', version => 0)", f"envelope_downgrade('{value}')",
                     f"rewrap('{value}', 'mine')", f"rewrap('{mine}', 'aws')"):
            with fails(NO_RIGHT, "with key"):
                one(user, f"SELECT {call}")
        assert call_count(user) == 0 and len(kms.requests) == heard
        people.grant("aws", role, "decrypt")
        assert decrypted(user, value) == "token"
        assert call_count(user) == 1 and len(kms.requests) == heard + 1


def test_trying_until_something_differs(tenants, admin, people):
    """From: EXECUTE, no key; PL/pgSQL that catches errors. Tries: right and wrong aads, contexts, versions, tampered and
    truncated payloads, a plaintext of another length, with the data key cached in the session and not. Ends in: 42501 with
    the same words for all of them."""
    role = people.make("oracle")
    execute_on_all(people, role)
    values = {"value": encrypted(admin, "token", key="a", aad="row"),
              "other": encrypted(admin, "another plaintext", key="a", aad="row")}
    sealed = Envelope.of(values["value"])
    values["tampered"] = sealed.with_(payload=sealed.payload[:-1] + bytes([sealed.payload[-1] ^ 1])).text()
    values["cut"] = sealed.with_(payload=sealed.payload[:-3]).text()
    values["moved"] = sealed.with_(commitment=bytes(32)).text()
    probes = [f"'{v}'{arguments}" for v in values.values()
              for arguments in (", 'row'", "", ", 'wrong'", ", 'row', '{\"tenant\": \"b\"}'", ", 'row', NULL, 2")]
    probe = """
        CREATE FUNCTION pg_temp.probe(call text) RETURNS text LANGUAGE plpgsql AS $$
        DECLARE d text; h text;
        BEGIN
            EXECUTE 'SELECT envelope_decrypt(' || call || ')';
            RETURN 'nothing';
        EXCEPTION WHEN OTHERS THEN
            GET STACKED DIAGNOSTICS d = PG_EXCEPTION_DETAIL, h = PG_EXCEPTION_HINT;
            RETURN concat_ws('/', SQLSTATE, SQLERRM, d, h);
        END $$"""
    reader = people.may("a", "decrypt")
    login = switching(people, role, reader)
    with tenants.connect(login) as user:
        user.execute(probe)
        user.execute(f"GRANT USAGE ON SCHEMA {one(user, 'SELECT pg_my_temp_schema()::regnamespace::text')} TO PUBLIC")
        answers = set()
        for filler in (None, reader):
            if filler:
                user.execute(f"SET ROLE {filler}")
                assert one(user, "SELECT envelope_decrypt(%s, 'row')", values["value"]) == "token"
                assert len({one(user, "SELECT pg_temp.probe(%s)", each) for each in probes}) > 3, "a reader is told"
            user.execute(f"SET ROLE {role}")
            answers |= {one(user, "SELECT pg_temp.probe(%s)", each) for each in probes}
    assert len(answers) == 1
    assert answers.pop().startswith('42501/permission denied to decrypt with key "a"')


def test_a_denied_call_leaves_a_usable_session(database, admin, people):
    """From: EXECUTE, no key. Tries: going on after the refusal, within savepoints and PL/pgSQL blocks, so that something is
    left half done. Ends in: 42501 each time; the same session's next role is served as always."""
    value = encrypted(admin)
    role, reader = people.make("stubborn"), people.may("default", "decrypt")
    execute_on_all(people, role)
    with database.connect(switching(people, role, reader)) as user:
        user.execute("BEGIN")
        for _ in range(3):
            user.execute(f"SET LOCAL ROLE {role}; SAVEPOINT s")
            with denied("decrypt", "default"):
                decrypted(user, value)
            user.execute(f"ROLLBACK TO s; SET LOCAL ROLE {reader}")
            assert decrypted(user, value) == "token"
        user.execute("COMMIT")


# -- one session, several roles ----------------------------------------------------------------------------------


def test_what_another_role_cached(database, admin, people):
    """From: SET ROLE to a role without the key, in a session where another one has just used it. Tries: the cached data
    keys, for opening and for sealing, and what a rewrap learned. Ends in: 42501, in both orders."""
    add_local_key(database, admin, "next", default=False)
    value = encrypted(admin)
    full, empty = people.may("default", *ALL, what="full"), people.make("empty")
    people.grant("next", full, "rewrap")
    execute_on_all(people, empty)
    login = switching(people, full, empty)

    def uses(user) -> "list[str]":
        return [decrypted(user, value), encrypted(user)[:7],
                one(user, "SELECT rewrap(%s, 'default')", value)[:7]]

    def refused(user) -> None:
        for statement in ("envelope_decrypt(%s)", "envelope_encrypt('x' || left(%s, 0))", "rewrap(%s, 'default')"):
            with fails(NO_RIGHT, "with key"):
                one(user, f"SELECT {statement}", value)

    for first in ("full", "empty"):
        with database.connect(login) as user:
            for turn in ("full", "empty", "full", "empty")[first == "empty":]:
                user.execute(f"SET ROLE {full if turn == 'full' else empty}")
                if turn == "full":
                    assert uses(user) == ["token", "kms:v2:", "kms:v2:"]
                else:
                    refused(user)
            user.execute("SET ROLE NONE")
            with fails(NO_RIGHT):
                decrypted(user, value)


def test_what_a_rewrap_learned_for_another_role(database, admin, people):
    """From: rewrap on the target only. Tries: a header that another role of the session has just moved, so that no key
    has to be asked. Ends in: 42501."""
    add_local_key(database, admin, "next", default=False)
    value = encrypted(admin)
    mover, half = people.may("default", "rewrap", what="mover"), people.may("next", "rewrap", what="half")
    people.grant("next", mover, "rewrap")
    with database.connect(switching(people, mover, half)) as user:
        user.execute(f"SET ROLE {mover}")
        assert one(user, "SELECT rewrap(%s, 'next')", value) != value
        user.execute(f"SET ROLE {half}")
        with denied("rewrap", "default"):
            one(user, "SELECT rewrap(%s, 'next')", value)


def test_changing_the_role_within_one_statement(database, admin, people):
    """From: SET ROLE through set_config() between two calls of one statement. Tries: the second role's call under what was
    asked for the first. Ends in: 42501."""
    value = encrypted(admin)
    reader, empty = people.may("default", "decrypt"), people.make("empty")
    execute_on_all(people, empty)
    change = "SELECT envelope_decrypt(%(v)s) || set_config('role', %(role)s, false) || envelope_decrypt(%(v)s)"
    with database.connect(switching(people, reader, empty)) as user:
        user.execute(f"SET ROLE {reader}")
        with denied("decrypt", "default"):
            user.execute(change, {"v": value, "role": empty})
        assert user.execute(change, {"v": value, "role": reader}).fetchone() == (f"token{reader}token",)


def test_changing_who_logged_in(database, admin, people):
    """From: a superuser's session that becomes somebody else. Tries: what the superuser cached; an ordinary role tries to
    become somebody by itself. Ends in: 42501."""
    value = encrypted(admin)
    reader, empty = people.may("default", "decrypt"), people.make("empty")
    execute_on_all(people, empty)
    assert decrypted(admin, value) == "token"
    admin.execute(f"SET SESSION AUTHORIZATION {empty}")
    with denied("decrypt", "default"):
        decrypted(admin, value)
    admin.execute(f"SET SESSION AUTHORIZATION {reader}")
    assert decrypted(admin, value) == "token"
    admin.execute("RESET SESSION AUTHORIZATION")
    assert decrypted(admin, value) == "token"
    with database.connect(empty) as user:
        for statement in (f"SET SESSION AUTHORIZATION {reader}", f"SET ROLE {reader}", "SET ROLE postgres"):
            with fails(NO_RIGHT):
                user.execute(statement)


def test_a_plan_that_another_role_prepared(database, admin, people):
    """From: SET ROLE to a role without the key. Tries: EXECUTE of what the other role has prepared and run. Ends in: 42501."""
    value = encrypted(admin)
    reader, empty = people.may("default", "decrypt"), people.make("empty")
    execute_on_all(people, empty)
    with database.connect(switching(people, reader, empty)) as user:
        user.execute(f"SET ROLE {reader}")
        user.execute("PREPARE p(text) AS SELECT envelope_decrypt($1)")
        for _ in range(7):
            assert one(user, f"EXECUTE p('{value}')") == "token"
        user.execute(f"SET ROLE {empty}")
        with denied("decrypt", "default"):
            one(user, f"EXECUTE p('{value}')")


def test_a_cursor_that_another_role_opened(database, admin, people):
    """From: SET ROLE to a role without the key. Tries: FETCH from the cursor of one that has it. Ends in: 42501 while the
    cursor still computes. What WITH HOLD has kept at the commit was computed for the role that committed: that is a copy
    of the plaintext in the session like any other, and not refused."""
    admin.execute("CREATE TABLE tokens AS SELECT envelope_encrypt('token') AS v FROM generate_series(1, 5)")
    reader, empty = people.may("default", "decrypt"), people.make("empty")
    execute_on_all(people, empty)
    admin.execute(f"GRANT SELECT ON tokens TO {reader}")
    with database.connect(switching(people, reader, empty)) as user:
        for hold in ("WITHOUT HOLD", "WITH HOLD"):
            user.execute(f"BEGIN; SET LOCAL ROLE {reader}")
            user.execute(f"DECLARE c CURSOR {hold} FOR SELECT envelope_decrypt(v) FROM tokens")
            assert user.execute("FETCH 1 FROM c").fetchall() == [("token",)]
            user.execute(f"SET LOCAL ROLE {empty}")
            with denied("decrypt", "default"):
                user.execute("FETCH 1 FROM c")
            user.execute("ROLLBACK")
        kept = "DECLARE kept CURSOR WITH HOLD FOR SELECT envelope_decrypt(v) FROM tokens"
        user.execute(f"BEGIN; SET LOCAL ROLE {reader}; {kept}; SET LOCAL ROLE {empty}")
        with denied("decrypt", "default"):
            user.execute("COMMIT")
        user.execute(f"BEGIN; SET LOCAL ROLE {reader}; {kept}; COMMIT")
        user.execute(f"SET ROLE {empty}")
        assert user.execute("FETCH 1 FROM kept").fetchall() == [("token",)]


# -- SECURITY DEFINER --------------------------------------------------------------------------------------------


def definer(admin, owner: str, name: str = "as_owner", body: str = "SELECT envelope_decrypt(v)") -> None:
    """A function of `owner`'s that decrypts with its owner's rights, and that everybody may call."""
    admin.execute(f"""
        CREATE FUNCTION {name}(v text) RETURNS text LANGUAGE sql SECURITY DEFINER
            SET search_path = public, pg_temp AS '{body}';
        ALTER FUNCTION {name}(text) OWNER TO {owner}""")


def test_a_function_whose_owner_may(database, admin, people):
    """From: EXECUTE on a SECURITY DEFINER function whose owner has the key (or owns all keys). Tries: its owner's right.
    Ends in: 42501, because the caller has none; a caller that has it is served."""
    value = encrypted(admin)
    owner = people.may("default", "decrypt", what="definer")
    definer(admin, owner)
    definer(admin, "postgres", "as_superuser")
    empty, reader = people.make("empty"), people.may("default", "decrypt")
    execute_on_all(people, empty)
    with database.connect(empty) as user, database.connect(reader) as entitled:
        for function in ("as_owner", "as_superuser"):
            with denied("decrypt", "default"):
                one(user, f"SELECT {function}(%s)", value)
            assert one(entitled, f"SELECT {function}(%s)", value) == "token"


def test_a_function_whose_owner_may_not(database, admin, people):
    """From: owning a SECURITY DEFINER function that a privileged role, or a superuser, calls. Tries: the caller's right.
    Ends in: 42501, because the owner has none."""
    value = encrypted(admin)
    mallory, reader = people.make("mallory"), people.may("default", "decrypt")
    execute_on_all(people, mallory)
    definer(admin, mallory)
    with database.connect(reader) as user:
        for caller in (user, admin):
            with denied("decrypt", "default"):
                one(caller, "SELECT as_owner(%s)", value)
            assert decrypted(caller, value) == "token"
        people.grant("default", mallory, "decrypt")
        assert one(user, "SELECT as_owner(%s)", value) == "token"


def test_functions_in_functions(database, admin, people):
    """From: a SECURITY DEFINER function of somebody's that may, around one of somebody's that may not, and the other way
    round. Tries: losing sight of who called. Ends in: 42501 where the innermost owner or the caller may not."""
    value = encrypted(admin)
    may, may_not = people.may("default", "decrypt", what="may"), people.make("may_not")
    execute_on_all(people, may_not)
    definer(admin, may, "inner_may")
    definer(admin, may_not, "inner_may_not")
    definer(admin, may_not, "around_may", "SELECT inner_may(v)")
    definer(admin, may, "around_may_not", "SELECT inner_may_not(v)")
    with database.connect(may) as user, database.connect(may_not) as stranger:
        assert one(user, "SELECT inner_may(%s)", value) == "token"
        assert one(user, "SELECT around_may(%s)", value) == "token"
        with denied("decrypt", "default"):
            one(user, "SELECT around_may_not(%s)", value)
        with denied("decrypt", "default"):
            one(stranger, "SELECT around_may(%s)", value)


def test_a_function_that_changes_the_role(database, admin, people):
    """From: a function of one's own that becomes a role with the key, by its SET clause or in its body, and that runs as
    its owner or its caller. Tries: that role's right. Ends in: 42501, unless the caller may become that role by itself."""
    value = encrypted(admin)
    mallory, reader = people.attacker(), people.may("default", "decrypt")
    execute_on_all(people, mallory)
    with database.connect(mallory) as user:
        for clause, body in ((f"SET role = '{reader}'", ""), (f"SECURITY DEFINER SET role = '{reader}'", ""),
                             ("", f"SET ROLE {reader};"), ("SECURITY DEFINER", f"SET ROLE {reader};"),
                             ("SECURITY DEFINER", f"PERFORM set_config('role', '{reader}', false);"),
                             ("SECURITY DEFINER", f"PERFORM set_config('session_authorization', '{reader}', false);")):
            with fails(NO_RIGHT):
                user.execute(f"""
                    CREATE OR REPLACE FUNCTION become(v text) RETURNS text LANGUAGE plpgsql {clause} AS
                        $$ BEGIN {body} RETURN public.envelope_decrypt(v); END $$""")
                one(user, "SELECT become(%s)", value)
    member = people.make("member", f"LOGIN NOINHERIT IN ROLE {reader}")
    admin.execute(f"""
        CREATE FUNCTION become(v text) RETURNS text LANGUAGE plpgsql SET role = '{reader}' AS
            $$ BEGIN RETURN public.envelope_decrypt(v); END $$""")
    with database.connect(member) as user:
        assert one(user, "SELECT become(%s)", value) == "token"
        with fails(NO_RIGHT):
            decrypted(user, value)


# -- the executor's other ways -----------------------------------------------------------------------------------


def test_parallel_workers(database, admin, people):
    """From: no key, and settings that make PostgreSQL plan in parallel. Tries: workers that know nothing of the caller.
    Ends in: 42501; and whoever may gets all values right."""
    mode = "debug_parallel_query" if one(admin, "SELECT current_setting('server_version_num')::int") >= 160000 \
        else "force_parallel_mode"
    admin.execute("CREATE TABLE tokens AS SELECT g, envelope_encrypt('t' || g) AS v FROM generate_series(1, 20000) g")
    admin.execute("ANALYZE tokens")
    reader, empty = people.may("default", "decrypt"), people.make("empty")
    execute_on_all(people, empty)
    admin.execute(f"GRANT SELECT ON tokens TO {reader}, {empty}")
    # Above the workers: the functions themselves are PARALLEL RESTRICTED.
    query = """SELECT count(*) FILTER (WHERE envelope_decrypt(v) = 't' || g)
               FROM (SELECT g, v FROM tokens WHERE hashtext(v) IS NOT NULL) t"""
    with database.connect(reader) as user, database.connect(empty) as stranger:
        for session in (user, stranger):
            session.execute(PARALLEL.format(mode=mode))
        plan = "\n".join(row[0] for row in user.execute(f"EXPLAIN {query}").fetchall())
        assert "Gather" in plan, plan
        assert one(user, query) == 20000
        with denied("decrypt", "default"):
            one(stranger, query)
        people.revoke("default", reader)
        with fails(NO_RIGHT):
            one(user, query)


def test_copy(database, admin, people):
    """From: SELECT and INSERT on the table, no key. Tries: COPY out, of the table and of a query that decrypts; COPY in, of
    a value taken from another row. Ends in: ciphertext; 42501; a value that does not open there (39000)."""
    admin.execute("CREATE TABLE tokens (id int PRIMARY KEY, v text)")
    admin.execute("INSERT INTO tokens SELECT g, envelope_encrypt('t' || g, aad => g::text) FROM generate_series(1, 2) g")
    empty = people.make("empty")
    execute_on_all(people, empty)
    admin.execute(f"GRANT SELECT, INSERT ON tokens TO {empty}")
    with database.connect(empty) as user:
        with user.cursor().copy("COPY tokens TO STDOUT") as out:
            stored = b"".join(bytes(piece) for piece in out).decode().splitlines()
        assert all("kms:v2:" in line for line in stored)
        with denied("decrypt", "default"), user.cursor().copy(
                "COPY (SELECT envelope_decrypt(v, id::text) FROM tokens) TO STDOUT") as out:
            list(out)
        with user.cursor().copy("COPY tokens FROM STDIN") as into:
            into.write("3\t" + stored[0].split("\t")[1] + "\n")
    with admin.cursor().copy("COPY (SELECT envelope_decrypt(v, id::text) FROM tokens WHERE id < 3) TO STDOUT") as out:
        assert b"".join(bytes(piece) for piece in out) == b"t1\nt2\n"
    with fails(UNVERIFIED):
        one(admin, "SELECT envelope_decrypt(v, id::text) FROM tokens WHERE id = 3")


# -- detours -----------------------------------------------------------------------------------------------------


def test_moving_a_value_to_a_key_that_one_may_read(tenants, admin, people):
    """From: decrypt on a, rewrap on a and b. Tries: rewrap() of b's value to a, to read it there. Ends in: 42501."""
    value = encrypted(admin, key="b")
    plain = encrypted(admin)
    role = people.may("a", *ALL)
    people.grant("b", role, "rewrap")
    people.grant("default", role, "decrypt", "rewrap")
    with tenants.connect(role) as user:
        with denied("decrypt", "b"):
            one(user, "SELECT rewrap(%s, 'default')", value)
        with fails(INVALID_PARAMETER, "does not include what key"):
            one(user, "SELECT rewrap(%s, 'a')", value)
        assert decrypted(user, plain) == "token"
        people.revoke("default", role, "decrypt")
        moved = one(user, "SELECT rewrap(%s, 'default')", value)
        with denied("decrypt", "default"):
            decrypted(user, moved)
    assert decrypted(admin, moved) == "token"


def test_moving_a_value_through_the_legacy_format(tenants, admin, people):
    """From: rewrap on b, encrypt and rewrap on legacy, everything on a. Tries: down from b to version 1, up again to a.
    Ends in: 42501 at the second step; with the right to read version 1, at the first one."""
    value = encrypted(admin, key="b")
    role = people.may("a", *ALL)
    people.grant("b", role, "rewrap")
    people.grant("legacy", role, "encrypt", "rewrap")
    with tenants.connect(role) as user:
        down = one(user, "SELECT envelope_downgrade(%s)", value)
        assert one(user, "SELECT envelope_version(%s)", down) == 1
        for version in ("", ", version => 1"):
            with denied("decrypt", "legacy"):
                one(user, f"SELECT envelope_upgrade(%s, key => 'a'{version})", down)
        with fails(INVALID_PARAMETER):
            one(user, "SELECT envelope_upgrade(%s, key => 'a', version => 0)", down)
        with denied("decrypt", "legacy"):
            decrypted(user, down)
        people.grant("legacy", role, "decrypt")
        with denied("decrypt", "b"):
            one(user, "SELECT envelope_downgrade(%s)", value)
    assert decrypted(admin, down) == "token"


def task(operation: str, key: "str | None" = None, **more) -> str:
    """What jobs pass to their functions."""
    return json.dumps({"operation": operation, "key": key, "check_wraps": True, "aad_given": False, **more})


def test_the_jobs_functions_as_a_detour(tenants, admin, people):
    """From: grant_jobs(), no key. Tries: every function that jobs call on values, by itself. Ends in: 42501, raised or
    given as the value's error; nothing gives a plaintext, a data key, or a value that this role may open."""
    value, old = encrypted(admin, key="b"), direct(admin)
    role = people.make("job_runner")
    execute_on_all(people, role)
    admin.execute("SELECT vod_tender_crypto.grant_jobs(%s::regrole)", [role])
    head = one(admin, "SELECT vod_tender_crypto.needed_head(%s::text)", value)
    with tenants.connect(role) as user:
        def error_of(operation, stored, key=None):
            """The SQLSTATE by which a value is refused."""
            try:
                return one(user, "SELECT vod_tender_crypto.conversion_error(%s, %s::text, NULL, %s)",
                           task(operation, key), stored, 0 if stored == "plaintext" else None)
            except psycopg.Error as error:
                return error.sqlstate

        for operation, stored, key in (("verify", value, None), ("verify", old, None), ("downgrade", value, None),
                                       ("rewrap_table", value, "b"), ("rewrap_table", value, "a"),
                                       ("migrate", old, "a"), ("migrate", "plaintext", "a")):
            state = error_of(operation, stored, key)
            assert state == NO_RIGHT or (operation, key, state) in {
                ("downgrade", None, "retry"), ("rewrap_table", "b", None)}, (operation, key, state)
            try:
                made = one(user, "SELECT vod_tender_crypto.convert_value(%s, %s::text, NULL, %s)",
                           task(operation, key), stored, 0 if stored == "plaintext" else None)
            except psycopg.Error as error:
                assert error.sqlstate == NO_RIGHT
                made = None
            assert made in (None, stored)
        for operation, key in (("verify", None), ("downgrade", None), ("rewrap_table", "a"), ("migrate", "a")):
            before = one(user, "SELECT vod_tender_crypto.session_stats()->>'deks_made'")
            try:
                user.execute("SELECT vod_tender_crypto.prepare_batch(%s, %s, 10, 10)", [task(operation, key), [head]])
            except psycopg.Error as error:
                assert error.sqlstate in (NO_RIGHT, INVALID_PARAMETER)
            assert one(user, "SELECT vod_tender_crypto.session_stats()->>'deks_made'") == before
            assert one(user, "SELECT vod_tender_crypto.session_stats()->>'cached_deks'") == "0"
        with fails(NO_RIGHT):
            user.execute("SELECT * FROM vod_tender_crypto.job_key('migrate', 'a', NULL)")
        assert one(user, "SELECT vod_tender_crypto.needed_head(%s::text)", value) == head
        assert b"token" not in bytes(head)
        with fails(NO_RIGHT):
            decrypted(user, value)
    # The same calls do something for a role that may.
    people.grant("b", role, "decrypt")
    with tenants.connect(role) as user:
        user.execute("SELECT vod_tender_crypto.prepare_batch(%s, %s, 10, 10)", [task("verify"), [head]])
        assert one(user, "SELECT vod_tender_crypto.conversion_error(%s, %s::text, NULL, NULL)", task("verify"), value) is None


def test_jobs_on_ones_own_table(tenants, admin, people):
    """From: grant_jobs() and a table of one's own with stolen ciphertext. Tries: migrate, rewrap and downgrade jobs, and
    verify(). Ends in: 42501; nothing in the table has changed."""
    role = people.attacker()
    execute_on_all(people, role)
    admin.execute("SELECT vod_tender_crypto.grant_jobs(%s::regrole)", [role])
    value = encrypted(admin, key="b")
    with tenants.connect(role) as user:
        user.execute("CREATE TABLE loot (id int PRIMARY KEY, v text)")
        user.execute("INSERT INTO loot VALUES (1, %s), (2, 'plain')", [value])
        for call in ("downgrade('loot', columns => '{v}')", "rewrap_table('loot', key => 'a', columns => '{v}')",
                     "migrate('loot', columns => '{v}', key => 'a')"):
            with pytest.raises(psycopg.Error):
                user.execute(f"CALL vod_tender_crypto.{call}")
        assert user.execute("SELECT v FROM loot ORDER BY id").fetchall() == [(value,), ("plain",)]
        people.grant("a", role, "encrypt")
        user.execute("CALL vod_tender_crypto.migrate('loot', columns => '{v}', key => 'a', context => '{\"tenant\": \"a\"}',"
                     " where_clause => 'id = 2', version => '0')")
        assert one(user, "SELECT envelope_info(v)->>'key' FROM loot WHERE id = 2") == "a"


def test_what_is_public_shows_no_plaintext(database, admin, people, kms):
    """From: a login. Tries: the functions that everybody may call, on values of every version. Ends in: what is stored in
    clear; the key service hears nothing."""
    admin.execute("SELECT vod_tender_crypto.add_key('aws', %s)", [kms.kek_uri()])
    secret = "a plaintext that is nowhere to be seen"
    values = [encrypted(admin, secret, key="aws", aad="row"), encrypted(admin, secret), direct(admin, secret)]
    heard, nobody = len(kms.requests), people.make("nobody")
    with database.connect(nobody) as user:
        for version, value in zip((2, 2, 1), values):
            shown = one(user, "SELECT envelope_info(%(v)s)::text || envelope_version(%(v)s) || is_envelope(%(v)s)"
                              .replace("%(v)s", f"'{value}'"))
            assert f'"version": {version}' in shown
            assert secret not in shown and "dek" not in shown.lower().replace("wrapped_dek", "")
        stats = json.dumps(one(user, "SELECT vod_tender_crypto.session_stats()"))
        user.execute("SELECT envelope_cache_clear()")
        assert secret not in stats and call_count(user) == 0 and len(kms.requests) == heard


# -- the extension's own tables ----------------------------------------------------------------------------------

TABLES = ["kek", "key_grant", "honey", "audit_record", "audit_chain", "protected_column", "job", "job_error"]


@pytest.mark.parametrize("with_jobs", [False, True], ids=["an ordinary role", "with grant_jobs"])
def test_writing_the_extensions_tables(database, admin, people, with_jobs):
    """From: a login; the same with grant_jobs() and every privilege on a key. Tries: giving itself rights and keys by
    writing the tables. Ends in: 42501."""
    role = people.may("default", *ALL, what="writer")
    open_to_jobs = {"protected_column", "job", "job_error"} if with_jobs else set()
    if with_jobs:
        admin.execute("SELECT vod_tender_crypto.grant_jobs(%s::regrole)", [role])
    with database.connect(role) as user:
        for table in TABLES:
            for statement in ("DELETE FROM {}", "TRUNCATE {} CASCADE", "SELECT * FROM {}", "INSERT INTO {} DEFAULT VALUES",
                              "DO $$ BEGIN LOCK TABLE {} IN ACCESS EXCLUSIVE MODE; END $$", "ALTER TABLE {} DISABLE TRIGGER ALL",
                              "COPY {} FROM STDIN", "CREATE TRIGGER t BEFORE INSERT ON {} EXECUTE FUNCTION "
                              "vod_tender_crypto.kek_changed()", "CREATE RULE r AS ON INSERT TO {} DO NOTHING"):
                if table in open_to_jobs and statement.startswith(("DELETE", "SELECT", "INSERT", "DO", "COPY")):
                    continue
                with fails(NO_RIGHT):
                    user.execute(statement.format(f"vod_tender_crypto.{table}"))
        for call in ("grant_key('default', current_user::regrole, '{decrypt}')", "revoke_key('default', 'postgres')",
                     "add_key('mine', 'local:///x')", "drop_key('default')", "set_key_state('default', 'active')",
                     "retire_key('default')", "grant_jobs('postgres')", "grant_audit('postgres')", "prune_audit(now())",
                     "watch_honey('x'::text)", "store_audit('{}', '{}', '{}', '{}')", "honey_mark('x'::text)"):
            with fails(NO_RIGHT, "permission denied for function"):
                user.execute(f"SELECT vod_tender_crypto.{call}")


def test_job_rows_of_other_peoples_tables(database, admin, people):
    """From: grant_jobs(), and no right on the table. Tries: a job on it, put into the table of jobs by hand and resumed;
    a registration that tells others a wrong key. Ends in: 42501 (row-level security)."""
    role = people.make("job_runner")
    execute_on_all(people, role)
    admin.execute("SELECT vod_tender_crypto.grant_jobs(%s::regrole)", [role])
    admin.execute("CREATE TABLE tokens (id int PRIMARY KEY, v text); INSERT INTO tokens VALUES (1, 'plain')")
    insert = """INSERT INTO vod_tender_crypto.job (operation, target, columns, aads, versions, batch_size, percent,
                    max_errors, triggers, check_wraps, dry_run, where_clause)
                VALUES ('migrate', %s::regclass, '{v}', '{NULL}', '{NULL}', 10, 100, 0, 'fire', true, false, %s)"""
    with database.connect(role) as user:
        with fails(NO_RIGHT, "row-level security"):
            user.execute(insert, ["tokens", None])
        with fails(NO_RIGHT, "row-level security"):
            user.execute("INSERT INTO vod_tender_crypto.protected_column VALUES ('public', 'tokens', 'v', 'default')")
    assert one(admin, "SELECT v FROM tokens") == "plain"


def test_locking_other_peoples_tables(database, admin, people):
    """From: grant_jobs(). Tries: the function by which jobs lock tables, on a table and a catalog that one has no right on,
    to keep others waiting. Ends in: 42501, without a lock."""
    role = people.attacker()
    admin.execute("SELECT vod_tender_crypto.grant_jobs(%s::regrole)", [role])
    admin.execute("CREATE TABLE tokens (id int PRIMARY KEY, v text)")
    held = "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND relation = %s::regclass"
    with database.connect(role) as user:
        user.execute("CREATE TABLE mine (id int)")
        user.execute("BEGIN")
        user.execute("SELECT vod_tender_crypto.lock_relation('mine'::regclass, true)")
        assert one(user, held, "mine") == 1
        for table, writes in (("public.tokens", False), ("public.tokens", True), ("pg_authid", False), ("pg_class", True)):
            user.execute("SAVEPOINT s")
            with fails(NO_RIGHT, "permission denied to lock"):
                user.execute("SELECT vod_tender_crypto.lock_relation(%s::regclass, %s)", [table, writes])
            user.execute("ROLLBACK TO s")
            assert table == "pg_class" or one(user, held, table) == 0
        user.execute("COMMIT")


def test_a_job_row_for_a_superuser_to_resume(database, admin, people):
    """From: grant_jobs() and a table of one's own. Tries: a where_clause put into the job by hand that calls a function of
    one's own, for a superuser to run with resume(). Ends in: an error before PostgreSQL reads it closer; the function is
    not called."""
    role = people.attacker()
    execute_on_all(people, role)
    admin.execute("SELECT vod_tender_crypto.grant_jobs(%s::regrole)", [role])
    with database.connect(role) as user:
        user.execute("CREATE TABLE mine (id int PRIMARY KEY, v text); INSERT INTO mine VALUES (1, 'plain')")
        user.execute("CREATE FUNCTION boom() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'boom' USING "
                     "ERRCODE = 'XX001'; END $$")
        job = one(user, f"""
            INSERT INTO vod_tender_crypto.job (operation, target, columns, aads, versions, batch_size, percent, max_errors,
                triggers, check_wraps, dry_run, state, where_clause)
            VALUES ('migrate', 'mine', '{{v}}', '{{NULL}}', '{{NULL}}', 10, 100, 0, 'fire', true, false, 'stopped',
                    '{role}.boom()') RETURNING job""")
    with pytest.raises(psycopg.Error) as caught:
        admin.execute(f"CALL vod_tender_crypto.resume({job})")
    assert caught.value.sqlstate not in ("XX001", None) and "boom" not in (caught.value.diag.context or "")


def test_writing_grants_through_views_and_rules(database, admin, people):
    """From: views and rules of one's own over the extension's tables, which a superuser writes through. Tries: a grant for
    oneself. Ends in: 42501, for the superuser too: PostgreSQL asks for the view's owner's rights."""
    mallory = people.attacker()
    row = f"('default', to_regrole('{mallory}'), 'decrypt')"
    with database.connect(mallory) as user:
        user.execute("CREATE TABLE innocent (x int)")
        user.execute("CREATE VIEW grants AS SELECT key, role, privilege FROM vod_tender_crypto.key_grant")
        user.execute(f"CREATE RULE r AS ON INSERT TO innocent DO ALSO INSERT INTO vod_tender_crypto.key_grant VALUES {row}")
        for session in (user, admin):
            for statement in (f"INSERT INTO {mallory}.grants VALUES {row}", f"INSERT INTO {mallory}.innocent VALUES (1)",
                              f"DELETE FROM {mallory}.grants"):
                with fails(NO_RIGHT, "key_grant"):
                    session.execute(statement)
    assert one(admin, "SELECT count(*) FROM vod_tender_crypto.key_grant") == 0


def test_switching_triggers_off(database, admin, people):
    """From: a login. Tries: session_replication_role = replica, under which triggers that tell sessions of changes would not
    fire. Ends in: 42501; and for a superuser they fire still."""
    value = encrypted(admin)
    reader = people.may("default", "decrypt")
    with database.connect(reader) as user:
        with fails(NO_RIGHT):
            user.execute("SET session_replication_role = replica")
        assert decrypted(user, value) == "token"
        admin.execute("SET session_replication_role = replica")
        admin.execute("DELETE FROM vod_tender_crypto.key_grant")
        with denied("decrypt", "default"):
            decrypted(user, value)
        admin.execute("INSERT INTO vod_tender_crypto.key_grant VALUES ('default', %s::regrole, 'decrypt')", [reader])
        assert decrypted(user, value) == "token"
        admin.execute("TRUNCATE vod_tender_crypto.key_grant")
        with denied("decrypt", "default"):
            decrypted(user, value)


def test_tables_types_and_functions_of_the_same_name(database, admin, people):
    """From: temporary tables named kek, key_grant and honey, first on the path, and temporary types and functions. Tries: to
    be asked in the place of the extension's own. Ends in: 42501 as before."""
    value = encrypted(admin)
    mallory = people.make("mallory")
    execute_on_all(people, mallory)
    with database.connect(mallory) as user:
        user.execute("""
            CREATE TEMP TABLE kek (name text, uri text, context jsonb, state text);
            INSERT INTO kek VALUES ('default', 'local:///forged', '{}', 'active');
            CREATE TEMP TABLE key_grant (key text, role regrole, privilege text);
            INSERT INTO key_grant VALUES ('default', current_user::regrole, 'decrypt');
            CREATE TEMP TABLE honey (mark bytea);
            CREATE DOMAIN pg_temp.text AS pg_catalog.text;
            CREATE DOMAIN pg_temp.regrole AS pg_catalog.regrole;
            CREATE FUNCTION pg_temp.has_privs_of_role(oid, oid) RETURNS boolean LANGUAGE sql AS 'SELECT true';
            SET search_path = pg_temp, public""")
        with denied("decrypt", "default"):
            user.execute(f"SELECT public.envelope_decrypt('{value}'::pg_catalog.text)")
        people.grant("default", mallory, "decrypt")
        assert one(user, f"SELECT public.envelope_decrypt('{value}'::pg_catalog.text)") == "token"


def test_the_owner_of_the_database(bare_database, extension, people):
    """From: owning the database, and its schema public, without being a superuser. Tries: making, dropping, replacing and
    changing the extension and its parts; a schema of its name made before it. Ends in: 42501; 2BP01 for what the schema's
    owner could drop but the extension needs; 55000 for the schema that was there first."""
    boss = people.make("boss")
    bare_database.psql(f"DROP EXTENSION {extension}; ALTER DATABASE {bare_database.name} OWNER TO {boss}")
    try:
        with bare_database.connect(boss) as user, bare_database.connect() as admin:
            with fails(NO_RIGHT):
                user.execute(f"CREATE EXTENSION {extension}")
            user.execute("CREATE SCHEMA vod_tender_crypto")
            with fails(NOT_READY, "not a member of extension"):
                admin.execute(f"CREATE EXTENSION {extension}")
            user.execute("DROP SCHEMA vod_tender_crypto")
            admin.execute(f"CREATE EXTENSION {extension}")
            path = bare_database.server_file("kek.b64", new_key())
            admin.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
            value = encrypted(admin)
            for statement in (
                    f"DROP EXTENSION {extension}", f"ALTER EXTENSION {extension} UPDATE",
                    f"ALTER EXTENSION {extension} DROP TABLE vod_tender_crypto.key_grant",
                    "DROP SCHEMA vod_tender_crypto CASCADE", "ALTER SCHEMA vod_tender_crypto OWNER TO CURRENT_USER",
                    "ALTER SCHEMA vod_tender_crypto RENAME TO elsewhere",
                    "CREATE TABLE vod_tender_crypto.kek2 ()",
                    "DROP TABLE vod_tender_crypto.key_grant", "ALTER TABLE vod_tender_crypto.kek OWNER TO CURRENT_USER",
                    "ALTER FUNCTION public.envelope_decrypt(text, text, jsonb, int) OWNER TO CURRENT_USER",
                    "ALTER FUNCTION public.envelope_decrypt(text, text, jsonb, int) SECURITY DEFINER",
                    "GRANT EXECUTE ON FUNCTION public.envelope_decrypt(text, text, jsonb, int) TO CURRENT_USER",
                    "CREATE OR REPLACE FUNCTION public.envelope_decrypt(value text, aad text DEFAULT NULL, "
                    "context jsonb DEFAULT NULL, version int DEFAULT NULL) RETURNS text LANGUAGE sql AS 'SELECT $1'",
                    "CREATE EVENT TRIGGER t ON ddl_command_start EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            ):
                with fails(NO_RIGHT):
                    user.execute(statement)
            with fails("2BP01"):
                user.execute("DROP FUNCTION public.envelope_decrypt(text, text, jsonb, int)")
            with fails(NO_RIGHT):
                decrypted(user, value)
            assert decrypted(admin, value) == "token"
    finally:
        bare_database.psql(f"ALTER DATABASE {bare_database.name} OWNER TO postgres; DROP OWNED BY {boss} CASCADE")


# -- values that are somewhere else than they were made for ------------------------------------------------------


def test_swapping_values(tenants, admin, people):
    """From: UPDATE on the table, and decrypt on one's own key. Tries: another row's, another column's, another context's and
    another tenant's value in the place of one's own. Ends in: 39000; 42501 for the other tenant's key."""
    admin.execute("CREATE TABLE t (id int PRIMARY KEY, tenant text, access text, refresh text)")
    admin.execute("""INSERT INTO t SELECT g, n, envelope_encrypt('a' || g, n, aad => g || '/access'),
                        envelope_encrypt('r' || g, n, aad => g || '/refresh', context => '{"kind": "refresh"}')
                     FROM (VALUES (1, 'a'), (2, 'a'), (3, 'b')) v(g, n)""")
    role = people.may("a", "decrypt")
    admin.execute(f"GRANT SELECT, UPDATE ON t TO {role}")
    read = """SELECT envelope_decrypt({0}, id || '/{0}', jsonb_build_object('tenant', tenant) || {1}) FROM t WHERE id = 1"""
    access, refresh = read.format("access", "'{}'"), read.format("refresh", "'{\"kind\": \"refresh\"}'")
    with tenants.connect(role) as user:
        assert (one(user, access), one(user, refresh)) == ("a1", "r1")
        for query, column, source, state in (
                (access, "access", "access FROM t s WHERE s.id = 2", UNVERIFIED),
                (access, "access", "refresh FROM t s WHERE s.id = 1", UNVERIFIED),
                (refresh, "refresh", "access FROM t s WHERE s.id = 1", UNVERIFIED),
                (access, "access", "access FROM t s WHERE s.id = 3", NO_RIGHT)):
            user.execute("BEGIN")
            user.execute(f"UPDATE t SET {column} = (SELECT s.{source}) WHERE id = 1")
            with fails(state):
                one(user, query)
            user.execute("ROLLBACK")
        assert (one(user, access), one(user, refresh)) == ("a1", "r1")


@pytest.mark.parametrize("cached", [False, True], ids=["not cached", "after its owner read it"])
def test_an_envelope_that_names_another_key(tenants, admin, people, cached):
    """From: decrypt on a, and b's ciphertext. Tries: b's envelope under a's name, with a's wrap added before or after, with
    b's wrapped data key under a's name and id, with a's context, in all combinations; in a session where b's data key is
    cached and one where it is not. Ends in: 39000 where a is asked and does not open it, 42501 where only b could."""
    values = {name: encrypted(admin, f"{name}'s", key=name) for name in "ab"}
    mine, theirs = Envelope.of(values["a"]), Envelope.of(values["b"])
    own_wrap, wrap = mine.wraps[0], theirs.wraps[0]
    renamed = theirs.wrap(name="a")
    moved = theirs.wrap(name="a", kek_id=own_wrap.kek_id)
    wraps = [(renamed,), (moved,), (own_wrap,), (own_wrap, wrap), (wrap, own_wrap), (renamed, wrap), (wrap, renamed),
             (moved, wrap), (wrap, moved), (theirs.wrap(kek_id=own_wrap.kek_id),)]
    both = tuple(sorted({**dict(theirs.context), "also": "a"}.items()))
    forged = [theirs.with_(wraps=each, context=context, commitment=commitment, payload=payload)
              for each in wraps for context in (theirs.context, mine.context, both, ())
              for commitment in (theirs.commitment, mine.commitment) for payload in (theirs.payload, mine.payload)]
    reader_a, reader_b = people.may("a", "decrypt", what="a"), people.may("b", "decrypt", what="b")
    with tenants.connect(switching(people, reader_a, reader_b)) as user:
        if cached:
            user.execute(f"SET ROLE {reader_b}")
            assert decrypted(user, values["b"]) == "b's"
            # b may have been made to open some of the forgeries too.
            for each in forged:
                with contextlib.suppress(psycopg.Error):
                    decrypted(user, each.text())
        user.execute(f"SET ROLE {reader_a}")
        assert decrypted(user, values["a"]) == "a's"
        opened = set()
        for each in forged:
            try:
                opened.add(decrypted(user, each.text()))
            except psycopg.Error as error:
                assert error.sqlstate in (UNVERIFIED, NO_RIGHT, "22P02"), error
        assert opened <= {"a's"}


def test_a_key_that_is_configured_under_two_names(database, admin, people):
    """From: decrypt on one name of a key that has two, each with its tenant's context. Tries: the other name's envelope
    under one's own name. Ends in: 39000, because a key opens only what has its context. Names alone would not part them."""
    path = add_local_key(database, admin, "a", '{"tenant": "a"}', default=False)
    admin.execute("SELECT vod_tender_crypto.add_key('b', %s, '{\"tenant\": \"b\"}')", [f"local://{path}"])
    theirs = Envelope.of(encrypted(admin, key="b"))
    role = people.may("a", "decrypt")
    with database.connect(role) as user:
        assert decrypted(user, encrypted(admin, "mine", key="a")) == "mine"
        with denied("decrypt", "b"):
            decrypted(user, theirs.text())
        for forged in (theirs.named("a"), theirs.named("a").with_(context=(("tenant", "a"),))):
            with fails(UNVERIFIED):
                decrypted(user, forged.text())


def test_an_envelope_under_a_key_that_is_not_configured(database, admin, people):
    """From: every privilege on a key. Tries: an envelope that names a key, an endpoint or an account of one's own. Ends in:
    42704; 22P02 for what
    is no name; 39000 for another id under a configured name."""
    value = Envelope.of(encrypted(admin))
    role = people.may("default", *ALL)
    with database.connect(role) as user:
        assert decrypted(user, value.text()) == "token"
        for name in ("mine", "legacy", "DEFAULT"):
            with fails(UNKNOWN_KEY):
                decrypted(user, value.named(name).text())
        for name in ("local:///etc/passwd", "aws-kms://alias/x?endpoint=http://127.0.0.1:1", ""):
            with fails(MALFORMED_TEXT):
                decrypted(user, value.named(name).text())
        for kek_id in ("local:///etc/passwd", "arn:aws:kms:eu-west-1:1:key/other"):
            with fails(UNVERIFIED):
                decrypted(user, value.with_(wraps=(value.wrap(kek_id=kek_id),)).text())


def test_an_envelope_of_another_aws_key(database, admin, people, kms):
    """From: decrypt on a KEK of AWS KMS. Tries: the envelope of another configured one, under one's own name. Ends in:
    39000 where one's own is configured by its ARN; 42501 where it is configured by an alias, which may have stood for any
    key of the account before: for one that is configured itself, one must have that one's right too."""
    other = kms.create_key()
    admin.execute("SELECT vod_tender_crypto.add_key('arn', %s)", [kms.kek_uri()])
    admin.execute("SELECT vod_tender_crypto.add_key('alias', %s)", [kms.kek_uri(kms.alias)])
    admin.execute("SELECT vod_tender_crypto.add_key('other', %s)", [kms.kek_uri(other)])
    theirs = Envelope.of(encrypted(admin, key="other"))
    role = people.may("arn", "decrypt")
    people.grant("alias", role, "decrypt")
    with database.connect(role) as user:
        for name in ("arn", "alias"):
            assert decrypted(user, encrypted(admin, "mine", key=name)) == "mine"
        with denied("decrypt", "other"):
            decrypted(user, theirs.text())
        with fails(UNVERIFIED):
            decrypted(user, theirs.named("arn").text())
        with denied("decrypt", "other"):
            decrypted(user, theirs.named("alias").text())
        people.grant("alias", role, "rewrap")
        people.grant("arn", role, "rewrap")
        with denied("rewrap", "other"):
            one(user, "SELECT rewrap(%s, 'arn')", theirs.named("alias").text())
    # Nor where somebody who may has opened it in the session.
    assert decrypted(admin, theirs.named("alias").text()) == "token"
    admin.execute(f"SET SESSION AUTHORIZATION {role}")
    with denied("decrypt", "other"):
        decrypted(admin, theirs.named("alias").text())
    admin.execute("RESET SESSION AUTHORIZATION")
