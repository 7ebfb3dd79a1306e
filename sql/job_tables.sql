-- What bulk jobs did, do and could not do. Operational: not part of a dump.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE TABLE vod_tender_crypto.job (
    job             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    operation       text NOT NULL CHECK (operation IN ('migrate', 'rewrap_table', 'downgrade')),
    target          regclass NOT NULL,
    columns         name[] NOT NULL,
    key             text,
    newest_kek_id   text,
    context         jsonb,
    aads            text[] NOT NULL,
    versions        text[] NOT NULL,
    set_columns     jsonb NOT NULL DEFAULT '{}',
    where_clause    text,
    batch_size      integer NOT NULL CHECK (batch_size BETWEEN 1 AND 1000000),
    max_rows_per_second integer CHECK (max_rows_per_second > 0),
    percent         numeric NOT NULL CHECK (percent > 0 AND percent <= 100),
    max_errors      integer NOT NULL CHECK (max_errors >= 0),
    triggers        text NOT NULL CHECK (triggers IN ('fire', 'skip')),
    check_wraps     boolean NOT NULL,
    dry_run         boolean NOT NULL,
    started_by      name NOT NULL DEFAULT current_user,
    started_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    state           text NOT NULL DEFAULT 'running'
                    CHECK (state IN ('running', 'stopped', 'failed', 'incomplete', 'done')),
    stop_requested  boolean NOT NULL DEFAULT false,
    sqlstate        text,
    message         text,
    -- Where it is: the pass over the table, the relation of it that is being read, the next row's place, and which file
    -- that place is in (a table that was rewritten begins again).
    pass            integer NOT NULL DEFAULT 1,
    relation        regclass,
    next_row        tid NOT NULL DEFAULT '(0,0)',
    filenode        oid,
    -- Counts of rows: done and skipped over all runs, failed in the last one, left at its end.
    rows_done       bigint NOT NULL DEFAULT 0,
    rows_failed     bigint NOT NULL DEFAULT 0,
    rows_skipped    bigint NOT NULL DEFAULT 0,
    rows_left       bigint,
    -- The run under way or the last one.
    run             integer NOT NULL DEFAULT 0,
    run_by          name,
    run_started_at  timestamptz,
    run_rows_due    bigint,
    run_rows_done   bigint NOT NULL DEFAULT 0,
    updated_at      timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);
COMMENT ON TABLE vod_tender_crypto.job IS
    'Bulk jobs: what, by whom, state, checkpoint and counts. One row is written with every batch, in the same transaction.';

CREATE TABLE vod_tender_crypto.job_error (
    job         bigint NOT NULL REFERENCES vod_tender_crypto.job ON DELETE CASCADE,
    relation    regclass NOT NULL,
    row_key     jsonb NOT NULL,
    column_name name NOT NULL,
    sqlstate    text NOT NULL,
    pass        integer NOT NULL,
    attempts    integer NOT NULL DEFAULT 1,
    seen_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (job, relation, row_key, column_name)
);
COMMENT ON TABLE vod_tender_crypto.job_error IS
    'Rows that a job could not handle: their primary key (or ctid), the column (* for the row as a whole) and the SQLSTATE, never a value.';

-- Row-level security: whoever has the rights of the target's owner sees and writes a job's rows.
ALTER TABLE vod_tender_crypto.job ENABLE ROW LEVEL SECURITY;
CREATE POLICY owner ON vod_tender_crypto.job USING (vod_tender_crypto.owns(target));
ALTER TABLE vod_tender_crypto.job_error ENABLE ROW LEVEL SECURITY;
CREATE POLICY owner ON vod_tender_crypto.job_error
    USING (EXISTS (SELECT FROM vod_tender_crypto.job j WHERE j.job = job_error.job));

-- The class of the advisory lock that whoever runs a job holds; the object is the job.
CREATE FUNCTION vod_tender_crypto.job_lock_class() RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN hashtext('vod_tender_crypto.job');

-- The process whose session runs the job; NULL when none does.
CREATE FUNCTION vod_tender_crypto.job_holder(job_id bigint) RETURNS integer
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    SELECT l.pid FROM pg_locks l
    WHERE l.locktype = 'advisory' AND l.objsubid = 2
      AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
      AND l.classid = (vod_tender_crypto.job_lock_class()::bigint & 4294967295)::oid
      AND l.objid = job_holder.job_id::oid;
END;

-- The state of a job that its row says is running: whether a session has its lock. A job is unlocked after its last state
-- was committed, so that state is looked up once more (a VOLATILE function sees what was committed meanwhile).
CREATE FUNCTION vod_tender_crypto.job_state(job_id bigint, state text) RETURNS text
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    now_state text;
BEGIN
    IF job_state.state <> 'running' OR vod_tender_crypto.job_holder(job_state.job_id) IS NOT NULL THEN
        RETURN job_state.state;
    END IF;
    SELECT j.state INTO now_state FROM vod_tender_crypto.job j WHERE j.job = job_state.job_id;
    RETURN CASE now_state WHEN 'running' THEN 'interrupted' ELSE now_state END;
END
$$;

CREATE VIEW vod_tender_crypto.job_progress WITH (security_invoker = true) AS
SELECT j.job, j.operation, j.target, j.columns, vod_tender_crypto.job_state(j.job, j.state) AS state,
       j.dry_run, j.pass, j.rows_done, j.rows_failed,
       coalesce(j.rows_left, greatest(j.run_rows_due - j.run_rows_done, 0)) AS rows_left,
       round(speed.rows_per_second, 1) AS rows_per_second,
       CASE WHEN j.state = 'running'
            THEN clock_timestamp() + greatest(j.run_rows_due - j.run_rows_done, 0)
                 / nullif(speed.rows_per_second, 0)::double precision * interval '1 second' END AS estimated_end,
       j.sqlstate, j.message, j.run_by, j.run_started_at, j.updated_at
FROM vod_tender_crypto.job j,
     LATERAL (SELECT (j.run_rows_done / nullif(extract(epoch FROM j.updated_at - j.run_started_at), 0))::numeric
              AS rows_per_second) speed;
COMMENT ON VIEW vod_tender_crypto.job_progress IS
    'Jobs as they stand: done, left, rows a second, estimated end. A job that says it runs and whose session is gone is interrupted: resume() continues it.';

SET LOCAL search_path = @extschema@, pg_temp;
