-- The extension's functions: arguments, volatility, and what PUBLIC may call.
CREATE EXTENSION vod_tender_crypto;
SELECT extnamespace::regnamespace, extrelocatable FROM pg_extension WHERE extname = 'vod_tender_crypto';
\pset format unaligned
SELECT p.pronamespace::regnamespace AS schema, p.proname AS name, pg_get_function_arguments(p.oid) AS arguments,
       pg_get_function_result(p.oid) AS result, p.provolatile AS volatile, p.proparallel AS parallel,
       p.proleakproof AS leakproof, has_function_privilege('public', p.oid, 'EXECUTE') AS public
FROM pg_depend d JOIN pg_proc p ON p.oid = d.objid JOIN pg_extension e ON e.oid = d.refobjid
WHERE d.classid = 'pg_proc'::regclass AND d.deptype = 'e' AND e.extname = 'vod_tender_crypto'
ORDER BY p.pronamespace::regnamespace::text COLLATE "C", p.proname COLLATE "C", pg_get_function_arguments(p.oid) COLLATE "C";
\pset format aligned
\d vod_tender_crypto.kek
SELECT c.relation::regclass, c.condition
FROM pg_extension e, unnest(e.extconfig, e.extcondition) c(relation, condition)
WHERE e.extname = 'vod_tender_crypto' ORDER BY c.relation::regclass::text;
-- Once more elsewhere; the administrative schema stays where it is.
DROP EXTENSION vod_tender_crypto;
CREATE SCHEMA crypto;
CREATE EXTENSION vod_tender_crypto SCHEMA crypto;
SELECT crypto.is_envelope('x'), to_regclass('vod_tender_crypto.kek') IS NOT NULL AS kek;
DROP EXTENSION vod_tender_crypto;
SELECT to_regnamespace('vod_tender_crypto') IS NULL AS gone;
CREATE EXTENSION vod_tender_crypto;
