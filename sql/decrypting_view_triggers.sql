-- The trigger function of a decrypting view. It runs under the writer's own search_path, so that the table's defaults and
-- triggers do as always: nothing in it may be looked up through that, and so the aad expressions are bound in a function of
-- their own.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Code that notes what was encrypted in the application's own columns.
CREATE FUNCTION vod_tender_crypto.view_note(v vod_tender_crypto.view_plan) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    item record;
    value text;
    field text;
    code text := '';
BEGIN
    FOR item IN SELECT s.key AS column_name, s.value #>> '{}' AS value FROM jsonb_each((view_note.v).set_columns) s LOOP
        value := quote_nullable(item.value);
        FOREACH field IN ARRAY ARRAY['kek_id', 'key', 'version'] LOOP
            IF strpos(item.value, format('{%s}', field)) > 0 THEN
                value := format('pg_catalog.replace(%s, ''{%s}'', pg_catalog.jsonb_object_field_text(note, ''%s''))',
                                value, field, field);
            END IF;
        END LOOP;
        code := code || format(E'\n        NEW.%I := %s;', item.column_name, value);
    END LOOP;
    RETURN code;
END
$$;

-- Code about single columns, of the trigger function.
CREATE FUNCTION vod_tender_crypto.view_column_code(
    v vod_tender_crypto.view_plan, OUT variables text, OUT refusals text, OUT opening text, OUT sealing text, OUT unchanged text,
    OUT following text, OUT keeping text, OUT items text, OUT closing text
)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    col record;
    has_aad boolean;
    seal text;
