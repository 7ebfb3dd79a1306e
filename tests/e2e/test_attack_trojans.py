"""Attacks through code of an ordinary user's that somebody else runs.

PostgreSQL runs functions in triggers, policies, constraints, views and so on with the rights of whoever's statement
reaches them. So do they here: a role that may decrypt should touch no object of somebody it does not trust. What
PostgreSQL runs as a table's owner (maintenance, materialised views) is refused for want of the owner's right.
"""

from __future__ import annotations

import json

import psycopg
import pytest

from helpers import add_local_key, new_key, one
from jobs import notices, wait_until
from roles import ALL, decrypted, encrypted, execute_on_all
from sqlstate import NO_RIGHT, UNKNOWN_KEY, fails


@pytest.fixture
def admin(database):
    """A superuser's session."""
    with database.connect() as session:
        yield session


@pytest.fixture
def value(admin):
    """What the attacker wants to read."""
    return encrypted(admin)


@pytest.fixture
def mallory(database, admin, people, value):
    """A role with EXECUTE and no key, and its function spy(): tells by a notice whether it could read, and what."""
    name = people.attacker()
    execute_on_all(people, name)
    with database.connect(name) as session:
        session.execute(spy(name, value))
        admin.execute(f"GRANT USAGE ON SCHEMA {name} TO PUBLIC")
    return name


def spy(schema: str, value: str, level: str = "NOTICE") -> str:
    """SQL for a function that gives its argument back. Said to be immutable, so that indexes take it."""
    return f"""
        CREATE FUNCTION {schema}.spy(x text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
        BEGIN
            RAISE {level} 'spy read %', public.envelope_decrypt('{value}');
            RETURN x;
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE {level} 'spy was refused';
            RETURN x;
        END $$"""


def spied(connection, statement: str) -> "set[str]":
    """What spy() said while the statement ran."""
    heard = notices(connection)
    connection.execute(statement)
    return {message for _, message in heard if message.startswith("spy")}


# What mallory makes, and what somebody else does with it. All of it runs with that one's rights.
TROJANS = {
    "function": ("", "SELECT m.spy('x')"),
    "function named like a built-in one": (
        "CREATE FUNCTION m.length(character varying) RETURNS int LANGUAGE sql AS $$ SELECT pg_catalog.length(m.spy('x')) $$",
        "SET search_path = m, pg_catalog; SELECT length('x'::varchar); RESET search_path"),
    "view": ("CREATE VIEW m.v AS SELECT m.spy('x')", "SELECT * FROM m.v"),
    "trigger": ("""CREATE TABLE m.t (x text);
                   CREATE FUNCTION m.f() RETURNS trigger LANGUAGE plpgsql AS
                       $$ BEGIN NEW.x := m.spy(NEW.x); RETURN NEW; END $$;
                   CREATE TRIGGER t BEFORE INSERT ON m.t FOR EACH ROW EXECUTE FUNCTION m.f()""",
                "INSERT INTO m.t VALUES ('x')"),
    "policy": ("""CREATE TABLE m.t (x text); INSERT INTO m.t VALUES ('x'); ALTER TABLE m.t ENABLE ROW LEVEL SECURITY;
                  CREATE POLICY p ON m.t USING (m.spy(x) = 'x')""", "SELECT * FROM m.t"),
    "check constraint": ("CREATE TABLE m.t (x text CHECK (m.spy(x) = x))", "INSERT INTO m.t VALUES ('x')"),
    "generated column": ("CREATE TABLE m.t (x text, y text GENERATED ALWAYS AS (m.spy(x)) STORED)",
                         "INSERT INTO m.t VALUES ('x')"),
    "default": ("CREATE TABLE m.t (x text DEFAULT m.spy('x'))", "INSERT INTO m.t DEFAULT VALUES"),
    "index expression": ("CREATE TABLE m.t (x text); CREATE INDEX ON m.t (m.spy(x))", "INSERT INTO m.t VALUES ('x')"),
    "domain": ("CREATE DOMAIN m.d AS text CHECK (m.spy(VALUE) = VALUE)", "SELECT 'x'::m.d"),
    "aggregate": ("""CREATE FUNCTION m.step(a text, b text) RETURNS text LANGUAGE sql AS 'SELECT m.spy(b)';
                     CREATE AGGREGATE m.agg(text) (SFUNC = m.step, STYPE = text)""", "SELECT m.agg('x')"),
    "operator": ("""CREATE FUNCTION m.same(a text, b text) RETURNS boolean LANGUAGE sql AS 'SELECT m.spy(a) = b';
                    CREATE OPERATOR m.= (LEFTARG = text, RIGHTARG = text, FUNCTION = m.same)""",
                 "SELECT 'x' OPERATOR(m.=) 'x'::text"),
    "cast": ("""CREATE TYPE m.e AS ENUM ('x');
                CREATE FUNCTION m.conv(m.e) RETURNS text LANGUAGE sql AS $$ SELECT m.spy('x') $$;
                CREATE CAST (m.e AS text) WITH FUNCTION m.conv(m.e) AS IMPLICIT""", "SELECT ('x'::m.e)::text"),
    "rule": ("CREATE TABLE m.t (x text); CREATE RULE r AS ON INSERT TO m.t DO ALSO SELECT m.spy(NEW.x)",
             "INSERT INTO m.t VALUES ('x')"),
}


