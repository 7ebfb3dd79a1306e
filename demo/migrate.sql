CALL vod_tender_crypto.migrate('oauth_tokens', ARRAY['access_token', 'refresh_token'],
    aad         => $$provider || '/' || channel || '/{column}'$$,
    version     => 'encryption_version',
    set_columns => '{"encryption_version": 2, "encryption_key_id": "{kek_id}"}');
