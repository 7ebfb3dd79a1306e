-- The bulk jobs as people call them. CALL them by themselves, with autocommit on: they commit as they go.
SET LOCAL search_path = pg_catalog, pg_temp;

-- How the columns of a table are registered; one row for each of `columns`, or for all that are registered.
CREATE FUNCTION vod_tender_crypto.registered(target regclass, columns name[]) RETURNS TABLE (
    column_name name, is_registered boolean, key text, context jsonb, aad text, version text
)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT w.column_name, p.column_name IS NOT NULL, p.key, p.context, p.aad, p.version
    FROM pg_class c
    JOIN pg_namespace s ON s.oid = c.relnamespace
    CROSS JOIN LATERAL unnest(coalesce(registered.columns, ARRAY(
        SELECT o.column_name FROM vod_tender_crypto.protected_column o
        WHERE o.schema_name = s.nspname AND o.table_name = c.relname ORDER BY o.column_name
    ))) WITH ORDINALITY w(column_name, place)
    LEFT JOIN vod_tender_crypto.protected_column p
        ON p.schema_name = s.nspname AND p.table_name = c.relname AND p.column_name = w.column_name
    WHERE c.oid = registered.target
    ORDER BY w.place;
END;

-- Notes the columns of a migration, so that others know how to open them.
CREATE FUNCTION vod_tender_crypto.register_columns(j vod_tender_crypto.job) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    new record;
    part regclass;
    part_name text;
    bound boolean;
    looks_for vod_tender_crypto.job := register_columns.j;
BEGIN
    -- What is checked here must still hold when it is written.
    LOCK TABLE vod_tender_crypto.protected_column IN SHARE ROW EXCLUSIVE MODE;
    FOR new IN
        SELECT w.column_name, w.aad, r.is_registered, r.aad AS registered_aad,
               -- Without a column in it, it says something about this run only.
               CASE WHEN vod_tender_crypto.checked_expression((register_columns.j).target, w.version, 'version', w.column_name, '{}')
                         ~ '\mt\.' THEN w.version END AS version
        FROM unnest((register_columns.j).columns, (register_columns.j).aads, (register_columns.j).versions) w(column_name, aad, version)
        JOIN vod_tender_crypto.registered((register_columns.j).target, (register_columns.j).columns) r USING (column_name)
    LOOP
        IF new.is_registered AND new.aad IS DISTINCT FROM new.registered_aad
           AND vod_tender_crypto.checked_expression((register_columns.j).target, new.aad, 'aad', new.column_name, '{}')
               IS DISTINCT FROM vod_tender_crypto.checked_expression(
                   (register_columns.j).target, new.registered_aad, 'aad', new.column_name, '{}')
        THEN
            -- It may change as long as no value is bound to it.
            looks_for.operation := 'downgrade';
            FOR part IN SELECT vod_tender_crypto.storing_relations((register_columns.j).target) LOOP
                part_name := vod_tender_crypto.lock_relation(part, false);
                EXECUTE format('SELECT EXISTS (SELECT FROM ONLY %s t WHERE vod_tender_crypto.is_due(%L, t.%I))', part_name,
                    vod_tender_crypto.job_task(looks_for, false), new.column_name) INTO bound;
                IF bound THEN
                    RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                        MESSAGE = format('column %I of %s is registered with another aad', new.column_name, (register_columns.j).target),
                        DETAIL = 'It holds values that were written with the registered one and would not open with the new one.',
                        HINT = 'Omit aad to use the registered one. To change it, downgrade the column first.';
                END IF;
            END LOOP;
        END IF;
        INSERT INTO vod_tender_crypto.protected_column AS p (schema_name, table_name, column_name, key, context, aad, version)
        SELECT s.nspname, c.relname, new.column_name, (register_columns.j).key, (register_columns.j).context, new.aad, new.version
        FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
        WHERE c.oid = (register_columns.j).target
        ON CONFLICT ON CONSTRAINT protected_column_pkey DO UPDATE SET
            key = excluded.key, context = excluded.context, aad = excluded.aad, version = coalesce(excluded.version, p.version);
    END LOOP;
