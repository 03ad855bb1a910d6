-- Appends events (their ids as `feed.event_id` has them) to feeds and adds to unread totals: the nth event to the feed of the nth user. The
-- users ascend; one who gets several events is there several times in a row. Holds the locks of their heads until the transaction ends.
CREATE OR REPLACE FUNCTION messenger.append_to_feeds(
    _users bigint[], _events bigint[], _unread bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
BEGIN
    FOR _nth IN 1..cardinality(_users) LOOP
        UPDATE messenger.feed_heads AS h
        SET head_seq = h.head_seq + 1, unread_total = h.unread_total + _unread[_nth]
        WHERE h.user_id = _users[_nth]
        RETURNING epochs || h.epoch, seqs || h.head_seq INTO STRICT epochs, seqs;
    END LOOP;
    INSERT INTO messenger.feed (user_id, seq, event_id)
    SELECT a.user_id, a.seq, a.event_id FROM unnest(_users, seqs, _events) AS a (user_id, seq, event_id);
END
$$;
