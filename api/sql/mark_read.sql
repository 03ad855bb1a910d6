-- Moves the reader's read position to the message `_to`, or to the last message that they see if that is null; never back, never beyond
-- that message. Outcomes: moved, unmoved, no_conversation, no_session.
--
-- Two events: `conversation.read` for the reader, with the count that is left, and `receipt.read` for the others, where the position moved
-- within what they see. Groups of more than `_receipts_up_to` members get no receipts.
CREATE OR REPLACE FUNCTION messenger.mark_read(
    _session bigint, _reader bigint, _conversation bigint, _to bigint, _receipts_up_to integer, _request_id text, _traceparent text
) RETURNS TABLE (
    outcome text, kind text, message_id bigint, unread_count bigint, event_at timestamptz,
    receivers bigint[], epochs bigint[], seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _mine messenger.participants;
    _to_id bigint;
    _to_number bigint;
    _unread bigint;
    _visible bigint;
    _others bigint[];
    _receiver bigint;
    _read_event bigint;
    _receipt_event bigint;
    _read_at timestamptz;
    _receipt_at timestamptz;
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
        _to_id := _mine.last_message_id;
        _to_number := _mine.last_number;
        IF _to IS NOT NULL THEN
            SELECT m.id, m.number INTO _to_id, _to_number
            FROM messenger.messages AS m
            WHERE m.id = _to AND m.conversation_id = _conversation
              AND m.number > _mine.joined_number AND m.number <= _mine.last_number
              AND m.hidden_from IS DISTINCT FROM _reader;
        END IF;
        IF _to_number IS NULL OR _to_number <= _mine.last_read_number THEN
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
    WHERE m.conversation_id = _conversation AND m.number > _to_number AND m.sender_id <> _reader
      AND m.hidden_from IS DISTINCT FROM _reader AND m.deleted_at IS NULL;

    UPDATE messenger.participants AS p
    SET last_read_message_id = _to_id, last_read_number = _to_number, unread_count = _unread
    WHERE p.conversation_id = _conversation AND p.user_id = _reader;

    IF _mine.other_user_id IS NOT NULL THEN
        -- Without the other user if the position did not move within what they see, or they block the reader.
        SELECT ARRAY[p.user_id], messenger.visible_last_read(_to_id, _to_number, p.last_message_id, p.last_number)
        INTO _others, _visible
        FROM messenger.participants AS p
        WHERE p.conversation_id = _conversation AND p.user_id = _mine.other_user_id
          AND p.last_number IS NOT NULL AND least(_to_number, p.last_number) > _mine.last_read_number
          AND NOT EXISTS (SELECT FROM messenger.blocks AS b WHERE b.blocker_id = p.user_id AND b.blocked_id = _reader);
    ELSE
        _visible := _to_id;
        -- Without those who have joined after that message.
        SELECT array_agg(p.user_id) INTO _others
        FROM messenger.conversations AS c JOIN messenger.participants AS p ON p.conversation_id = c.id
        WHERE c.id = _conversation AND c.participant_count <= _receipts_up_to AND p.user_id <> _reader
          AND p.joined_number < _to_number;
    END IF;

    INSERT INTO messenger.events AS e (kind, conversation_id, message_id, count, request_id, traceparent)
    VALUES ('conversation.read', _conversation, _to_id, _unread, _request_id, _traceparent)
    RETURNING -e.id, e.created_at INTO _read_event, _read_at;
    IF _others IS NOT NULL THEN
        INSERT INTO messenger.events AS e (kind, conversation_id, message_id, user_id, request_id, traceparent)
        VALUES ('receipt.read', _conversation, _visible, _reader, _request_id, _traceparent)
        RETURNING -e.id, e.created_at INTO _receipt_event, _receipt_at;
    END IF;
    outcome := 'moved';
    FOR _receiver IN SELECT u FROM unnest(_others || _reader) AS u ORDER BY u LOOP
        IF _receiver = _reader THEN
            SELECT 'conversation.read', _to_id, _unread, _read_at, ARRAY[_reader], ARRAY[f.epoch], ARRAY[f.seq]
            INTO kind, message_id, unread_count, event_at, receivers, epochs, seqs
            FROM messenger.append_to_feed(_reader, _read_event, _unread - _mine.unread_count) AS f;
        ELSE
            SELECT 'receipt.read', _visible, NULL, _receipt_at, ARRAY[_receiver], ARRAY[f.epoch], ARRAY[f.seq]
            INTO kind, message_id, unread_count, event_at, receivers, epochs, seqs
            FROM messenger.append_to_feed(_receiver, _receipt_event, 0) AS f;
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;
