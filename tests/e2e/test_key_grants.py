"""Grants on keys: who may encrypt, decrypt and rewrap with which key, and from when until when."""

from __future__ import annotations

import psycopg
import pytest

from helpers import add_local_key, one
from roles import ALL, decrypted, direct, encrypted, execute_on_all
from sqlstate import INVALID_PARAMETER, NO_RIGHT, UNKNOWN_KEY, detail, fails

KEY_GRANT_SCANS = """
    SELECT pg_stat_get_xact_numscans('vod_tender_crypto.key_grant'::regclass)
         + coalesce((SELECT sum(pg_stat_get_xact_numscans(indexrelid)) FROM pg_index
                     WHERE indrelid = 'vod_tender_crypto.key_grant'::regclass), 0)"""


@pytest.fixture
def admin(database):
    """A superuser's session."""
    with database.connect() as session:
        yield session


def rows(connection, where: str = "true") -> "set[tuple[str, str, str]]":
    """(key, role, privilege) of the grants."""
    query = f"SELECT key, role::text, privilege FROM vod_tender_crypto.key_grant g WHERE {where}"
    return set(connection.execute(query).fetchall())


def denied(privilege: str, key: str):
    """The block must be refused for want of this privilege on this key."""
    return fails(NO_RIGHT, f'permission denied to {privilege} with key "{key}"')


# -- what each privilege is for ----------------------------------------------------------------------------------


def test_by_default_a_role_may_use_no_key(database, admin, people):
    value, old = encrypted(admin), direct(admin)
    nobody = people.make("nobody")
    with database.connect(nobody) as user:
        with fails(NO_RIGHT, "permission denied for function envelope_decrypt"):
            decrypted(user, value)
    execute_on_all(people, nobody)
    with database.connect(nobody) as user:
        with denied("decrypt", "default"):
            decrypted(user, value)
        with denied("encrypt", "default"):
            encrypted(user)
        with denied("rewrap", "default"):
            one(user, "SELECT rewrap(%s)", value)
        with denied("decrypt", "legacy"):
            decrypted(user, old)


CALLS = {
    "encrypt": "envelope_encrypt('x'::text)",
    "encrypt bytea": "envelope_encrypt('x'::bytea)",
    "decrypt": "envelope_decrypt(%(envelope)s)",
    "decrypt bytea": "envelope_decrypt(%(binary)s::bytea)",
    "rewrap": "rewrap(%(envelope)s)",
    "rewrap bytea": "rewrap(%(binary)s::bytea)",
    "upgrade plaintext": "envelope_upgrade('x'::text, version => 0)",
    "upgrade direct": "envelope_upgrade(%(direct)s)",
    "upgrade envelope": "envelope_upgrade(%(envelope)s)",
    "downgrade envelope": "envelope_downgrade(%(envelope)s)",
    "downgrade direct": "envelope_downgrade(%(direct)s)",
    "decrypt direct": "envelope_decrypt(%(direct)s)",
}


@pytest.mark.parametrize("key, privilege, allowed", [
    ("default", "encrypt", {"encrypt", "encrypt bytea", "upgrade plaintext"}),
    ("default", "decrypt", {"decrypt", "decrypt bytea"}),
    ("default", "rewrap", {"rewrap", "rewrap bytea"}),
    ("legacy", "encrypt", set()),
    ("legacy", "decrypt", {"decrypt direct", "downgrade direct"}),
    ("legacy", "rewrap", {"downgrade direct"}),
    ("elsewhere", "decrypt", set()),
])
def test_a_privilege_by_itself(database, admin, people, key, privilege, allowed):
    """EXECUTE on everything and one privilege on one key: what is not for it is refused. An envelope is no concern of
    envelope_upgrade()'s: it comes back as it is."""
    add_local_key(database, admin, "elsewhere", default=False)
    given = {"envelope": encrypted(admin), "direct": direct(admin),
             "binary": one(admin, "SELECT envelope_encrypt('token'::bytea)")}
    role = people.make("single")
    execute_on_all(people, role)
    people.grant(key, role, privilege)
    with database.connect(role) as user:
        done = set()
        for name, call in CALLS.items():
            try:
                user.execute(f"SELECT {call}", given)
                done.add(name)
            except psycopg.Error as error:
                assert error.sqlstate == NO_RIGHT and "with key" in str(error), (name, error)
    assert done == allowed | {"upgrade envelope"}


