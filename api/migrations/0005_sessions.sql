-- What a person recognises a session by, when they look which of theirs live: "Firefox on Linux". Made from the User-Agent
-- at the login. Empty for sessions from before this migration, and for those that the version before this one still makes.
ALTER TABLE sessions ADD COLUMN device text NOT NULL DEFAULT '' CHECK (length(device) <= 64);
