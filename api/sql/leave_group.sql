-- Takes a member out of a group whose row is locked. `participant.left` is for all, who left included. If no owner is left, the
-- longest-standing member becomes one (`successor`), and `participant.updated` is for those who stay; `kinds` tells which one went to the
-- nth receiver. A group without members stays only until the pruner deletes it.
CREATE OR REPLACE FUNCTION messenger.leave_group(
    _conversation bigint, _who bigint, _request_id text, _traceparent text,
    OUT successor bigint, OUT event_at timestamptz, OUT receivers bigint[], OUT kinds text[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _unread bigint;
    _left bigint;
    _updated bigint;
BEGIN
    event_at := clock_timestamp();
    UPDATE messenger.conversations AS c SET participant_count = c.participant_count - 1 WHERE c.id = _conversation;
    -- For readers of the list of members who have come as far as this one.
    WITH gone AS (
        DELETE FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _who RETURNING p.*
    ), formerly AS (
        INSERT INTO messenger.former_participants (conversation_id, user_id, joined_at)
        SELECT gone.conversation_id, gone.user_id, gone.joined_at FROM gone
        ON CONFLICT ON CONSTRAINT former_participants_pkey DO UPDATE SET joined_at = excluded.joined_at
    )
    SELECT gone.unread_count INTO STRICT _unread FROM gone;
    INSERT INTO messenger.events AS e (kind, conversation_id, user_id, request_id, traceparent, created_at)
    VALUES ('participant.left', _conversation, _who, _request_id, _traceparent, event_at)
    RETURNING -e.id INTO _left;
    IF NOT EXISTS (SELECT FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND p.is_owner) THEN
        UPDATE messenger.participants AS p SET is_owner = true
        WHERE p.conversation_id = _conversation AND p.user_id = (
            SELECT oldest.user_id FROM messenger.participants AS oldest WHERE oldest.conversation_id = _conversation
            ORDER BY oldest.joined_at, oldest.user_id LIMIT 1
        )
        RETURNING p.user_id INTO successor;
        IF FOUND THEN
            INSERT INTO messenger.events AS e (kind, conversation_id, user_id, is_owner, request_id, traceparent, created_at)
            VALUES ('participant.updated', _conversation, successor, true, _request_id, _traceparent, event_at)
            RETURNING -e.id INTO _updated;
        END IF;
    END IF;
    SELECT a.receivers, a.kinds, f.epochs, f.seqs INTO receivers, kinds, epochs, seqs
    FROM (
        SELECT array_agg(t.receiver ORDER BY t.receiver, t.nth) AS receivers, array_agg(t.kind ORDER BY t.receiver, t.nth) AS kinds,
               array_agg(t.event ORDER BY t.receiver, t.nth) AS events, array_agg(t.unread ORDER BY t.receiver, t.nth) AS unread
        FROM (
            SELECT _who, 1, 'participant.left', _left, -_unread
            UNION ALL
            SELECT p.user_id, 1, 'participant.left', _left, 0 FROM messenger.participants AS p WHERE p.conversation_id = _conversation
            UNION ALL
            SELECT p.user_id, 2, 'participant.updated', _updated, 0
            FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND _updated IS NOT NULL
        ) AS t (receiver, nth, kind, event, unread)
    ) AS a CROSS JOIN LATERAL messenger.append_to_feeds(a.receivers, a.events, a.unread) AS f;
END
$$;
