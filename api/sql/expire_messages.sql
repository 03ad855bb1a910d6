-- Removes the texts of the next messages of a conversation, at most `_most`, that are older than `_before`: always from the oldest on, so
-- a clock that was once wrong leaves nothing behind. `expired`: how many messages it has passed; the same in each row.
--
-- Members who had some of them unread get one event for all, `message.deleted` of the newest one, with the count that is left: counts and
-- totals stay exact at the position of their feed. Others receive nothing, since they have had the messages for `MESSAGE_KEEP_DAYS`.
CREATE OR REPLACE FUNCTION messenger.expire_messages(_conversation bigint, _before timestamptz, _most integer)
RETURNS TABLE (expired bigint, message_id bigint, event_at timestamptz, receiver bigint, unread_count bigint, epoch bigint, seq bigint)
LANGUAGE plpgsql AS $$
DECLARE
    _emptied bigint;
    _to bigint;
    _unread bigint;
    _event bigint;
BEGIN
    SELECT c.emptied_number INTO _emptied FROM messenger.conversations AS c WHERE c.id = _conversation FOR NO KEY UPDATE;
    SELECT max(o.number), count(*) INTO _to, expired
    FROM (
        SELECT m.number, bool_and(m.created_at < _before) OVER (ORDER BY m.number) AS is_old
        FROM (
            SELECT m.number, m.created_at FROM messenger.messages AS m
            WHERE m.conversation_id = _conversation AND m.number > _emptied
            ORDER BY m.number LIMIT _most
        ) AS m
    ) AS o
    WHERE o.is_old;
    IF _to IS NULL THEN
        RETURN;
    END IF;

    event_at := clock_timestamp();
    -- In the order of user ids.
    FOR receiver, _unread, message_id IN
        SELECT p.user_id, count(*), (array_agg(m.id ORDER BY m.number DESC))[1]
        FROM messenger.participants AS p
        JOIN messenger.messages AS m
            ON m.conversation_id = p.conversation_id AND m.number > _emptied AND m.number <= _to AND m.deleted_at IS NULL
            AND m.sender_id <> p.user_id AND m.number > p.last_read_number AND m.number > p.joined_number
            AND m.hidden_from IS DISTINCT FROM p.user_id
        WHERE p.conversation_id = _conversation
        GROUP BY p.user_id ORDER BY p.user_id
    LOOP
        UPDATE messenger.participants AS p SET unread_count = p.unread_count - _unread
        WHERE p.conversation_id = _conversation AND p.user_id = receiver
        RETURNING p.unread_count INTO expire_messages.unread_count;
        INSERT INTO messenger.events AS e (kind, conversation_id, message_id, created_at)
        VALUES ('message.deleted', _conversation, expire_messages.message_id, event_at)
        RETURNING -e.id INTO _event;
        SELECT f.epoch, f.seq INTO epoch, seq FROM messenger.append_to_feed(receiver, _event, -_unread) AS f;
        RETURN NEXT;
    END LOOP;
    UPDATE messenger.messages AS m SET content = '', deleted_at = event_at, text_hidden_from = NULL
    WHERE m.conversation_id = _conversation AND m.number > _emptied AND m.number <= _to AND m.deleted_at IS NULL;
    UPDATE messenger.conversations AS c SET emptied_number = _to WHERE c.id = _conversation;
    IF receiver IS NULL THEN
        RETURN NEXT;
    END IF;
END
$$;