@pytest.mark.parametrize("kind", TROJANS)
def test_what_runs_with_the_rights_of_whoever_touches_it(database, admin, people, mallory, kind):
    """From: a schema of one's own. Tries: the object, run by a role that may decrypt. Ends in: the plaintext, as PostgreSQL
    has it for everything that role may do; and 42501 for the attacker, and for whoever else may not."""
    made, touch = (sql.replace("m.", f"{mallory}.").replace("= m,", f"= {mallory},") for sql in TROJANS[kind])
    victim, other = people.may("default", "decrypt", what="victim"), people.make("other")
    execute_on_all(people, other)
    with database.connect(mallory) as user:
        if made:
            user.execute(made)
        for what in ("ALL TABLES", "ALL FUNCTIONS"):
            user.execute(f"GRANT ALL ON {what} IN SCHEMA {mallory} TO PUBLIC")
    with database.connect(other) as session:
        assert spied(session, touch) == {"spy was refused"}
    with database.connect(victim) as session:
        assert spied(session, touch) == {"spy read token"}
    with database.connect(mallory) as session:
        if kind != "policy":
            assert spied(session, touch) == {"spy was refused"}


MAINTENANCE = ["CREATE INDEX ON m.t (m.spy(x))", "REINDEX TABLE m.t", "ANALYZE m.t", "VACUUM FULL m.t", "CLUSTER m.t USING i",
               "REFRESH MATERIALIZED VIEW m.mv"]


@pytest.mark.parametrize("statement", MAINTENANCE)
def test_maintenance_by_a_superuser(database, admin, mallory, statement):
    """From: an expression index and a materialised view of one's own. Tries: having a superuser build, analyse or refresh
    them. Ends in: 42501: PostgreSQL does that as the owner, and the owner has no key."""
    sql = """CREATE TABLE m.t (x text); INSERT INTO m.t SELECT g::text FROM generate_series(1, 20) g;
             CREATE INDEX i ON m.t (x); CREATE INDEX e ON m.t (m.spy(x));
             CREATE MATERIALIZED VIEW m.mv AS SELECT m.spy('x') AS s"""
    with database.connect(mallory) as user:
        user.execute(sql.replace("m.", f"{mallory}."))
    admin.execute("SET client_min_messages = notice")
    assert spied(admin, f"SELECT {mallory}.spy('x')") == {"spy read token"}, "by itself it runs as the superuser"
    assert spied(admin, statement.replace("m.", f"{mallory}.")) == {"spy was refused"}


