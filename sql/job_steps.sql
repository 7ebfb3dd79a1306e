-- The steps of a job, each a transaction of its own (run_job commits between them):
--   read     takes a batch of rows as they are, without locking them;
--   convert  makes the new values, and is the only one that waits for a key service: it holds no lock on the table;
--   write    locks the rows that nobody else has locked, leaves those that changed since, writes and checks the rest.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Takes the job for this transaction, waiting for a stop() that is just being noted. False when it was asked to stop.
CREATE FUNCTION vod_tender_crypto.job_hold(j vod_tender_crypto.job) RETURNS boolean
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    current vod_tender_crypto.job;
BEGIN
    PERFORM pg_advisory_xact_lock(vod_tender_crypto.job_lock_class(), (job_hold.j).job::integer);
    SELECT * INTO current FROM vod_tender_crypto.job o WHERE o.job = (job_hold.j).job;
    IF NOT FOUND OR current.run <> (job_hold.j).run THEN
        RAISE EXCEPTION USING ERRCODE = 'object_in_use',
            MESSAGE = format('job %s was taken over by another session', (job_hold.j).job);
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
    IF NOT pg_try_advisory_xact_lock(vod_tender_crypto.job_lock_class(), job_take.job_id::integer) THEN
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
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_object',
            MESSAGE = format('there is no job %s', job_take.job_id),
            HINT = 'Jobs are in vod_tender_crypto.job: those on tables that you own.';
    END IF;
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
    UPDATE vod_tender_crypto.protected_column p SET key = (job_note_key.j).key
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
        EXECUTE (vod_tender_crypto.plan_job(job_count_due.j, part)).count_sql INTO rows_in_part;
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
    SELECT k.newest_kek_id INTO j.newest_kek_id
    FROM vod_tender_crypto.job_key((job_begin_run.j).operation, (job_begin_run.j).key, (job_begin_run.j).context) k;
    PERFORM vod_tender_crypto.job_note(job_begin_run.j);
    RETURN j;
END
$$;

CREATE FUNCTION vod_tender_crypto.job_convert(
    j vod_tender_crypto.job, plan vod_tender_crypto.job_plan, n integer, texts text[], bytes bytea[], aads text[], versions integer[]
) RETURNS vod_tender_crypto.job_converted
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    all_converted vod_tender_crypto.job_converted;
    columns integer := cardinality((job_convert.plan).columns);
    left_after bigint;
    at integer;
    place integer;
    column_aads text[];
    new_texts text[];
    new_bytes bytea[];
    failed text[];
    kek_ids text[];
BEGIN
    -- All calls of the batch go together, and further ahead while rows are left; at a limited speed not so far that
    -- the DEKs grow old.
    left_after := greatest((job_convert.j).run_rows_due - (job_convert.j).run_rows_done, 0);
    PERFORM vod_tender_crypto.prepare_keys((job_convert.j).operation, n::bigint * columns,
        columns * least(left_after, 60 * (job_convert.j).max_rows_per_second::bigint),
        (job_convert.j).key, (job_convert.j).context, (job_convert.j).check_wraps);
    FOR at IN 0 .. columns - 1 LOOP
        column_aads := CASE WHEN (job_convert.plan).aad_given[at + 1] THEN job_convert.aads[at * n + 1 : (at + 1) * n] END;
        IF at < (job_convert.plan).text_columns THEN
            SELECT c.converted, c.failed, c.kek_ids INTO new_texts, failed, kek_ids
            FROM vod_tender_crypto.convert_batch((job_convert.j).operation, job_convert.texts[at * n + 1 : (at + 1) * n],
                column_aads, job_convert.versions, (job_convert.j).key, (job_convert.j).context, (job_convert.j).check_wraps) c;
            all_converted.texts := all_converted.texts || new_texts;
        ELSE
            place := at - (job_convert.plan).text_columns;
            SELECT c.converted, c.failed, c.kek_ids INTO new_bytes, failed, kek_ids
            FROM vod_tender_crypto.convert_batch((job_convert.j).operation, job_convert.bytes[place * n + 1 : (place + 1) * n],
                column_aads, job_convert.versions, (job_convert.j).key, (job_convert.j).context, (job_convert.j).check_wraps) c;
            all_converted.bytes := all_converted.bytes || new_bytes;
        END IF;
        IF failed IS NOT NULL OR all_converted.failed IS NOT NULL THEN
            all_converted.failed := coalesce(all_converted.failed, array_fill(NULL::text, ARRAY[at * n]))
                                    || coalesce(failed, array_fill(NULL::text, ARRAY[n]));
        END IF;
        IF (job_convert.plan).uses_kek_id THEN
            all_converted.kek_ids := all_converted.kek_ids
                || CASE WHEN cardinality(kek_ids) = n THEN kek_ids ELSE array_fill(kek_ids[1], ARRAY[n]) END;
        END IF;
    END LOOP;
    RETURN all_converted;
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

