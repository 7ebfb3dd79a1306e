-- What a job runs on one relation: statements written once for the whole job, from checked expressions and quoted names.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE TYPE vod_tender_crypto.job_plan AS (
    columns      name[],     -- the job's columns, those of type text first
    text_columns integer,    -- how many of them are text
    aad_given    boolean[],  -- which of them have an aad
    uses_kek_id  boolean,    -- whether the new KEK id is written beside the values
    read_sql     text,       -- $1, $2 first place and the one behind the last, $3 most rows -> job_batch
    lock_sql     text,       -- $1 ctids, $2 xmins -> places in the arrays of the rows that are locked now
    write_sql    text,       -- $1 to $7 as job_update passes them -> rows written, whether they are as meant
    count_sql    text,       -- -> rows that are due
    key_sql      text        -- $1 ctid, $2 xmin -> the row's key as jsonb
);
CREATE TYPE vod_tender_crypto.job_batch AS (
    tids     tid[],
    xmins    xid[],
    texts    text[],         -- rows of the first text column, then of the second, ...
    bytes    bytea[],
    aads     text[],         -- rows of the first column of the plan, then of the second, ...
    versions integer[]
);
CREATE TYPE vod_tender_crypto.job_converted AS (
    texts    text[],
    bytes    bytea[],
    failed   text[],         -- SQLSTATE, in the order of job_batch.aads; NULL when nothing failed
    kek_ids  text[]          -- in the order of job_batch.aads
);

CREATE FUNCTION vod_tender_crypto.primary_key(relation regclass) RETURNS name[]
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT array_agg(a.attname ORDER BY k.place)
    FROM pg_index i, unnest(i.indkey) WITH ORDINALITY k(attnum, place), pg_attribute a
    WHERE i.indrelid = primary_key.relation AND i.indisprimary AND k.place <= i.indnkeyatts
      AND a.attrelid = i.indrelid AND a.attnum = k.attnum;
END;

CREATE FUNCTION vod_tender_crypto.key_expression(relation regclass) RETURNS text
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT coalesce(
        (SELECT format('jsonb_build_object(%s)', string_agg(format('%L, t.%I', k.column_name, k.column_name), ', ' ORDER BY k.place))
         FROM unnest(vod_tender_crypto.primary_key(key_expression.relation)) WITH ORDINALITY k(column_name, place)
         HAVING count(*) > 0),
        'jsonb_build_object(''ctid'', t.ctid::text)');
END;

-- What a job writes into the application's own columns: SET items of an UPDATE.
CREATE FUNCTION vod_tender_crypto.bookkeeping(j vod_tender_crypto.job, relation regclass) RETURNS text[]
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    item record;
    items text[] := '{}';
    attribute record;
    literal text;
BEGIN
    FOR item IN SELECT s.key AS column_name, s.value #>> '{}' AS value FROM jsonb_each((bookkeeping.j).set_columns) s LOOP
        SELECT format_type(a.atttypid, a.atttypmod) AS type, a.attgenerated INTO attribute
        FROM pg_attribute a
        WHERE a.attrelid = bookkeeping.relation AND a.attname = item.column_name AND a.attnum > 0 AND NOT a.attisdropped;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING ERRCODE = 'undefined_column',
                MESSAGE = format('column %I of %s, in set_columns, does not exist', item.column_name, bookkeeping.relation);
        END IF;
        IF attribute.attgenerated <> '' OR item.column_name = ANY ((bookkeeping.j).columns)
           OR item.column_name = ANY (vod_tender_crypto.primary_key(bookkeeping.relation)) THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('column %I cannot be in set_columns', item.column_name),
                DETAIL = 'It is generated, part of the primary key, or a column that the job converts.';
        END IF;
        literal := quote_nullable(replace(item.value, '{key}', coalesce((bookkeeping.j).key, '')));
        items := items || CASE WHEN strpos(item.value, '{kek_id}') > 0
            THEN format('%I = CAST(replace(%s, ''{kek_id}'', coalesce({kek_ids})) AS %s)', item.column_name, literal, attribute.type)
            ELSE format('%I = CAST(%s AS %s)', item.column_name, literal, attribute.type) END;
    END LOOP;
    RETURN items;
END
$$;

-- The condition on a row (called t) that the job has something to do with it.
CREATE FUNCTION vod_tender_crypto.due_expression(j vod_tender_crypto.job, relation regclass) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    due text;
    key_columns name[] := vod_tender_crypto.primary_key((due_expression.j).target);
