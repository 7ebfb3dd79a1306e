-- What a decrypting view is made of, in pieces of SQL from checked expressions and quoted names.
SET LOCAL search_path = pg_catalog, pg_temp;

CREATE TYPE vod_tender_crypto.view_plan AS (
    target       regclass,
    table_name   text,    -- this and what follows as statements name it
    view_name    text,
    crypto       text,    -- the schema of the functions on values
    aad_name     text,    -- function that gives the aads of a row; NULL where no column has one
    aad_signature text,   -- what it is, or would be
    write_name   text,    -- trigger function
    columns      name[],  -- protected ones; of each:
    aads         text[],  -- checked expressions over the row t
    keys         text[],
    contexts     jsonb[],
    set_columns  jsonb,
    identity_column   name,
    identity_sequence text  -- where an aad is made of the identity column
);

-- By what a row is found again: the columns of the primary key, or else of a unique index, and how those are compared. No
-- rows where nothing is sure to name a single row.
CREATE FUNCTION vod_tender_crypto.view_key(target regclass, columns name[]) RETURNS TABLE (
    column_name name, operator text, collation_clause text
)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH best AS (
        SELECT i.* FROM pg_index i
        JOIN pg_class c ON c.oid = i.indexrelid
        JOIN pg_am m ON m.oid = c.relam AND m.amname = 'btree'
        WHERE i.indrelid = view_key.target AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indislive
          AND i.indpred IS NULL AND i.indexprs IS NULL
          AND NOT EXISTS (SELECT FROM unnest(i.indkey) WITH ORDINALITY k(attnum, place)
                          JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                          WHERE k.place <= i.indnkeyatts AND (NOT a.attnotnull OR a.attname = ANY (view_key.columns)))
          -- The heirs of a table have rows of their own, which its index knows nothing of.
          AND NOT EXISTS (SELECT FROM pg_inherits h JOIN pg_class p ON p.oid = h.inhparent
                          WHERE h.inhparent = view_key.target AND p.relkind = 'r')
        ORDER BY i.indisprimary DESC, i.indnkeyatts, i.indexrelid LIMIT 1
    )
    SELECT a.attname, format('OPERATOR(%I.%s)', n.nspname, o.oprname),
           coalesce((SELECT format(' COLLATE %I.%I', s.nspname, l.collname)
                     FROM pg_collation l JOIN pg_namespace s ON s.oid = l.collnamespace
                     WHERE l.oid = i.indcollation[k.place - 1]), '')
    FROM best i
    CROSS JOIN unnest(i.indkey) WITH ORDINALITY k(attnum, place)
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
    JOIN pg_opclass f ON f.oid = i.indclass[k.place - 1]
    JOIN pg_amop e ON e.amopfamily = f.opcfamily AND e.amopstrategy = 3
         AND e.amoplefttype = f.opcintype AND e.amoprighttype = f.opcintype
    JOIN pg_operator o ON o.oid = e.amopopr
    JOIN pg_namespace n ON n.oid = o.oprnamespace
    WHERE k.place <= i.indnkeyatts
    ORDER BY k.place;
END;

-- The columns of the table in their order, as its view shows them. `place`: which of the protected ones it is.
CREATE FUNCTION vod_tender_crypto.view_column(v vod_tender_crypto.view_plan) RETURNS TABLE (
    number smallint, column_name name, place bigint, type text, value_type text, collation_clause text, generated boolean,
    identity "char", default_value text
)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT a.attnum, a.attname, c.place, format_type(a.atttypid, a.atttypmod),
           CASE WHEN a.atttypid = 'bytea'::regtype THEN 'pg_catalog.bytea' ELSE 'pg_catalog.text' END,
           coalesce((SELECT format(' COLLATE %I.%I', s.nspname, l.collname)
                     FROM pg_collation l JOIN pg_namespace s ON s.oid = l.collnamespace WHERE l.oid = a.attcollation), ''),
           a.attgenerated <> '', a.attidentity,
           CASE WHEN a.attgenerated = '' THEN pg_get_expr(d.adbin, d.adrelid) END
    FROM pg_attribute a
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    LEFT JOIN unnest((view_column.v).columns) WITH ORDINALITY c(column_name, place) ON c.column_name = a.attname
    WHERE a.attrelid = (view_column.v).target AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attnum;
END;

-- Gives the plaintext of a stored value (of the type text or bytea) of the protected column at `place`.
CREATE FUNCTION vod_tender_crypto.open_expression(v vod_tender_crypto.view_plan, place bigint, value text, aad text)
    RETURNS text
    LANGUAGE sql STABLE
RETURN format('%s.envelope_decrypt(%s, aad => %s, context => %s)', (v).crypto, value,
    CASE WHEN (v).aads[place] IS NULL THEN 'NULL' ELSE aad END,
    coalesce(format('%L::pg_catalog.jsonb', (v).contexts[place]), 'NULL'));