BEGIN
    variables := ''; refusals := ''; opening := ''; sealing := ''; unchanged := ''; following := ''; keeping := '';
    items := ''; closing := '';
    FOR col IN SELECT w.*, quote_ident(w.column_name) AS name FROM vod_tender_crypto.view_column(view_column_code.v) w LOOP
        IF col.generated OR col.identity = 'a' THEN
            -- In PostgreSQL's own words.
            refusals := refusals || format($code$
    IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' AND pg_catalog.record_image_ne(ROW(NEW.%1$s), ROW(OLD.%1$s)) THEN
        RAISE EXCEPTION USING ERRCODE = 'generated_always', MESSAGE = %2$L, DETAIL = %3$L;
    END IF;$code$, col.name, format('column "%s" can only be updated to DEFAULT', col.column_name),
                format(CASE WHEN col.generated THEN 'Column "%s" is a generated column.'
                            ELSE 'Column "%s" is an identity column defined as GENERATED ALWAYS.' END, col.column_name));
        END IF;
        IF col.generated THEN
            refusals := refusals || format($code$
    IF TG_OP OPERATOR(pg_catalog.=) 'INSERT' AND NEW.%1$s IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'generated_always', MESSAGE = %2$L, DETAIL = %3$L;
    END IF;$code$, col.name, format('cannot insert a non-DEFAULT value into column "%s"', col.column_name),
                format('Column "%s" is a generated column.', col.column_name));
        ELSIF col.place IS NULL AND col.identity <> 'a' THEN
            items := items || format($code$
        IF pg_catalog.record_image_ne(ROW(NEW.%1$s), ROW(OLD.%1$s)) THEN
            items := pg_catalog.textcat(items, %2$L);
        END IF;$code$, col.name, format(', %1$s = ($1).%1$s', col.name));
        END IF;
        CONTINUE WHEN col.place IS NULL;

        has_aad := (view_column_code.v).aads[col.place] IS NOT NULL;
        variables := variables || format($code$
    given_%1$s %2$s;
    stored_%1$s %2$s;
    changed_%1$s pg_catalog.bool;
    sealed_%1$s pg_catalog.bool;$code$, col.place, col.value_type);
        opening := opening || format($code$
        stored_%1$s := cur.%2$s;
        cur.%2$s := %3$s;$code$, col.place, col.name, vod_tender_crypto.open_expression(
            view_column_code.v, col.place, format('stored_%s', col.place), format('cur_aads[%s]', col.place)));
        seal := CASE WHEN has_aad THEN format($code$
        IF aads[%s] IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'null_value_not_allowed', MESSAGE = %L,
                HINT = 'An aad is made of columns that are not NULL.';
        END IF;$code$, col.place, format('the aad of column %s of view %s is NULL', col.name, (view_column_code.v).view_name))
            ELSE '' END;
        seal := seal || format($code$
        NEW.%1$s := %2$s;$code$, col.name, vod_tender_crypto.seal_expression(
            view_column_code.v, col.place, format('given_%s', col.place), format('aads[%s]', col.place)));
        IF (view_column_code.v).set_columns <> '{}' THEN
            seal := seal || format($code$
        note := COALESCE(note, %s.envelope_info(CAST(NEW.%s AS %s)));$code$,
                (view_column_code.v).crypto, col.name, col.value_type);
            -- A note of the version is about all of the row's values.
            following := following || format($code$
    IF note IS NOT NULL AND NOT changed_%1$s AND NOT sealed_%1$s AND given_%1$s IS NOT NULL
       AND pg_catalog.int4ne(%2$s.envelope_version(stored_%1$s),
                             CAST(pg_catalog.jsonb_object_field_text(note, 'version') AS pg_catalog.int4)) THEN
        sealed_%1$s := true;%3$s
    END IF;$code$, col.place, (view_column_code.v).crypto, seal);
        END IF;
        sealing := sealing || format($code$
    given_%1$s := NEW.%2$s;
    changed_%1$s := pg_catalog.record_image_ne(ROW(NEW.%2$s), ROW(OLD.%2$s));
    sealed_%1$s := NEW.%2$s IS NOT NULL AND (changed_%1$s%4$s);
    IF sealed_%1$s THEN%3$s
    END IF;$code$, col.place, col.name, seal,
            CASE WHEN has_aad THEN format(' OR pg_catalog.record_image_ne(ROW(aads[%1$s]), ROW(cur_aads[%1$s]))', col.place)
                 ELSE '' END);
        unchanged := unchanged || format($code$
    IF NOT changed_%1$s AND NOT sealed_%1$s THEN
        NEW.%2$s := stored_%1$s;
    END IF;$code$, col.place, col.name);
        keeping := keeping || format($code$
    stored_%s := NEW.%s;$code$, col.place, col.name);
        items := items || format($code$
        IF changed_%1$s OR sealed_%1$s THEN
            items := pg_catalog.textcat(items, %2$L);
        END IF;$code$, col.place, format(', %1$s = ($1).%1$s', col.name));
        closing := closing || CASE WHEN has_aad THEN format($code$
    IF NEW.%1$s IS NOT NULL AND pg_catalog.record_image_ne(ROW(aads[%2$s]), ROW(cur_aads[%2$s])) THEN
        RAISE EXCEPTION USING ERRCODE = 'triggered_action_exception', MESSAGE = %3$L,
            DETAIL = 'The value is bound to the aad of the row as it was given, and would not open.',
            HINT = 'Give the columns that the aad is made of their values in the statement.';
    END IF;$code$, col.name, col.place,
                format('a trigger on %s changes what the aad of column %s is made of', (view_column_code.v).table_name, col.name))
            ELSE '' END || format($code$
    IF pg_catalog.record_image_eq(ROW(CAST(NEW.%1$s AS %2$s)), ROW(stored_%3$s)) THEN
        NEW.%1$s := given_%3$s;
    ELSE -- a trigger put something else in its place
        NEW.%1$s := %4$s;
    END IF;$code$, col.name, col.value_type, col.place, vod_tender_crypto.open_expression(view_column_code.v, col.place,
            format('CAST(NEW.%s AS %s)', col.name, col.value_type), format('cur_aads[%s]', col.place)));
    END LOOP;
END
$$;

-- Code that finds the row that is to be changed or deleted as it is now, and raises where it is not what the statement saw.
CREATE FUNCTION vod_tender_crypto.view_find_code(
    v vod_tender_crypto.view_plan, returned text, into_cur text, same_row text, opening text
) RETURNS text
    LANGUAGE sql STABLE