def test_conversions_take_rights_on_both_keys(database, admin, people):
    value, old = encrypted(admin), direct(admin)
    role = people.may("default", "encrypt", "decrypt", what="converter")
    with database.connect(role) as user:
        with denied("rewrap", "legacy"):
            one(user, "SELECT envelope_upgrade(%s)", old)
        with denied("encrypt", "legacy"):
            one(user, "SELECT envelope_downgrade(%s)", value)
        people.grant("legacy", role, "rewrap")
        with denied("decrypt", "legacy"):
            one(user, "SELECT envelope_upgrade(%s)", old)
        people.grant("legacy", role, "decrypt", "encrypt")
        assert decrypted(user, one(user, "SELECT envelope_upgrade(%s)", old)) == "token"
        assert decrypted(user, one(user, "SELECT envelope_downgrade(%s)", value)) == "token"


def test_rewrapping_takes_the_privilege_on_both_keys(database, admin, people):
    value = encrypted(admin)
    add_local_key(database, admin, "next", default=False)
    role = people.make("mover")
    execute_on_all(people, role)
    people.grant("next", role, "rewrap")
    with database.connect(role) as user:
        with denied("rewrap", "default"):
            one(user, "SELECT rewrap(%s, 'next')", value)
        people.grant("default", role, "rewrap")
        moved = one(user, "SELECT rewrap(%s, 'next')", value)
        with denied("decrypt", "next"):
            decrypted(user, moved)
        people.grant("next", role, "decrypt")
        with denied("decrypt", "default"):
            one(user, "SELECT rewrap(%s, 'next')", value)
    assert decrypted(admin, moved) == "token"


def test_plaintext_needs_no_right(database, people):
    role = people.make("dual_reader")
    execute_on_all(people, role)
    people.admin("SELECT envelope_version('')")
    people.admin(f"ALTER ROLE {role} SET vod_tender_crypto.plaintext_reads = 'allow'")
    with database.connect(role) as user:
        assert decrypted(user, "not encrypted yet") == "not encrypted yet"


# -- whose rights count ------------------------------------------------------------------------------------------


def test_grants_are_inherited_as_memberships_are(database, admin, people):
    value = encrypted(admin)
    group = people.may("default", "decrypt", what="readers", options="NOLOGIN")
    heir = people.make("heir", f"LOGIN IN ROLE {group}")
    stranger = people.make("stranger", f"LOGIN NOINHERIT IN ROLE {group}")
    with database.connect(heir) as user:
        assert decrypted(user, value) == "token"
        with fails(NO_RIGHT):
            encrypted(user)
    with database.connect(stranger) as user:
        with fails(NO_RIGHT):
            decrypted(user, value)
        user.execute(f"SET ROLE {group}")
        assert decrypted(user, value) == "token"
        user.execute("RESET ROLE")
        with fails(NO_RIGHT):
            decrypted(user, value)


def test_a_membership_counts_from_the_next_statement_on(database, admin, people):
    """Without a new connection, also where the answer was asked for before: granted, removed, through two levels."""
    value = encrypted(admin)
    group = people.may("default", "decrypt", what="readers", options="NOLOGIN")
    between = people.make("team", "NOLOGIN")
    member = people.make("member")
    execute_on_all(people, member)
    with database.connect(member) as user:
        with denied("decrypt", "default"):
            decrypted(user, value)
        people.admin(f"GRANT {group} TO {between}; GRANT {between} TO {member}")
        assert decrypted(user, value) == "token"
        people.admin(f"REVOKE {group} FROM {between}")
        with denied("decrypt", "default"):
            decrypted(user, value)
        people.admin(f"GRANT {group} TO {between}")
        assert decrypted(user, value) == "token"
        people.admin(f"ALTER ROLE {member} NOINHERIT")
        if one(admin, "SELECT current_setting('server_version_num')::int") < 160000:
            with denied("decrypt", "default"):
                decrypted(user, value)
        else:
            # There it is the default of memberships yet to be granted.
            assert decrypted(user, value) == "token"
            people.admin(f"GRANT {between} TO {member} WITH INHERIT FALSE")
            with denied("decrypt", "default"):
                decrypted(user, value)


