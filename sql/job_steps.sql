-- The steps of a job, each a transaction of its own (run_job commits between them):
--   look     finds the next rows that are due, and what they need from the key service; it locks none;
--   prepare  fetches that, and is the only one that waits for a key service: it holds no lock on the table;
--   write    converts, checks and writes the rows that nobody else has locked, and asks no key service.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Whoever runs a job holds an advisory lock of its session's, from beginning to end. It goes with the session, however
-- that ends. False when another session has it.
CREATE FUNCTION vod_tender_crypto.job_lock(job_id bigint) RETURNS boolean
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A cancelled run may have left it in this session; it is held once.
    RETURN vod_tender_crypto.job_holder(job_lock.job_id) IS NOT DISTINCT FROM pg_backend_pid()
        OR pg_try_advisory_lock(vod_tender_crypto.job_lock_class(), job_lock.job_id::integer);
END
$$;

CREATE FUNCTION vod_tender_crypto.job_unlock(job_id bigint) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM pg_advisory_unlock(vod_tender_crypto.job_lock_class(), job_unlock.job_id::integer);
END
$$;

-- Whether the run goes on. False when it was asked to stop.
CREATE FUNCTION vod_tender_crypto.job_goes_on(j vod_tender_crypto.job) RETURNS boolean
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    current vod_tender_crypto.job;
BEGIN
    SELECT * INTO current FROM vod_tender_crypto.job o WHERE o.job = (job_goes_on.j).job;
    IF NOT FOUND OR current.run <> (job_goes_on.j).run THEN
        RAISE EXCEPTION USING ERRCODE = 'object_in_use',
            MESSAGE = format('job %s was taken over by another session', (job_goes_on.j).job);
    END IF;
    RETURN NOT current.stop_requested;
END
$$;

-- Makes this session the one that runs the job.
CREATE FUNCTION vod_tender_crypto.job_take(job_id bigint) RETURNS vod_tender_crypto.job
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    taken vod_tender_crypto.job;
BEGIN
    IF NOT EXISTS (SELECT FROM vod_tender_crypto.job o WHERE o.job = job_take.job_id) THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('there is no job %s', coalesce(job_take.job_id::text, 'NULL')),
            HINT = 'Jobs are in vod_tender_crypto.job: those on tables that you own.';
    END IF;
    IF NOT vod_tender_crypto.job_lock(job_take.job_id) THEN
        RAISE EXCEPTION USING ERRCODE = 'object_in_use',
            MESSAGE = format('job %s is being run by another session', job_take.job_id),
            HINT = 'vod_tender_crypto.job_progress shows how far it is; stop() ends it.';
    END IF;
    UPDATE vod_tender_crypto.job o SET
        run = o.run + 1, run_by = current_user, run_started_at = clock_timestamp(), updated_at = clock_timestamp(),
        run_rows_due = NULL, run_rows_done = 0, rows_left = NULL, state = 'running', stop_requested = false,
        sqlstate = NULL, message = NULL,
        -- After failures it begins again from the start, for they lie behind the checkpoint; what is done costs little.
        rows_failed = 0, pass = o.pass + (o.state IN ('done', 'incomplete') OR o.rows_failed > 0)::integer,
        relation = CASE WHEN o.state NOT IN ('done', 'incomplete') AND o.rows_failed = 0 THEN o.relation END
    WHERE o.job = job_take.job_id
    RETURNING * INTO taken;
    DELETE FROM vod_tender_crypto.job_error e WHERE e.job = job_take.job_id;
    RETURN taken;
END
$$;

-- Notes where the job stands and what it counted.
CREATE FUNCTION vod_tender_crypto.job_note(j vod_tender_crypto.job) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE vod_tender_crypto.job o SET
        newest_kek_id = (job_note.j).newest_kek_id, state = (job_note.j).state, sqlstate = (job_note.j).sqlstate,
        message = (job_note.j).message, pass = (job_note.j).pass, relation = (job_note.j).relation,
        next_row = (job_note.j).next_row, filenode = (job_note.j).filenode, rows_done = (job_note.j).rows_done,
        rows_failed = (job_note.j).rows_failed, rows_skipped = (job_note.j).rows_skipped,
        rows_left = (job_note.j).rows_left, run_rows_due = (job_note.j).run_rows_due,
        run_rows_done = (job_note.j).run_rows_done, updated_at = clock_timestamp()
    WHERE o.job = (job_note.j).job AND o.run = (job_note.j).run;