CREATE FUNCTION vod_tender_crypto.job_note_error(
    j vod_tender_crypto.job, plan vod_tender_crypto.job_plan, tid tid, xmin xid, column_name name, code text
) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    row_key jsonb;
BEGIN
    EXECUTE (job_note_error.plan).key_sql INTO row_key USING job_note_error.tid, job_note_error.xmin;
    IF row_key IS NOT NULL THEN
        INSERT INTO vod_tender_crypto.job_error AS e (job, relation, row_key, column_name, sqlstate, pass)
        VALUES ((job_note_error.j).job, (job_note_error.j).relation, row_key, job_note_error.column_name,
                job_note_error.code, (job_note_error.j).pass)
        ON CONFLICT (job, relation, row_key, column_name) DO UPDATE SET
            sqlstate = excluded.sqlstate, pass = excluded.pass, attempts = e.attempts + 1, seen_at = clock_timestamp();
    END IF;
END
$$;

-- Writes the rows that did not change since they were read. With `lock_first` it takes only what nobody else has locked;
-- without, which is faster, a row that somebody has locked makes it fail soon (55P03).
--
-- The UPDATE runs under the caller's search_path and trigger setting: triggers of the table may rely on them.
CREATE FUNCTION vod_tender_crypto.job_update(
    j vod_tender_crypto.job, plan vod_tender_crypto.job_plan, tids tid[], xmins xid[], texts text[], bytes bytea[],
    writable boolean[], kek_ids text[], aads text[], caller_path text, lock_first boolean
) RETURNS bigint
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    mine boolean[] := job_update.writable;
    locked bigint[];
    written bigint;
    same boolean;
    role_before text := current_setting('session_replication_role');
    timeout_before text := current_setting('lock_timeout');
    statement text := (job_update.plan).write_sql;
BEGIN
    IF job_update.lock_first THEN
        EXECUTE (job_update.plan).lock_sql INTO locked USING job_update.tids, job_update.xmins;
        IF coalesce(cardinality(locked), 0) < cardinality(job_update.tids) THEN
            SELECT array_agg(m.may AND l.place IS NOT NULL ORDER BY m.place) INTO mine
            FROM unnest(job_update.writable) WITH ORDINALITY m(may, place) LEFT JOIN unnest(locked) l(place) USING (place);
        END IF;
    ELSE
        PERFORM set_config('lock_timeout', '20ms', true);
    END IF;
    IF (job_update.j).triggers = 'skip' THEN
        PERFORM set_config('session_replication_role', 'replica', true);
    END IF;
    -- PostgreSQL's own functions first, whatever the caller's path says: the statement is resolved under it.
    PERFORM set_config('search_path', concat_ws(', ', 'pg_catalog', nullif(job_update.caller_path, '')), true);
    EXECUTE statement INTO written, same
        USING job_update.tids, job_update.xmins, job_update.texts, job_update.bytes, mine, job_update.kek_ids, job_update.aads;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    PERFORM set_config('lock_timeout', timeout_before, true);
    IF (job_update.j).triggers = 'skip' THEN
        PERFORM set_config('session_replication_role', role_before, true);
    END IF;
    IF NOT same THEN
        RAISE EXCEPTION USING ERRCODE = 'triggered_action_exception',
            MESSAGE = format('a trigger on %s changes what the job writes or leaves alone', (job_update.j).relation),
            DETAIL = 'The batch was not written.',
            HINT = 'Pass triggers => ''skip'' to write without triggers (this takes the right to set session_replication_role), or make the trigger ignore the job.';
    END IF;
    RETURN written;
END
$$;

