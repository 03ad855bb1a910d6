-- Each change that a user can make is one function, called by one statement that commits itself. So a change costs one
-- round trip, and its locks live inside the server: no slow or vanished client can hold them.
--
-- Isolation is READ COMMITTED: each statement inside a function sees what was committed before it, so what is read after
-- a lock was taken is the newest there is.
--
-- Locks, always in this order, so that nobody waits in a circle: the conversation's row, then feed heads in the order of
-- user ids.
--
-- All three answer rows of one form: `outcome` first; then what it is about; then one event that was appended, if any, to
-- be published after the commit. No row is without an outcome.

-- The one form of a time in JSON: RFC 3339, UTC, microseconds.
CREATE FUNCTION rfc3339(_at timestamptz) RETURNS text LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT to_char(_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
$$;

-- In PL/pgSQL, which keeps its plan; a function in plain SQL would be planned again at every call from another one.
CREATE FUNCTION session_is_live(_session bigint, _user bigint) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN EXISTS (SELECT FROM sessions AS s
                   WHERE s.id = _session AND s.user_id = _user AND s.revoked_at IS NULL AND s.expires_at > now());
END
$$;

CREATE FUNCTION append_to_feed(
    _user bigint, _kind text, _message bigint, _payload text, _request_id text, _traceparent text,
    OUT epoch bigint, OUT seq bigint, OUT at timestamptz
) LANGUAGE plpgsql AS $$
BEGIN
    UPDATE feed_heads AS h SET head_seq = h.head_seq + 1 WHERE h.user_id = _user
    RETURNING h.epoch, h.head_seq INTO STRICT epoch, seq;
    INSERT INTO feed AS f (user_id, seq, kind, message_id, payload, request_id, traceparent)
    VALUES (_user, append_to_feed.seq, _kind, _message, _payload, _request_id, _traceparent)
    RETURNING f.created_at INTO at;
END
$$;

-- A conversation as `_reader` sees it, with its last message; the same JSON as the REST answer.
CREATE FUNCTION conversation_json(_conversation bigint, _reader bigint) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT row_to_json(c)::text
    FROM (
        SELECT p.conversation_id::text AS id,
               (SELECT row_to_json(o) FROM (
                   SELECT u.id::text AS id, u.username, u.avatar_url AS "avatarURL"
                   FROM users AS u WHERE u.id = p.other_user_id
               ) AS o) AS "otherParticipant",
               (SELECT row_to_json(l) FROM (
                   SELECT m.id::text AS id, m.content, rfc3339(m.created_at) AS "createdAt", m.sender_id = _reader AS mine
                   FROM messages AS m WHERE m.id = p.last_message_id
               ) AS l) AS "lastMessage",
               p.unread_count > 0 AS "hasUnreadMessages",
               p.unread_count AS "unreadCount",
               p.last_read_message_id::text AS "lastReadMessageId",
               other.last_read_message_id::text AS "otherLastReadMessageId"
        FROM participants AS p
        JOIN participants AS other ON other.conversation_id = p.conversation_id AND other.user_id = p.other_user_id
        WHERE p.conversation_id = _conversation AND p.user_id = _reader
    ) AS c
$$;

-- Outcomes: posted, replayed, key_conflict, no_conversation, no_session.
CREATE FUNCTION post_message(
    _session bigint, _sender bigint, _conversation bigint, _content text, _key text, _request_id text, _traceparent text
) RETURNS TABLE (
    outcome text, message_id bigint, created_at timestamptz,
    receiver bigint, epoch bigint, seq bigint, kind text, payload text, event_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    _other bigint;
    _earlier messages;
BEGIN
    IF NOT session_is_live(_session, _sender) THEN
        outcome := 'no_session';
        RETURN NEXT;
        RETURN;
    END IF;

    -- A repeat is recognised before anything is locked, and whatever conversation it names.
    IF _key IS NOT NULL THEN
        SELECT m.* INTO _earlier FROM messages AS m WHERE m.sender_id = _sender AND m.idempotency_key = _key;
    END IF;

    IF _earlier.id IS NULL THEN
        SELECT p.other_user_id INTO _other
        FROM participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _sender;
        IF NOT FOUND THEN
            outcome := 'no_conversation';
            RETURN NEXT;
            RETURN;
        END IF;

        -- From here on this is the only writer of the conversation, so the message's id is its newest.
        PERFORM FROM conversations AS c WHERE c.id = _conversation FOR NO KEY UPDATE;

        -- A second copy of this send may have come in meanwhile: in this conversation it has committed, in another one
        -- the index makes us wait for its end. Either way nothing is inserted, and the row is there to be read.
        INSERT INTO messages AS m (conversation_id, sender_id, content, idempotency_key)
        VALUES (_conversation, _sender, _content, _key)
        ON CONFLICT (sender_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING m.id, m.created_at INTO message_id, created_at;
        IF NOT FOUND THEN
            SELECT m.* INTO STRICT _earlier FROM messages AS m WHERE m.sender_id = _sender AND m.idempotency_key = _key;
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

    UPDATE participants AS p
    SET last_message_id = post_message.message_id,
        unread_count = p.unread_count + (p.user_id <> _sender)::int
    WHERE p.conversation_id = _conversation;

    outcome := 'posted';
    FOR receiver IN SELECT u FROM unnest(ARRAY[_sender, _other]) AS u ORDER BY u LOOP
        IF receiver = _sender THEN
            kind := 'message.sent';
            SELECT row_to_json(e)::text INTO payload FROM (
                SELECT post_message.message_id::text AS id, _content AS content, _conversation::text AS "conversationId",
                       rfc3339(post_message.created_at) AS "createdAt", true AS mine, _key AS "idempotencyKey"
            ) AS e;
        ELSE
            kind := 'message';
            SELECT row_to_json(e)::text INTO payload FROM (
                SELECT post_message.message_id::text AS id, _content AS content, _conversation::text AS "conversationId",
                       rfc3339(post_message.created_at) AS "createdAt", false AS mine
            ) AS e;
        END IF;
        SELECT f.epoch, f.seq, f.at INTO epoch, seq, event_at
        FROM append_to_feed(receiver, kind, message_id, payload, _request_id, _traceparent) AS f;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Outcomes: created, exists, no_user, self, no_session.
CREATE FUNCTION start_conversation(
    _session bigint, _user bigint, _username text, _request_id text, _traceparent text
) RETURNS TABLE (
    outcome text, conversation_id bigint,
    receiver bigint, epoch bigint, seq bigint, kind text, payload text, event_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    _other bigint;
BEGIN
    IF NOT session_is_live(_session, _user) THEN
        outcome := 'no_session';
        RETURN NEXT;
        RETURN;
    END IF;

    SELECT u.id INTO _other FROM users AS u WHERE u.username = _username;
    IF NOT FOUND THEN
        outcome := 'no_user';
    ELSIF _other = _user THEN
        outcome := 'self';
    ELSE
        SELECT c.id INTO conversation_id
        FROM conversations AS c WHERE c.user_a = least(_user, _other) AND c.user_b = greatest(_user, _other);
        IF NOT FOUND THEN
            -- Of two who start it at once, one waits here for the other's commit, and then reads what the other made.
            INSERT INTO conversations AS c (user_a, user_b) VALUES (least(_user, _other), greatest(_user, _other))
            ON CONFLICT ON CONSTRAINT conversations_one_per_pair DO NOTHING
            RETURNING c.id INTO conversation_id;
            IF FOUND THEN
                outcome := 'created';
            ELSE
                SELECT c.id INTO STRICT conversation_id
                FROM conversations AS c WHERE c.user_a = least(_user, _other) AND c.user_b = greatest(_user, _other);
            END IF;
        END IF;
        outcome := coalesce(outcome, 'exists');
    END IF;

    IF outcome <> 'created' THEN
        RETURN NEXT;
        RETURN;
    END IF;

    INSERT INTO participants (conversation_id, user_id, other_user_id)
    VALUES (start_conversation.conversation_id, _user, _other), (start_conversation.conversation_id, _other, _user);

    kind := 'conversation.created';
    FOR receiver IN SELECT u FROM unnest(ARRAY[_user, _other]) AS u ORDER BY u LOOP
        payload := conversation_json(conversation_id, receiver);
        SELECT f.epoch, f.seq, f.at INTO epoch, seq, event_at
        FROM append_to_feed(receiver, kind, NULL, payload, _request_id, _traceparent) AS f;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Moves the reader's position to `_to`, or to the last message when that is null; never back, never beyond the last
-- message. Outcomes: moved, unmoved, no_conversation, no_session.
CREATE FUNCTION mark_read(
    _session bigint, _reader bigint, _conversation bigint, _to bigint, _request_id text, _traceparent text
) RETURNS TABLE (
    outcome text,
    receiver bigint, epoch bigint, seq bigint, kind text, payload text, event_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    _mine participants;
    _position bigint;
    _unread bigint;
BEGIN
    IF NOT session_is_live(_session, _reader) THEN
        outcome := 'no_session';
        RETURN NEXT;
        RETURN;
    END IF;

    -- Twice: most calls move nothing, which can be seen without a lock because a position never goes back. Only a move is
    -- worth the lock, and then everything is read again under it.
    FOR _attempt IN 1..2 LOOP
        SELECT p.* INTO _mine FROM participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _reader;
        IF NOT FOUND THEN
            outcome := 'no_conversation';
            RETURN NEXT;
            RETURN;
        END IF;
        _position := least(coalesce(_to, _mine.last_message_id), _mine.last_message_id);
        IF _mine.last_message_id IS NULL OR _position <= coalesce(_mine.last_read_message_id, 0) THEN
            outcome := 'unmoved';
            RETURN NEXT;
            RETURN;
        END IF;
        IF _attempt = 1 THEN
            PERFORM FROM conversations AS c WHERE c.id = _conversation FOR NO KEY UPDATE;
        END IF;
    END LOOP;

    -- Counted anew rather than subtracted: it ends right even if a count ever was wrong. Own messages are never unread.
    SELECT count(*) INTO _unread
    FROM messages AS m WHERE m.conversation_id = _conversation AND m.id > _position AND m.sender_id <> _reader;

    UPDATE participants AS p SET last_read_message_id = _position, unread_count = _unread
    WHERE p.conversation_id = _conversation AND p.user_id = _reader;

    outcome := 'moved';
    FOR receiver IN SELECT u FROM unnest(ARRAY[_reader, _mine.other_user_id]) AS u ORDER BY u LOOP
        IF receiver = _reader THEN
            kind := 'conversation.read';
            SELECT row_to_json(e)::text INTO payload FROM (
                SELECT _conversation::text AS "conversationId", _position::text AS "lastReadMessageId",
                       _unread AS "unreadCount"
            ) AS e;
        ELSE
            kind := 'receipt.read';
            SELECT row_to_json(e)::text INTO payload FROM (
                SELECT _conversation::text AS "conversationId", _reader::text AS "userId",
                       _position::text AS "lastReadMessageId"
            ) AS e;
        END IF;
        SELECT f.epoch, f.seq, f.at INTO epoch, seq, event_at
        FROM append_to_feed(receiver, kind, NULL, payload, _request_id, _traceparent) AS f;
        RETURN NEXT;
    END LOOP;
END
$$;
