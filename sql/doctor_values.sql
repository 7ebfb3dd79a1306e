-- doctor(), what is configured and stored: keys and their files, registered columns, values, jobs, the clock.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE FUNCTION vod_tender_crypto.doctor_keys() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    WITH legacy_file AS (
        SELECT s.scope, s.own ->> 'vod_tender_crypto.legacy_key_file' AS path
        FROM vod_tender_crypto.doctor_scope() s WHERE s.own ->> 'vod_tender_crypto.legacy_key_file' <> ''
    ), problem AS (
        SELECT format('key "%s"', k.name) AS subject, p.*
        FROM vod_tender_crypto.kek k
        CROSS JOIN LATERAL jsonb_to_recordset(vod_tender_crypto.kek_problems(k.uri)) p(finding text, saw text)
        -- A key that was retired may be gone; a file of it that is there must still be nobody else's.
        WHERE k.state <> 'disabled' OR p.finding NOT IN ('key_file_missing', 'key_unusable', 'key_file_unusable')
        UNION ALL
        SELECT 'vod_tender_crypto.legacy_key_file' || CASE l.scope WHEN 'server' THEN '' ELSE format(' (%s)', l.scope) END, p.*
        FROM legacy_file l
        CROSS JOIN LATERAL jsonb_to_recordset(vod_tender_crypto.legacy_file_problems(l.path)) p(finding text, saw text)
        UNION ALL
        SELECT p.*
        FROM jsonb_to_recordset(vod_tender_crypto.server_facts() -> 'environment_problems')
            p(subject text, finding text, saw text)
    )
    SELECT 'critical', p.finding, p.subject, p.saw, m.mend
    FROM problem p
    LEFT JOIN (VALUES
        ('key_file_missing', 'Restore the file: values under the key cannot be read without it.'),
        ('key_file_owner', 'chown it to the server''s user: it is not read otherwise, and its owner knows the key.'),
        ('key_file_exposed', 'chmod 0600, and consider the key known to whoever could read it; until then it is not read.'),
        ('key_file_unusable', 'Put base64 of 32 bytes there (openssl rand -base64 32 makes a new key; an old one is in '
        'your backup).'),
        ('key_directory_open', 'Let only root and the server''s user write there: whoever can may put another key in '
        'the file''s place.'),
        ('key_unusable', 'Correct it; docs: README, Keys.')
    ) m(finding, mend) ON m.finding = p.finding
    UNION ALL
    SELECT 'notice', 'legacy_key_twice', 'ENCRYPTION_KEY',
           format('it is set beside vod_tender_crypto.legacy_key_file (%s)', string_agg(l.scope, ', ')),
           'Keep one of them, preferably the file: an environment is inherited and shown more easily.'
    FROM legacy_file l
    WHERE vod_tender_crypto.server_facts() -> 'secrets_in_environment' ? 'ENCRYPTION_KEY'
    HAVING count(*) > 0;
END;

CREATE FUNCTION vod_tender_crypto.doctor_columns() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    col record;
    expression record;
    name text;
BEGIN
    FOR col IN
        SELECT p.*, c.oid AS relation, a.atttypid
        FROM vod_tender_crypto.protected_column p
        LEFT JOIN pg_class c ON c.oid = to_regclass(format('%I.%I', p.schema_name, p.table_name))
        LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = p.column_name AND a.attnum > 0 AND NOT a.attisdropped
        ORDER BY p.schema_name, p.table_name, p.column_name
    LOOP
        name := format('%I.%I.%I', col.schema_name, col.table_name, col.column_name);
        IF col.atttypid IS NULL THEN
            RETURN NEXT ROW('warning', 'registered_column_gone', name,
                CASE WHEN col.relation IS NULL THEN 'the table does not exist' ELSE 'the table has no such column' END,
                'Delete its row in vod_tender_crypto.protected_column; if it was renamed, correct the row: it has the aad.'
                )::vod_tender_crypto.doctor_finding;
        ELSIF col.atttypid NOT IN ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype) THEN
            RETURN NEXT ROW('warning', 'registered_column_type', name, format('its type is %s', col.atttypid::regtype),
                'Jobs and verify() handle text, varchar and bytea: change the type back, or delete the registration.'
                )::vod_tender_crypto.doctor_finding;
        ELSE
            FOR expression IN
                SELECT e.* FROM (VALUES ('aad', col.aad), ('version', col.version)) e(purpose, code) WHERE e.code IS NOT NULL
            LOOP
                BEGIN
                    PERFORM vod_tender_crypto.row_expression(col.relation, expression.code, expression.purpose,
                                                             col.column_name, '{}');
                EXCEPTION WHEN OTHERS THEN
                    RETURN NEXT ROW('critical', 'expression_unusable', name,
                        format('its %s expression does not check any more (SQLSTATE %s)', expression.purpose, SQLSTATE),
                        format('Correct %s in its row of vod_tender_crypto.protected_column so that it gives what it '
                        'gave before: jobs and verify() cannot open its values.',
                               expression.purpose))::vod_tender_crypto.doctor_finding;
                END;
            END LOOP;
        END IF;
    END LOOP;
