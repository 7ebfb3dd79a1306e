-- What a job runs on one relation: statements written once for a pass over it, from checked expressions and quoted names.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE TYPE vod_tender_crypto.job_plan AS (
    table_name text,   -- as the statements name it
    guarded   boolean, -- whether they check what triggers made of a row
    columns   integer, -- how many
    look_sql  text,    -- $1, $2 first place and the one behind the last, $3 most rows
                       -- -> rows that are due, the last one's place, the heads of their values
    lock_sql  text,    -- $1, $2 first and last place -> places of due rows that nobody else has locked: now they are
    rows_sql  text,    -- $1, $2 first and last place -> places of due rows
    write_sql text,    -- $1, $2 first and last place, $3 which of the rows between (NULL: all)
                       -- -> rows written, whether they are as meant
    try_sql   text,    -- $1, $2 first and last place -> rows that would be written
    fail_sql  text,    -- $1, $2 first and last place -> key, column and SQLSTATE of what cannot be converted
    key_sql   text,    -- $1 place -> the row's key as jsonb
    count_sql text     -- $1 job -> rows that are due, but those that failed in it
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
        (SELECT format('jsonb_build_object(%s)', string_agg(format('%L, t.%I%s', k.column_name, k.column_name,
                -- Turning a type into JSON may call a cast of its owner's.
                CASE WHEN a.atttypid >= 16384 THEN '::text' ELSE '' END), ', ' ORDER BY k.place))
         FROM unnest(vod_tender_crypto.primary_key(key_expression.relation)) WITH ORDINALITY k(column_name, place)
         JOIN pg_attribute a ON a.attrelid = key_expression.relation AND a.attname = k.column_name
         HAVING count(*) > 0),
        'jsonb_build_object(''ctid'', t.ctid::text)');
END;

-- The value of a column of a row (called t), of a type that the functions on values take.
CREATE FUNCTION vod_tender_crypto.stored_expression(column_name name, type oid) RETURNS text
    LANGUAGE sql IMMUTABLE
RETURN format('t.%I%s', stored_expression.column_name,
              CASE WHEN stored_expression.type = 'bytea'::regtype THEN '' ELSE '::text' END);

-- row_expression() with the argument's name in what it raises.
CREATE FUNCTION vod_tender_crypto.checked_expression(
    relation regclass, expression text, purpose text, column_name name, changed text[]
) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    message text;
    hint text;
BEGIN
    IF checked_expression.expression IS NULL THEN
        RETURN NULL;
    END IF;
    RETURN vod_tender_crypto.row_expression(checked_expression.relation, checked_expression.expression,
        checked_expression.purpose, checked_expression.column_name, checked_expression.changed);
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
    RAISE EXCEPTION USING ERRCODE = SQLSTATE,
        MESSAGE = format('unusable %s: %s', checked_expression.purpose, message), HINT = hint;
END
$$;

-- What a job writes into the application's own columns: items of an UPDATE's SET, and conditions that they were written.
CREATE FUNCTION vod_tender_crypto.bookkeeping(
    j vod_tender_crypto.job, relation regclass, OUT items text[], OUT checks text[]
)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    item record;
    attribute record;
    value text;
BEGIN
    items := '{}';
    checks := '{}';
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
        value := quote_nullable(replace(item.value, '{key}', coalesce((bookkeeping.j).key, '')));
        IF strpos(item.value, '{kek_id}') > 0 THEN
            value := format('pg_catalog.replace(%s, ''{kek_id}'', l.kek_id)', value);
        END IF;
        -- Without a cast, which would cut off what is too long for the column.
        items := items || format('%I = %s', item.column_name, value);
        checks := checks || format('t.%I::text IS NOT DISTINCT FROM CAST(%s AS %s)::text', item.column_name, value, attribute.type);
    END LOOP;
END
$$;

-- What the job does, for the functions that do it value by value: the same text in every call.
CREATE FUNCTION vod_tender_crypto.job_task(j vod_tender_crypto.job, aad_given boolean) RETURNS text
    LANGUAGE sql STABLE
RETURN jsonb_build_object(
    'operation', (job_task.j).operation, 'key', (job_task.j).key, 'newest_kek_id', (job_task.j).newest_kek_id,
    'context', (job_task.j).context, 'check_wraps', (job_task.j).check_wraps, 'aad_given', job_task.aad_given)::text;

-- The condition on a row (called t) that the job has something to do with it.
CREATE FUNCTION vod_tender_crypto.due_expression(j vod_tender_crypto.job, relation regclass) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    due text;
    key_columns name[] := vod_tender_crypto.primary_key((due_expression.j).target);