END
$$;

-- Checks everything that can be checked and notes the job. Nothing of the table is touched.
CREATE FUNCTION vod_tender_crypto.create_job(
    operation text, target regclass, columns name[], key text, context jsonb, aad text, version text, set_columns jsonb,
    where_clause text, batch_size integer, max_rows_per_second integer, percent numeric, max_errors integer,
    triggers text, check_wraps boolean, dry_run boolean
) RETURNS bigint
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    j vod_tender_crypto.job;
    part regclass;
    plan vod_tender_crypto.job_plan;
    wrong record;
    registered_key text;
    named_key text;
    registering vod_tender_crypto.job;
    registered_context jsonb;
    noted_versions text[];
BEGIN
    PERFORM vod_tender_crypto.check_may_commit();
    IF create_job.target IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'null_value_not_allowed', MESSAGE = 'no table is given';
    END IF;
    IF jsonb_typeof(create_job.set_columns) <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'set_columns is not a JSON object',
            HINT = 'For example: {"encryption_version": 2, "encryption_key_id": "{kek_id}"}.';
    END IF;
    SELECT a.name, a.range INTO wrong
    FROM (VALUES ('batch_size', '1 to 1000000', create_job.batch_size BETWEEN 1 AND 1000000),
                 ('max_rows_per_second', 'more than 0', coalesce(create_job.max_rows_per_second > 0, true)),
                 ('percent', 'more than 0 and at most 100', create_job.percent > 0 AND create_job.percent <= 100),
                 ('max_errors', '0 or more', create_job.max_errors >= 0),
                 ('triggers', 'fire or skip', create_job.triggers IN ('fire', 'skip')),
                 ('check_wraps', 'true or false', create_job.check_wraps IS NOT NULL),
                 ('dry_run', 'true or false', create_job.dry_run IS NOT NULL)) a(name, range, usable)
    WHERE a.usable IS NOT TRUE LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('unusable %s for a job', wrong.name), HINT = format('It is %s.', wrong.range);
    END IF;
    IF NOT vod_tender_crypto.owns(create_job.target) THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege', MESSAGE = format('must be owner of table %s', create_job.target);
    END IF;
    j.job := 0;
    j.operation := create_job.operation;
    j.target := create_job.target;
    SELECT array_agg(r.column_name), array_agg(coalesce(create_job.aad, r.aad)),
           array_agg(CASE create_job.operation WHEN 'migrate' THEN coalesce(create_job.version, r.version) END),
           -- One key and one context for all columns, or none.
           CASE WHEN count(DISTINCT r.key) = 1 AND count(r.key) = count(*) THEN min(r.key) END,
           CASE WHEN count(DISTINCT r.context) = 1 AND count(r.context) = count(*) THEN min(r.context::text)::jsonb END,
           array_agg(coalesce(create_job.version, r.version))
    INTO j.columns, j.aads, j.versions, registered_key, registered_context, noted_versions
    FROM vod_tender_crypto.registered(create_job.target, create_job.columns) r;
    PERFORM vod_tender_crypto.check_target(j.target, j.columns, true);
    IF cardinality(j.columns) <> (SELECT count(DISTINCT c) FROM unnest(j.columns) c) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'a column is given twice';
    END IF;
    IF create_job.operation = 'migrate' THEN
        j.key := coalesce(create_job.key, registered_key);
        j.context := coalesce(create_job.context, registered_context);
    ELSE
        j.key := create_job.key;
    END IF;
    named_key := j.key;
    SELECT k.key_name, k.newest_kek_id INTO j.key, j.newest_kek_id
    FROM vod_tender_crypto.job_key(create_job.operation, j.key, j.context) k;
    j.set_columns := coalesce(create_job.set_columns, '{}');
    j.where_clause := create_job.where_clause;
    j.batch_size := create_job.batch_size;
    j.max_rows_per_second := create_job.max_rows_per_second;
    j.percent := create_job.percent;
    j.max_errors := create_job.max_errors;
    j.triggers := create_job.triggers;
    j.check_wraps := create_job.check_wraps;
    j.dry_run := create_job.dry_run;

    IF j.triggers = 'skip' THEN
        BEGIN
            -- To its own value: whether the caller may set it at all.
            PERFORM set_config('session_replication_role', current_setting('session_replication_role'), true);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
                MESSAGE = 'the caller may not skip triggers',
                HINT = format('GRANT SET ON PARAMETER session_replication_role TO %I.', current_user);
        END;
    END IF;
    FOR part IN SELECT vod_tender_crypto.storing_relations(j.target) LOOP
        plan := vod_tender_crypto.plan_job(j, part);
        -- Planned with nothing to do: what PostgreSQL does not accept, it says before anything runs.
        EXECUTE 'EXPLAIN ' || plan.write_sql USING '(0,0)'::tid, '(0,0)'::tid, NULL::tid[];
    END LOOP;
    -- The application reads by its own note of the version, where it has one: then the job has to keep it right.
    IF create_job.set_columns IS NULL AND j.operation IN ('migrate', 'downgrade') THEN
        SELECT a.attname INTO wrong
        FROM unnest(noted_versions) n(version)
        JOIN pg_attribute a ON a.attrelid = j.target AND a.attnum > 0 AND NOT a.attisdropped
             AND vod_tender_crypto.checked_expression(j.target, n.version, 'version', NULL, '{}') = format('t.%I', a.attname)
        LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('column %I notes the version of each value, and the job would leave it as it is', wrong.attname),
                HINT = format('Pass set_columns => ''{"%s": %s}'', or ''{}'' if something else keeps it right.', wrong.attname,
                              CASE j.operation WHEN 'migrate' THEN 2 ELSE 1 END);
        END IF;
    END IF;
    -- What identifies the values of the table's other columns must stay as it is.
    FOR wrong IN
        SELECT r.column_name, r.aad FROM vod_tender_crypto.registered(j.target, NULL) r
        WHERE r.aad IS NOT NULL AND NOT r.column_name = ANY (j.columns)
    LOOP
        PERFORM vod_tender_crypto.checked_expression(j.target, wrong.aad, 'aad', wrong.column_name,
            j.columns::text[] || ARRAY(SELECT jsonb_object_keys(j.set_columns)));
    END LOOP;
    IF j.operation = 'migrate' AND NOT j.dry_run THEN
        -- Where no key was named, none is registered: the default key stays the one that default_key says.
        registering := j;
        registering.key := named_key;
        PERFORM vod_tender_crypto.register_columns(registering);
    END IF;
    INSERT INTO vod_tender_crypto.job (operation, target, columns, key, newest_kek_id, context, aads, versions, set_columns,
        where_clause, batch_size, max_rows_per_second, percent, max_errors, triggers, check_wraps, dry_run)
    VALUES (j.operation, j.target, j.columns, j.key, j.newest_kek_id, j.context, j.aads, j.versions, j.set_columns,
        j.where_clause, j.batch_size, j.max_rows_per_second, j.percent, j.max_errors, j.triggers, j.check_wraps, j.dry_run)
    RETURNING job.job INTO j.job;
    -- From now on it runs, as others see it.
    PERFORM vod_tender_crypto.job_lock(j.job);
    RETURN j.job;
