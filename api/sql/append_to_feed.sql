-- Appends one event to a user's feed and holds the lock of its head until the transaction ends. Call it for several users in the order of
-- their ids.
CREATE OR REPLACE FUNCTION messenger.append_to_feed(
    _user bigint, _kind text, _message bigint, _payload text, _request_id text, _traceparent text,
    OUT epoch bigint, OUT seq bigint, OUT at timestamptz
) LANGUAGE plpgsql AS $$
BEGIN
    UPDATE messenger.feed_heads AS h SET head_seq = h.head_seq + 1 WHERE h.user_id = _user
    RETURNING h.epoch, h.head_seq INTO STRICT epoch, seq;
    INSERT INTO messenger.feed AS f (user_id, seq, kind, message_id, payload, request_id, traceparent)
    VALUES (_user, append_to_feed.seq, _kind, _message, _payload, _request_id, _traceparent)
    RETURNING f.created_at INTO at;
END
$$;