BEGIN
    SELECT format('(%s)', string_agg(format('vod_tender_crypto.is_due(t.%I%s, %L, %L::text, %L::text)', a.attname,
               CASE WHEN a.atttypid = 'varchar'::regtype THEN '::text' ELSE '' END,
               (due_expression.j).operation, (due_expression.j).key, (due_expression.j).newest_kek_id), ' OR '))
    INTO due
    FROM unnest((due_expression.j).columns) c(column_name)
    JOIN pg_attribute a ON a.attrelid = due_expression.relation AND a.attname = c.column_name;
    IF (due_expression.j).where_clause IS NOT NULL THEN
        due := due || format(' AND (%s)', vod_tender_crypto.row_expression(
            due_expression.relation, (due_expression.j).where_clause, 'where_clause', NULL, '{}'));
    END IF;
    IF (due_expression.j).percent < 100 THEN
        IF key_columns IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('%s has no primary key, so no stable share of its rows can be chosen', (due_expression.j).target),
                HINT = 'Use where_clause instead of percent.';
        END IF;
        due := due || format(' AND (hash_record_extended(ROW(%s), 0) & 9223372036854775807) %% 1000000 < %s',
            (SELECT string_agg(format('t.%I', k), ', ') FROM unnest(key_columns) k),
            ((due_expression.j).percent * 10000)::bigint);
    END IF;
    RETURN due;
END
$$;

CREATE FUNCTION vod_tender_crypto.plan_job(j vod_tender_crypto.job, relation regclass) RETURNS vod_tender_crypto.job_plan
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    plan vod_tender_crypto.job_plan;
    due text := vod_tender_crypto.due_expression(plan_job.j, plan_job.relation);
    set_items text[] := vod_tender_crypto.bookkeeping(plan_job.j, plan_job.relation);
    -- What an aad must not be made of.
    changed text[] := (plan_job.j).columns::text[] || ARRAY(SELECT jsonb_object_keys((plan_job.j).set_columns));
    -- A trigger may change what the job leaves alone.
    guarded boolean := EXISTS (
        SELECT FROM pg_trigger g
        WHERE g.tgrelid = plan_job.relation AND NOT g.tgisinternal
          AND g.tgenabled IN ('A', CASE (plan_job.j).triggers WHEN 'fire' THEN 'O' ELSE 'R' END::"char")
          AND g.tgtype & 1 = 1 AND g.tgtype & 2 = 2 AND g.tgtype & 16 = 16);
    col record;
    slice text;
    read_items text := '';
    texts text; bytes text; aads text;
    batch_names text := ''; batch_arrays text := ''; some_new text; same text; kek_ids text;
    version text := 'NULL::integer';
    relation_name text := plan_job.relation::text;