def test_membership_that_comes_with_owning_the_database(database, admin, people):
    """pg_database_owner is a group whose only member is whoever owns the database at the time."""
    value = encrypted(admin)
    first, second = people.make("first"), people.make("second")
    for each in (first, second):
        execute_on_all(people, each)
    people.admin(f"ALTER DATABASE {database.name} OWNER TO {first}")
    people.grant("default", "pg_database_owner", "decrypt")
    try:
        with database.connect(first) as one_of_them, database.connect(second) as other:
            assert decrypted(one_of_them, value) == "token"
            with denied("decrypt", "default"):
                decrypted(other, value)
            people.admin(f"ALTER DATABASE {database.name} OWNER TO {second}")
            with denied("decrypt", "default"):
                decrypted(one_of_them, value)
            assert decrypted(other, value) == "token"
    finally:
        people.admin(f"ALTER DATABASE {database.name} OWNER TO postgres")


def test_superusers_and_the_keys_owner_may_do_everything(database, admin, people):
    value, old = encrypted(admin), direct(admin)
    root = people.make("root", "LOGIN SUPERUSER")
    owner = people.make("key_owner")
    deputy = people.make("deputy", f"LOGIN IN ROLE {owner}")
    for each in (owner, deputy):
        execute_on_all(people, each)
    with database.connect(root) as by_root, database.connect(owner) as by_owner, database.connect(deputy) as by_deputy:
        assert decrypted(by_root, value) == decrypted(by_root, old) == "token"
        for user in (by_owner, by_deputy):
            with denied("decrypt", "default"):
                decrypted(user, value)
        people.admin(f"ALTER TABLE vod_tender_crypto.kek OWNER TO {owner}")
        for user in (by_owner, by_deputy):
            assert decrypted(user, value) == decrypted(user, old) == "token"
            assert encrypted(user).startswith("kms:v2:")
        people.admin("ALTER TABLE vod_tender_crypto.kek OWNER TO postgres")
        for user in (by_owner, by_deputy):
            with denied("decrypt", "default"):
                decrypted(user, value)
        people.admin(f"ALTER ROLE {root} NOSUPERUSER")
        execute_on_all(people, root)
        with denied("decrypt", "default"):
            decrypted(by_root, value)


def test_a_renamed_role_keeps_its_grants(database, admin, people):
    value = encrypted(admin)
    role = people.may("default", "decrypt", what="before")
    people.admin(f"ALTER ROLE {role} RENAME TO {role}_after")
    people.forget(role)
    people.watch(f"{role}_after")
    with database.connect(f"{role}_after") as user:
        assert decrypted(user, value) == "token"
    assert rows(admin) == {("default", f"{role}_after", "decrypt")}


def test_a_role_made_again_under_its_name_has_nothing(database, admin, people):
    value = encrypted(admin)
    role = people.may("default", "decrypt", what="again")
    people.admin(f"DROP OWNED BY {role}; DROP ROLE {role}; CREATE ROLE {role} LOGIN")
    people.admin(f"GRANT EXECUTE ON FUNCTION envelope_decrypt(text, text, jsonb, int) TO {role}")
    with database.connect(role) as user:
        with denied("decrypt", "default"):
            decrypted(user, value)
    other = people.may("default", "encrypt", what="other")
    assert rows(admin) == {("default", other, "encrypt")}, "what dropped roles left goes with the next grant"


# -- from when, until when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_revoked_key_does_not_serve_the_rest_of_a_transaction(database, admin, people, isolation):
    value = encrypted(admin)
    role = people.may("default", "decrypt")
    with database.connect(role) as user:
        user.execute(f"BEGIN ISOLATION LEVEL {isolation}")
        assert decrypted(user, value) == "token"
        people.revoke("default", role)
        user.execute("SAVEPOINT s")
        with fails(NO_RIGHT):
            decrypted(user, value)
        user.execute("ROLLBACK TO s")
        people.grant("default", role, "decrypt")
        assert decrypted(user, value) == "token"
        user.execute("COMMIT")


def test_a_revoked_key_ends_an_open_cursor(database, admin, people):
    admin.execute("CREATE TABLE tokens AS SELECT envelope_encrypt('token') AS v FROM generate_series(1, 20)")
    role = people.may("default", "decrypt")
    admin.execute(f"GRANT SELECT ON tokens TO {role}")
    with database.connect(role) as user:
        user.execute("BEGIN")
        user.execute("DECLARE c CURSOR FOR SELECT envelope_decrypt(v) FROM tokens")
        assert user.execute("FETCH 2 FROM c").fetchall() == [("token",)] * 2
        people.revoke("default", role)
        with denied("decrypt", "default"):
            user.execute("FETCH 2 FROM c")
        user.execute("ROLLBACK")