END
$$;

CREATE FUNCTION vod_tender_crypto.doctor_jobs() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    SELECT 'notice', 'job_unfinished', format('job %s', p.job),
           format('%s of %s is %s: %s rows left, %s failed%s', p.operation, p.target, p.state, p.rows_left, p.rows_failed,
                  ' (SQLSTATE ' || p.sqlstate || ')'),
           format('vod_tender_crypto.job_error has the rows; CALL vod_tender_crypto.resume(%s) goes on.', p.job)
    FROM vod_tender_crypto.job_progress p
    WHERE (p.state IN ('failed', 'incomplete', 'interrupted') OR p.rows_failed > 0) AND NOT p.dry_run
      -- Another one has done it since.
      AND NOT EXISTS (SELECT FROM vod_tender_crypto.job j WHERE j.target = p.target AND j.operation = p.operation
                      AND j.columns @> p.columns AND j.job > p.job AND j.state = 'done' AND j.rows_failed = 0
                      AND NOT j.dry_run AND j.where_clause IS NULL AND j.percent = 100);
END;

CREATE FUNCTION vod_tender_crypto.doctor_clock() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    SELECT 'warning', 'clock_went_back', max(w.what) FILTER (WHERE w.at = w.latest),
           format('%s timestamps lie in the future, up to %s', count(*), max(w.at) - clock_timestamp()),
           'Set the clock and keep it with NTP: AWS refuses requests that are signed more than five minutes off.'
    FROM (SELECT t.what, t.at, max(t.at) OVER () AS latest
          FROM (SELECT 'vod_tender_crypto.kek.created_at', k.created_at FROM vod_tender_crypto.kek k
                UNION ALL
                SELECT 'vod_tender_crypto.protected_column.registered_at', p.registered_at
                FROM vod_tender_crypto.protected_column p
                UNION ALL
                SELECT 'vod_tender_crypto.job', greatest(j.started_at, j.run_started_at, j.updated_at)
                FROM vod_tender_crypto.job j
                UNION ALL
                SELECT 'vod_tender_crypto.job_error.seen_at', e.seen_at FROM vod_tender_crypto.job_error e
                UNION ALL
                SELECT 'the server''s start', pg_postmaster_start_time()) t(what, at)
          WHERE t.at > clock_timestamp() + interval '1 minute') w
    HAVING count(*) > 0;
END;

-- Reads every text and bytea column of the database once, as census() does, column by column.
CREATE FUNCTION vod_tender_crypto.doctor_values() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    facts jsonb := vod_tender_crypto.server_facts();
    col record;
    counted jsonb := '[]';
    unread jsonb := '[]';
