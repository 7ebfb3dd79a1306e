-- Runs a job: goes over the table batch by batch, commits after every step, and goes over it again until nothing is left
-- that it can do. A procedure that commits can have no SET clause: each of its transactions sets its own search_path.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE FUNCTION vod_tender_crypto.job_read(plan vod_tender_crypto.job_plan, from_row tid, to_row tid, most_rows integer)
    RETURNS vod_tender_crypto.job_batch
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    batch vod_tender_crypto.job_batch;
BEGIN
    EXECUTE (job_read.plan).read_sql INTO batch USING job_read.from_row, job_read.to_row, job_read.most_rows;
    RETURN batch;
END
$$;

-- Rows of about this size that a batch may have: it is in memory several times over.
CREATE FUNCTION vod_tender_crypto.job_fitting_rows(j vod_tender_crypto.job, bytes bigint, in_rows double precision) RETURNS integer
    LANGUAGE sql IMMUTABLE
RETURN least((job_fitting_rows.j).batch_size, greatest(1,
    16777216 * job_fitting_rows.in_rows / greatest(job_fitting_rows.bytes, 1)))::integer;

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
    IF j.dry_run OR j.rows_left <= j.rows_failed THEN
        j.state := 'done';
        IF j.operation = 'rewrap_table' AND NOT j.dry_run THEN
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
    -- Most blocks that are looked at in one go for rows that are due.
    most_blocks CONSTANT bigint := 65536;
    -- How long a service that throttles is asked again, and how many passes may follow one that brought nothing.
    throttled_at_most CONSTANT interval := interval '30 minutes';
    idle_passes_at_most CONSTANT integer := 30;

    caller_path text := pg_catalog.current_setting('search_path');
    j vod_tender_crypto.job;
    phase text := 'begin';
    -- The pass.
    relations regclass[];
    relation_at integer;
    least_left bigint;
    idle_passes integer := 0;
    -- The relation.
    plan vod_tender_crypto.job_plan;
    relation_blocks bigint;
    blocks bigint;
    rows_fit integer;
    -- The batch.
    batch vod_tender_crypto.job_batch;
    converted vod_tender_crypto.job_converted;
    written vod_tender_crypto.job;
    behind_batch tid;
    most_rows integer;
    n integer;
    batch_began timestamptz;
    -- The session.
    pause double precision := 0;
    throttles integer := 0;
    throttled_since timestamptz;
    noticed_at timestamptz := pg_catalog.clock_timestamp();
    failed_with text;
    failed_message text;
    failed_detail text;
    failed_hint text;
