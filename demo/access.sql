SELECT vod_tender_crypto.create_decrypting_view('oauth_tokens', 'tokens',
    set_columns => '{"encryption_version": "{version}", "encryption_key_id": "{kek_id}"}', readers => '{demo_app,demo_analyst}');
GRANT INSERT, UPDATE, DELETE ON tokens, oauth_tokens TO demo_app;
SELECT vod_tender_crypto.grant_key(:key, 'demo_app', ARRAY['encrypt', 'decrypt']);
