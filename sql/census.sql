-- What is stored under which version and key, and so which keys are still needed.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Every column of the database that can hold protected values, and whether the caller can read all of it.
CREATE FUNCTION vod_tender_crypto.census_column() RETURNS TABLE (
    relation regclass, column_name name, registered boolean, readable boolean
)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH RECURSIVE base(type) AS (
        SELECT t.oid FROM pg_type t WHERE t.oid IN ('text'::regtype, 'varchar'::regtype, 'bpchar'::regtype, 'bytea'::regtype)
        UNION ALL
        SELECT d.oid FROM pg_type d JOIN base ON d.typbasetype = base.type WHERE d.typtype = 'd'
    ), registration(relation, column_name) AS (
        SELECT heir.relation, p.column_name
        FROM vod_tender_crypto.protected_column p
        CROSS JOIN LATERAL vod_tender_crypto.storing_relations(to_regclass(format('%I.%I', p.schema_name, p.table_name))) heir(relation)
    )
    SELECT c.oid::regclass, a.attname,
           EXISTS (SELECT FROM registration r WHERE r.relation = c.oid AND r.column_name = a.attname),
           has_column_privilege(c.oid, a.attnum, 'SELECT') AND has_schema_privilege(c.relnamespace, 'USAGE')
               AND NOT row_security_active(c.oid) AND (c.relkind <> 'm' OR c.relispopulated)
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN base ON base.type = a.atttypid
    JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'm') AND NOT pg_is_other_temp_schema(s.oid)
      AND s.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast', 'vod_tender_crypto')
    ORDER BY c.oid::regclass::text, a.attnum;
END;

CREATE FUNCTION vod_tender_crypto.count_column(relation regclass, column_name name)
    RETURNS TABLE (version integer, key text, kek_id text, value_count bigint)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT (c.under::jsonb ->> 'version')::integer, w.wrap ->> 0, w.wrap ->> 1, sum(c.value_count)::bigint
    FROM pg_attribute a
    CROSS JOIN LATERAL vod_tender_crypto.count_stored(a.attrelid, a.attnum) c
    LEFT JOIN LATERAL jsonb_array_elements(c.under::jsonb -> 'wraps') w(wrap) ON true
    WHERE a.attrelid = count_column.relation AND a.attname = count_column.column_name AND NOT a.attisdropped
    GROUP BY 1, 2, 3 ORDER BY 1, 2, 3;
END;

CREATE FUNCTION vod_tender_crypto.census(target regclass) RETURNS TABLE (
    relation regclass, column_name name, registered boolean, version integer, key text, kek_id text, value_count bigint
)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    col record;
    unread text[] := '{}';
    wanted regclass[];
    missing record;
BEGIN
    IF census.target IS NOT NULL THEN
        wanted := ARRAY(SELECT vod_tender_crypto.storing_relations(census.target));
    END IF;
    FOR col IN SELECT c.* FROM vod_tender_crypto.census_column() c WHERE wanted IS NULL OR c.relation = ANY (wanted) LOOP
        IF NOT col.readable THEN
            unread := unread || format('%s.%I', col.relation, col.column_name);
            CONTINUE;
        END IF;
        RETURN QUERY
            SELECT col.relation, col.column_name, col.registered, counted.version, counted.key, counted.kek_id, counted.value_count
            FROM (SELECT n.*, bool_or(n.version IS DISTINCT FROM 0) OVER () AS has_ours
                  FROM vod_tender_crypto.count_column(col.relation, col.column_name) n) counted
            WHERE col.registered OR counted.has_ours;
    END LOOP;
    IF cardinality(unread) > 0 THEN
        RAISE WARNING '% columns were not read: %', cardinality(unread), array_to_string(unread[1:20], ', ')
            USING HINT = 'The caller may not read them, row-level security would hide rows, or a materialized view is not populated.';
    END IF;
    FOR missing IN
        SELECT p.* FROM vod_tender_crypto.protected_column p
        WHERE census.target IS NULL AND NOT EXISTS (
            SELECT FROM pg_attribute a
            WHERE a.attrelid = to_regclass(format('%I.%I', p.schema_name, p.table_name)) AND a.attname = p.column_name)
    LOOP
        RAISE WARNING 'registered column %.%.% does not exist', quote_ident(missing.schema_name),
            quote_ident(missing.table_name), quote_ident(missing.column_name);
    END LOOP;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.census(regclass) IS
    'Values of a table''s columns per version, key and KEK id: of registered columns, and of all others that hold values of version 1 or 2. Version NULL: begins as an envelope and is malformed.';

CREATE FUNCTION vod_tender_crypto.census() RETURNS TABLE (
    relation regclass, column_name name, registered boolean, version integer, key text, kek_id text, value_count bigint
)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT c.* FROM vod_tender_crypto.census(NULL::regclass) c;
END;
COMMENT ON FUNCTION vod_tender_crypto.census() IS
    'The census of every text and bytea column of the database, registered or not.';