BEGIN
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
    j := vod_tender_crypto.job_take(run_job.job_id);
    RAISE NOTICE 'job %: % of %', j.job, j.operation, j.target;
    COMMIT;
    LOOP
        -- Rows that are locked or changed are passed by, which takes a fresh look with every statement.
        SET TRANSACTION ISOLATION LEVEL READ COMMITTED;
        PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
        failed_with := NULL;
        BEGIN
            IF NOT vod_tender_crypto.job_hold(j) THEN
                pause := 0;
                phase := 'stop';
            END IF;
            IF pause > 0 THEN
                -- In short transactions: an old snapshot keeps VACUUM from its work.
                PERFORM pg_sleep(least(pause, 1));
                pause := pause - least(pause, 1);
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
                    plan := vod_tender_crypto.plan_job(j, j.relation);
                    relation_blocks := pg_relation_size(j.relation) / current_setting('block_size')::integer;
                    blocks := 1;
                    rows_fit := coalesce(
                        (SELECT vod_tender_crypto.job_fitting_rows(j, pg_table_size(c.oid), c.reltuples)
                         FROM pg_class c WHERE c.oid = j.relation AND c.reltuples > 0),
                        least(j.batch_size, 100));
                    phase := 'read';
                END IF;
            ELSIF phase = 'read' THEN
                IF j.rows_failed > j.max_errors THEN
                    RAISE EXCEPTION USING ERRCODE = 'data_exception',
                        MESSAGE = format('more than %s rows of %s failed', j.max_errors, j.target),
                        DETAIL = format('SQLSTATEs: %s.', (SELECT string_agg(DISTINCT e.sqlstate, ', ')
                            FROM vod_tender_crypto.job_error e WHERE e.job = j.job)),
                        HINT = 'The rows are in vod_tender_crypto.job_error.';
                END IF;
                batch_began := clock_timestamp();
                EXECUTE format('LOCK TABLE ONLY %s IN ACCESS SHARE MODE', j.relation);
                IF j.filenode IS DISTINCT FROM pg_relation_filenode(j.relation)::oid THEN
                    -- Just begun, or rewritten since: then places mean nothing any more.
                    j.filenode := pg_relation_filenode(j.relation);
                    j.next_row := '(0,0)';
                END IF;
                behind_batch := format('(%s,0)', vod_tender_crypto.block_of(j.next_row) + blocks)::tid;
                most_rows := least(rows_fit, j.max_rows_per_second);
                batch := vod_tender_crypto.job_read(plan, j.next_row, behind_batch, most_rows);
                n := coalesce(cardinality(batch.tids), 0);
                IF n > 0 THEN
                    phase := 'convert';
                ELSE
                    j.next_row := behind_batch;
                    blocks := least(blocks * 4, most_blocks);
                    IF vod_tender_crypto.block_of(j.next_row) >= relation_blocks THEN
                        relation_at := relation_at + 1;
                        phase := 'relation';
                    END IF;
                    PERFORM vod_tender_crypto.job_note(j);
                END IF;
            ELSIF phase = 'convert' THEN
                converted := vod_tender_crypto.job_convert(
                    j, plan, n, batch.texts, batch.bytes, batch.aads, batch.versions);
                phase := 'write';
            ELSIF phase = 'write' THEN
                written := j;
                IF n = most_rows THEN
                    -- There may be more in the last block.
                    written.next_row := format('(%s,%s)', vod_tender_crypto.block_of(batch.tids[n]),
                                               (batch.tids[n]::text::point)[1]::integer + 1)::tid;
                ELSE
                    written.next_row := behind_batch;
                END IF;
                written := vod_tender_crypto.job_write(written, plan, batch.tids, batch.xmins, converted.texts,
                    converted.bytes, converted.failed, converted.kek_ids, batch.aads, caller_path);
                IF written.job IS NOT NULL THEN
                    blocks := CASE WHEN n < most_rows THEN least(blocks * 2, most_blocks)
                        ELSE vod_tender_crypto.block_of(written.next_row) - vod_tender_crypto.block_of(j.next_row) + 1 END;
                    rows_fit := vod_tender_crypto.job_fitting_rows(j,
                        coalesce(pg_column_size(batch.texts), 0) + coalesce(pg_column_size(batch.bytes), 0), n);
                    IF j.max_rows_per_second IS NOT NULL THEN
                        pause := greatest(0, n::double precision / j.max_rows_per_second
                                             - extract(epoch FROM clock_timestamp() - batch_began)::double precision);
                    END IF;
                    j := written;
                END IF;
                batch := NULL;
                converted := NULL;
                phase := 'read';
            ELSIF phase = 'end of pass' THEN
                j := vod_tender_crypto.job_end_pass(j, idle_passes < idle_passes_at_most);
                IF j.state = 'running' THEN
                    idle_passes := CASE WHEN j.rows_left < coalesce(least_left, j.rows_left + 1) THEN 0 ELSE idle_passes + 1 END;
                    least_left := least(least_left, j.rows_left);
                    j.rows_left := NULL;
                    pause := least(idle_passes, 1);
                    phase := 'pass';
                ELSE
                    phase := 'end';
                END IF;
            ELSIF phase = 'stop' THEN
                j.state := 'stopped';
                PERFORM vod_tender_crypto.job_note(j);
                phase := 'end';
            END IF;
        EXCEPTION WHEN OTHERS THEN
            GET STACKED DIAGNOSTICS failed_with = RETURNED_SQLSTATE, failed_message = MESSAGE_TEXT,
                failed_detail = PG_EXCEPTION_DETAIL, failed_hint = PG_EXCEPTION_HINT;
        END;
        IF failed_with IS NULL THEN
            IF pause <= 0 THEN
                throttles := 0;
            END IF;
        ELSIF failed_with = '53400' AND phase IN ('begin', 'convert')
              AND (throttles = 0 OR clock_timestamp() < throttled_since + throttled_at_most) THEN
            throttled_since := CASE WHEN throttles = 0 THEN clock_timestamp() ELSE throttled_since END;
            throttles := throttles + 1;
            pause := least(30, 0.5 * 2 ^ least(throttles, 10)) * (0.5 + random() / 2);
        ELSIF failed_with IN ('53200', '54000') AND phase IN ('read', 'convert') AND most_rows > 1 THEN
            rows_fit := most_rows / 2;
            phase := 'read';
        ELSE
            PERFORM vod_tender_crypto.job_fail(j, failed_with, failed_message);
            COMMIT;
            RAISE EXCEPTION USING ERRCODE = failed_with,
                MESSAGE = format('job %s stopped: %s', j.job, failed_message), DETAIL = failed_detail,
                HINT = concat_ws(' ', nullif(failed_hint, ''), format('CALL vod_tender_crypto.resume(%s) continues the job.', j.job));
        END IF;
        COMMIT;
        EXIT WHEN phase = 'end';
        IF clock_timestamp() > noticed_at + interval '10 seconds' THEN
            noticed_at := clock_timestamp();
            RAISE NOTICE 'job %: % rows done, about % left, % rows a second%', j.job, j.rows_done,
                greatest(j.run_rows_due - j.run_rows_done, 0),
                round((j.run_rows_done / extract(epoch FROM clock_timestamp() - j.run_started_at))::numeric),
                CASE WHEN throttles > 0 THEN '; the key service throttles' ELSE '' END;
        END IF;
    END LOOP;
    RAISE NOTICE 'job % %: % rows %, % failed, % left', j.job, j.state, j.rows_done,
        CASE WHEN j.dry_run THEN 'would be done (dry run)' ELSE 'done' END, j.rows_failed, coalesce(j.rows_left::text, 'some');
    IF j.state = 'incomplete' THEN
        RAISE WARNING 'job %: % rows are left that it could not get hold of', j.job, j.rows_left - j.rows_failed
            USING HINT = format('They are locked, or rows keep arriving that need it. CALL vod_tender_crypto.resume(%s) tries again.', j.job);
    END IF;
END
$$;

SET LOCAL search_path = @extschema@, pg_temp;