CREATE FUNCTION vod_tender_crypto.job_write(
    j vod_tender_crypto.job, plan vod_tender_crypto.job_plan, tids tid[], xmins xid[], texts text[], bytes bytea[],
    failed text[], kek_ids text[], aads text[], caller_path text
) RETURNS vod_tender_crypto.job
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    n integer := cardinality(job_write.tids);
    columns integer := cardinality((job_write.plan).columns);
    writable boolean[] := array_fill(true, ARRAY[n]);
    failure record;
    written bigint := 0;
    code text;
    one_by_one boolean := false;
    lock_first boolean := false;
BEGIN
    IF NOT (job_write.j).dry_run THEN
        -- Rows are named by their place. The lock keeps the table from being rewritten, and the file says whether it
        -- was between reading and now: then other rows are in those places.
        EXECUTE format('LOCK TABLE ONLY %s IN ROW EXCLUSIVE MODE', (job_write.j).relation);
        IF pg_relation_filenode((job_write.j).relation)::oid IS DISTINCT FROM (job_write.j).filenode THEN
            RETURN NULL;
        END IF;
    END IF;
    FOR failure IN
        SELECT f.code, (f.place - 1) % n + 1 AS row_at, (f.place - 1) / n + 1 AS column_at
        FROM unnest(job_write.failed) WITH ORDINALITY f(code, place)
        WHERE f.code IS NOT NULL
    LOOP
        writable[failure.row_at] := false;
        PERFORM vod_tender_crypto.job_note_error(job_write.j, job_write.plan, job_write.tids[failure.row_at],
            job_write.xmins[failure.row_at], (job_write.plan).columns[failure.column_at], failure.code);
    END LOOP;
    IF (job_write.j).dry_run THEN
        written := (SELECT count(*) FROM unnest(writable) w WHERE w);
    ELSE
        LOOP
            BEGIN
                written := vod_tender_crypto.job_update(job_write.j, job_write.plan, job_write.tids, job_write.xmins,
                    job_write.texts, job_write.bytes, writable, job_write.kek_ids, job_write.aads, job_write.caller_path,
                    lock_first);
                EXIT;
            EXCEPTION WHEN OTHERS THEN
                IF NOT lock_first AND SQLSTATE IN ('55P03', '40P01') THEN
                    lock_first := true;
                ELSIF vod_tender_crypto.concerns_one_row(SQLSTATE) THEN
                    one_by_one := true;
                ELSE
                    RAISE;
                END IF;
            END;
            EXIT WHEN one_by_one;
        END LOOP;
    END IF;
    IF one_by_one THEN
        -- One row of the batch cannot be written: find it.
        FOR row_at IN 1 .. n LOOP
            BEGIN
                written := written + vod_tender_crypto.job_update(job_write.j, job_write.plan,
                    job_write.tids[row_at : row_at], job_write.xmins[row_at : row_at],
                    ARRAY(SELECT job_write.texts[row_at + n * c] FROM generate_series(0, (job_write.plan).text_columns - 1) c),
                    ARRAY(SELECT job_write.bytes[row_at + n * c]
                          FROM generate_series(0, columns - (job_write.plan).text_columns - 1) c),
                    writable[row_at : row_at],
                    ARRAY(SELECT job_write.kek_ids[row_at + n * c] FROM generate_series(0, columns - 1) c),
                    ARRAY(SELECT job_write.aads[row_at + n * c] FROM generate_series(0, columns - 1) c),
                    job_write.caller_path, true);
            EXCEPTION WHEN OTHERS THEN
                IF NOT vod_tender_crypto.concerns_one_row(SQLSTATE) THEN
                    RAISE;
                END IF;
                code := SQLSTATE;
                PERFORM vod_tender_crypto.job_note_error(job_write.j, job_write.plan, job_write.tids[row_at],
                    job_write.xmins[row_at], '*', code);
            END;
        END LOOP;
    END IF;
    j.rows_done := j.rows_done + written;
    j.run_rows_done := j.run_rows_done + written;
    j.rows_skipped := j.rows_skipped + (SELECT count(*) FROM unnest(writable) w WHERE w) - written;
    IF one_by_one OR job_write.failed IS NOT NULL THEN
        j.rows_failed := vod_tender_crypto.job_count_failed(j);
    END IF;
    PERFORM vod_tender_crypto.job_note(j);
    RETURN j;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.job_write(vod_tender_crypto.job, vod_tender_crypto.job_plan, tid[], xid[], text[], bytea[], text[], text[], text[], text) IS
    'Writes a batch. NULL when the table was rewritten since the batch was read.';

SET LOCAL search_path = @extschema@, pg_temp;