CREATE FUNCTION vod_tender_crypto.seal_expression(v vod_tender_crypto.view_plan, place bigint, value text, aad text)
    RETURNS text
    LANGUAGE sql STABLE
RETURN format('%s.envelope_encrypt(%s, key => %L, context => %s, aad => %s)', (v).crypto, value, (v).keys[place],
    coalesce(format('%L::pg_catalog.jsonb', (v).contexts[place]), 'NULL'),
    CASE WHEN (v).aads[place] IS NULL THEN 'NULL' ELSE aad END);

CREATE FUNCTION vod_tender_crypto.view_query(v vod_tender_crypto.view_plan) RETURNS text
    LANGUAGE sql STABLE
BEGIN ATOMIC
    -- Type and collation are the column's own: the view stands in the table's place.
    SELECT format('SELECT %s FROM %s t', string_agg(
        CASE WHEN c.place IS NULL THEN format('t.%I', c.column_name)
             ELSE format('CAST(%s AS %s)%s AS %I',
                 vod_tender_crypto.open_expression(view_query.v, c.place, format('CAST(t.%I AS %s)', c.column_name, c.value_type),
                                                   (view_query.v).aads[c.place]),
                 c.type, c.collation_clause, c.column_name)
        END, ', ' ORDER BY c.number), (view_query.v).table_name)
    FROM vod_tender_crypto.view_column(view_query.v) c;
END;

-- Whether a function was made for the triggers of a decrypting view.
CREATE FUNCTION vod_tender_crypto.is_view_function(candidate oid) RETURNS boolean
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM pg_proc p WHERE p.oid = is_view_function.candidate AND p.prorettype = 'trigger'::regtype
                   AND p.prosrc LIKE E'\n-- Made by vod\\_tender\\_crypto.create\\_decrypting\\_view()%');
END;

-- The trigger function of a decrypting view; NULL for every other relation. Whoever owns a view can give it a trigger of
-- this name, so the function must belong to the same owner.
CREATE FUNCTION vod_tender_crypto.view_function(relation regclass) RETURNS regprocedure
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT p.oid::regprocedure
    FROM pg_class c JOIN pg_trigger g ON g.tgrelid = c.oid JOIN pg_proc p ON p.oid = g.tgfoid
    WHERE c.oid = view_function.relation AND c.relkind = 'v' AND g.tgname = 'vod_tender_crypto_write'
      AND p.pronamespace = c.relnamespace AND p.proowner = c.relowner AND vod_tender_crypto.is_view_function(p.oid);
END;

-- The name of a trigger function for a view of this name: at most 63 bytes, and not the same for another view.
CREATE FUNCTION vod_tender_crypto.view_function_name(view_name name) RETURNS name
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT CASE WHEN octet_length(view_function_name.view_name::text) <= 57 THEN view_function_name.view_name || '_write'
                ELSE (SELECT max(left(view_function_name.view_name::text, n)) FROM generate_series(1, 48) n
                      WHERE octet_length(left(view_function_name.view_name::text, n)) <= 48)
                     || '_' || left(md5(view_function_name.view_name::text), 8) || '_write' END;
END;

-- Raises where the view's own name or its functions' is something else's.
CREATE FUNCTION vod_tender_crypto.check_view_name(target regclass, schema_name name, view_name name) RETURNS name
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    existing regclass := to_regclass(format('%I.%I', check_view_name.schema_name, check_view_name.view_name));
    owner oid := (SELECT c.relowner FROM pg_class c WHERE c.oid = check_view_name.target);
    function_name name;
BEGIN
    IF existing IS NOT NULL THEN
        -- Whoever owns it could have given it triggers, or a function that looks like ours.
        IF owner <> (SELECT c.relowner FROM pg_class c WHERE c.oid = existing) THEN
            RAISE EXCEPTION USING ERRCODE = 'duplicate_table',
                MESSAGE = format('relation %s already exists', existing),
                DETAIL = format('It does not belong to the owner of %s.', check_view_name.target);
        END IF;
        SELECT p.proname INTO function_name FROM pg_proc p
        WHERE p.oid = vod_tender_crypto.view_function(existing)
          AND EXISTS (SELECT FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                      WHERE r.ev_class = existing AND d.refclassid = 'pg_class'::regclass
                        AND d.refobjid = check_view_name.target);
        IF NOT FOUND THEN
            RAISE EXCEPTION USING ERRCODE = 'duplicate_table',
                MESSAGE = format('relation %s already exists', existing),
                DETAIL = format('It is no decrypting view of %s.', check_view_name.target);
        END IF;
        RETURN function_name;
    END IF;
    function_name := vod_tender_crypto.view_function_name(check_view_name.view_name);
    -- One that a view left behind, when it was dropped with its table, may be used again.
    IF EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
               WHERE n.nspname = check_view_name.schema_name AND p.proname = function_name AND p.pronargs = 0
                 AND NOT (p.proowner = owner AND vod_tender_crypto.is_view_function(p.oid)
                          AND NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgfoid = p.oid))) THEN
        RAISE EXCEPTION USING ERRCODE = 'duplicate_function',
            MESSAGE = format('function %I.%I() already exists', check_view_name.schema_name, function_name),
            HINT = 'Choose another name for the view.';
    END IF;
    RETURN function_name;