BEGIN
    plan.uses_kek_id := strpos((plan_job.j).set_columns::text, '{kek_id}') > 0;
    IF (plan_job.j).version IS NOT NULL THEN
        version := vod_tender_crypto.row_expression(plan_job.relation, (plan_job.j).version, 'version', NULL, '{}');
    END IF;
    FOR col IN
        SELECT c.column_name, a.atttypid = 'bytea'::regtype AS is_bytea, (plan_job.j).aads[c.place] AS aad,
               row_number() OVER byte_order - 1 AS at,
               row_number() OVER (PARTITION BY a.atttypid = 'bytea'::regtype ORDER BY c.place) - 1 AS at_in_type
        FROM unnest((plan_job.j).columns) WITH ORDINALITY c(column_name, place)
        JOIN pg_attribute a ON a.attrelid = plan_job.relation AND a.attname = c.column_name
        WINDOW byte_order AS (ORDER BY a.atttypid = 'bytea'::regtype, c.place)
        ORDER BY at
    LOOP
        plan.columns := plan.columns || col.column_name;
        plan.aad_given := plan.aad_given || (col.aad IS NOT NULL);
        plan.text_columns := coalesce(plan.text_columns, 0) + (NOT col.is_bytea)::integer;
        IF col.aad IS NOT NULL THEN
            col.aad := vod_tender_crypto.row_expression(plan_job.relation, col.aad, 'aad', col.column_name, changed);
        END IF;
        read_items := read_items || format(', t.%I%s AS v%s, %s AS a%s', col.column_name,
            CASE WHEN col.is_bytea THEN '' ELSE '::text' END, col.at, coalesce(col.aad, 'NULL::text'), col.at);
        IF col.is_bytea THEN
            bytes := concat_ws(' || ', bytes, format('array_agg(b.v%s)', col.at));
        ELSE
            texts := concat_ws(' || ', texts, format('array_agg(b.v%s)', col.at));
        END IF;
        aads := concat_ws(' || ', aads, format('array_agg(b.a%s)', col.at));
        -- Each column's part of the arrays, which hold one column after the other.
        slice := format('[%1$s * cardinality($1) + 1 : (%1$s + 1) * cardinality($1)]', col.at);
        batch_names := batch_names || format(', n%s', col.at);
        batch_arrays := batch_arrays || format(', ($%s)[%3$s * cardinality($1) + 1 : (%3$s + 1) * cardinality($1)]',
            CASE WHEN col.is_bytea THEN 4 ELSE 3 END, NULL, col.at_in_type);
        some_new := concat_ws(' OR ', some_new, format('l.n%s IS NOT NULL', col.at));
        set_items := set_items || format('%1$I = coalesce(l.n%2$s, t.%1$I)', col.column_name, col.at);
        IF plan.uses_kek_id THEN
            batch_names := batch_names || format(', k%s', col.at);
            batch_arrays := batch_arrays || format(', ($6)%s', slice);
            kek_ids := concat_ws(', ', kek_ids, format('l.k%s', col.at));
        END IF;
        IF guarded THEN
            -- What is stored must be what was made, under the aad that it was made with.
            batch_names := batch_names || format(', a%s', col.at);
            batch_arrays := batch_arrays || format(', ($7)%s', slice);
            same := concat_ws(' AND ', same, format('(l.n%1$s IS NULL OR t.%2$I%3$s = l.n%1$s)', col.at, col.column_name,
                CASE WHEN col.is_bytea THEN '' ELSE '::text COLLATE "C"' END));
            IF col.aad IS NOT NULL THEN
                same := same || format(' AND %s IS NOT DISTINCT FROM l.a%s', col.aad, col.at);
            END IF;
        END IF;
    END LOOP;
    IF plan.uses_kek_id THEN
        set_items := ARRAY(SELECT replace(item, 'coalesce({kek_ids})', format('coalesce(%s)', kek_ids)) FROM unnest(set_items) item);
    END IF;

    plan.read_sql := format(
        'SELECT array_agg(b.tid), array_agg(b.xmin), %s, %s, %s, %s
         FROM (SELECT t.ctid AS tid, t.xmin AS xmin, %s AS version%s
               FROM ONLY %s t
               WHERE t.ctid >= $1 AND t.ctid < $2 AND %s
               ORDER BY t.ctid LIMIT $3) b',
        coalesce(texts, 'NULL::text[]'), coalesce(bytes, 'NULL::bytea[]'), aads,
        CASE WHEN (plan_job.j).version IS NULL THEN 'NULL::integer[]' ELSE 'array_agg(b.version)' END,
        version, read_items, relation_name, due);

    -- A row that changed since it was read (its xmin is another) is left alone.
    plan.lock_sql := format(
        'SELECT array_agg(l.place)
         FROM (SELECT b.place
               FROM unnest($1, $2) WITH ORDINALITY b(tid, xmin, place)
               JOIN ONLY %s t ON t.ctid = b.tid AND t.xmin = b.xmin
               FOR NO KEY UPDATE OF t SKIP LOCKED) l', relation_name);
    plan.write_sql := format(
        'WITH written AS (
             UPDATE ONLY %1$s t SET %2$s
             FROM (SELECT b.*%3$s FROM unnest($1, $2, $5%4$s) AS b(tid, xmin, mine%5$s)%6$s) l
             WHERE t.ctid = l.tid AND t.xmin = l.xmin AND l.mine AND (%7$s)
             RETURNING %8$s AS same)
         SELECT count(*), coalesce(bool_and(w.same), true) FROM written w',
        relation_name, array_to_string(set_items, ', '), CASE WHEN guarded THEN ', o.whole' ELSE '' END,
        batch_arrays, batch_names,
        CASE WHEN guarded THEN format(
            ', LATERAL (SELECT to_jsonb(o) AS whole FROM ONLY %s o WHERE o.ctid = b.tid OFFSET 0) o', relation_name)
        ELSE '' END,
        some_new,
        CASE WHEN guarded THEN same || format(' AND to_jsonb(t) - %1$L::text[] = l.whole - %1$L::text[]',
            changed || ARRAY(SELECT a.attname::text FROM pg_attribute a
                             WHERE a.attrelid = plan_job.relation AND a.attgenerated <> '')) ELSE 'true' END);

    plan.count_sql := format('SELECT count(*) FROM ONLY %s t WHERE %s', relation_name, due);
    plan.key_sql := format('SELECT %s FROM ONLY %s t WHERE t.ctid = $1 AND t.xmin = $2',
        vod_tender_crypto.key_expression(plan_job.relation), relation_name);
    RETURN plan;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.plan_job(vod_tender_crypto.job, regclass) IS 'The statements that a job runs on one relation.';

SET LOCAL search_path = @extschema@, pg_temp;