-- Raises when part of the database cannot be counted: "not needed" must not mean "not seen".
CREATE FUNCTION vod_tender_crypto.check_census_complete() RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    unread text;
BEGIN
    SELECT format('%s.%I', c.relation, c.column_name) INTO unread
    FROM vod_tender_crypto.census_column() c WHERE NOT c.readable LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = format('column %s cannot be read, so it may hold values that need the key', unread),
            HINT = 'Run it as a superuser; refresh materialized views that are not populated, or drop them.';
    END IF;
END
$$;

CREATE FUNCTION vod_tender_crypto.retire_key(name text) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    retiring record;
    needed text;
    running record;
BEGIN
    SELECT k.name, k.state, k.xmin AS changed_by INTO retiring
    FROM vod_tender_crypto.kek k WHERE k.name = retire_key.name FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('key "%s" is not configured', retire_key.name),
            HINT = 'Configured keys are in vod_tender_crypto.kek. The key of the server''s environment is retired by removing it there; vod_tender_crypto.census() shows what needs it.';
    END IF;
    IF retiring.state = 'active' THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('key "%s" is active', retire_key.name),
            DETAIL = 'Values could be encrypted under it while they are counted.',
            HINT = format('SELECT vod_tender_crypto.set_key_state(%L, ''decrypt_only'') first.', retire_key.name);
    END IF;
    PERFORM vod_tender_crypto.check_census_complete();
    -- A transaction that began before the key stopped encrypting may hold values under it that nobody sees yet.
    SELECT o.pid::text AS who INTO running
    FROM pg_stat_activity o
    WHERE o.pid <> pg_backend_pid() AND o.datname = current_database()
      AND greatest(age(o.backend_xid), age(o.backend_xmin)) >= age(retiring.changed_by)
    UNION ALL
    SELECT format('prepared transaction %L', p.gid) FROM pg_prepared_xacts p
    WHERE p.database = current_database() AND age(p.transaction) >= age(retiring.changed_by)
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'object_in_use',
            MESSAGE = format('a transaction that began while key "%s" could encrypt is still open', retire_key.name),
            DETAIL = format('It is of process %s.', running.who),
            HINT = 'Wait for it to end, or end it.';
    END IF;
    SELECT string_agg(format('%s values in %s.%I', c.value_count, c.relation, c.column_name), '; ') INTO needed
    FROM vod_tender_crypto.census() c
    -- The literal form names no key: it is under the default one.
    WHERE c.key = retire_key.name
       OR c.version = 2 AND c.key IS NULL AND retire_key.name = current_setting('vod_tender_crypto.default_key');
    IF needed IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'dependent_objects_still_exist',
            MESSAGE = format('key "%s" is still needed', retire_key.name),
            DETAIL = needed || '.',
            HINT = 'CALL vod_tender_crypto.rewrap_table() puts them under another key.';
    END IF;
    SELECT string_agg(w.what, '; ') INTO needed
    FROM (SELECT 'vod_tender_crypto.default_key' WHERE current_setting('vod_tender_crypto.default_key') = retire_key.name
          UNION ALL
          SELECT format('the registration of %I.%I.%I', p.schema_name, p.table_name, p.column_name)
          FROM vod_tender_crypto.protected_column p WHERE p.key = retire_key.name) w(what);
    IF needed IS NOT NULL THEN
        RAISE WARNING 'key "%" is retired, and still named by: %', retire_key.name, needed
            USING HINT = 'What would encrypt under it fails until another key is named there.';
    END IF;
    UPDATE vod_tender_crypto.kek k SET state = 'disabled' WHERE k.name = retire_key.name;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.retire_key(text) IS
    'Disables a key that nothing stored in this database needs any more; refuses, and says what needs it, otherwise. Backups may still need it: keep the key itself as long as they are kept.';

CREATE FUNCTION vod_tender_crypto.legacy_key_unused() RETURNS boolean
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    held record;
    unused boolean := true;
BEGIN
    -- Without the key, its values cannot be told from plaintext: raises.
    PERFORM vod_tender_crypto.job_key('downgrade', NULL, NULL);
    PERFORM vod_tender_crypto.check_census_complete();
    FOR held IN SELECT c.* FROM vod_tender_crypto.census() c WHERE c.version IS DISTINCT FROM 2 LOOP
        IF held.version = 1 THEN
            unused := false;
            RAISE NOTICE '% values of %.% need the legacy key', held.value_count, held.relation, quote_ident(held.column_name);
        ELSIF held.registered THEN
            RAISE NOTICE '% values of %.% are % and open under no legacy key', held.value_count, held.relation,
                quote_ident(held.column_name), CASE WHEN held.version = 0 THEN 'not encrypted, or damaged,' ELSE 'malformed' END;
        END IF;
    END LOOP;
    RETURN unused;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.legacy_key_unused() IS
    'Whether nothing stored in this database needs the legacy key any more, as far as it is committed; says what does. Run it when no session writes version 1 any more.';

SET LOCAL search_path = @extschema@, pg_temp;