def test_autovacuum(make_cluster, extension):
    """From: an expression index of one's own. Tries: having autovacuum, which is a superuser, analyse it. Ends in: 42501."""
    own = make_cluster({"autovacuum_naptime": "1s", "log_min_messages": "log"})
    own.psql(f"CREATE EXTENSION {extension}; CREATE ROLE mallory LOGIN; CREATE SCHEMA m AUTHORIZATION mallory")
    path = own.server_file("kek.b64", new_key())
    with own.connect() as admin, own.connect(user="mallory") as user:
        admin.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
        admin.execute("GRANT EXECUTE ON FUNCTION envelope_decrypt(text, text, jsonb, int) TO mallory")
        user.execute(spy("m", encrypted(admin), "LOG"))
        user.execute("CREATE TABLE m.t (x text) WITH (autovacuum_analyze_threshold = 1, autovacuum_analyze_scale_factor = 0)")
        user.execute("CREATE INDEX ON m.t (m.spy(x))")
        since = own.log_size()
        user.execute("INSERT INTO m.t SELECT g::text FROM generate_series(1, 20) g")
        asked = "SELECT count(*) FROM pg_stat_user_tables WHERE relname = 't' AND last_autoanalyze IS NOT NULL"
        wait_until(lambda: one(admin, asked), "for autovacuum", 60)
        said = [line for line in own.log_text(since).splitlines() if "spy" in line and "LOG:" in line]
        worker = [line for line in said if "mallory@" not in line and "postgres@" not in line]
        assert worker and all("spy was refused" in line for line in said), said[:3]
        assert one(admin, "SELECT m.spy('x')") == "x"
        assert "spy read token" in own.log_text(since), "by itself it runs as the superuser"


def test_a_leaky_function_below_a_barrier(database, admin, people):
    """From: decrypt, and SELECT on a security_barrier view that decrypts the rows that a policy gives. Tries: a cheap
    function in WHERE, for the planner to run first. Ends in: one's own rows only, for the function too; the same function on
    a view without the barrier sees the ciphertext of them all, and plaintext of none."""
    admin.execute("""
        CREATE TABLE tokens (owner text, v text);
        INSERT INTO tokens SELECT CASE g % 2 WHEN 0 THEN 'mine' ELSE 'theirs' END, envelope_encrypt('t' || g)
            FROM generate_series(1, 10) g;
        ALTER TABLE tokens ENABLE ROW LEVEL SECURITY;
        CREATE POLICY own ON tokens USING (owner = 'mine');
        CREATE VIEW open_tokens WITH (security_barrier, security_invoker) AS
            SELECT owner, envelope_decrypt(v) AS token FROM tokens""")
    role = people.may("default", "decrypt", what="tenant")
    admin.execute(f"GRANT SELECT ON tokens, open_tokens TO {role}")
    with database.connect(role) as user:
        user.execute("""CREATE FUNCTION pg_temp.leak(x text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS
                        $$ BEGIN RAISE NOTICE 'leak %', x; RETURN true; END $$""")
        for query in ("SELECT count(*) FROM open_tokens WHERE pg_temp.leak(token)",
                      "SELECT count(*) FROM tokens WHERE pg_temp.leak(envelope_decrypt(v))",
                      "SELECT count(*) FROM tokens WHERE pg_temp.leak(v) AND envelope_decrypt(v) <> ''"):
            heard = notices(user)
            assert one(user, query) == 5
            seen = {message.removeprefix("leak ") for _, message in heard}
            if "leak(v)" in query:
                assert len(seen) == 5 and all(each.startswith("kms:v2:") for each in seen)
            else:
                assert seen == {f"t{g}" for g in range(2, 11, 2)}
        with fails(NO_RIGHT):
            user.execute("CREATE FUNCTION pg_temp.sure(text) RETURNS boolean LANGUAGE sql LEAKPROOF AS 'SELECT true'")