@pytest.mark.parametrize("plan", ["force_generic_plan", "force_custom_plan"])
def test_a_prepared_statement_outlives_no_right(database, admin, people, plan):
    value = encrypted(admin)
    role = people.may("default", "decrypt", "rewrap")
    group = people.may("default", "decrypt", what="readers", options="NOLOGIN")
    with database.connect(role) as user:
        user.execute(f"SET plan_cache_mode = {plan}")
        user.execute("PREPARE p(text) AS SELECT envelope_decrypt($1)")

        def runs():
            return one(user, f"EXECUTE p('{value}')")

        assert runs() == "token"
        people.revoke("default", role, "decrypt")
        with fails(NO_RIGHT, "permission denied for function"):
            runs()
        people.grant("default", role, "decrypt")
        assert runs() == "token"
        people.admin(f"DELETE FROM vod_tender_crypto.key_grant WHERE role = '{role}'::regrole")
        with denied("decrypt", "default"):
            runs()
        people.admin(f"GRANT {group} TO {role}")
        assert runs() == "token"
        people.admin(f"REVOKE {group} FROM {role}")
        with denied("decrypt", "default"):
            runs()


def test_a_grant_counts_when_it_is_committed(database, admin, people):
    value = encrypted(admin)
    role = people.make("waiting")
    execute_on_all(people, role)
    with database.connect(role) as user:
        admin.execute("BEGIN")
        admin.execute("SELECT vod_tender_crypto.grant_key('default', %s::regrole, '{decrypt}')", [role])
        with denied("decrypt", "default"):
            decrypted(user, value)
        admin.execute("ROLLBACK")
        with denied("decrypt", "default"):
            decrypted(user, value)
        people.grant("default", role, "decrypt")
        admin.execute("BEGIN")
        admin.execute("SELECT vod_tender_crypto.revoke_key('default', %s::regrole)", [role])
        assert decrypted(user, value) == "token"
        admin.execute("COMMIT")
        with fails(NO_RIGHT):
            decrypted(user, value)


def test_a_revoke_that_is_rolled_back_to_a_savepoint(database, admin, people):
    """Within the transaction that revokes, for the role itself."""
    value = encrypted(admin)
    role = people.may("default", "decrypt")
    admin.execute("BEGIN")
    admin.execute(f"SET LOCAL ROLE {role}")
    assert decrypted(admin, value) == "token"
    admin.execute("RESET ROLE; SAVEPOINT s")
    admin.execute(f"DELETE FROM vod_tender_crypto.key_grant WHERE role = '{role}'::regrole; SET LOCAL ROLE {role}")
    admin.execute("SAVEPOINT t")
    with denied("decrypt", "default"):
        decrypted(admin, value)
    admin.execute(f"ROLLBACK TO s; SET LOCAL ROLE {role}")
    assert decrypted(admin, value) == "token"
    admin.execute("ROLLBACK")


# -- grant_key() and revoke_key() --------------------------------------------------------------------------------


def test_granting_and_revoking_twice(admin, people):
    role = people.may("default", "decrypt")
    people.grant("default", role, "decrypt", "decrypt")
    assert rows(admin) == {("default", role, "decrypt")}
    people.revoke("default", role)
    people.revoke("default", role)
    assert rows(admin) == set()


def test_revoking_one_privilege_keeps_what_others_need(database, admin, people):
    value = encrypted(admin)
    add_local_key(database, admin, "other", default=False)
    role = people.may("default", *ALL)
    people.grant("other", role, "decrypt")
    executes = "SELECT has_function_privilege(%s, %s, 'EXECUTE')"
    signatures = {"envelope_encrypt": "text, text, jsonb, text", "envelope_decrypt": "text, text, jsonb, int",
                  "rewrap": "text, text", "envelope_upgrade": "text, text, jsonb, text, int"}

    def may_call() -> "set[str]":
        return {name for name, types in signatures.items() if one(admin, executes, role, f"{name}({types})")}

    assert may_call() == set(signatures)
    with database.connect(role) as user:
        people.revoke("default", role, "decrypt")
        assert may_call() == set(signatures), "decrypt is needed for the other key"
        with denied("decrypt", "default"):
            decrypted(user, value)
        people.revoke("default", role, "encrypt")
        assert may_call() == {"envelope_decrypt", "rewrap", "envelope_upgrade"}
        assert one(user, "SELECT rewrap(%s)", value) == value
        people.revoke("default", role, "rewrap")
        assert may_call() == {"envelope_decrypt", "envelope_upgrade"}
        people.revoke("other", role)
        assert may_call() == set()


