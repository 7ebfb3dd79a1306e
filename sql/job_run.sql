-- Runs a job: goes over the table batch by batch, commits after every step, and goes over it again until nothing is left
-- that it can do. A procedure that commits can have no SET clause: each of its transactions sets its own search_path.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Where a place in a table is.
CREATE FUNCTION vod_tender_crypto.block_of(place tid) RETURNS bigint
    LANGUAGE sql IMMUTABLE
RETURN (block_of.place::text::point)[0]::bigint;

-- After a pass: whether the job is done, goes on with another pass, or cannot finish.
CREATE FUNCTION vod_tender_crypto.job_end_pass(j vod_tender_crypto.job, may_go_on boolean) RETURNS vod_tender_crypto.job
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- What failed in an earlier pass and no longer does is not a failure any more.
    DELETE FROM vod_tender_crypto.job_error e WHERE e.job = (job_end_pass.j).job AND e.pass < (job_end_pass.j).pass;
    j.rows_failed := vod_tender_crypto.job_count_failed(j);
    j.rows_left := vod_tender_crypto.job_count_due(j);
    j.relation := NULL;
    -- Counted without those that failed, which are left too.
    j.rows_left := j.rows_left + j.rows_failed;
    IF j.dry_run OR j.rows_left = j.rows_failed THEN
        j.state := 'done';
        IF j.operation = 'rewrap_table' AND NOT j.dry_run AND j.rows_failed = 0
           AND j.where_clause IS NULL AND j.percent = 100 THEN
            PERFORM vod_tender_crypto.job_note_key(j);
        END IF;
    ELSIF NOT job_end_pass.may_go_on THEN
        j.state := 'incomplete';
    ELSE
        j.pass := j.pass + 1;
    END IF;
    PERFORM vod_tender_crypto.job_note(j);
    RETURN j;
END
$$;

CREATE PROCEDURE vod_tender_crypto.run_job(job_id bigint)
    LANGUAGE plpgsql
