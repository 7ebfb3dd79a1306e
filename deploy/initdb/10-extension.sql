-- Run once, when the data directory is made.
CREATE EXTENSION vod_tender_crypto;