def test_a_refusal_says_whom_to_ask_for_what(database, admin, people):
    value = encrypted(admin)
    role = people.make("paged")
    execute_on_all(people, role)
    with database.connect(role) as user, denied("decrypt", "default") as caught:
        decrypted(user, value)
    assert detail(caught) == f'The calling role is "{role}".'
    assert "vod_tender_crypto.grant_key()" in caught.value.diag.message_hint
    assert value not in str(caught.value) and "token" not in str(caught.value)
    admin.execute("CREATE FUNCTION as_owner(v text) RETURNS text LANGUAGE sql SECURITY DEFINER AS 'SELECT envelope_decrypt(v)'")
    with database.connect(role) as user, denied("decrypt", "default") as caught:
        one(user, "SELECT as_owner(%s)", value)
    assert f'"{role}", in a function that runs as "postgres"; both need the privilege' in detail(caught)


@pytest.mark.parametrize("function", ["grant_key", "revoke_key"])
@pytest.mark.parametrize("arguments, state, saying", [
    ("'default', 'public', '{decrypt}'", UNKNOWN_KEY, 'role "public" does not exist'),
    ("'default', 'no_such_role', '{decrypt}'", UNKNOWN_KEY, 'role "no_such_role" does not exist'),
    ("'default', '-', '{decrypt}'", UNKNOWN_KEY, "role with OID 0 does not exist"),
    ("'default', 4000000000::oid::regrole, '{decrypt}'", UNKNOWN_KEY, "role with OID 4000000000 does not exist"),
    ("'default', 'postgres', '{select}'", INVALID_PARAMETER, "unusable privileges"),
    ("'default', 'postgres', '{decrypt,NULL}'", INVALID_PARAMETER, "unusable privileges"),
    ("'default', 'postgres', '{}'", INVALID_PARAMETER, "unusable privileges"),
    ("'default', 'postgres', NULL", INVALID_PARAMETER, "unusable privileges"),
    ("NULL, 'postgres', '{decrypt}'", "22004", "a grant has a key"),
    ("'default', NULL, '{decrypt}'", "22004", "a grant has a key"),
])
def test_grants_that_cannot_be(admin, function, arguments, state, saying):
    with fails(state, saying):
        admin.execute(f"SELECT vod_tender_crypto.{function}({arguments})")
    assert rows(admin) == set()


def test_a_key_must_be_configured_to_be_granted(admin, people):
    role = people.make("early")
    with fails(UNKNOWN_KEY, 'key "missing" is not configured') as caught:
        admin.execute("SELECT vod_tender_crypto.grant_key('missing', %s::regrole, '{decrypt}')", [role])
    assert "vod_tender_crypto.kek" in caught.value.diag.message_hint
    # Nothing to take back is no error.
    admin.execute("SELECT vod_tender_crypto.revoke_key('missing', %s::regrole)", [role])


def test_names_that_need_quotes(database, admin, people):
    value = encrypted(admin)
    for name in ("Mixed Case", 'quo"te', "a'b; DROP TABLE x", "público"):
        quoted = psycopg.sql.Identifier(name).as_string(admin)
        admin.execute(f"CREATE ROLE {quoted} LOGIN")
        try:
            admin.execute("SELECT vod_tender_crypto.grant_key('default', %s::regrole, '{decrypt}')", [quoted])
            with database.connect(name) as user:
                assert decrypted(user, value) == "token"
            admin.execute("SELECT vod_tender_crypto.revoke_key('default', %s::regrole)", [quoted])
            with database.connect(name) as user, fails(NO_RIGHT):
                decrypted(user, value)
        finally:
            admin.execute(f"DROP OWNED BY {quoted}; DROP ROLE {quoted}")


def test_dropping_a_key_drops_its_grants(database, admin, people):
    """Whoever adds a key under an old name does not know whom the old one was for."""
    path = add_local_key(database, admin, "tenant", default=False)
    value = encrypted(admin, key="tenant")
    role = people.may("tenant", *ALL)
    people.grant("default", role, "encrypt")
    with database.connect(role) as user:
        assert decrypted(user, value) == "token"
        admin.execute("SELECT vod_tender_crypto.drop_key('tenant')")
        assert rows(admin) == {("default", role, "encrypt")}
        admin.execute("SELECT vod_tender_crypto.add_key('tenant', %s)", [f"local://{path}"])
        with fails(NO_RIGHT):
            decrypted(user, value)
        people.grant("tenant", role, "decrypt")
        assert decrypted(user, value) == "token"


