-- Moves the reader's read position to `_to`, or to the last message that they see if that is null; never back, never beyond that message.
-- Outcomes: moved, unmoved, no_conversation, no_session.
CREATE OR REPLACE FUNCTION messenger.mark_read(
    _session bigint, _reader bigint, _conversation bigint, _to bigint, _request_id text, _traceparent text
) RETURNS TABLE (
    outcome text,
    receiver bigint, epoch bigint, seq bigint, kind text, payload text, event_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    _mine messenger.participants;
    _last_read bigint;
    _unread bigint;
    _others_last bigint;
BEGIN
    IF NOT messenger.session_is_live(_session, _reader) THEN
        outcome := 'no_session';
        RETURN NEXT;
        RETURN;
    END IF;

    -- Most calls move nothing, which is visible without a lock because a read position never goes back. Only a move is worth the lock;
    -- everything is read again under it.
    FOR _attempt IN 1..2 LOOP
        SELECT p.* INTO _mine
        FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _reader;
        IF NOT FOUND THEN
            outcome := 'no_conversation';
            RETURN NEXT;
            RETURN;
        END IF;
        _last_read := least(coalesce(_to, _mine.last_message_id), _mine.last_message_id);
        IF _mine.last_message_id IS NULL OR _last_read <= coalesce(_mine.last_read_message_id, 0) THEN
            outcome := 'unmoved';
            RETURN NEXT;
            RETURN;
        END IF;
        IF _attempt = 1 THEN
            PERFORM FROM messenger.conversations AS c WHERE c.id = _conversation FOR NO KEY UPDATE;
        END IF;
    END LOOP;

    -- Counted, not subtracted: the result is right even if an earlier count was wrong.
    SELECT count(*) INTO _unread
    FROM messenger.messages AS m
    WHERE m.conversation_id = _conversation AND m.id > _last_read AND m.sender_id <> _reader
      AND m.hidden_from IS DISTINCT FROM _reader;

    UPDATE messenger.participants AS p SET last_read_message_id = _last_read, unread_count = _unread
    WHERE p.conversation_id = _conversation AND p.user_id = _reader;

    -- The other user receives an event only if the position moved within what they see.
    SELECT p.last_message_id INTO _others_last
    FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _mine.other_user_id;

    outcome := 'moved';
    FOR receiver IN
        SELECT u FROM unnest(ARRAY[_reader, _mine.other_user_id]) AS u
        WHERE u = _reader
           OR messenger.visible_last_read(_last_read, _others_last)
              > coalesce(messenger.visible_last_read(_mine.last_read_message_id, _others_last), 0)
        ORDER BY u
    LOOP
        IF receiver = _reader THEN
            kind := 'conversation.read';
            SELECT row_to_json(e)::text INTO payload FROM (
                SELECT _conversation::text AS "conversationId", _last_read::text AS "lastReadMessageId",
                       _unread AS "unreadCount"
            ) AS e;
        ELSE
            kind := 'receipt.read';
            SELECT row_to_json(e)::text INTO payload FROM (
                SELECT _conversation::text AS "conversationId", _reader::text AS "userId",
                       messenger.visible_last_read(_last_read, _others_last)::text AS "lastReadMessageId"
            ) AS e;
        END IF;
        SELECT f.epoch, f.seq, f.at INTO epoch, seq, event_at
        FROM messenger.append_to_feed(receiver, kind, NULL, payload, _request_id, _traceparent) AS f;
        RETURN NEXT;
    END LOOP;
END
$$;