END
$$;

-- Notes why the job failed, and leaves its checkpoint as the last batch left it.
CREATE FUNCTION vod_tender_crypto.job_fail(j vod_tender_crypto.job, code text, message text) RETURNS void
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    UPDATE vod_tender_crypto.job o SET
        state = 'failed', sqlstate = job_fail.code, message = job_fail.message, updated_at = clock_timestamp()
    WHERE o.job = (job_fail.j).job AND o.run = (job_fail.j).run;
END;

-- The key that a finished rewrap put the columns under is theirs from now on.
CREATE FUNCTION vod_tender_crypto.job_note_key(j vod_tender_crypto.job) RETURNS void
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    -- A column that follows the default key goes on following it.
    UPDATE vod_tender_crypto.protected_column p
    SET key = CASE WHEN p.key IS NOT NULL
                     OR (job_note_key.j).key IS DISTINCT FROM current_setting('vod_tender_crypto.default_key', true)
                   THEN (job_note_key.j).key END
    FROM pg_class c JOIN pg_namespace s ON s.oid = c.relnamespace
    WHERE c.oid = (job_note_key.j).target AND p.schema_name = s.nspname AND p.table_name = c.relname
      AND p.column_name = ANY ((job_note_key.j).columns);
END;

CREATE FUNCTION vod_tender_crypto.job_count_due(j vod_tender_crypto.job) RETURNS bigint
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    part regclass;
    rows_in_part bigint;
    due bigint := 0;
BEGIN
    FOR part IN SELECT vod_tender_crypto.storing_relations((job_count_due.j).target) LOOP
        EXECUTE (vod_tender_crypto.plan_job(job_count_due.j, part)).count_sql INTO rows_in_part USING (job_count_due.j).job;
        due := due + rows_in_part;
    END LOOP;
    RETURN due;
END
$$;

-- Asks what the run needs to know once.
CREATE FUNCTION vod_tender_crypto.job_begin_run(j vod_tender_crypto.job) RETURNS vod_tender_crypto.job
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM vod_tender_crypto.check_target((job_begin_run.j).target, (job_begin_run.j).columns, true);
    IF (job_begin_run.j).operation = 'migrate' AND NOT (job_begin_run.j).dry_run AND EXISTS (
        SELECT FROM unnest((job_begin_run.j).columns, (job_begin_run.j).aads) w(column_name, aad)
        LEFT JOIN vod_tender_crypto.registered((job_begin_run.j).target, (job_begin_run.j).columns) r USING (column_name)
        WHERE r.is_registered IS NOT TRUE OR r.aad IS DISTINCT FROM w.aad)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'its columns are registered with another aad by now, or not at all',
            HINT = 'Begin a new job.';
    END IF;
    SELECT k.newest_kek_id INTO j.newest_kek_id
    FROM vod_tender_crypto.job_key((job_begin_run.j).operation, (job_begin_run.j).key, (job_begin_run.j).context) k;
    PERFORM vod_tender_crypto.job_note(job_begin_run.j);
    RETURN j;
END
$$;

-- Looks for the next rows that are due. Plans anew where the plan's name is not the relation's any more.
CREATE FUNCTION vod_tender_crypto.job_look(
    plan vod_tender_crypto.job_plan, from_row tid, to_row tid, most_rows integer,
    OUT n integer, OUT last_row tid, OUT heads bytea[]
)
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- Whether a header is too long to be gathered with others.
    left_out boolean;
BEGIN
    EXECUTE (job_look.plan).look_sql INTO n, last_row, heads, left_out
        USING job_look.from_row, job_look.to_row, job_look.most_rows;
    IF n = 1 AND left_out AND job_look.most_rows > 1 THEN
        EXECUTE (job_look.plan).look_sql INTO n, last_row, heads, left_out USING job_look.from_row, job_look.to_row, 1;
    END IF;
END
$$;