def test_a_disabled_key_is_disabled_for_whoever_may_use_it(database, admin, people):
    value = encrypted(admin)
    role = people.may("default", *ALL)
    admin.execute("SELECT vod_tender_crypto.set_key_state('default', 'disabled')")
    with database.connect(role) as user:
        with fails("55000", "disabled"):
            decrypted(user, value)
        admin.execute("SELECT vod_tender_crypto.set_key_state('default', 'active')")
        assert decrypted(user, value) == "token"


# -- cost --------------------------------------------------------------------------------------------------------


def test_grants_are_not_looked_up_for_each_row(database, admin, people):
    admin.execute("CREATE TABLE tokens AS SELECT envelope_encrypt('t' || g) AS v FROM generate_series(1, 10000) g")
    role = people.may("default", "decrypt")
    admin.execute(f"GRANT SELECT ON tokens TO {role}")

    def scans(limit: int) -> int:
        with database.connect(role, autocommit=False) as user:
            query = "SELECT count(envelope_decrypt(v)) FROM (SELECT v FROM tokens LIMIT %s) t"
            assert one(user, query, limit) == limit
            return one(user, KEY_GRANT_SCANS)

    few, many = scans(1), scans(10000)
    assert 0 < few <= 5 and many == few


def test_changing_roles_within_a_statement_reads_the_grants_once(database, admin, people):
    """A function that runs as its owner, a thousand times: each pair of roles is worked out once."""
    value = encrypted(admin)
    owner, caller = people.may("default", "decrypt", what="definer"), people.may("default", "decrypt", what="caller")
    admin.execute(f"""
        CREATE FUNCTION as_owner(v text) RETURNS text LANGUAGE sql SECURITY DEFINER
            SET search_path = public, pg_temp AS 'SELECT envelope_decrypt(v)';
        ALTER FUNCTION as_owner(text) OWNER TO {owner}""")
    with database.connect(caller, autocommit=False) as user:
        rows_of_both = "SELECT count(as_owner(%s) || envelope_decrypt(%s)) FROM generate_series(1, 1000)"
        assert one(user, rows_of_both, value, value) == 1000
        assert 0 < one(user, KEY_GRANT_SCANS) <= 5


# -- dump and restore --------------------------------------------------------------------------------------------


@pytest.fixture
def restored(database):
    """Restores a dump of the database beside it, and gives sessions there."""
    name = database.name + "_restored"
    database.cluster.createdb(name)

    def restore(dump: str):
        database.cluster.run("psql", "-X", "-q", "-d", name, "-U", "postgres", "-f", "-", input=dump)
        return lambda user="postgres": database.cluster.connect(name, user)

    yield restore
    database.cluster.dropdb(name)


def test_a_dump_keeps_the_grants(database, admin, people, restored):
    value = encrypted(admin)
    reader, writer = people.may("default", "decrypt"), people.may("default", "encrypt", what="writer")
    connect = restored(database.pg_dump())
    with connect() as there:
        assert rows(there) == rows(admin) != set()
    with connect(reader) as user:
        assert decrypted(user, value) == "token"
        with fails(NO_RIGHT):
            encrypted(user)
    with connect(writer) as user:
        assert encrypted(user).startswith("kms:v2:")


def test_a_dump_without_a_role_grants_nothing_to_anybody_else(database, admin, people, restored):
    """pg_dump names roles, as it does for GRANT: where one is missing, COPY refuses the table. Keys are all there, and
    nobody has a right that the dump did not give; grant_key() gives them again."""
    value = encrypted(admin)
    reader = people.may("default", "decrypt")
    dump = database.pg_dump()
    assert reader in dump
    dump = dump.replace(reader, "no_such_role_here")
    other = people.make("bystander")
    connect = restored(dump)
    with connect() as there:
        assert rows(there) == set()
        assert one(there, "SELECT count(*) FROM vod_tender_crypto.kek") == 1
        assert decrypted(there, value) == "token"
        there.execute("SELECT vod_tender_crypto.grant_key('default', %s::regrole, '{decrypt}')", [reader])
    with connect(reader) as user:
        assert decrypted(user, value) == "token"
    with connect(other) as user, fails(NO_RIGHT):
        decrypted(user, value)


def test_a_dump_leaves_out_roles_that_are_gone(database, admin, people, restored):
    gone, kept = people.may("default", "decrypt", what="gone"), people.may("default", "decrypt", what="kept")
    people.admin(f"DROP OWNED BY {gone}; DROP ROLE {gone}")
    people.forget(gone)
    with restored(database.pg_dump())() as there:
        assert rows(there) == {("default", kept, "decrypt")}