END
$$;

CREATE PROCEDURE vod_tender_crypto.migrate(
    target regclass, columns name[] DEFAULT NULL, key text DEFAULT NULL, context jsonb DEFAULT NULL,
    aad text DEFAULT NULL, set_columns jsonb DEFAULT NULL, where_clause text DEFAULT NULL,
    batch_size integer DEFAULT 2000, max_rows_per_second integer DEFAULT NULL, percent numeric DEFAULT 100,
    dry_run boolean DEFAULT false, version text DEFAULT NULL, max_errors integer DEFAULT 100,
    triggers text DEFAULT 'fire', check_wraps boolean DEFAULT true, INOUT job bigint DEFAULT NULL
)
    LANGUAGE plpgsql
AS $$
BEGIN
    job := vod_tender_crypto.create_job('migrate', migrate.target, migrate.columns, migrate.key, migrate.context,
        migrate.aad, migrate.version, migrate.set_columns, migrate.where_clause, migrate.batch_size,
        migrate.max_rows_per_second, migrate.percent, migrate.max_errors, migrate.triggers, migrate.check_wraps,
        migrate.dry_run);
    COMMIT;
    CALL vod_tender_crypto.run_job(job);
END
$$;
COMMENT ON PROCEDURE vod_tender_crypto.migrate(regclass, name[], text, jsonb, text, jsonb, text, integer, integer, numeric, boolean, text, integer, text, boolean, bigint) IS
    'Turns the values of columns into envelopes: versions 0 and 1 become version 2.';