BEGIN
    SELECT format('(%s)', string_agg(format('vod_tender_crypto.is_due(%L, %s)',
               vod_tender_crypto.job_task(due_expression.j, (due_expression.j).aads[c.place] IS NOT NULL),
               vod_tender_crypto.stored_expression(a.attname, a.atttypid)), ' OR '))
    INTO due
    FROM unnest((due_expression.j).columns) WITH ORDINALITY c(column_name, place)
    JOIN pg_attribute a ON a.attrelid = due_expression.relation AND a.attname = c.column_name;
    IF (due_expression.j).where_clause IS NOT NULL THEN
        due := due || format(' AND (%s)', vod_tender_crypto.checked_expression(
            due_expression.relation, (due_expression.j).where_clause, 'where_clause', NULL, '{}'));
    END IF;
    IF (due_expression.j).percent < 100 THEN
        IF key_columns IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
                MESSAGE = format('%s has no primary key, so no stable share of its rows can be chosen', (due_expression.j).target),
                HINT = 'Use where_clause instead of percent.';
        END IF;
        due := due || format(' AND (pg_catalog.hash_record_extended(ROW(%s), 0) & 9223372036854775807) %% 1000000 < %s::bigint',
            (SELECT string_agg(format('t.%I', k), ', ') FROM unnest(key_columns) k),
            ((due_expression.j).percent * 10000)::bigint);
    END IF;
    RETURN due;
END
$$;

-- Whether a trigger may change a row before it is written.
CREATE FUNCTION vod_tender_crypto.has_before_trigger(relation regclass, triggers text) RETURNS boolean
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT EXISTS (
        SELECT FROM pg_trigger g
        WHERE g.tgrelid = has_before_trigger.relation AND NOT g.tgisinternal
          AND g.tgenabled IN ('A', CASE has_before_trigger.triggers WHEN 'fire' THEN 'O' ELSE 'R' END::"char")
          AND g.tgtype & 1 = 1 AND g.tgtype & 2 = 2 AND g.tgtype & 16 = 16);
END;

CREATE FUNCTION vod_tender_crypto.plan_job(j vod_tender_crypto.job, relation regclass) RETURNS vod_tender_crypto.job_plan
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    plan vod_tender_crypto.job_plan;
    -- Locked, so that the name stays its own for as long as the statements are used: until the transaction ends.
    table_name text := vod_tender_crypto.lock_relation(plan_job.relation, false);
    due text := vod_tender_crypto.due_expression(plan_job.j, plan_job.relation);
    row_key text := vod_tender_crypto.key_expression(plan_job.relation);
    set_items text[];
    -- What an aad must not be made of.
    changed text[] := (plan_job.j).columns::text[] || ARRAY(SELECT jsonb_object_keys((plan_job.j).set_columns));
    -- A trigger may change what the job writes, or leaves alone.
    guarded boolean := vod_tender_crypto.has_before_trigger(plan_job.relation, (plan_job.j).triggers);
    version text;
    needs_heads boolean := (plan_job.j).operation <> 'migrate';
    col record;
    aad text;
    stored text;
    arguments text;
    long_head CONSTANT integer := 16384;
    head_items text := ''; heads text; long_heads text; new_items text := ''; fine text; kek_ids text; same text; errors text := ''; error_rows text;
