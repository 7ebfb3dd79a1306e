-- Which columns hold protected values, and how. Registered by migrate(); read by jobs, verify(), and whoever decrypts.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Whether the caller may act for the owner of a table: what a job's expressions say is then no more than what the
-- owner's triggers could do.
CREATE FUNCTION vod_tender_crypto.owns(target regclass) RETURNS boolean
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM pg_class c WHERE c.oid = owns.target AND pg_has_role(c.relowner, 'USAGE'));
END;
COMMENT ON FUNCTION vod_tender_crypto.owns(regclass) IS 'Whether the caller has the rights of the table''s owner.';

-- By name and not by OID: a dump without the table must restore.
CREATE TABLE vod_tender_crypto.protected_column (
    schema_name  name NOT NULL,
    table_name   name NOT NULL,
    column_name  name NOT NULL,
    key          text,
    context      jsonb,
    aad          text,
    version      text,
    registered_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (schema_name, table_name, column_name)
);
COMMENT ON TABLE vod_tender_crypto.protected_column IS
    'Columns that hold protected values: key, context, and the SQL expressions over the row that give a value''s aad and the version the application notes for it ({column} stands for the column''s name). Holds no secret.';
-- Part of a dump: without the aad expressions a restored table could not be read.
SELECT pg_extension_config_dump('vod_tender_crypto.protected_column', '');

ALTER TABLE vod_tender_crypto.protected_column ENABLE ROW LEVEL SECURITY;
CREATE POLICY owner ON vod_tender_crypto.protected_column
    USING (vod_tender_crypto.owns(to_regclass(format('%I.%I', schema_name, table_name))));

-- A table and everything that stores rows for it: its partitions and the tables that inherit from it.
CREATE FUNCTION vod_tender_crypto.storing_relations(target regclass) RETURNS SETOF regclass
    LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH RECURSIVE tree(relation) AS (
        SELECT storing_relations.target::oid
        UNION
        SELECT i.inhrelid FROM pg_inherits i JOIN tree ON i.inhparent = tree.relation
    )
    SELECT c.oid::regclass FROM tree JOIN pg_class c ON c.oid = tree.relation WHERE c.relkind <> 'p' ORDER BY c.oid;
END;
COMMENT ON FUNCTION vod_tender_crypto.storing_relations(regclass) IS 'The table, its partitions and its heirs: what has rows of its own.';

-- Raises for what is no table with rows of its own, and for columns that cannot hold protected values.
CREATE FUNCTION vod_tender_crypto.check_columns(target regclass, columns name[], writes boolean) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    kind "char" := (SELECT c.relkind FROM pg_class c WHERE c.oid = check_columns.target);
    column_name name;
    attribute record;
BEGIN
    IF kind IS NULL OR kind NOT IN ('r', 'p') THEN
        RAISE EXCEPTION USING ERRCODE = 'wrong_object_type',
            MESSAGE = format('%s is not a table', coalesce(check_columns.target::text, 'NULL')),
            DETAIL = CASE coalesce(kind, '-') WHEN 'f' THEN 'It is a foreign table: its rows are stored elsewhere.'
                               WHEN 'v' THEN 'It is a view.' WHEN 'm' THEN 'It is a materialized view.' ELSE '' END,
            HINT = CASE kind WHEN 'f' THEN 'Run the job on the server that stores the table.' ELSE '' END;
    END IF;
    IF coalesce(cardinality(check_columns.columns), 0) = 0 OR array_position(check_columns.columns, NULL) IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'invalid_parameter_value',
            MESSAGE = format('no columns of %s are given or registered', check_columns.target),
            HINT = 'Pass columns => ARRAY[...]. Registered columns are in vod_tender_crypto.protected_column.';
    END IF;
    FOREACH column_name IN ARRAY check_columns.columns LOOP
        SELECT a.atttypid::regtype AS type, a.attgenerated <> '' AS generated,
               -- Of a partition or an heir too: its rows are named by it.
               EXISTS (SELECT FROM vod_tender_crypto.storing_relations(check_columns.target) p(relation)
                       JOIN pg_index i ON i.indrelid IN (p.relation, a.attrelid) AND i.indisprimary
                       JOIN pg_attribute k ON k.attrelid = i.indrelid AND k.attnum = ANY (i.indkey)
                       WHERE k.attname = a.attname) AS in_key
        INTO attribute
        FROM pg_attribute a
        WHERE a.attrelid = check_columns.target AND a.attname = column_name AND a.attnum > 0 AND NOT a.attisdropped;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING ERRCODE = 'undefined_column',
                MESSAGE = format('column %I of %s does not exist', column_name, check_columns.target);
        END IF;
        IF attribute.type NOT IN ('text'::regtype, 'varchar'::regtype, 'bytea'::regtype) THEN
            RAISE EXCEPTION USING ERRCODE = 'datatype_mismatch',
                MESSAGE = format('column %I of %s is of type %s', column_name, check_columns.target, attribute.type),
                HINT = 'Protected columns are of type text, varchar or bytea.';
        END IF;
        IF check_columns.writes AND (attribute.generated OR attribute.in_key) THEN
            RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
                MESSAGE = format('column %I of %s cannot be rewritten', column_name, check_columns.target),
                DETAIL = CASE WHEN attribute.generated THEN 'It is a generated column.'
                              ELSE 'It is part of the primary key.' END;
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.check_columns(regclass, name[], boolean) IS 'Raises for columns that cannot hold protected values.';

-- Raises for a table that a job or verify() cannot handle.
CREATE FUNCTION vod_tender_crypto.check_target(target regclass, columns name[], writes boolean) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    relation regclass;
    attribute record;
BEGIN
    PERFORM vod_tender_crypto.check_columns(check_target.target, check_target.columns, check_target.writes);
    FOREACH relation IN ARRAY ARRAY(SELECT vod_tender_crypto.storing_relations(check_target.target)) LOOP
        SELECT c.relkind, row_security_active(c.oid) AS secured INTO attribute
        FROM pg_class c WHERE c.oid = relation;
        IF attribute.relkind = 'f' THEN
            RAISE EXCEPTION USING ERRCODE = 'wrong_object_type',
                MESSAGE = format('partition %s is a foreign table', relation),
                DETAIL = 'Its rows are stored elsewhere.',
                HINT = 'Run the job on each local partition, and on the server that stores this one.';
        END IF;
        IF attribute.secured THEN
            RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
                MESSAGE = format('row-level security of %s would hide rows', relation),
                HINT = 'Run it as the table''s owner where row-level security is not forced, or as a role with BYPASSRLS.';
        END IF;
        IF check_target.writes AND EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = relation AND r.ev_type = '2') THEN
            RAISE EXCEPTION USING ERRCODE = 'feature_not_supported',
                MESSAGE = format('%s has a rule for UPDATE', relation),
                DETAIL = 'It would put something else in the place of what the job writes.';
        END IF;
        IF check_target.writes AND NOT vod_tender_crypto.owns(relation) THEN
            RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
                MESSAGE = format('must be owner of table %s', relation);
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION vod_tender_crypto.check_target(regclass, name[], boolean) IS 'Raises for a table or columns that a job cannot handle.';

SET LOCAL search_path = @extschema@, pg_temp;
