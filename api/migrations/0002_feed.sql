-- The feed: what each user is told, numbered 1, 2, 3, … per user without holes.
--
-- A Postgres sequence would leave a hole at every rollback, and would number by the time of the call and not of the commit:
-- a reader could pass a number that is not there yet. So the number is a column. Whoever appends holds the row's lock until
-- commit; numbers follow commits, and a rollback gives its number back.

-- Small rows, updated with every event: room is left in each page so that updates stay in it (HOT) and touch no index.
CREATE TABLE feed_heads (
    user_id  bigint PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    -- The name of this feed. Random, so that a cursor from another history (a database restored to an earlier point, whose
    -- epochs are drawn anew) is seen to be one.
    epoch    bigint NOT NULL,
    head_seq bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);

-- 60 random bits: the first half of a random UUID, of which four bits are fixed.
CREATE FUNCTION random_epoch() RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT ('x' || left(replace(gen_random_uuid()::text, '-', ''), 16))::bit(64)::bigint
$$;

-- A trigger, so that users made by plain SQL (a seed, an import) have a feed too.
CREATE FUNCTION give_user_a_feed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO feed_heads (user_id, epoch) VALUES (NEW.id, random_epoch());
    RETURN NULL;
END
$$;

CREATE TRIGGER users_have_a_feed AFTER INSERT ON users FOR EACH ROW EXECUTE FUNCTION give_user_a_feed();

-- One row per event and receiver. `payload` is the complete line of JSON as this receiver sees it: text and not jsonb,
-- because it is never looked into and goes out byte by byte. No foreign keys: the head row, updated in the same function,
-- proves the user, and the largest table of all shall be appended to and cut off at its old end, and nothing else.
CREATE TABLE feed (
    user_id     bigint      NOT NULL,
    seq         bigint      NOT NULL,
    kind        text        NOT NULL,
    message_id  bigint,
    payload     text        NOT NULL,
    request_id  text,
    traceparent text,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (user_id, seq)
);
