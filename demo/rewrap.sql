CALL vod_tender_crypto.rewrap_table('oauth_tokens', key => :key, set_columns => '{"encryption_key_id": "{kek_id}"}');