RETURN format($code$
    IF TG_OP OPERATOR(pg_catalog.=) 'DELETE' THEN
        cur := OLD;
        DELETE FROM %1$s AS t WHERE %2$s
            RETURNING t.xmin, %3$s
            INTO writer, %4$s;
        IF NOT FOUND THEN
            RETURN NULL;
        END IF;
    ELSIF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' THEN
        cur := OLD;
        FOR attempt IN 1 .. 2 LOOP
            SELECT t.xmin, %3$s
                INTO writer, %4$s
                FROM %1$s AS t WHERE %2$s FOR NO KEY UPDATE OF t;
            is_found := FOUND;
            -- Once more, for another row that came into its place meanwhile.
            EXIT WHEN is_found OR NOT pg_catalog.row_security_active(%1$L);
        END LOOP;
        IF NOT is_found THEN
            -- What row-level security lets the writer see but not change stays as it is, as in the table.
            IF pg_catalog.row_security_active(%1$L) AND EXISTS (SELECT FROM %1$s AS t WHERE %2$s) THEN
                RETURN NULL;
            END IF;
            RAISE EXCEPTION USING ERRCODE = 'serialization_failure',
                MESSAGE = 'could not serialize access due to concurrent update',
                DETAIL = 'The row is gone, or another has its key.', HINT = 'Try the transaction again.';
        END IF;
    END IF;
    IF TG_OP OPERATOR(pg_catalog.<>) 'INSERT' THEN%5$s%6$s
        IF pg_catalog.record_image_ne(cur, OLD) THEN
            -- Whoever wrote it has committed, or is this transaction, after the statement began.
            top := CAST(CAST(pg_catalog.pg_current_xact_id() AS pg_catalog.text) AS pg_catalog.int8);
            later := (CAST(CAST(writer AS pg_catalog.text) AS pg_catalog.int8) OPERATOR(pg_catalog.-) top)
                OPERATOR(pg_catalog.&) 4294967295;
            IF later OPERATOR(pg_catalog.<) 2147483648
               AND pg_catalog.pg_xact_status(CAST(CAST(top OPERATOR(pg_catalog.+) later AS pg_catalog.text) AS pg_catalog.xid8))
                   OPERATOR(pg_catalog.=) 'in progress' THEN
                RAISE EXCEPTION USING ERRCODE = 'cardinality_violation',
                    MESSAGE = %7$L,
                    HINT = 'Ensure that one row of FROM or USING matches it, and that nothing else in the statement changes it.';
            END IF;
            RAISE EXCEPTION USING ERRCODE = 'serialization_failure',
                MESSAGE = 'could not serialize access due to concurrent update', HINT = 'Try the transaction again.';
        END IF;
    END IF;
    IF TG_OP OPERATOR(pg_catalog.=) 'DELETE' THEN
        RETURN OLD;
    END IF;$code$,
    (v).table_name, same_row, returned, into_cur,
    CASE WHEN (v).aad_name IS NULL THEN '' ELSE format(E'\n        cur_aads := %s(cur);', (v).aad_name) END, opening,
    format('a row of view %s is changed twice by one statement', (v).view_name));

-- Code that writes a new row. An identity column that is not given is left to the table; where an aad is made of it, its
-- value has been taken from the sequence before.
CREATE FUNCTION vod_tender_crypto.view_insert_code(v vod_tender_crypto.view_plan, returned text, into_new text) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    statement CONSTANT text := $code$
        INSERT INTO %s AS t (%s)%s VALUES (%s)
            RETURNING %s
            INTO %s;
        is_found := FOUND;$code$;
    columns text[];
    all_columns text[];