CREATE PROCEDURE vod_tender_crypto.rewrap_table(
    target regclass, columns name[] DEFAULT NULL, key text DEFAULT NULL, set_columns jsonb DEFAULT NULL,
    where_clause text DEFAULT NULL, batch_size integer DEFAULT 2000, max_rows_per_second integer DEFAULT NULL,
    percent numeric DEFAULT 100, dry_run boolean DEFAULT false, max_errors integer DEFAULT 100,
    triggers text DEFAULT 'fire', check_wraps boolean DEFAULT true, INOUT job bigint DEFAULT NULL
)
    LANGUAGE plpgsql
AS $$
BEGIN
    job := vod_tender_crypto.create_job('rewrap_table', rewrap_table.target, rewrap_table.columns, rewrap_table.key, NULL,
        NULL, NULL, rewrap_table.set_columns, rewrap_table.where_clause, rewrap_table.batch_size,
        rewrap_table.max_rows_per_second, rewrap_table.percent, rewrap_table.max_errors, rewrap_table.triggers,
        rewrap_table.check_wraps, rewrap_table.dry_run);
    COMMIT;
    CALL vod_tender_crypto.run_job(job);
END
$$;
COMMENT ON PROCEDURE vod_tender_crypto.rewrap_table(regclass, name[], text, jsonb, text, integer, integer, numeric, boolean, integer, text, boolean, bigint) IS
    'Puts every envelope of the columns that is not under the newest key there. Payloads stay as they are.';

CREATE PROCEDURE vod_tender_crypto.downgrade(
    target regclass, columns name[] DEFAULT NULL, aad text DEFAULT NULL, set_columns jsonb DEFAULT NULL,
    where_clause text DEFAULT NULL, batch_size integer DEFAULT 2000, max_rows_per_second integer DEFAULT NULL,
    percent numeric DEFAULT 100, dry_run boolean DEFAULT false, max_errors integer DEFAULT 100,
    triggers text DEFAULT 'fire', INOUT job bigint DEFAULT NULL
)
    LANGUAGE plpgsql
AS $$
BEGIN
    job := vod_tender_crypto.create_job('downgrade', downgrade.target, downgrade.columns, NULL, NULL, downgrade.aad, NULL,
        downgrade.set_columns, downgrade.where_clause, downgrade.batch_size, downgrade.max_rows_per_second,
        downgrade.percent, downgrade.max_errors, downgrade.triggers, false, downgrade.dry_run);
    COMMIT;
    CALL vod_tender_crypto.run_job(job);
END
$$;
COMMENT ON PROCEDURE vod_tender_crypto.downgrade(regclass, name[], text, jsonb, text, integer, integer, numeric, boolean, integer, text, bigint) IS
    'The way back: envelopes of the columns become direct ciphertext under the legacy key.';

