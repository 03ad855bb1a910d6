-- Posts a message. Outcomes: posted, replayed, key_conflict, no_conversation, no_session.
--
-- Like every command it is called by one statement that commits itself: one round trip, and no client that is slow or gone can hold its
-- locks. It runs in READ COMMITTED, so what it reads after it took a lock is the newest there is. Locks are taken in one order, to
-- avoid deadlocks: the conversation's row, then feed heads by user id.
--
-- Every command returns rows of one form: `outcome`, what it is about, and one appended event, if any, to publish after the commit. There
-- is at least one row.
--
-- A message that is hidden from the receiver changes nothing of theirs: no event, no last message, no count. Their read position stays
-- below it, because nothing that they see can move it there.
CREATE OR REPLACE FUNCTION messenger.post_message(
    _session bigint, _sender bigint, _conversation bigint, _content text, _key text, _request_id text, _traceparent text
) RETURNS TABLE (
    outcome text, message_id bigint, created_at timestamptz,
    receiver bigint, epoch bigint, seq bigint, kind text, payload text, event_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    _other bigint;
    _hidden_from bigint;
    _earlier messenger.messages;
BEGIN
    IF NOT messenger.session_is_live(_session, _sender) THEN
        outcome := 'no_session';
        RETURN NEXT;
        RETURN;
    END IF;

    -- Before any lock, and for a repeat in any conversation.
    IF _key IS NOT NULL THEN
        SELECT m.* INTO _earlier FROM messenger.messages AS m WHERE m.sender_id = _sender AND m.idempotency_key = _key;
    END IF;

    IF _earlier.id IS NULL THEN
        SELECT p.other_user_id INTO _other
        FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _sender;
        IF NOT FOUND THEN
            outcome := 'no_conversation';
            RETURN NEXT;
            RETURN;
        END IF;

        -- From here on this is the only writer of the conversation, so the message's id is its newest.
        PERFORM FROM messenger.conversations AS c WHERE c.id = _conversation FOR NO KEY UPDATE;

        -- A second copy of this send may have arrived meanwhile: one in this conversation has committed; for one in another conversation
        -- the index makes us wait. Either way nothing is inserted and the earlier row can be read.
        --
        -- Blocks are read after the wait for the lock, so a block that was confirmed before this send is seen.
        INSERT INTO messenger.messages AS m (conversation_id, sender_id, content, idempotency_key, hidden_from)
        VALUES (_conversation, _sender, _content, _key,
                (SELECT b.blocker_id FROM messenger.blocks AS b WHERE b.blocker_id = _other AND b.blocked_id = _sender))
        ON CONFLICT (sender_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING m.id, m.created_at, m.hidden_from INTO message_id, created_at, _hidden_from;
        IF NOT FOUND THEN
            SELECT m.* INTO STRICT _earlier
            FROM messenger.messages AS m WHERE m.sender_id = _sender AND m.idempotency_key = _key;
        END IF;
    END IF;

    IF _earlier.id IS NOT NULL THEN
        IF _earlier.conversation_id = _conversation AND _earlier.content = _content THEN
            outcome := 'replayed';
            message_id := _earlier.id;
            created_at := _earlier.created_at;
        ELSE
            outcome := 'key_conflict';
        END IF;
        RETURN NEXT;
        RETURN;
    END IF;

    UPDATE messenger.participants AS p
    SET last_message_id = post_message.message_id,
        unread_count = p.unread_count + (p.user_id <> _sender)::int
    WHERE p.conversation_id = _conversation AND p.user_id IS DISTINCT FROM _hidden_from;

    outcome := 'posted';
    FOR receiver IN SELECT u FROM unnest(ARRAY[_sender, _other]) AS u WHERE u IS DISTINCT FROM _hidden_from ORDER BY u LOOP
        IF receiver = _sender THEN
            kind := 'message.sent';
            SELECT row_to_json(e)::text INTO payload FROM (
                SELECT post_message.message_id::text AS id, _content AS content, _conversation::text AS "conversationId",
                       messenger.rfc3339(post_message.created_at) AS "createdAt", true AS mine, _key AS "idempotencyKey"
            ) AS e;
        ELSE
            kind := 'message';
            SELECT row_to_json(e)::text INTO payload FROM (
                SELECT post_message.message_id::text AS id, _content AS content, _conversation::text AS "conversationId",
                       messenger.rfc3339(post_message.created_at) AS "createdAt", false AS mine
            ) AS e;
        END IF;
        SELECT f.epoch, f.seq, f.at INTO epoch, seq, event_at
        FROM messenger.append_to_feed(receiver, kind, message_id, payload, _request_id, _traceparent) AS f;
        RETURN NEXT;
    END LOOP;
END
$$;