BEGIN
    FOR col IN SELECT c.* FROM vod_tender_crypto.census_column() c LOOP
        BEGIN
            IF NOT col.readable THEN
                RAISE insufficient_privilege;
            END IF;
            counted := counted || (
                SELECT coalesce(jsonb_agg(jsonb_build_object('column_name', format('%s.%I', col.relation, col.column_name),
                           'registered', col.registered, 'version', n.version, 'value_count', n.value_count,
                           'is_envelope', n.version IS NOT DISTINCT FROM 2,
                           -- The literal form names no key: it is under the default one.
                           'key', coalesce(n.key, current_setting('vod_tender_crypto.default_key')))), '[]')
                FROM (SELECT n.*, bool_or(n.version IS DISTINCT FROM 0) OVER () AS has_ours
                      FROM vod_tender_crypto.count_column(col.relation, col.column_name) n) n
                WHERE col.registered OR n.has_ours);
        EXCEPTION WHEN OTHERS THEN
            unread := unread || jsonb_build_object('code', SQLSTATE,
                                                   'column_name', format('%s.%I', col.relation, col.column_name));
        END;
    END LOOP;
    RETURN QUERY
        WITH count AS (
            SELECT c.* FROM jsonb_to_recordset(counted)
                AS c(column_name text, registered boolean, version integer, value_count bigint, is_envelope boolean, key text)
        ), kek AS (
            SELECT k.name, k.state FROM vod_tender_crypto.kek k
            UNION ALL
            SELECT 'default', 'active' WHERE (facts -> 'kek_in_environment')::boolean
                AND NOT EXISTS (SELECT FROM vod_tender_crypto.kek k WHERE k.name = 'default')
        ), default_key AS (
            SELECT DISTINCT s.own ->> 'vod_tender_crypto.default_key' AS name, s.scope FROM vod_tender_crypto.doctor_scope() s
            WHERE s.own ? 'vod_tender_crypto.default_key'
        ), needed AS (
            SELECT c.key, sum(c.value_count) AS value_count, string_agg(DISTINCT c.column_name, ', ') AS columns
            FROM count c WHERE c.is_envelope GROUP BY c.key
        )
        SELECT 'notice', 'not_looked_at',
               CASE WHEN count(*) > 1 THEN format('%s columns', count(*)) ELSE min(u.column_name) END,
               format('SQLSTATE %s: %s', u.code, string_agg(u.column_name, ', ' ORDER BY u.place) FILTER (WHERE u.place <= 10)),
               'Run it as a superuser; refresh materialized views that are not populated, or drop them.'
        FROM (SELECT u.column_name, u.code, row_number() OVER (PARTITION BY u.code) AS place
              FROM jsonb_to_recordset(unread) u(column_name text, code text)) u GROUP BY u.code
        UNION ALL
        SELECT 'critical', 'plaintext_left', c.column_name,
               format('%s values are not encrypted, or are of a legacy key that is not configured', c.value_count),
               'CALL vod_tender_crypto.migrate() on the table; configure the legacy key first if there is one.'
        FROM count c WHERE c.registered AND c.version = 0
        UNION ALL
        SELECT 'warning', 'direct_left', c.column_name, format('%s values of version 1', c.value_count),
               'CALL vod_tender_crypto.migrate() on the table.'
        FROM count c WHERE c.registered AND c.version = 1
        UNION ALL
        SELECT 'critical', 'values_malformed', c.column_name,
               format('%s values begin as envelopes and are malformed', c.value_count),
               'vod_tender_crypto.verify() says which rows; restore them from a backup.'
        FROM count c WHERE c.version IS NULL
        UNION ALL
        SELECT 'critical', CASE WHEN k.name IS NULL THEN 'key_not_configured' ELSE 'key_disabled' END,
               format('key "%s"', n.key),
               format('%s values are under it in %s', n.value_count, n.columns),
               CASE WHEN k.name IS NULL
                    THEN 'Add it back under its name with vod_tender_crypto.add_key(): they cannot be read without it.'
                    ELSE format('SELECT vod_tender_crypto.set_key_state(%L, ''decrypt_only''): they cannot be read now.', n.key)
               END
        FROM needed n LEFT JOIN kek k ON k.name = n.key WHERE k.name IS NULL OR k.state = 'disabled'
        UNION ALL
        SELECT 'notice', 'key_unused', format('key "%s"', k.name),
               'no value of this database is under it, and it is not the default key',
               format('SELECT vod_tender_crypto.set_key_state(%L, ''decrypt_only''), then retire_key(); keep the key '
               'itself as long as backups need it.', k.name)
        FROM vod_tender_crypto.kek k
        WHERE k.state <> 'disabled' AND unread = '[]' AND NOT k.name IN (SELECT n.key FROM needed n)
          AND NOT k.name IN (SELECT d.name FROM default_key d)
          AND NOT EXISTS (SELECT FROM vod_tender_crypto.protected_column p WHERE p.key = k.name)
        UNION ALL
        SELECT 'warning', 'legacy_key_unneeded', 'ENCRYPTION_KEY', 'no version 1 value is left in this database',
               'Ask legacy_key_unused() here and in the server''s other databases, then unset it and restart; backups '
               'may still need the key.'
        WHERE facts -> 'secrets_in_environment' ? 'ENCRYPTION_KEY' AND unread = '[]'
          -- It writes as long as there is nothing else to write with, or version 1 is asked for.
          AND EXISTS (SELECT FROM kek k WHERE k.state = 'active')
          AND NOT EXISTS (SELECT FROM vod_tender_crypto.doctor_scope() s
                          WHERE lower(s.own ->> 'vod_tender_crypto.write_format') = 'direct')
          AND NOT EXISTS (SELECT FROM count c WHERE c.version = 1);
END
$$;

SET LOCAL search_path = @extschema@, pg_temp;