-- Fetches what the next rows need: all calls together, and DEKs further ahead while rows are left; at a limited speed not
-- so far that they grow old.
CREATE FUNCTION vod_tender_crypto.job_prepare(
    j vod_tender_crypto.job, plan vod_tender_crypto.job_plan, n integer, heads bytea[]
) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    left_over bigint := greatest((job_prepare.j).run_rows_due - (job_prepare.j).run_rows_done, 0);
BEGIN
    PERFORM vod_tender_crypto.prepare_batch(vod_tender_crypto.job_task(job_prepare.j, false), job_prepare.heads,
        job_prepare.n::bigint * (job_prepare.plan).columns,
        (job_prepare.plan).columns * least(left_over, 60 * (job_prepare.j).max_rows_per_second::bigint));
END
$$;

-- Whether an error says something about the row that was written, and the next row may fare better.
CREATE FUNCTION vod_tender_crypto.concerns_one_row(sqlstate text) RETURNS boolean
    LANGUAGE sql IMMUTABLE
RETURN "left"(concerns_one_row.sqlstate, 2) IN ('22', '23', '27', '44', '54', 'P0');

CREATE FUNCTION vod_tender_crypto.job_count_failed(j vod_tender_crypto.job) RETURNS bigint
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    SELECT count(DISTINCT (e.relation, e.row_key)) FROM vod_tender_crypto.job_error e WHERE e.job = (job_count_failed.j).job;
END;

CREATE FUNCTION vod_tender_crypto.job_note_error(j vod_tender_crypto.job, row_key jsonb, column_name name, code text) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF job_note_error.row_key IS NULL THEN
        RETURN; -- The row changed meanwhile: it is looked at again.
    END IF;
    INSERT INTO vod_tender_crypto.job_error AS e (job, relation, row_key, column_name, sqlstate, pass)
    VALUES ((job_note_error.j).job, (job_note_error.j).relation, job_note_error.row_key, job_note_error.column_name,
            job_note_error.code, (job_note_error.j).pass)
    ON CONFLICT ON CONSTRAINT job_error_pkey DO UPDATE SET
        sqlstate = excluded.sqlstate, pass = excluded.pass, attempts = e.attempts + 1, seen_at = clock_timestamp();
END
$$;

-- Writes the due rows between two places. With `lock_first` it takes only what nobody else has locked; without, which is
-- faster, a row that somebody has locked makes it fail soon (55P03).
--
-- The UPDATE runs under the caller's search_path and trigger setting: triggers of the table may rely on them.
CREATE FUNCTION vod_tender_crypto.job_update(
    j vod_tender_crypto.job, plan vod_tender_crypto.job_plan, first_row tid, last_row tid, only_rows tid[],
    caller_path text, lock_first boolean
) RETURNS bigint
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    written bigint;
    same boolean;
    role_before text := current_setting('session_replication_role');
    timeout_before text := current_setting('lock_timeout');
    statement text := (job_update.plan).write_sql;
BEGIN
    IF job_update.lock_first THEN
        EXECUTE (job_update.plan).lock_sql INTO only_rows USING job_update.first_row, job_update.last_row;
        IF only_rows IS NULL THEN
            RETURN 0;
        END IF;
    END IF;
    -- What it has not locked itself it does not wait for: others may be waiting for what it has.
    PERFORM set_config('lock_timeout', '20ms', true);
    IF (job_update.j).triggers = 'skip' THEN
        PERFORM set_config('session_replication_role', 'replica', true);
    END IF;
    -- PostgreSQL's own functions first, whatever the caller's path says: the statement is resolved under it.
    PERFORM set_config('search_path', concat_ws(', ', 'pg_catalog', nullif(job_update.caller_path, '')), true);
    EXECUTE statement INTO written, same USING job_update.first_row, job_update.last_row, job_update.only_rows;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    IF (job_update.j).triggers = 'skip' THEN
        PERFORM set_config('session_replication_role', role_before, true);
    END IF;
    PERFORM set_config('lock_timeout', timeout_before, true);
    IF NOT same THEN
        RAISE EXCEPTION USING ERRCODE = 'triggered_action_exception',
            MESSAGE = format('a trigger on %s changes what the job writes or leaves alone', (job_update.j).relation),
            DETAIL = 'The batch was not written.',
            HINT = 'Pass triggers => ''skip'' to write without triggers (this takes the right to set session_replication_role), or make the trigger ignore the job.';
    END IF;
    RETURN written;