END
$$;

-- Whether an expression that is known to be a usable aad is made of a column.
CREATE FUNCTION vod_tender_crypto.aad_uses(relation regclass, aad text, column_name name, used name) RETURNS boolean
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM vod_tender_crypto.row_expression(aad_uses.relation, aad_uses.aad, 'aad', aad_uses.column_name,
                                             ARRAY[aad_uses.used]::text[]);
    RETURN false;
EXCEPTION WHEN invalid_object_definition THEN
    RETURN true;
END
$$;

-- What a view's set_columns cannot be.
CREATE FUNCTION vod_tender_crypto.check_view_set_columns(v vod_tender_crypto.view_plan) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    j vod_tender_crypto.job;
    items text[];
BEGIN
    IF jsonb_typeof((v).set_columns) <> 'object' THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = 'set_columns is not a JSON object',
            HINT = 'For example: {"encryption_version": 2, "encryption_key_id": "{kek_id}"}.';
    END IF;
    j.columns := (v).columns;
    j.set_columns := replace((v).set_columns::text, '{version}', '2')::jsonb;
    items := (SELECT b.items FROM vod_tender_crypto.bookkeeping(j, (v).target) b);
    IF cardinality(items) > 0 THEN
        -- Planned with nothing to do: what PostgreSQL does not accept, it says now.
        EXECUTE format('EXPLAIN UPDATE ONLY %s t SET %s FROM (SELECT NULL::text AS kek_id) l WHERE false', (v).table_name,
                       array_to_string(items, ', '));
    END IF;
END
$$;

-- Checks everything that can be checked, and registers the columns.
CREATE FUNCTION vod_tender_crypto.plan_view(
    target regclass, view_name name, columns name[], aad text, key text, context jsonb, set_columns jsonb
) RETURNS vod_tender_crypto.view_plan
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    v vod_tender_crypto.view_plan;
    j vod_tender_crypto.job;
    col record;
    schema_name name := (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                         WHERE c.oid = plan_view.target);
    function_name name;
    changed text[];
    aads text[];
    other_binding boolean;