AS $$
DECLARE
    -- Types by their full names: here the path is still the caller's.
    -- Most blocks that are looked at in one go for rows that are due.
    most_blocks CONSTANT bigint := 65536;
    -- How long a service that throttles is asked again, and how many passes may follow one that brought nothing.
    throttled_at_most CONSTANT interval := interval '30 minutes';
    idle_passes_at_most CONSTANT integer := 10;

    caller_path pg_catalog.text := pg_catalog.current_setting('search_path');
    caller_isolation pg_catalog.text := pg_catalog.current_setting('default_transaction_isolation');
    j vod_tender_crypto.job;
    before vod_tender_crypto.job;
    phase pg_catalog.text := 'begin';
    -- The pass.
    relations pg_catalog.regclass[];
    relation_at integer;
    least_left bigint;
    idle_passes integer := 0;
    -- The relation.
    plan vod_tender_crypto.job_plan;
    relation_blocks bigint;
    blocks bigint;
    -- The batch.
    most_headers CONSTANT integer := 8192;
    rows_fit integer;
    most_rows integer;
    behind pg_catalog.tid;
    looked record;
    outcome record;
    batch_began pg_catalog.timestamptz;
    -- The session.
    pause double precision := 0;
    paused boolean;
    throttles integer := 0;
    throttled_since pg_catalog.timestamptz;
    noticed_at pg_catalog.timestamptz := pg_catalog.clock_timestamp();
    failed_with pg_catalog.text;
    failed_message pg_catalog.text;
    failed_detail pg_catalog.text;
    failed_hint pg_catalog.text;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    j := vod_tender_crypto.job_take(run_job.job_id);
    RAISE NOTICE 'job %: % of %', j.job, j.operation, j.target;
    -- Rows that are locked or changed are passed by, which takes a fresh look with every statement. SET TRANSACTION does
    -- not reach a procedure that was called by another one.
    PERFORM set_config('default_transaction_isolation', 'read committed', false);
    COMMIT;
    -- First of all in every transaction: without it, operators and functions are the caller's path's.
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    LOOP
        failed_with := NULL;
        paused := false;
        BEGIN
            IF NOT vod_tender_crypto.job_goes_on(j) THEN
                pause := 0;
                phase := 'stop';
            END IF;
            IF pause > 0 THEN
                -- In short transactions: an old snapshot keeps VACUUM from its work.
                PERFORM pg_sleep(least(pause, 1));
                pause := pause - least(pause, 1);
                paused := true;
            ELSIF phase = 'begin' THEN
                j := vod_tender_crypto.job_begin_run(j);
                phase := 'count due';
            ELSIF phase = 'count due' THEN
                j.run_rows_due := vod_tender_crypto.job_count_due(j);
                PERFORM vod_tender_crypto.job_note(j);
                phase := 'pass';
            ELSIF phase = 'pass' THEN
                relations := ARRAY(SELECT vod_tender_crypto.storing_relations(j.target));
                relation_at := coalesce(array_position(relations, j.relation), 1);
                phase := 'relation';
            ELSIF phase = 'relation' THEN
                IF relation_at > cardinality(relations) THEN
                    phase := 'end of pass';
                ELSE
                    IF j.relation IS DISTINCT FROM relations[relation_at] THEN
                        j.relation := relations[relation_at];
                        j.filenode := NULL;
                    END IF;
                    plan := NULL;
                    relation_blocks := pg_relation_size(j.relation) / current_setting('block_size')::integer;
                    blocks := 1;
                    rows_fit := j.batch_size;
                    phase := 'look';
                END IF;
            ELSIF phase = 'look' THEN
                IF j.rows_failed > j.max_errors THEN
                    RAISE EXCEPTION USING ERRCODE = 'data_exception',
                        MESSAGE = format('more than %s rows of %s failed', j.max_errors, j.target),
                        DETAIL = format('SQLSTATEs: %s.', (SELECT string_agg(DISTINCT e.sqlstate, ', ')
                            FROM vod_tender_crypto.job_error e WHERE e.job = j.job)),
                        HINT = 'The rows are in vod_tender_crypto.job_error.';
                END IF;
                batch_began := clock_timestamp();
                -- No plan yet, or one of another name.
                IF vod_tender_crypto.lock_relation(j.relation, false) IS DISTINCT FROM plan.table_name THEN
                    plan := vod_tender_crypto.plan_job(j, j.relation);
                END IF;
                IF j.filenode IS DISTINCT FROM pg_relation_filenode(j.relation)::oid THEN
                    -- Just begun, or rewritten since: then places mean nothing any more.
                    j.filenode := pg_relation_filenode(j.relation);
                    j.next_row := '(0,0)';
                END IF;
                behind := format('(%s,0)', vod_tender_crypto.block_of(j.next_row) + blocks)::tid;
                most_rows := least(rows_fit, j.max_rows_per_second);
                IF j.operation <> 'migrate' THEN
                    -- Their headers are gathered, and have up to 16 KB each.
                    most_rows := least(most_rows, most_headers / plan.columns);
                END IF;
                looked := vod_tender_crypto.job_look(plan, j.next_row, behind, most_rows);
                IF cardinality(looked.heads) > greatest(current_setting('vod_tender_crypto.dek_cache_entries')::integer / 2, 1)
                   AND most_rows > 1 THEN
                    -- More DEKs than the session keeps.
                    rows_fit := most_rows / 2;
                ELSIF looked.n > 0 THEN
                    phase := 'prepare';
                ELSE
                    j.next_row := behind;
                    blocks := least(blocks * 4, most_blocks);
                    IF vod_tender_crypto.block_of(j.next_row) >= relation_blocks THEN
                        relation_at := relation_at + 1;
                        phase := 'relation';
                    END IF;
                    PERFORM vod_tender_crypto.job_note(j);
                END IF;
            ELSIF phase = 'prepare' THEN
                PERFORM vod_tender_crypto.job_prepare(j, plan, looked.n, looked.heads);
                phase := 'write';
            ELSIF phase = 'write' THEN
                before := j;
                IF looked.n = most_rows THEN
                    -- There may be more in the last block.
                    j.next_row := format('(%s,%s)', vod_tender_crypto.block_of(looked.last_row),
                                         (looked.last_row::text::point)[1]::integer + 1)::tid;
                ELSE
                    j.next_row := behind;
                END IF;
                outcome := vod_tender_crypto.job_write(j, plan, before.next_row, looked.last_row, looked.n, caller_path);
                j := outcome.j;
                IF outcome.replan THEN
                    j.next_row := before.next_row;
                    plan := NULL;
                ELSIF outcome.retries > 0 THEN
                    j.next_row := before.next_row;
                    rows_fit := greatest(1, looked.n / 2);
                    PERFORM vod_tender_crypto.job_note(j);
                ELSE
                    blocks := CASE WHEN looked.n < most_rows THEN least(blocks * 2, most_blocks)
                        ELSE vod_tender_crypto.block_of(j.next_row) - vod_tender_crypto.block_of(before.next_row) + 1 END;
                    rows_fit := least(j.batch_size, rows_fit::bigint * 2);
                END IF;
                IF j.max_rows_per_second IS NOT NULL THEN
                    pause := greatest(0, looked.n::double precision / j.max_rows_per_second
                                         - extract(epoch FROM clock_timestamp() - batch_began)::double precision);
                END IF;
                phase := 'look';
            ELSIF phase = 'end of pass' THEN
                j := vod_tender_crypto.job_end_pass(j, idle_passes < idle_passes_at_most);
                IF j.state = 'running' THEN
                    idle_passes := CASE WHEN j.rows_left < coalesce(least_left, j.rows_left + 1) THEN 0 ELSE idle_passes + 1 END;
                    least_left := least(least_left, j.rows_left);
                    j.rows_left := NULL;
                    pause := idle_passes;
                    phase := 'pass';
                ELSE
                    phase := 'end';
                END IF;
            ELSIF phase = 'stop' THEN
                j.state := 'stopped';
                PERFORM vod_tender_crypto.job_note(j);
                phase := 'end';
            END IF;
        -- A cancel too: the job says why it ended, and its lock goes.
        EXCEPTION WHEN query_canceled OR OTHERS THEN
            GET STACKED DIAGNOSTICS failed_with = RETURNED_SQLSTATE, failed_message = MESSAGE_TEXT,
                failed_detail = PG_EXCEPTION_DETAIL, failed_hint = PG_EXCEPTION_HINT;
        END;
        IF failed_with IS NULL THEN
            IF NOT paused THEN
                throttles := 0;
            END IF;
        ELSIF failed_with = '53400' AND phase IN ('begin', 'prepare')
              AND (throttles = 0 OR clock_timestamp() < throttled_since + throttled_at_most) THEN
            throttled_since := CASE WHEN throttles = 0 THEN clock_timestamp() ELSE throttled_since END;
            throttles := throttles + 1;
            pause := least(10, 0.5 * 2 ^ least(throttles, 10)) * (0.5 + random() / 2);
        ELSE
            IF "left"(failed_with, 2) IN ('22', '23') AND failed_with <> '22000' AND phase NOT IN ('begin', 'prepare') THEN
                -- PostgreSQL's words may quote a value.
                failed_message := format('a value does not suit an expression or a constraint (SQLSTATE %s)', failed_with);
                failed_detail := '';
                failed_hint := '';
            END IF;
            PERFORM vod_tender_crypto.job_fail(j, failed_with, failed_message);
            PERFORM vod_tender_crypto.job_unlock(j.job);
            PERFORM set_config('default_transaction_isolation', caller_isolation, false);
            COMMIT;
            PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
            RAISE EXCEPTION USING ERRCODE = failed_with,
                MESSAGE = format('job %s failed: %s', j.job, failed_message), DETAIL = failed_detail,
                HINT = concat_ws(' ', nullif(failed_hint, ''), format('CALL vod_tender_crypto.resume(%s) continues the job.', j.job));
        END IF;
        IF phase = 'end' THEN
            PERFORM vod_tender_crypto.job_unlock(j.job);
            PERFORM set_config('default_transaction_isolation', caller_isolation, false);
        END IF;
        COMMIT;
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        EXIT WHEN phase = 'end';
        IF clock_timestamp() > noticed_at + interval '10 seconds' THEN
            noticed_at := clock_timestamp();
            RAISE NOTICE 'job %: % rows done, about % left, % rows a second%', j.job, j.rows_done,
                greatest(j.run_rows_due - j.run_rows_done, 0),
                round((j.run_rows_done / extract(epoch FROM clock_timestamp() - j.run_started_at))::numeric),
                CASE WHEN throttles > 0 THEN '; the key service throttles' ELSE '' END;
        END IF;
    END LOOP;
    RAISE NOTICE 'job % %: % rows %, % failed, % left', j.job, j.state, j.run_rows_done,
        CASE WHEN j.dry_run THEN 'would be done (dry run)' ELSE 'done' END, j.rows_failed, coalesce(j.rows_left::text, format('about %s', greatest(j.run_rows_due - j.run_rows_done, 0)));
    IF j.state = 'incomplete' THEN
        RAISE WARNING 'job %: % rows are left that it could not get hold of', j.job, j.rows_left - j.rows_failed
            USING HINT = format('They are locked, or rows keep arriving that need it. CALL vod_tender_crypto.resume(%s) tries again.', j.job);
    END IF;
END
$$;

SET LOCAL search_path = @extschema@, pg_temp;