BEGIN
    SELECT array_agg(quote_ident(c.column_name) ORDER BY c.number) FILTER (WHERE c.identity = ''),
           array_agg(quote_ident(c.column_name) ORDER BY c.number)
    INTO columns, all_columns
    FROM vod_tender_crypto.view_column(view_insert_code.v) c WHERE NOT c.generated;
    IF (view_insert_code.v).identity_column IS NULL THEN
        RETURN format(statement, (view_insert_code.v).table_name, array_to_string(columns, ', '), '',
                      'NEW.' || array_to_string(columns, ', NEW.'), returned, into_new);
    END IF;
    RETURN format(E'\n        IF is_omitted THEN%s\n        ELSE%s\n        END IF;',
        CASE WHEN (view_insert_code.v).identity_sequence IS NULL
             THEN format(statement, (view_insert_code.v).table_name, array_to_string(columns, ', '), '',
                         'NEW.' || array_to_string(columns, ', NEW.'), returned, into_new)
             ELSE format(statement, (view_insert_code.v).table_name, array_to_string(all_columns, ', '),
                         ' OVERRIDING SYSTEM VALUE', 'NEW.' || array_to_string(all_columns, ', NEW.'), returned, into_new) END,
        format(statement, (view_insert_code.v).table_name, array_to_string(all_columns, ', '), '',
               'NEW.' || array_to_string(all_columns, ', NEW.'), returned, into_new));
END
$$;

-- The body of the function behind the triggers of a view.
CREATE FUNCTION vod_tender_crypto.view_write_body(v vod_tender_crypto.view_plan) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    code record;
    returned text;
    into_new text;
    into_cur text;
    untouched text;
    same_row text;  -- as the trigger function says it
    same_row_2 text; -- as a statement that gets OLD as $2
    aads_of_new text := '';
    aads_of_stored text := '';
    identity_code text := '';
    find_code text := '';
    update_code text := '';
    note_code text := '';
