-- doctor(), objects of the database: rights, views and functions that decrypt, functions that stand in the way of ours.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE FUNCTION vod_tender_crypto.doctor_rights() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT 'critical', 'public_execute', p.oid::regprocedure::text, 'EXECUTE is granted to PUBLIC',
           format('REVOKE EXECUTE ON ROUTINE %s FROM PUBLIC, and grant it to the roles that need it.', p.oid::regprocedure)
    FROM pg_proc p
    CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
    WHERE a.grantee = 0 AND a.privilege_type = 'EXECUTE'
      AND (p.pronamespace = 'vod_tender_crypto'::regnamespace AND p.proname <> 'session_stats'
           OR EXISTS (SELECT FROM vod_tender_crypto.data_path() o WHERE o.function = p.oid
                      AND o.name IN ('envelope_encrypt', 'envelope_decrypt', 'envelope_upgrade', 'envelope_downgrade', 'rewrap')))
    UNION ALL
    SELECT CASE WHEN bool_and(g.privilege = 'SELECT') THEN 'warning' ELSE 'critical' END, 'public_table', g.relation::text,
           format('%s is granted to PUBLIC', string_agg(DISTINCT g.privilege, ', ')),
           format('REVOKE ALL ON %s FROM PUBLIC: keys, registrations and jobs are for their owner and '
           'grant_jobs().', g.relation)
    FROM (SELECT c.oid::regclass, a.privilege_type
          FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
          WHERE c.relnamespace = 'vod_tender_crypto'::regnamespace AND a.grantee = 0
          UNION ALL
          SELECT c.oid::regclass, a.privilege_type
          FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid CROSS JOIN LATERAL aclexplode(t.attacl) a
          WHERE c.relnamespace = 'vod_tender_crypto'::regnamespace AND a.grantee = 0) g(relation, privilege)
    GROUP BY g.relation;
END;

-- Rights on keys that nobody has any more, and records of the audit that do not get into the table.
CREATE FUNCTION vod_tender_crypto.doctor_access() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    SELECT 'notice', 'grant_left_over', format('%s (%s)', g.key, g.role),
           CASE WHEN r.oid IS NULL THEN 'the role was dropped' ELSE 'the key is not configured' END,
           'DELETE FROM vod_tender_crypto.key_grant: a key that is configured under this name again would be open to the role.'
    FROM (SELECT DISTINCT k.key, k.role FROM vod_tender_crypto.key_grant k) g
    LEFT JOIN pg_roles r ON r.oid = g.role
    WHERE r.oid IS NULL
       OR g.key NOT IN ('default', 'legacy') AND NOT EXISTS (SELECT FROM vod_tender_crypto.kek k WHERE k.name = g.key)
    UNION ALL
    SELECT 'warning', 'audit_waits', 'vod_tender_crypto.audit',
           format('%s of records wait for the table since more than a minute', pg_size_pretty(w.bytes)),
           'See the server''s log for why its background worker does not store them; max_worker_processes must leave room for it. '
           'flush_audit() starts it.'
    FROM (SELECT vod_tender_crypto.audit_waiting_bytes()) w(bytes)
    WHERE w.bytes > 0
    UNION ALL
    SELECT 'notice', 'worker_room', 'max_worker_processes',
           format('max_worker_processes = %s, max_parallel_workers = %s', w.all_workers, w.parallel),
           'Raise max_worker_processes above max_parallel_workers: parallel queries can keep the audit''s worker out.'
    FROM (SELECT current_setting('max_worker_processes')::integer, current_setting('max_parallel_workers')::integer) w(all_workers, parallel)
    WHERE w.parallel >= w.all_workers AND current_setting('vod_tender_crypto.audit', true) = 'table';
END;

-- What decrypts: our functions, and those of others that call them, as far as PostgreSQL or their text says so.
CREATE FUNCTION vod_tender_crypto.decrypting_function() RETURNS TABLE (function oid, is_ours boolean)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH RECURSIVE ours AS (SELECT o.* FROM vod_tender_crypto.data_path() o),
    decrypting(function) AS (
        SELECT o.function FROM ours o WHERE o.name = 'envelope_decrypt'
        UNION
        SELECT p.oid FROM pg_proc p
        WHERE p.prosrc ~* '\menvelope_decrypt\M' AND p.pronamespace <> 'vod_tender_crypto'::regnamespace
          AND NOT p.oid IN (SELECT o.function FROM ours o)
        UNION
        SELECT d.objid FROM decrypting x
        JOIN pg_depend d ON d.refclassid = 'pg_proc'::regclass AND d.refobjid = x.function AND d.classid = 'pg_proc'::regclass
    )
    SELECT x.function, x.function IN (SELECT o.function FROM ours o) FROM decrypting x;
