-- Appends an event (its id as `feed.event_id` has it) to a user's feed, adds to their unread total, and holds the lock of their head until the transaction ends. Call it
-- for several users in the order of their ids.
CREATE OR REPLACE FUNCTION messenger.append_to_feed(
    _user bigint, _event bigint, _unread bigint, OUT epoch bigint, OUT seq bigint
) LANGUAGE plpgsql AS $$
BEGIN
    UPDATE messenger.feed_heads AS h SET head_seq = h.head_seq + 1, unread_total = h.unread_total + _unread
    WHERE h.user_id = _user
    RETURNING h.epoch, h.head_seq INTO STRICT epoch, seq;
    INSERT INTO messenger.feed (user_id, seq, event_id) VALUES (_user, append_to_feed.seq, _event);
END
$$;