def test_views_over_other_peoples_tables(database, admin, people, mallory):
    """From: a view of one's own that decrypts, over a table of one's own with stolen ciphertext, and over a table that one
    may not read. Tries: having a role read it that may both. Ends in: the plaintext for that role alone (as if it had
    called the function itself); 42501 for the other table, because a view's owner must be able to read it."""
    admin.execute("CREATE TABLE secrets AS SELECT envelope_encrypt('secret') AS v")
    victim = people.may("default", "decrypt", what="victim")
    admin.execute(f"GRANT SELECT ON secrets TO {victim}")
    with database.connect(mallory) as user, database.connect(victim) as reader:
        user.execute("CREATE TABLE loot (v text)")
        user.execute("INSERT INTO loot VALUES (%s)", [encrypted(admin, "stolen")])
        user.execute("CREATE VIEW own AS SELECT envelope_decrypt(v) AS v FROM loot")
        user.execute("CREATE VIEW others AS SELECT envelope_decrypt(v) AS v FROM public.secrets")
        user.execute("GRANT SELECT ON own, others TO PUBLIC")
        assert one(reader, f"SELECT v FROM {mallory}.own") == "stolen"
        assert one(reader, "SELECT envelope_decrypt(v) FROM secrets") == "secret"
        for session in (reader, user):
            with fails(NO_RIGHT, "permission denied for table secrets"):
                session.execute(f"SELECT v FROM {mallory}.others")
        with fails(NO_RIGHT, "with key"):
            user.execute("SELECT v FROM own")
        # A view with security_invoker reads the table as the reader does, too.
        user.execute("ALTER VIEW others SET (security_invoker = true)")
        assert one(reader, f"SELECT v FROM {mallory}.others") == "secret"


def test_overloads_in_the_extensions_schema(database, admin, people):
    """From: CREATE on the extension's schema (PostgreSQL 15 takes it from everybody in public; an owner can give it). Tries:
    functions of the extension's name whose arguments fit a call better. Ends in: a call that is ambiguous (42725), or that
    is the attacker's function's, as with every function of PostgreSQL's: so nobody may CREATE there."""
    role = people.make("mallory")
    trap = """CREATE FUNCTION public.envelope_encrypt(plaintext {}) RETURNS text LANGUAGE sql
              AS $$ SELECT 'trapped ' || plaintext $$"""
    with database.connect(role) as user:
        with fails(NO_RIGHT, "permission denied for schema public"):
            user.execute(trap.format("text"))
        admin.execute(f"GRANT CREATE ON SCHEMA public TO {role}")
        for type_ in ("text", "character varying"):
            user.execute(trap.format(type_))
    with fails("42725"):
        one(admin, "SELECT envelope_encrypt('x'::text)")
    assert one(admin, "SELECT envelope_encrypt('x'::varchar)") == "trapped x"
    assert one(admin, "SELECT envelope_encrypt('x'::text, NULL, NULL, NULL)").startswith("kms:v2:")


# Everything that the extension's own SQL could take from the path in place of PostgreSQL's.
SHADOWS = """
    CREATE SCHEMA evil;
    CREATE FUNCTION evil.trap() RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'a shadow was asked' USING ERRCODE = 'XX001'; END $$;
    CREATE TABLE evil.kek (name text, uri text, context jsonb, state text);
    CREATE TABLE evil.key_grant (key text, role regrole, privilege text);
    CREATE TABLE evil.honey (mark bytea, label text);
    CREATE TABLE evil.pg_roles (oid oid); CREATE TABLE evil.pg_class (oid oid, relowner oid);
    CREATE TABLE evil.pg_extension (oid oid, extname name, extnamespace oid);
    CREATE TABLE evil.pg_proc (oid oid, proname name, pronamespace oid); CREATE TABLE evil.pg_namespace (oid oid, nspname name);
    INSERT INTO evil.kek VALUES ('default', 'local:///forged', '{}', 'active');
    CREATE DOMAIN evil.text AS pg_catalog.text CHECK (evil.trap());
    CREATE DOMAIN evil.name AS pg_catalog.name CHECK (evil.trap());
    CREATE DOMAIN evil.oid AS pg_catalog.oid CHECK (evil.trap());
    CREATE DOMAIN evil.regrole AS pg_catalog.regrole CHECK (evil.trap());
    CREATE DOMAIN evil.regprocedure AS pg_catalog.regprocedure CHECK (evil.trap());
    CREATE DOMAIN evil.regclass AS pg_catalog.regclass CHECK (evil.trap());
    CREATE DOMAIN evil.jsonb AS pg_catalog.jsonb CHECK (evil.trap())"""