BEGIN
    SELECT b.items, array_to_string(b.checks, ' AND ') INTO set_items, same
    FROM vod_tender_crypto.bookkeeping(plan_job.j, plan_job.relation) b;
    same := nullif(same, '');
    plan.table_name := table_name;
    plan.guarded := guarded;
    plan.columns := cardinality((plan_job.j).columns);
    FOR col IN
        SELECT c.column_name, c.place AS at, a.atttypid AS type, (plan_job.j).aads[c.place] AS aad,
               (plan_job.j).versions[c.place] AS version
        FROM unnest((plan_job.j).columns) WITH ORDINALITY c(column_name, place)
        JOIN pg_attribute a ON a.attrelid = plan_job.relation AND a.attname = c.column_name
        ORDER BY c.place
    LOOP
        stored := vod_tender_crypto.stored_expression(col.column_name, col.type);
        aad := 'NULL::text';
        IF col.aad IS NOT NULL THEN
            aad := vod_tender_crypto.checked_expression(plan_job.relation, col.aad, 'aad', col.column_name, changed);
        END IF;
        version := 'NULL::integer';
        IF col.version IS NOT NULL THEN
            version := vod_tender_crypto.checked_expression(plan_job.relation, col.version, 'version', col.column_name, '{}');
        END IF;
        arguments := format('%L, %s, %s, %s', vod_tender_crypto.job_task(plan_job.j, col.aad IS NOT NULL), stored, aad, version);
        head_items := head_items || format(', vod_tender_crypto.needed_head(%s) AS h%s', stored, col.at);
        -- A header may have a megabyte and a half. One that is longer than what is fetched with others (`stored_head` knows the
        -- same bound) is fetched when its row is the only one of a batch.
        heads := concat_ws(' || ', heads, format('array_agg(DISTINCT b.h%1$s) FILTER (WHERE $3 = 1 OR octet_length(b.h%1$s) <= %2$s)',
            col.at, long_head));
        long_heads := concat_ws(' OR ', long_heads, format('bool_or(octet_length(b.h%s) > %s)', col.at, long_head));
        new_items := new_items || format(', vod_tender_crypto.convert_value(%1$s) AS n%2$s, %3$s IS NULL AS z%2$s, %4$s AS a%2$s',
            arguments, col.at, stored, CASE WHEN guarded THEN aad ELSE 'NULL::text' END);
        fine := concat_ws(' AND ', fine, format('(l.z%1$s OR l.n%1$s IS NOT NULL)', col.at));
        kek_ids := concat_ws(', ', kek_ids, format('vod_tender_crypto.kek_id(b.n%s, %L)', col.at, (plan_job.j).key));
        set_items := set_items || format('%I = l.n%s', col.column_name, col.at);
        IF guarded THEN
            -- What is stored must be what was made, under the aad that it was made with.
            same := concat_ws(' AND ', same, format('%s%s IS NOT DISTINCT FROM l.n%s AND %s IS NOT DISTINCT FROM l.a%s', stored,
                CASE WHEN col.type = 'bytea'::regtype THEN '' ELSE ' COLLATE "C"' END, col.at, aad, col.at));
        END IF;
        errors := errors || format(', vod_tender_crypto.conversion_error(%s) AS e%s', arguments, col.at);
        error_rows := concat_ws(', ', error_rows, format('(%L, b.e%s)', col.column_name, col.at));
    END LOOP;

    plan.look_sql := format(
        'SELECT count(*), max(b.tid), %s, %s
         FROM (SELECT t.ctid AS tid%s FROM ONLY %s t
               WHERE t.ctid >= $1 AND t.ctid < $2 AND %s ORDER BY t.ctid LIMIT $3) b',
        CASE WHEN needs_heads THEN heads ELSE 'NULL::bytea[]' END, CASE WHEN needs_heads THEN long_heads ELSE 'false' END,
        CASE WHEN needs_heads THEN head_items ELSE '' END,
        table_name, due);
    plan.lock_sql := format(
        'SELECT array_agg(b.tid) FROM (SELECT t.ctid AS tid FROM ONLY %s t
         WHERE t.ctid >= $1 AND t.ctid <= $2 AND %s FOR NO KEY UPDATE SKIP LOCKED) b', table_name, due);
    plan.rows_sql := format(
        'SELECT array_agg(t.ctid) FROM ONLY %s t WHERE t.ctid >= $1 AND t.ctid <= $2 AND %s', table_name, due);
    -- One statement reads, converts and writes a row, so that nothing comes between: of a row that somebody changes
    -- meanwhile the xmin is another, and it is left alone.
    plan.write_sql := format(
        'WITH written AS (
             UPDATE ONLY %1$s t SET %2$s
             FROM (SELECT b.*%8$s
                   FROM (SELECT t.ctid AS tid, t.xmin AS xmin%3$s%4$s FROM ONLY %1$s t
                         WHERE t.ctid >= $1 AND t.ctid <= $2 AND ($3 IS NULL OR t.ctid = ANY ($3)) AND %5$s
                         OFFSET 0) b
                   OFFSET 0) l
             WHERE t.ctid = l.tid AND t.xmin = l.xmin AND t.ctid >= $1 AND t.ctid <= $2 AND %6$s
             RETURNING %7$s AS same)
         SELECT pg_catalog.count(*), coalesce(pg_catalog.bool_and(w.same), true) FROM written w',
        table_name, array_to_string(set_items, ', '), new_items, CASE WHEN guarded THEN ', pg_catalog.to_jsonb(t.*) AS whole' ELSE '' END,
        due, fine,
        CASE WHEN guarded THEN same || format(' AND pg_catalog.to_jsonb(t.*) - %1$L::text[] = l.whole - %1$L::text[]',
            changed || ARRAY(SELECT a.attname::text FROM pg_attribute a
                             WHERE a.attrelid = plan_job.relation AND a.attgenerated <> '')) ELSE 'true' END,
        CASE WHEN strpos((plan_job.j).set_columns::text, '{kek_id}') > 0 THEN format(', coalesce(%s) AS kek_id', kek_ids) ELSE '' END);
    plan.try_sql := format(
        'SELECT count(*) FROM (SELECT t.ctid%s FROM ONLY %s t WHERE t.ctid >= $1 AND t.ctid <= $2 AND %s OFFSET 0) l WHERE %s',
        new_items, table_name, due, fine);
    plan.fail_sql := format(
        'SELECT b.row_key, f.column_name, f.code
         FROM (SELECT %s AS row_key%s FROM ONLY %s t WHERE t.ctid >= $1 AND t.ctid <= $2 AND %s OFFSET 0) b,
              LATERAL (VALUES %s) f(column_name, code)
         WHERE f.code IS NOT NULL',
        row_key, errors, table_name, due, error_rows);
    plan.key_sql := format('SELECT %s FROM ONLY %s t WHERE t.ctid = $1', row_key, table_name);
    plan.count_sql := format(
        'SELECT count(*) FROM ONLY %s t WHERE %s AND NOT EXISTS (
             SELECT FROM vod_tender_crypto.job_error e WHERE e.job = $1 AND e.relation = %s::regclass AND e.row_key = %s)',
        table_name, due, plan_job.relation::oid, row_key);
    RETURN plan;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.plan_job(vod_tender_crypto.job, regclass) IS 'The statements that a job runs on one relation.';

SET LOCAL search_path = @extschema@, pg_temp;
