-- doctor(), settings: what the server, a role or a database is set to that would show values, or is left over.
SET LOCAL search_path = pg_catalog, pg_temp;

-- severity: critical (values or keys are shown, lost or open to others), warning (they could be), notice (worth knowing).
CREATE TYPE vod_tender_crypto.doctor_finding AS (severity text, finding text, subject text, saw text, mend text);

CREATE FUNCTION vod_tender_crypto.setting_on(value text) RETURNS boolean
    LANGUAGE sql IMMUTABLE
RETURN coalesce(value !~* '^(|of|off|f|fa|fal|fals|false|n|no|0)$', false);

-- The number that a setting's value begins with; units do not matter where only zero and the sign do.
CREATE FUNCTION vod_tender_crypto.setting_number(value text) RETURNS numeric
    LANGUAGE sql IMMUTABLE
RETURN substring(value from '^\s*([-+]?[0-9]*\.?[0-9]+)')::numeric;

-- Settings and where they hold: for the server, in this session, for roles and for this database. `own` is what is set
-- right there, `effective` what holds there with it. The server's own value is looked up in its files where this session
-- has another one.
CREATE FUNCTION vod_tender_crypto.doctor_scope() RETURNS TABLE (scope text, own jsonb, effective jsonb)
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    in_session CONSTANT text[] := ARRAY['client', 'session', 'interactive'];
    elsewhere CONSTANT text[] := in_session || ARRAY['database', 'user', 'database user'];
    here oid := (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
    in_files jsonb;
    server jsonb;
    session jsonb;
BEGIN
    -- Loads the library: its settings are known then.
    PERFORM vod_tender_crypto.server_facts();
    SELECT coalesce(jsonb_object_agg(f.name, f.setting), '{}') INTO in_files
    FROM (SELECT DISTINCT ON (s.name) s.name, s.setting FROM pg_file_settings s
          WHERE s.error IS NULL AND s.name IS NOT NULL ORDER BY s.name, s.seqno DESC) f;
    SELECT in_files || jsonb_object_agg(s.name, CASE WHEN s.source = ANY (elsewhere)
                                                     THEN coalesce(in_files ->> s.name, s.boot_val) ELSE s.setting END),
           -- This function's own SET clause is no finding.
           coalesce(jsonb_object_agg(s.name, s.setting)
               FILTER (WHERE s.source = ANY (in_session) AND s.name <> 'search_path'), '{}')
    INTO server, session
    FROM pg_settings s;
    -- Settings of libraries that are not loaded here are in no view.
    SELECT session || coalesce(jsonb_object_agg(n.name, current_setting(n.name, true)), '{}') INTO session
    FROM unnest(ARRAY['pgaudit.log', 'pgaudit.role', 'pgaudit.log_statement', 'pgaudit.log_parameter',
                      'auto_explain.log_min_duration', 'auto_explain.sample_rate', 'auto_explain.log_verbose',
                      'auto_explain.log_parameter_max_length']) n(name)
    WHERE nullif(current_setting(n.name, true), '') IS DISTINCT FROM (in_files ->> n.name)
      AND current_setting(n.name, true) <> ''
      AND NOT EXISTS (SELECT FROM pg_settings s WHERE s.name = n.name)
      AND NOT EXISTS (SELECT FROM pg_db_role_setting s, unnest(s.setconfig) c(pair)
                      WHERE s.setdatabase IN (0, here)
                        AND s.setrole IN (0, (SELECT r.oid FROM pg_roles r WHERE r.rolname = session_user))
                        AND c.pair = n.name || '=' || current_setting(n.name, true));
    RETURN QUERY
        SELECT 'server', server, server
        UNION ALL
        SELECT 'this session', session, server || session
        UNION ALL
        SELECT concat_ws(' in ', 'role ' || quote_ident(r.rolname), 'database ' || quote_ident(d.datname)), o.own, server || o.own
        FROM pg_db_role_setting s
        LEFT JOIN pg_roles r ON r.oid = s.setrole
        LEFT JOIN pg_database d ON d.oid = s.setdatabase
        CROSS JOIN LATERAL (SELECT jsonb_object_agg(split_part(c.pair, '=', 1), substr(c.pair, strpos(c.pair, '=') + 1)) AS own
                            FROM unnest(s.setconfig) c(pair)) o
        WHERE s.setdatabase IN (0, here) AND (s.setrole = 0 OR r.rolcanlogin);
END
$$;

-- Critical where bind parameters are printed, which is how applications should pass values; a warning where literals are.
CREATE FUNCTION vod_tender_crypto.doctor_logging() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    WITH scope AS (
        SELECT s.*, coalesce(vod_tender_crypto.setting_number(s.effective ->> 'log_parameter_max_length'), -1) <> 0 AS binds
        FROM vod_tender_crypto.doctor_scope() s
    )
    SELECT CASE WHEN r.critical THEN 'critical' ELSE 'warning' END, r.finding,
           r.names[1] || CASE s.scope WHEN 'server' THEN '' ELSE format(' (%s)', s.scope) END,
           (SELECT string_agg(format('%s = %s', n.name, s.effective ->> n.name), ', ' ORDER BY n.place)
            FROM unnest(r.names) WITH ORDINALITY n(name, place) WHERE s.effective ? n.name),
           r.mend
    FROM scope s
    CROSS JOIN LATERAL (VALUES
        ('statement_logging', s.binds, ARRAY['log_statement', 'log_parameter_max_length'],
         lower(s.effective ->> 'log_statement') IN ('mod', 'all'),
         'Set log_statement to none or ddl; log_parameter_max_length = 0 keeps bind parameters out of the log.'),
        ('duration_logging', s.binds, ARRAY['log_min_duration_statement', 'log_parameter_max_length'],
         vod_tender_crypto.setting_number(s.effective ->> 'log_min_duration_statement') >= 0,
         'Set log_min_duration_statement to -1; log_parameter_max_length = 0 keeps bind parameters out of the log.'),
        ('duration_sampling', s.binds, ARRAY['log_min_duration_sample', 'log_statement_sample_rate', 'log_parameter_max_length'],
         vod_tender_crypto.setting_number(s.effective ->> 'log_min_duration_sample') >= 0
             AND vod_tender_crypto.setting_number(s.effective ->> 'log_statement_sample_rate') > 0,
         'Set log_min_duration_sample to -1; log_parameter_max_length = 0 keeps bind parameters out of the log.'),
        ('transaction_sampling', s.binds, ARRAY['log_transaction_sample_rate', 'log_parameter_max_length'],
         vod_tender_crypto.setting_number(s.effective ->> 'log_transaction_sample_rate') > 0,
         'Set log_transaction_sample_rate to 0; log_parameter_max_length = 0 keeps bind parameters out of the log.'),
        ('error_parameter_logging', true, ARRAY['log_parameter_max_length_on_error'],
         vod_tender_crypto.setting_number(s.effective ->> 'log_parameter_max_length_on_error') <> 0,
         'Set log_parameter_max_length_on_error to 0, its default.'),
        ('error_statement_logging', false, ARRAY['log_min_error_statement'],
         lower(s.effective ->> 'log_min_error_statement') ~ '^(debug[1-5]?|info|notice|warning)$',
         'Set log_min_error_statement to error, its default: below that, the statement of every warning or notice is '
         'printed.'),
        ('debug_messages', false, ARRAY['log_min_messages'],
         lower(s.effective ->> 'log_min_messages') ~ CASE s.scope WHEN 'server' THEN '^debug2?$' ELSE '^debug[2-5]?$' END,
         'Set log_min_messages to warning, its default: from debug2 on, PostgreSQL prints statements as it parses them.'),
        ('plan_printing', false, ARRAY['debug_print_parse'], vod_tender_crypto.setting_on(s.effective ->> 'debug_print_parse'),
         'Set debug_print_parse to off: it prints the constants of statements.'),
        ('plan_printing', false, ARRAY['debug_print_rewritten'],
         vod_tender_crypto.setting_on(s.effective ->> 'debug_print_rewritten'),
         'Set debug_print_rewritten to off: it prints the constants of statements.'),
        ('plan_printing', true, ARRAY['debug_print_plan'], vod_tender_crypto.setting_on(s.effective ->> 'debug_print_plan'),
         'Set debug_print_plan to off: it prints constants, and bind parameters that were planned as such.'),
        ('auto_explain', vod_tender_crypto.setting_on(s.effective ->> 'auto_explain.log_verbose')
             OR coalesce(vod_tender_crypto.setting_number(s.effective ->> 'auto_explain.log_parameter_max_length'),
                         CASE WHEN current_setting('server_version_num')::integer < 160000 THEN 0 ELSE -1 END) <> 0,
         ARRAY['auto_explain.log_min_duration', 'auto_explain.log_parameter_max_length', 'auto_explain.log_verbose'],
         vod_tender_crypto.setting_number(s.effective ->> 'auto_explain.log_min_duration') >= 0
             AND coalesce(vod_tender_crypto.setting_number(s.effective ->> 'auto_explain.sample_rate') > 0, true),
         'Set auto_explain.log_min_duration to -1, or at least auto_explain.log_parameter_max_length to 0 and '
         'log_verbose to off.'),
        ('pgaudit', vod_tender_crypto.setting_on(s.effective ->> 'pgaudit.log_parameter'),
         ARRAY['pgaudit.log', 'pgaudit.role', 'pgaudit.log_parameter'],
         (EXISTS (SELECT FROM unnest(ARRAY['read', 'write', 'function']) c(class)
                  CROSS JOIN regexp_split_to_array(lower(btrim(s.effective ->> 'pgaudit.log')), '\s*,\s*') chosen(classes)
                  WHERE (c.class = ANY (chosen.classes) OR 'all' = ANY (chosen.classes))
                    AND NOT '-' || c.class = ANY (chosen.classes))
             OR s.effective ->> 'pgaudit.role' <> '')
         AND vod_tender_crypto.setting_on(coalesce(s.effective ->> 'pgaudit.log_statement', 'on')),
         'Set pgaudit.log_parameter to off, and pgaudit.log_statement to off where its log has read, write or function.')
    ) r(finding, critical, names, found, mend)
    WHERE r.found AND (s.scope = 'server' OR s.own ?| r.names);
END;

CREATE FUNCTION vod_tender_crypto.doctor_own_settings() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    SELECT r.severity, r.finding, r.name || CASE s.scope WHEN 'server' THEN '' ELSE format(' (%s)', s.scope) END,
           format('%s = %s', r.name, s.own ->> r.name), r.mend
    FROM vod_tender_crypto.doctor_scope() s
    CROSS JOIN (VALUES
        ('warning', 'plaintext_reads', 'vod_tender_crypto.plaintext_reads', '^(allow|warn)$',
         'When nothing is left that is not encrypted (census()), set it to refuse: until then, whoever can write a row '
         'can pass plaintext off as a value.'),
        ('warning', 'write_format_direct', 'vod_tender_crypto.write_format', '^direct$',
         'Set it to auto or envelope, unless you are on the way back: version 1 has no aad, no context and one key for all.'),
        ('notice', 'audit_off', 'vod_tender_crypto.audit', '^off$',
         'Set it to table or log: until then nobody can say who used which key.'),
        ('warning', 'alarms_unlogged', 'log_min_messages', '^(error|log|fatal|panic)$',
         'Set it to warning, its default: alarms of honey values are warnings.')
    ) r(severity, finding, name, pattern, mend)
    WHERE lower(s.own ->> r.name) ~ r.pattern;
END;

CREATE FUNCTION vod_tender_crypto.doctor_process() RETURNS SETOF vod_tender_crypto.doctor_finding
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    WITH fact AS (SELECT vod_tender_crypto.server_facts() AS f),
    server AS (SELECT s.effective AS e FROM vod_tender_crypto.doctor_scope() s WHERE s.scope = 'server')
    SELECT 'warning', 'core_dumps', 'RLIMIT_CORE',
           format('a backend may write core dumps of %s',
                  coalesce(pg_size_pretty((f ->> 'core_limit')::numeric), 'any size')),
           'Start the server with a core limit of 0 (systemd: LimitCORE=0; docker: --ulimit core=0): arguments and '
           'results are in ordinary memory.'
    FROM fact WHERE (f ->> 'core_limit')::numeric > 0 OR f ->> 'core_limit' IS NULL
    UNION ALL
    SELECT 'warning', 'locked_memory', 'RLIMIT_MEMLOCK',
           format('a backend may lock %s; data keys need up to %s with vod_tender_crypto.dek_cache_entries = %s',
                  pg_size_pretty((f ->> 'locked_memory_limit')::numeric), pg_size_pretty((f ->> 'locked_memory_needed')::numeric),
                  current_setting('vod_tender_crypto.dek_cache_entries')),
           'Raise the limit (systemd: LimitMEMLOCK; docker: --ulimit memlock) or lower dek_cache_entries: keys beyond '
           'it can be swapped to disk.'
    FROM fact WHERE (f ->> 'locked_memory_limit')::numeric < (f ->> 'locked_memory_needed')::numeric
    UNION ALL
    SELECT CASE WHEN f -> 'secrets_in_environment' = '[]' THEN 'warning' ELSE 'critical' END, 'environment_logging',
           'log_min_messages', format('log_min_messages = %s; in the environment: %s', server.e ->> 'log_min_messages',
               coalesce((SELECT string_agg(n, ', ') FROM jsonb_array_elements_text(f -> 'secrets_in_environment') n),
                        'no secret')),
           'Set log_min_messages to warning, its default, and remove logs from since then: at debug3 and below, '
           'PostgreSQL prints its environment when it starts.'
    FROM fact, server WHERE lower(server.e ->> 'log_min_messages') ~ '^debug[345]$'
    UNION ALL
    SELECT 'warning', 'unencrypted_connections', 'ssl',
           format('ssl = off, listen_addresses = %s', server.e ->> 'listen_addresses'),
           'Set ssl to on and let pg_hba.conf accept hostssl only: result sets carry plaintext.'
    FROM server
    WHERE NOT vod_tender_crypto.setting_on(server.e ->> 'ssl')
      AND EXISTS (SELECT FROM regexp_split_to_table(server.e ->> 'listen_addresses', '[\s,]+') a(address)
                  WHERE a.address <> '' AND a.address !~ '^(localhost|127\..*|::1)$');
END;

SET LOCAL search_path = @extschema@, pg_temp;