END;

CREATE FUNCTION vod_tender_crypto.doctor_decrypting() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH viewed AS (
        SELECT DISTINCT c.oid, c.relkind, coalesce(o.is_barrier, false) AS is_barrier
        FROM vod_tender_crypto.decrypting_function() x
        JOIN pg_depend d ON d.refclassid = 'pg_proc'::regclass AND d.refobjid = x.function AND d.classid = 'pg_rewrite'::regclass
        JOIN pg_rewrite r ON r.oid = d.objid
        JOIN pg_class c ON c.oid = r.ev_class
        LEFT JOIN LATERAL (SELECT vod_tender_crypto.setting_on(t.option_value) AS is_barrier
                           FROM pg_options_to_table(c.reloptions) t WHERE t.option_name = 'security_barrier') o ON true
        WHERE c.relnamespace <> 'vod_tender_crypto'::regnamespace
    )
    SELECT 'warning', 'view_without_barrier', v.oid::regclass::text, 'the view decrypts and is no security barrier',
           format('ALTER VIEW %s SET (security_barrier = true): else a caller''s own function in WHERE can see rows '
           'that the view would hide.',
                  v.oid::regclass)
    FROM viewed v WHERE v.relkind = 'v' AND NOT v.is_barrier
    UNION ALL
    SELECT 'critical', 'plaintext_stored', v.oid::regclass::text, 'the materialized view stores what it decrypts',
           format('DROP MATERIALIZED VIEW %s, and decrypt in a view or in the query: it is plaintext on disk and in '
           'every backup.',
                  v.oid::regclass)
    FROM viewed v WHERE v.relkind = 'm'
    UNION ALL
    SELECT 'critical', 'definer_decrypts', p.oid::regprocedure::text,
           'SECURITY DEFINER, decrypts, and EXECUTE is granted to PUBLIC',
           format('REVOKE EXECUTE ON ROUTINE %s FROM PUBLIC, and grant it to the roles that need it.', p.oid::regprocedure)
    FROM vod_tender_crypto.decrypting_function() x
    JOIN pg_proc p ON p.oid = x.function
    WHERE p.prosecdef AND NOT x.is_ours
      AND EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                  WHERE a.grantee = 0 AND a.privilege_type = 'EXECUTE');
END;

-- Where each login role's unqualified calls are looked up in this database.
CREATE FUNCTION vod_tender_crypto.login_path() RETURNS TABLE (role_name name, role oid, place bigint, schema oid)
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    WITH server AS (
        SELECT s.effective ->> 'search_path' AS path FROM vod_tender_crypto.doctor_scope() s WHERE s.scope = 'server'
    ),
    path AS (
        SELECT r.oid, r.rolname, coalesce(
            (SELECT substr(c.pair, length('search_path=') + 1)
             FROM pg_db_role_setting s, unnest(s.setconfig) c(pair)
             WHERE starts_with(c.pair, 'search_path=') AND s.setrole IN (0, r.oid)
               AND s.setdatabase IN (0, (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()))
             ORDER BY s.setrole <> 0 DESC, s.setdatabase <> 0 DESC LIMIT 1),
            server.path) AS path
        FROM pg_roles r, server
        WHERE r.rolcanlogin AND has_database_privilege(r.oid, current_database(), 'CONNECT')
    ), element AS (
        SELECT p.oid, p.rolname, e.place, coalesce(replace(e.part[1], '""', '"'), lower(e.part[2])) AS name
        FROM path p, regexp_matches(p.path, '"((?:[^"]|"")*)"|([^",\s]+)', 'g') WITH ORDINALITY e(part, place)
    )
    SELECT e.rolname, e.oid, min(e.place), n.oid
    FROM (SELECT e.* FROM element e
          UNION ALL
          SELECT p.oid, p.rolname, 0, 'pg_catalog' FROM path p
          WHERE NOT EXISTS (SELECT FROM element e WHERE e.oid = p.oid AND e.name = 'pg_catalog')) e
    JOIN pg_namespace n ON n.nspname = CASE e.name WHEN '$user' THEN e.rolname::text ELSE e.name END
    WHERE has_schema_privilege(e.oid, n.oid, 'USAGE')
    GROUP BY e.rolname, e.oid, n.oid;