CREATE PROCEDURE vod_tender_crypto.resume(job bigint)
    LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM vod_tender_crypto.check_may_commit();
    CALL vod_tender_crypto.run_job(resume.job);
END
$$;
COMMENT ON PROCEDURE vod_tender_crypto.resume(bigint) IS
    'Continues a job that stopped, failed, was interrupted or is incomplete, from its checkpoint; goes over one that is done again.';

CREATE PROCEDURE vod_tender_crypto.stop(job bigint)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE vod_tender_crypto.job o SET stop_requested = true WHERE o.job = stop.job AND o.state = 'running';
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('job %s is not running', stop.job),
            HINT = 'Jobs are in vod_tender_crypto.job_progress: those on tables that you own.';
    END IF;
    -- Nobody runs it: its session is gone.
    IF pg_try_advisory_xact_lock(vod_tender_crypto.job_lock_class(), stop.job::integer) THEN
        UPDATE vod_tender_crypto.job o SET state = 'stopped' WHERE o.job = stop.job;
    END IF;
END
$$;
COMMENT ON PROCEDURE vod_tender_crypto.stop(bigint) IS 'Ends a job after the batch at hand. resume() continues it.';

-- What running jobs takes.
CREATE FUNCTION vod_tender_crypto.job_routine() RETURNS SETOF regprocedure
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT p.oid::regprocedure FROM pg_proc p
    WHERE p.pronamespace = 'vod_tender_crypto'::regnamespace AND p.proname = ANY (ARRAY[
        'migrate', 'rewrap_table', 'downgrade', 'resume', 'stop', 'verify', 'census', 'owns', 'storing_relations',
        'check_target', 'check_columns', 'registered', 'register_columns', 'create_job', 'run_job', 'primary_key', 'key_expression', 'stored_expression',
        'checked_expression', 'row_expression', 'bookkeeping', 'job_task', 'due_expression', 'plan_job', 'check_may_commit',
        'job_key', 'job_lock_class', 'job_holder', 'job_lock', 'job_unlock', 'job_goes_on', 'job_take', 'job_note', 'job_fail',
        'job_note_key', 'job_count_due', 'job_begin_run', 'job_look', 'job_prepare', 'prepare_batch', 'concerns_one_row',
        'job_count_failed', 'job_note_error', 'lock_relation', 'has_before_trigger', 'job_update', 'job_write', 'block_of', 'job_end_pass', 'job_state', 'is_due',
        'needed_head', 'unfetched_head', 'convert_value', 'conversion_error', 'kek_id', 'census_column', 'count_stored', 'count_bound', 'count_column', 'extension_schema',
        'is_view_function', 'view_function', 'view_function_name', 'check_view_name', 'aad_uses', 'check_view_set_columns',
        'plan_view', 'create_decrypting_view', 'drop_decrypting_view', 'view_key', 'view_column', 'open_expression',
        'seal_expression', 'view_query', 'view_note', 'view_column_code', 'view_find_code', 'view_insert_code',
        'view_write_body']::name[]);
END;

-- Lets a role run jobs on the tables that it owns. It configures no keys and decrypts nothing by this.
CREATE FUNCTION vod_tender_crypto.grant_jobs(grantee regrole) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    routine regprocedure;
BEGIN
    FOR routine IN SELECT vod_tender_crypto.job_routine() LOOP
        EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO %s', routine, grant_jobs.grantee);
    END LOOP;
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON vod_tender_crypto.protected_column, vod_tender_crypto.job,
                    vod_tender_crypto.job_error TO %s', grant_jobs.grantee);
    EXECUTE format('GRANT SELECT ON vod_tender_crypto.job_progress TO %s', grant_jobs.grantee);
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.grant_jobs(regrole) IS 'Lets a role run bulk jobs, census and verify on the tables that it owns.';

SET LOCAL search_path = @extschema@, pg_temp;