SHADOW_OPERATORS = [("text", "text"), ("name", "name"), ("name", "text"), ("oid", "oid"), ("regrole", "oid"),
                    ("regrole", "regrole"), ("bytea", "bytea"), ("int4", "int4"), ("int8", "int8"), ("jsonb", "jsonb"),
                    ("\"char\"", "\"char\"")]
SHADOW_FUNCTIONS = ["format(text, text)", "format(text, text, text)", "format(text, oid)", "format(text, regprocedure, regrole)",
                    "unnest(text[])", "cardinality(text[])", "has_schema_privilege(regrole, name, text)", "now()", "md5(text)",
                    "coalesce_(text)", "count(text)", "pg_has_role(oid, text)", "to_regclass(text)", "sha256(bytea)",
                    "check_key(text, text, jsonb)", "check_grant(text, regrole, text[])", "clock_timestamp()", "hashtext(text)",
                    "concat_ws(text, bigint, text, bigint, text)", "to_timestamp(numeric)", "array_length(text[], int)",
                    "jsonb_typeof(jsonb)", "jsonb_object_keys(jsonb)", "string_agg(text, text)", "gen_random_uuid()"]


def shadow(connection) -> None:
    """Makes them all, and puts them first on the session's path."""
    connection.execute(SHADOWS)
    for number, (left, right) in enumerate(SHADOW_OPERATORS):
        left, right = (side if side.startswith('"') else f"pg_catalog.{side}" for side in (left, right))
        for operator, name in (("=", "eq"), ("<>", "ne"), ("||", "cat"), ("<", "lt")):
            kind = "pg_catalog.text" if operator == "||" else "boolean"
            function = f"evil.{name}_{number}"
            connection.execute(f"""
                CREATE FUNCTION {function}({left}, {right}) RETURNS {kind} LANGUAGE sql AS 'SELECT evil.trap()::{kind}';
                CREATE OPERATOR evil.{operator} (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = {function})""")
    for signature in SHADOW_FUNCTIONS:
        connection.execute(f"CREATE FUNCTION evil.{signature} RETURNS pg_catalog.text LANGUAGE sql AS "
                           "'SELECT evil.trap()::pg_catalog.text'")
    connection.execute("""
        CREATE TEMP TABLE kek (name pg_catalog.text, uri pg_catalog.text, context pg_catalog.jsonb, state pg_catalog.text);
        CREATE TEMP TABLE key_grant (key pg_catalog.text, role pg_catalog.regrole, privilege pg_catalog.text);
        CREATE TEMP TABLE honey (mark pg_catalog.bytea, label pg_catalog.text);
        SET search_path = evil, pg_temp, public, pg_catalog""")