BEGIN
    IF NOT vod_tender_crypto.owns(plan_view.target) THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege', MESSAGE = format('must be owner of table %s', plan_view.target);
    END IF;
    v.target := plan_view.target;
    SELECT array_agg(r.column_name), array_agg(coalesce(plan_view.aad, r.aad)), array_agg(coalesce(plan_view.key, r.key)),
           array_agg(nullif(coalesce(plan_view.context, r.context), '{}'))
    INTO v.columns, aads, v.keys, v.contexts
    FROM vod_tender_crypto.registered(v.target, plan_view.columns) r;
    PERFORM vod_tender_crypto.check_columns(v.target, v.columns, true);
    IF cardinality(v.columns) <> (SELECT count(DISTINCT c) FROM unnest(v.columns) c) THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'a column is given twice';
    END IF;
    IF EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = v.target) THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported', MESSAGE = format('%s has a rule', v.target),
            DETAIL = 'It would put something else in the place of what is written through the view.';
    END IF;
    v.table_name := vod_tender_crypto.lock_relation(v.target, false);
    function_name := vod_tender_crypto.check_view_name(v.target, schema_name, plan_view.view_name);
    v.view_name := format('%I.%I', schema_name, plan_view.view_name);
    v.write_name := format('%I.%I', schema_name, function_name);
    v.aad_signature := format('%I.%I(%s)', schema_name, left(function_name, -6) || '_aad', v.view_name);
    v.crypto := quote_ident(vod_tender_crypto.extension_schema());
    -- Those that the view has already, where none are given.
    v.set_columns := coalesce(plan_view.set_columns, CASE WHEN to_regclass(v.view_name) IS NOT NULL THEN substring(obj_description(
        to_regprocedure(v.write_name || '()'), 'pg_proc') FROM '^Internal\. set_columns (.*)$')::jsonb END, '{}');
    PERFORM vod_tender_crypto.check_view_set_columns(v);

    -- What identifies a value must stay as it is when the view or a job writes another.
    changed := v.columns::text[] || ARRAY(SELECT jsonb_object_keys(v.set_columns))
        || ARRAY(SELECT r.column_name::text FROM vod_tender_crypto.registered(v.target, NULL) r);
    v.aads := ARRAY(SELECT vod_tender_crypto.checked_expression(v.target, a.aad, 'aad', a.column_name, changed)
                    FROM unnest(v.columns, aads) WITH ORDINALITY a(column_name, aad, place) ORDER BY a.place);
    IF EXISTS (SELECT FROM unnest(v.aads) a WHERE a IS NOT NULL) THEN
        v.aad_name := format('%I.%I', schema_name, left(function_name, -6) || '_aad');
    END IF;
    FOR col IN SELECT r.column_name, r.aad FROM vod_tender_crypto.registered(v.target, NULL) r
               WHERE r.aad IS NOT NULL AND NOT r.column_name = ANY (v.columns) LOOP
        PERFORM vod_tender_crypto.checked_expression(v.target, col.aad, 'aad', col.column_name, changed);
    END LOOP;

    FOR col IN SELECT r.*, w.aad AS new_aad, w.key AS new_key, w.context AS new_context
               FROM unnest(v.columns, aads, v.keys, v.contexts) w(column_name, aad, key, context)
               JOIN vod_tender_crypto.registered(v.target, v.columns) r USING (column_name) LOOP
        IF EXISTS (SELECT FROM jsonb_each(CASE coalesce(jsonb_typeof(col.new_context), '') WHEN '' THEN '{}'
                                          WHEN 'object' THEN col.new_context ELSE '{"": 0}' END) p
                   WHERE jsonb_typeof(p.value) <> 'string') THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value', MESSAGE = 'a context is a JSON object of strings',
                HINT = 'For example: {"tenant": "a"}.';
        END IF;
        IF col.new_key IS NOT NULL THEN
            -- Raises where there is no such key, or it may not encrypt.
            PERFORM vod_tender_crypto.job_key('migrate', col.new_key, col.new_context);
        END IF;
        IF col.is_registered AND coalesce(col.context, '{}') <> coalesce(col.new_context, '{}') THEN
            RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
                MESSAGE = format('column %I of %s is registered with another context', col.column_name, v.target),
                DETAIL = 'Values that were written with the registered one would not open with the new one.',
                HINT = 'Omit context to use the registered one.';
        END IF;
        IF NOT col.is_registered THEN
            SELECT bool_or(CASE WHEN col.new_aad IS NULL THEN b.bound > 0 ELSE b.unbound > 0 END) INTO other_binding
            FROM vod_tender_crypto.storing_relations(v.target) s(relation)
            JOIN pg_attribute a ON a.attrelid = s.relation AND a.attname = col.column_name AND NOT a.attisdropped
            CROSS JOIN LATERAL vod_tender_crypto.count_bound(s.relation, a.attnum) b
            WHERE NOT row_security_active(s.relation);
            IF other_binding THEN
                RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
                    MESSAGE = format('column %I of %s holds values that are %s to an aad', col.column_name, v.target,
                                     CASE WHEN col.new_aad IS NULL THEN 'bound' ELSE 'not bound' END),
                    HINT = CASE WHEN col.new_aad IS NULL THEN 'Pass the aad that they were written with. Where a column was '
                                || 'renamed, correct its row of vod_tender_crypto.protected_column.' ELSE 'Omit aad.' END;
            END IF;
        END IF;
        IF NOT col.is_registered OR col.aad IS DISTINCT FROM col.new_aad THEN
            IF col.is_registered THEN
                -- Looks for values that are bound to the other aad: it must see all rows.
                PERFORM vod_tender_crypto.check_target(v.target, v.columns, true);
            END IF;
            j.target := v.target;
            j.check_wraps := false;
            j.columns := ARRAY[col.column_name];
            j.aads := ARRAY[col.new_aad];
            j.versions := ARRAY[NULL::text];
            j.key := col.new_key;
            j.context := col.new_context;
            PERFORM vod_tender_crypto.register_columns(j);
        END IF;
    END LOOP;

    SELECT min(a.attname) INTO v.identity_column FROM pg_attribute a
    WHERE a.attrelid = v.target AND a.attidentity <> '' AND NOT a.attisdropped HAVING count(*) <= 1;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'feature_not_supported', MESSAGE = format('%s has several identity columns', v.target);
    END IF;
    IF EXISTS (SELECT FROM unnest(v.columns, aads) a(column_name, aad)
               WHERE a.aad IS NOT NULL AND vod_tender_crypto.aad_uses(v.target, a.aad, a.column_name, v.identity_column)) THEN
        v.identity_sequence := pg_get_serial_sequence(v.table_name, v.identity_column);
    END IF;
    RETURN v;
END
$$;

SET LOCAL search_path = @extschema@, pg_temp;