BEGIN
    SELECT * INTO code FROM vod_tender_crypto.view_column_code(view_write_body.v);
    SELECT string_agg(format('t.%I', c.column_name), ', ' ORDER BY c.number),
           string_agg(format('NEW.%I', c.column_name), ', ' ORDER BY c.number),
           string_agg(format('cur.%I', c.column_name), ', ' ORDER BY c.number),
           (array_agg(format(', %1$I = t.%1$I', c.column_name) ORDER BY c.place IS NOT NULL, c.column_name IN (
                SELECT k.column_name FROM vod_tender_crypto.view_key((view_write_body.v).target, (view_write_body.v).columns) k),
                c.number) FILTER (WHERE NOT c.generated AND c.identity = ''))[1]
    INTO returned, into_new, into_cur, untouched
    FROM vod_tender_crypto.view_column(view_write_body.v) c;
    SELECT string_agg(format('t.%I %s OLD.%I%s', k.column_name, k.operator, k.column_name, k.collation_clause), ' AND '),
           string_agg(format('t.%I %s ($2).%I%s', k.column_name, k.operator, k.column_name, k.collation_clause), ' AND ')
    INTO same_row, same_row_2
    FROM vod_tender_crypto.view_key((view_write_body.v).target, (view_write_body.v).columns) k;

    IF (view_write_body.v).aad_name IS NOT NULL THEN
        aads_of_new := format($code$
    aads := %1$s(NEW);
    IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' THEN
        cur_aads := %1$s(OLD);
    END IF;$code$, (view_write_body.v).aad_name);
        aads_of_stored := format(E'\n    cur_aads := %s(NEW);', (view_write_body.v).aad_name);
    END IF;
    IF (view_write_body.v).identity_column IS NOT NULL THEN
        identity_code := format(E'\n    is_omitted := TG_OP OPERATOR(pg_catalog.=) ''INSERT'' AND NEW.%I IS NULL;',
                                (view_write_body.v).identity_column);
        IF (view_write_body.v).identity_sequence IS NOT NULL THEN
            identity_code := identity_code || format($code$
    IF is_omitted THEN
        NEW.%I := pg_catalog.nextval(%L);
    END IF;$code$, (view_write_body.v).identity_column, (view_write_body.v).identity_sequence);
        END IF;
    END IF;
    IF (view_write_body.v).set_columns <> '{}' THEN
        note_code := code.following || format($code$
    IF note IS NOT NULL THEN%s
    END IF;$code$, vod_tender_crypto.view_note(view_write_body.v));
    END IF;
    IF same_row IS NOT NULL THEN
        find_code := vod_tender_crypto.view_find_code(view_write_body.v, returned, into_cur, same_row, code.opening);
        update_code := format($code$%s
        IF items OPERATOR(pg_catalog.=) '' THEN
            items := %L; -- for the table's triggers
        END IF;
        EXECUTE pg_catalog.concat(%L, pg_catalog.substr(items, 3), %L)
            INTO %s
            USING NEW, OLD;
        GET DIAGNOSTICS written = ROW_COUNT;
        is_found := written OPERATOR(pg_catalog.>) 0;$code$, code.items, untouched,
            format('UPDATE %s AS t SET ', (view_write_body.v).table_name),
            format(' WHERE %s RETURNING %s', same_row_2, returned), into_new);
    END IF;
    RETURN format($code$
-- Made by vod_tender_crypto.create_decrypting_view(): call that again instead of changing this.
DECLARE
    cur pg_catalog.record; -- the row as it is now, and from then on OLD's likeness
    writer pg_catalog.xid;
    top pg_catalog.int8;
    later pg_catalog.int8;
    is_found pg_catalog.bool;
    is_omitted pg_catalog.bool;
    written pg_catalog.int8;
    aads pg_catalog.text[];
    cur_aads pg_catalog.text[];
    note pg_catalog.jsonb;
    items pg_catalog.text := '';%1$s
BEGIN
    IF TG_LEVEL OPERATOR(pg_catalog.=) 'STATEMENT' THEN%2$s
        IF NOT EXISTS (
            SELECT FROM pg_catalog.pg_rewrite r
            JOIN pg_catalog.pg_depend d ON d.objid OPERATOR(pg_catalog.=) r.oid
            WHERE r.ev_class OPERATOR(pg_catalog.=) TG_RELID
              AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_rewrite'::pg_catalog.regclass
              AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass
              AND d.refobjid OPERATOR(pg_catalog.=) pg_catalog.to_regclass(%3$L)
        ) THEN
            RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state', MESSAGE = %4$L,
                HINT = 'A table was renamed: call vod_tender_crypto.create_decrypting_view() again.';
        END IF;
        RETURN NULL;
    END IF;%5$s
    -- A key service may be waited for here: before the row is locked.
    IF TG_OP OPERATOR(pg_catalog.<>) 'DELETE' THEN%6$s%7$s%8$s
    END IF;%9$s%10$s%11$s%12$s
    IF TG_OP OPERATOR(pg_catalog.=) 'INSERT' THEN%13$s%14$s
    END IF;
    IF NOT is_found THEN
        RETURN NULL;
    END IF;%15$s%16$s
    RETURN NEW;
END
$code$,
        code.variables,
        CASE WHEN same_row IS NULL THEN format($code$
        IF TG_OP OPERATOR(pg_catalog.<>) 'INSERT' THEN
            RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state', MESSAGE = %L,
                DETAIL = 'Nothing is sure to name a single row of it.',
                HINT = 'Add a primary key, or a unique index on columns that are NOT NULL, and call '
                       'vod_tender_crypto.create_decrypting_view() again.';
        END IF;$code$, format('rows of view %s cannot be updated or deleted: table %s has no primary key',
                              (view_write_body.v).view_name, (view_write_body.v).table_name)) ELSE '' END,
        (view_write_body.v).table_name,
        format('view %s does not show what is called %s now', (view_write_body.v).view_name, (view_write_body.v).table_name),
        code.refusals, identity_code, aads_of_new, code.sealing, find_code, code.unchanged, note_code, code.keeping,
        vod_tender_crypto.view_insert_code(view_write_body.v, returned, into_new),
        CASE WHEN update_code = '' THEN '' ELSE E'\n    ELSE' || update_code END, aads_of_stored, code.closing);
END
$$;

SET LOCAL search_path = @extschema@, pg_temp;