def test_shadows_on_the_path_of_an_administrator(database, admin, people):
    """From: a schema that is on an administrator's path before pg_catalog, and temporary objects. Tries: tables, types,
    functions and operators in the place of those that the extension's SQL uses. Ends in: none of them is asked."""
    role = people.make("grantee")
    path = database.server_file("other.b64", new_key())
    admin.execute("CREATE TABLE public.protected (id int PRIMARY KEY, v text)")
    admin.execute("INSERT INTO public.protected SELECT g, 'v' || g FROM generate_series(1, 3) g")
    with database.connect() as session:
        shadow(session)
        with fails("XX001"):
            session.execute("SELECT format('x'::pg_catalog.text, 'x'::pg_catalog.text)")
        for statement in (
                f"SELECT vod_tender_crypto.add_key('other', 'local://{path}')",
                "SELECT vod_tender_crypto.set_key_state('other', 'decrypt_only')",
                "SELECT vod_tender_crypto.set_key_state('other', 'active')",
                f"SELECT vod_tender_crypto.grant_key('other', '{role}', '{{encrypt,decrypt}}')",
                f"SELECT vod_tender_crypto.revoke_key('other', '{role}', '{{decrypt}}')",
                f"SELECT vod_tender_crypto.grant_jobs('{role}')", f"SELECT vod_tender_crypto.grant_audit('{role}')",
                "CALL vod_tender_crypto.migrate('public.protected', columns => '{v}', version => '0', key => 'other')",
                "CALL vod_tender_crypto.rewrap_table('public.protected', columns => '{v}', key => 'default')",
                "SELECT vod_tender_crypto.plant_honey('public.protected', '{\"id\": 4}')",
                "SELECT vod_tender_crypto.create_decrypting_view('public.protected', 'clear', columns => '{v}')",
                "SELECT vod_tender_crypto.drop_decrypting_view('public.clear')",
                "SELECT * FROM vod_tender_crypto.doctor()",
                "SELECT * FROM vod_tender_crypto.verify('public.protected')",
                "SELECT * FROM vod_tender_crypto.census()",
                "SELECT * FROM vod_tender_crypto.verify_audit()", "SELECT vod_tender_crypto.prune_audit('2000-01-01')",
                "SELECT vod_tender_crypto.set_key_state('other', 'decrypt_only')",
                "SELECT vod_tender_crypto.retire_key('other')", "SELECT vod_tender_crypto.legacy_key_unused()",
                "SELECT vod_tender_crypto.drop_key('other')"):
            psycopg.ClientCursor(session).execute(statement)
        value = one(session, "SELECT envelope_encrypt('token'::pg_catalog.text, aad => 'row')")
        assert one(session, f"SELECT envelope_decrypt('{value}'::pg_catalog.text, 'row')") == "token"
        with fails(UNKNOWN_KEY):
            session.execute("SELECT vod_tender_crypto.drop_key('other')")
    assert one(admin, "SELECT count(*) FROM vod_tender_crypto.key_grant") == 0
    assert one(admin, "SELECT count(*) FROM public.protected WHERE envelope_info(v)->>'key' = 'default'") == 4
    assert one(admin, "SELECT count(*) FROM evil.kek") == 1


def test_a_path_that_hides_the_function_itself(database, admin, people, mallory, value):
    """From: a function of the extension's name in a schema that a privileged role has before the extension's. Tries: being
    called in its place. Ends in: being called, as with every function of PostgreSQL's: qualify the name, or keep others'
    schemas off the path. It gets what it is passed, and the caller's rights; a qualified call is not hidden."""
    victim = people.may("default", *ALL, what="victim")
    with database.connect(mallory) as user:
        user.execute("CREATE FUNCTION envelope_decrypt(text) RETURNS text LANGUAGE sql AS $$ SELECT 'mallory' $$")
    with database.connect(victim) as session:
        session.execute(f"SET search_path = {mallory}, public")
        assert decrypted(session, value) == "mallory"
        assert one(session, "SELECT public.envelope_decrypt(%s)", value) == "token"


def test_by_hand_made_views_with_triggers(database, admin, people):
    """From: INSERT and UPDATE on a view that encrypts for others. Tries: reading by writing: RETURNING, a row moved to
    another tenant's key. Ends in: 42501."""
    for name in "ab":
        add_local_key(database, admin, name, json.dumps({"tenant": name}), default=False)
    admin.execute("""
        CREATE TABLE stored (id int PRIMARY KEY, tenant text, v text);
        INSERT INTO stored SELECT g, n, envelope_encrypt('secret ' || n, n) FROM (VALUES (1, 'a'), (2, 'b')) x(g, n);
        CREATE VIEW clear WITH (security_barrier, security_invoker) AS
            SELECT id, tenant, envelope_decrypt(v) AS v FROM stored;
        CREATE FUNCTION write_clear() RETURNS trigger LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                INSERT INTO stored VALUES (NEW.id, NEW.tenant, envelope_encrypt(NEW.v, NEW.tenant));
            ELSE
                UPDATE stored SET v = envelope_encrypt(NEW.v, NEW.tenant), tenant = NEW.tenant WHERE id = OLD.id;
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER t INSTEAD OF INSERT OR UPDATE ON clear FOR EACH ROW EXECUTE FUNCTION write_clear()""")
    role = people.may("a", "encrypt", "decrypt", what="tenant")
    admin.execute(f"GRANT SELECT, INSERT, UPDATE ON stored, clear TO {role}")
    with database.connect(role) as user:
        assert one(user, "SELECT v FROM clear WHERE tenant = 'a'") == "secret a"
        assert one(user, "INSERT INTO clear VALUES (3, 'a', 'new') RETURNING v") == "new"
        for statement in ("SELECT v FROM clear", "UPDATE clear SET tenant = 'a' WHERE id = 2 RETURNING v",
                          "UPDATE clear SET tenant = 'b' WHERE id = 1", "INSERT INTO clear VALUES (4, 'b', 'x')"):
            with fails(NO_RIGHT, 'with key "b"'):
                user.execute(statement)
        # The ciphertext is the table's, and whose it is does not change with another column.
        user.execute("UPDATE stored SET tenant = 'a' WHERE id = 2")
        with fails(NO_RIGHT, 'with key "b"'):
            user.execute("SELECT v FROM clear WHERE tenant = 'a'")