END;

CREATE FUNCTION vod_tender_crypto.doctor_shadows() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    WITH ours AS (SELECT o.* FROM vod_tender_crypto.data_path() o),
    path AS MATERIALIZED (SELECT l.* FROM vod_tender_crypto.login_path() l),
    shadow AS (
        SELECT p.oid, l.role_name,
               -- Of two that fit alike the first on the path is called; one that fits better is called wherever it is.
               NOT EXISTS (SELECT FROM ours o WHERE o.name = p.proname AND o.arguments = p.proargtypes)
               OR l.place < coalesce((SELECT min(b.place) FROM path b JOIN ours o ON o.schema = b.schema WHERE b.role = l.role),
                                     l.place + 1) AS may_win
        FROM pg_proc p JOIN path l ON l.schema = p.pronamespace
        WHERE p.proname IN (SELECT o.name FROM ours o) AND NOT p.oid IN (SELECT o.function FROM ours o)
    )
    SELECT CASE WHEN bool_or(s.may_win) THEN 'critical' ELSE 'warning' END, 'shadowing_function', s.oid::regprocedure::text,
           format('it is not the extension''s, and its schema is on the search_path of %s',
                  array_to_string((array_agg(quote_ident(s.role_name) ORDER BY s.role_name))[1:5], ', ')
                  || CASE WHEN count(*) > 5 THEN format(' and %s more', count(*) - 5) ELSE '' END),
           format('DROP FUNCTION %s, unless you know what it is for: called in the extension''s place, it is given '
           'plaintext.',
                  s.oid::regprocedure)
    FROM shadow s GROUP BY s.oid
    UNION ALL
    SELECT CASE WHEN g.grantee = 0 THEN 'critical' ELSE 'warning' END, 'schema_open', format('%I', g.nspname),
           format('%s may create functions in it, and %s',
                  CASE WHEN g.grantee = 0 THEN 'PUBLIC' ELSE format('role %I', r.rolname) END,
                  CASE g.nspname WHEN 'vod_tender_crypto' THEN 'the extension''s are called by its name'
                                 ELSE 'it is on the search_path of other login roles' END),
           format('REVOKE CREATE ON SCHEMA %I FROM %s: a function made there can be called in the place of the extension''s.',
                  g.nspname, CASE WHEN g.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END)
    FROM (SELECT DISTINCT n.oid, n.nspname, a.grantee
          FROM pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) a
          WHERE a.privilege_type = 'CREATE' AND a.grantee <> n.nspowner) g
    LEFT JOIN pg_roles r ON r.oid = g.grantee
    WHERE r.rolsuper IS NOT TRUE
      AND (g.nspname = 'vod_tender_crypto' OR EXISTS (SELECT FROM path l WHERE l.schema = g.oid AND l.role <> g.grantee));
END;

-- Statements that are kept with a literal in the place of a value. Which literal is nobody's business.
CREATE FUNCTION vod_tender_crypto.doctor_statements() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- The first argument, or one that is named as the value's.
    literal CONSTANT text := $re$\menvelope_(encrypt|decrypt|upgrade)"?\s*\(([^()]*\m(plaintext|value)\s*(=>|:=))?$re$
        -- Behind parentheses, a cast or a type's name too.
        || $re$(\s|\(|\mcast\s*\()*((\w+|u&)\s*)?('|\$([a-z_]\w*)?\$)$re$;
    home name := (SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
                  WHERE e.extname = 'pg_stat_statements');
    kept bigint;
BEGIN
    IF home IS NULL THEN
        RETURN;
    END IF;
    EXECUTE format('SELECT count(*) FROM %I.pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid
                    WHERE d.datname = current_database() AND s.query ~* $1', home) INTO kept USING literal;
    IF kept > 0 THEN
        RETURN NEXT ROW('critical', 'statement_kept', 'pg_stat_statements',
            format('%s statements with a literal passed to the extension', kept),
            format('Pass values as bind parameters; SELECT %I.pg_stat_statements_reset() forgets what is there.', home)
            )::vod_tender_crypto.doctor_finding;
    END IF;
END
$$;

SET LOCAL search_path = @extschema@, pg_temp;