END
$$;

-- Writes a batch and counts. `retries`: values whose keys were not at hand any more.
CREATE FUNCTION vod_tender_crypto.job_write(
    INOUT j vod_tender_crypto.job, plan vod_tender_crypto.job_plan, first_row tid, last_row tid, n integer, caller_path text,
    OUT written bigint, OUT retries bigint, OUT replan boolean
)
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    failure record;
    one_by_one boolean := false;
    lock_first boolean := false;
    tids tid[];
    one tid;
    row_key jsonb;
    code text;
    failed bigint := j.rows_failed;
    failures bigint := j.rows_failed;
BEGIN
    retries := 0;
    written := 0;
    replan := false;
    IF j.dry_run THEN
        EXECUTE plan.try_sql INTO written USING first_row, last_row;
    ELSE
        -- Under this lock it is not renamed and gets no new trigger; if that happened since it was planned, nothing is
        -- written and the next look plans anew.
        IF vod_tender_crypto.lock_relation(j.relation, true) <> plan.table_name
           OR vod_tender_crypto.has_before_trigger(j.relation, j.triggers) <> plan.guarded THEN
            replan := true;
            RETURN;
        END IF;
        LOOP
            BEGIN
                written := vod_tender_crypto.job_update(j, plan, first_row, last_row, NULL, caller_path, lock_first);
                EXIT;
            EXCEPTION WHEN OTHERS THEN
                IF NOT lock_first AND SQLSTATE IN ('55P03', '40P01') THEN
                    lock_first := true;
                ELSIF vod_tender_crypto.concerns_one_row(SQLSTATE) OR SQLSTATE IN ('55P03', '40P01', '40001') THEN
                    one_by_one := true;
                    EXIT;
                ELSE
                    RAISE;
                END IF;
            END;
        END LOOP;
    END IF;
    IF one_by_one THEN
        -- One row of the batch cannot be written: find it.
        EXECUTE plan.rows_sql INTO tids USING first_row, last_row;
        FOREACH one IN ARRAY coalesce(tids, '{}') LOOP
            EXIT WHEN failures > j.max_errors;
            BEGIN
                written := written + vod_tender_crypto.job_update(j, plan, one, one, NULL, caller_path, false);
            EXCEPTION WHEN OTHERS THEN
                IF vod_tender_crypto.concerns_one_row(SQLSTATE) THEN
                    code := SQLSTATE;
                    EXECUTE plan.key_sql INTO row_key USING one;
                    PERFORM vod_tender_crypto.job_note_error(j, row_key, '*', code);
                    failures := failures + 1;
                ELSIF SQLSTATE NOT IN ('55P03', '40P01', '40001') THEN
                    RAISE;
                END IF;
            END;
        END LOOP;
    END IF;
    IF written < n THEN
        FOR failure IN EXECUTE plan.fail_sql USING first_row, last_row LOOP
            IF failure.code = 'retry' AND n > 1 THEN
                retries := retries + 1;
            ELSIF failure.code = 'retry' THEN
                -- Not even for this row alone are its data keys kept long enough.
                PERFORM vod_tender_crypto.job_note_error(j, failure.row_key, failure.column_name, '55000');
            ELSE
                PERFORM vod_tender_crypto.job_note_error(j, failure.row_key, failure.column_name, failure.code);
            END IF;
        END LOOP;
        j.rows_failed := vod_tender_crypto.job_count_failed(j);
    END IF;
    j.rows_done := j.rows_done + written;
    j.run_rows_done := j.run_rows_done + written;
    j.rows_skipped := j.rows_skipped + greatest(n - written - greatest(j.rows_failed - failed, 0) - retries, 0);
    PERFORM vod_tender_crypto.job_note(j);
    -- What waits for the commit fails here, where it is noted.
    SET CONSTRAINTS ALL IMMEDIATE;
END
$$;

SET LOCAL search_path = @extschema@, pg_temp;