def test_shadows_on_the_path_of_a_views_writer(database, admin, people):
    """From: a schema on the path, and temporary objects in the session, of a role that uses a decrypting view (whose trigger
    leaves the path as it is). Tries: types, functions and operators in the place of PostgreSQL's. Ends in: none of them is
    asked, in reading and in writing."""
    admin.execute("""
        CREATE TABLE stored (id int PRIMARY KEY, channel text NOT NULL, v text, note text);
        SELECT vod_tender_crypto.create_decrypting_view('stored', 'clear', columns => '{v}', aad => 'channel || ''/v''',
            key => 'default', set_columns => '{"note": "{key}"}')""")
    with database.connect() as session:
        shadow(session)
        session.execute("INSERT INTO public.clear (id, channel, v) VALUES (1, 'c', 'one'), (2, 'c', 'two')")
        session.execute("UPDATE public.clear SET v = 'changed' WHERE id OPERATOR(pg_catalog.=) 1")
        session.execute("UPDATE public.clear SET channel = 'other' WHERE id OPERATOR(pg_catalog.=) 1")
        session.execute("DELETE FROM public.clear WHERE id OPERATOR(pg_catalog.=) 2")
        assert session.execute("TABLE public.clear").fetchall() == [(1, "other", "changed", "default")]
    assert one(admin, "SELECT envelope_decrypt(v, 'other/v') FROM stored") == "changed"


def test_a_superuser_makes_a_view_of_somebodys_table(database, admin, people, mallory):
    """From: a table of one's own whose defaults, checks and generated columns call one's function. Tries: having it run while
    a superuser makes a decrypting view of the table, or plans jobs on it. Ends in: it is not called; who then reads and
    writes through the view does so with that one's own rights, as with every table of somebody else's."""
    with database.connect(mallory) as user:
        user.execute(f"""
            CREATE TABLE {mallory}.t (id int PRIMARY KEY DEFAULT length({mallory}.spy('x')), v text DEFAULT {mallory}.spy('x'),
                c text CHECK ({mallory}.spy(c) = c),
                g text GENERATED ALWAYS AS ({mallory}.spy('x')) STORED)""")
    statement = f"""SELECT vod_tender_crypto.create_decrypting_view('{mallory}.t', 'clear', columns => '{{v}}', key => 'default',
                    set_columns => '{{"c": "{{key}}"}}')"""
    assert spied(admin, statement) == set()
    assert one(admin, f"SELECT relowner::regrole::text FROM pg_class WHERE oid = '{mallory}.clear'::regclass") == mallory
    with database.connect(mallory) as user:
        with fails(NO_RIGHT, "with key"):
            user.execute(f"INSERT INTO {mallory}.clear (id, v) VALUES (1, 'x')")
    assert "spy read token" in spied(admin, f"INSERT INTO {mallory}.clear (id, v, c) VALUES (1, 'x', NULL)")
