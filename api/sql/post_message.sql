-- Posts a message. Outcomes: posted, replayed, key_conflict, no_conversation, no_session.
--
-- Like every command it is called by one statement that commits itself: one round trip, and no client that is slow or gone can hold its
-- locks. It runs in READ COMMITTED, so what it reads after it took a lock is the newest there is. Locks are taken in one order, to
-- avoid deadlocks: the conversation's row, then feed heads by user id.
--
-- The event is the message itself. `receivers`, `epochs` and `seqs` say where it was appended, so that it can be published after the
-- commit.
--
-- A message that is hidden from the receiver changes nothing of theirs: no event, no last message, no count. Their read position stays
-- below it, because nothing that they see can move it there.
CREATE OR REPLACE FUNCTION messenger.post_message(
    _session bigint, _sender bigint, _conversation bigint, _content text, _key_hash bytea, _content_hash bytea,
    _request_id text, _traceparent text,
    OUT outcome text, OUT message_id bigint, OUT content text, OUT created_at timestamptz, OUT edited_at timestamptz,
    OUT deleted_at timestamptz, OUT sender_username text, OUT sender_avatar_url text,
    OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _number bigint;
    _hidden_from bigint;
    -- Of a direct conversation.
    _other bigint;
    _used messenger.idempotency_keys;
    _receiver bigint;
BEGIN
    -- With the session check of `session_is_live`, in one statement.
    SELECT u.username, u.avatar_url INTO sender_username, sender_avatar_url
    FROM messenger.users AS u
    WHERE u.id = _sender AND (_session IS NULL OR EXISTS (
        SELECT FROM messenger.sessions AS s
        WHERE s.id = _session AND s.user_id = _sender AND s.revoked_at IS NULL AND s.expires_at > now()
    ));
    IF NOT FOUND THEN
        outcome := 'no_session';
        RETURN;
    END IF;

    -- From here on this is the only writer of the conversation.
    UPDATE messenger.conversations AS c
    SET last_number = c.last_number + 1,
        user_a_has_written = c.user_a_has_written OR c.user_a IS NOT DISTINCT FROM _sender,
        user_b_has_written = c.user_b_has_written OR c.user_b IS NOT DISTINCT FROM _sender
    WHERE c.id = _conversation AND c.erased_user IS DISTINCT FROM _sender
      AND (_sender IN (c.user_a, c.user_b)
           OR EXISTS (SELECT FROM messenger.participants AS p WHERE p.conversation_id = c.id AND p.user_id = _sender))
    RETURNING c.last_number, array_remove(ARRAY[c.user_a, c.user_b], c.erased_user), c.user_a + c.user_b - _sender
    INTO _number, receivers, _other;
    -- A member of a group may have left while we waited for the lock.
    IF FOUND AND receivers[1] IS NULL THEN
        SELECT array_agg(p.user_id ORDER BY p.user_id) INTO receivers
        FROM messenger.participants AS p WHERE p.conversation_id = _conversation;
        IF _sender = ANY (receivers) IS NOT TRUE THEN
            receivers := NULL;
            UPDATE messenger.conversations AS c SET last_number = c.last_number - 1 WHERE c.id = _conversation;
        END IF;
    END IF;
    message_id := nextval('messenger.messages_id_seq');

    -- A used key is recognised in every conversation. If a copy of this send is under way in another one, the index makes us wait for its
    -- end.
    IF _key_hash IS NOT NULL THEN
        IF receivers IS NULL THEN
            SELECT k.* INTO _used FROM messenger.idempotency_keys AS k WHERE k.sender_id = _sender AND k.key_hash = _key_hash;
        ELSE
            INSERT INTO messenger.idempotency_keys (sender_id, key_hash, content_hash, made_id)
            VALUES (_sender, _key_hash, _content_hash, post_message.message_id)
            ON CONFLICT DO NOTHING;
            IF NOT FOUND THEN
                SELECT k.* INTO STRICT _used FROM messenger.idempotency_keys AS k WHERE k.sender_id = _sender AND k.key_hash = _key_hash;
                UPDATE messenger.conversations AS c SET last_number = c.last_number - 1 WHERE c.id = _conversation;
            END IF;
        END IF;
    END IF;
    IF _used.made_id IS NOT NULL THEN
        SELECT m.id, m.content, m.created_at, m.edited_at, m.deleted_at
        INTO message_id, content, created_at, edited_at, deleted_at
        FROM messenger.messages AS m WHERE m.id = _used.made_id AND m.conversation_id = _conversation;
        outcome := CASE WHEN FOUND AND _used.content_hash = _content_hash THEN 'replayed' ELSE 'key_conflict' END;
        receivers := NULL;
        RETURN;
    END IF;
    IF receivers IS NULL THEN
        outcome := 'no_conversation';
        RETURN;
    END IF;

    -- Blocks are read after the wait for the lock, so a block that was confirmed before this send is seen. In a group they hide nothing.
    INSERT INTO messenger.messages AS m (id, conversation_id, number, sender_id, content, hidden_from, request_id, traceparent)
    SELECT message_id, _conversation, _number, _sender, _content,
           (SELECT b.blocker_id FROM messenger.blocks AS b WHERE b.blocker_id = _other AND b.blocked_id = _sender),
           _request_id, _traceparent
    RETURNING m.content, m.created_at, m.hidden_from INTO content, created_at, _hidden_from;
    receivers := array_remove(receivers, _hidden_from);

    IF _other IS NULL THEN
        SELECT f.epochs, f.seqs INTO epochs, seqs
        FROM (
            SELECT array_agg(message_id) AS events, array_agg((r.user_id <> _sender)::int::bigint ORDER BY r.nth) AS unread
            FROM unnest(receivers) WITH ORDINALITY AS r (user_id, nth)
        ) AS a CROSS JOIN LATERAL messenger.append_to_feeds(receivers, a.events, a.unread) AS f;
    ELSE
        -- The same for two, without the cost of a call. In the order of user ids.
        FOREACH _receiver IN ARRAY receivers LOOP
            UPDATE messenger.feed_heads AS h
            SET head_seq = h.head_seq + 1, unread_total = h.unread_total + (_receiver <> _sender)::int
            WHERE h.user_id = _receiver
            RETURNING epochs || h.epoch, seqs || h.head_seq INTO STRICT epochs, seqs;
        END LOOP;
        INSERT INTO messenger.feed (user_id, seq, event_id)
        SELECT r.user_id, r.seq, message_id FROM unnest(receivers, seqs) AS r (user_id, seq);
    END IF;
    UPDATE messenger.participants AS p
    SET last_message_id = post_message.message_id, last_number = _number, list_seq = r.seq,
        unread_count = p.unread_count + (p.user_id <> _sender)::int
    FROM unnest(receivers, seqs) AS r (user_id, seq)
    WHERE p.conversation_id = _conversation AND p.user_id = r.user_id;
    outcome := 'posted';
END
$$;
