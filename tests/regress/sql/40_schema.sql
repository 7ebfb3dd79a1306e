-- In a schema of one's choice, and gone without a trace.
CREATE DATABASE regress_vtc_schema;
\c regress_vtc_schema
CREATE SCHEMA "Odd schema";
CREATE EXTENSION vod_tender_crypto SCHEMA "Odd schema";

-- The functions on values follow; the administrative schema is fixed.
SELECT p.pronamespace::regnamespace AS schema, count(*)
FROM pg_proc p
JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'
JOIN pg_extension e ON e.oid = d.refobjid
WHERE e.extname = 'vod_tender_crypto' GROUP BY 1 ORDER BY 1::text;

-- The grants follow as well.
CREATE ROLE regress_vtc_nobody;
SELECT has_function_privilege('regress_vtc_nobody', '"Odd schema".envelope_decrypt(text, text, jsonb, integer)', 'EXECUTE') AS decrypts,
       has_function_privilege('regress_vtc_nobody', '"Odd schema".is_envelope(text)', 'EXECUTE') AS looks;
DROP ROLE regress_vtc_nobody;

-- The functions need nobody's search_path.
\getenv keys VOD_TENDER_KEYS
SELECT vod_tender_crypto.add_key('one', 'local://' || :'keys' || '/one.b64');
SET vod_tender_crypto.default_key = 'one';
SET search_path = '';
SELECT "Odd schema".envelope_decrypt("Odd schema".envelope_encrypt('secret'));
RESET search_path;

-- Not relocatable, and only for superusers to create.
\set VERBOSITY sqlstate
ALTER EXTENSION vod_tender_crypto SET SCHEMA public;
\set VERBOSITY default
DROP EXTENSION vod_tender_crypto;
CREATE ROLE regress_vtc_owner;
GRANT CREATE ON DATABASE regress_vtc_schema TO regress_vtc_owner;
SET ROLE regress_vtc_owner;
\set VERBOSITY sqlstate
CREATE EXTENSION vod_tender_crypto;
\set VERBOSITY default
RESET ROLE;

-- Nothing is left, and it can be created again.
SELECT count(*) FROM pg_proc WHERE probin LIKE '%vod_tender_crypto%';
SELECT to_regclass('vod_tender_crypto.kek') IS NULL AS table_gone, to_regnamespace('vod_tender_crypto') IS NULL AS schema_gone;
CREATE EXTENSION vod_tender_crypto;
SELECT count(*) FROM vod_tender_crypto.kek;
-- A column that needs the functions holds the extension.
CREATE TABLE tokens (token text CHECK (is_envelope(token)));
DROP EXTENSION vod_tender_crypto;

\c contrib_regression
DROP DATABASE regress_vtc_schema;
DROP ROLE regress_vtc_owner;
