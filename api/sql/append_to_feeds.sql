-- Appends events (their ids as `feed.event_id` has them) to feeds and adds to unread totals: the nth event to the feed of the nth user. The
-- users ascend; one who gets several events is there several times in a row. Takes the locks of their heads in this order, and holds them
-- until the transaction ends. A user without a head, who was erased meanwhile, is P0002: the statement is repeated.
CREATE OR REPLACE FUNCTION messenger.append_to_feeds(
    _users bigint[], _events bigint[], _unread bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
BEGIN
    IF cardinality(_users) <= 8 THEN
        FOR _nth IN 1..cardinality(_users) LOOP
            UPDATE messenger.feed_heads AS h
            SET head_seq = h.head_seq + 1, unread_total = h.unread_total + _unread[_nth]
            WHERE h.user_id = _users[_nth]
            RETURNING epochs || h.epoch, seqs || h.head_seq INTO STRICT epochs, seqs;
        END LOOP;
    ELSE
        -- For many a statement each is slower, and so is an array that grows one by one.
        PERFORM FROM messenger.feed_heads AS h WHERE h.user_id = ANY (_users) ORDER BY h.user_id FOR NO KEY UPDATE;
        WITH given AS (
            SELECT g.user_id, g.unread, g.nth, row_number() OVER (PARTITION BY g.user_id ORDER BY g.nth) AS place
            FROM unnest(_users, _unread) WITH ORDINALITY AS g (user_id, unread, nth)
        ), moved AS (
            UPDATE messenger.feed_heads AS h SET head_seq = h.head_seq + n.events, unread_total = h.unread_total + n.unread
            FROM (SELECT g.user_id, count(*) AS events, sum(g.unread)::bigint AS unread FROM given AS g GROUP BY g.user_id) AS n
            WHERE h.user_id = n.user_id
            RETURNING h.user_id, h.epoch, h.head_seq - n.events AS before
        )
        SELECT array_agg(m.epoch ORDER BY g.nth), array_agg(m.before + g.place ORDER BY g.nth) INTO epochs, seqs
        FROM given AS g LEFT JOIN moved AS m USING (user_id);
        IF array_position(seqs, NULL) IS NOT NULL THEN
            RAISE EXCEPTION 'a receiver has no head' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    INSERT INTO messenger.feed (user_id, seq, event_id)
    SELECT a.user_id, a.seq, a.event_id FROM unnest(_users, seqs, _events) AS a (user_id, seq, event_id);
END
$$;
