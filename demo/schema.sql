-- The application's table, and a table of digests by which the demo proves that no token changed:
-- it holds no token itself.
CREATE EXTENSION vod_tender_crypto;

CREATE TABLE oauth_tokens (
    provider           text NOT NULL,
    channel            text NOT NULL,
    access_token       text NOT NULL,
    refresh_token      text NOT NULL,
    expires_at         timestamptz,
    scope              text,
    updated_at         timestamptz NOT NULL DEFAULT now(),
    encryption_version integer NOT NULL,
    encryption_key_id  text,
    PRIMARY KEY (provider, channel)
);

CREATE TABLE demo_digests (
    provider       text NOT NULL,
    channel        text NOT NULL,
    access_sha256  bytea NOT NULL,
    refresh_sha256 bytea NOT NULL,
    PRIMARY KEY (provider, channel)
);

-- Until the migration is over, values that were never encrypted are read as they are.
ALTER DATABASE demo SET vod_tender_crypto.plaintext_reads = 'allow';
