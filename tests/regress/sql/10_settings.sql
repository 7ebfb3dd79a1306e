-- Every setting, with its range and who may change it.
SELECT envelope_cache_clear();
SELECT name, setting, unit, context, min_val, max_val, enumvals, short_desc FROM pg_settings
WHERE name LIKE 'vod\_tender\_crypto.%' ORDER BY name COLLATE "C";
SET vod_tender_crypto.write_format = 'nonsense';
SET vod_tender_crypto.dek_max_uses = 0;
SET vod_tender_crypto.dek_max_agee = 1;
