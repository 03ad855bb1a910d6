-- Blocks: who does not want to hear from whom. Silent for the one who is blocked: they write and see as before, and nothing
-- tells them. What they write meanwhile stays unseen by the other one for ever, also after the block has ended: it was
-- never delivered, and messages that turn up in the past would be in no order that anybody could read.
--
-- Adding a column without a default changes no row, but waits for whoever uses the table, and all others wait behind: so it
-- gives up soon, and the migration can be run again.
SET LOCAL lock_timeout = '2s';

CREATE TABLE blocks (
    blocker_id bigint      NOT NULL REFERENCES users ON DELETE CASCADE,
    blocked_id bigint      NOT NULL REFERENCES users ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (blocker_id, blocked_id),
    CONSTRAINT blocks_somebody_else CHECK (blocker_id <> blocked_id)
);

-- The cascade from the second of the pair; the first is served by the key.
CREATE INDEX blocks_by_blocked ON blocks (blocked_id);

-- Who does not see this message: its receiver, when they had blocked its sender at that moment. No foreign key: it is never
-- looked up by this. Every reader of messages compares it with who reads.
ALTER TABLE messages ADD COLUMN hidden_from bigint;

-- How far somebody has read, as the other one is told: not beyond the last message that this one sees.
CREATE FUNCTION read_of_seen(_read bigint, _last_seen bigint) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN _read IS NULL OR _last_seen IS NULL THEN NULL ELSE least(_read, _last_seen) END
$$;

-- The functions of 0003 with what blocks change in them; their signatures stay, so that the version before this one can call
-- them while it still runs.

-- A conversation as `_reader` sees it, with its last message; the same JSON as the REST answer.
--
-- The other one may have read beyond what the reader sees: then they have read all that the reader sees.
CREATE OR REPLACE FUNCTION conversation_json(_conversation bigint, _reader bigint) RETURNS text LANGUAGE sql STABLE AS $$
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
               read_of_seen(other.last_read_message_id, p.last_message_id)::text AS "otherLastReadMessageId"
        FROM participants AS p
        JOIN participants AS other ON other.conversation_id = p.conversation_id AND other.user_id = p.other_user_id
        WHERE p.conversation_id = _conversation AND p.user_id = _reader
    ) AS c
$$;

-- Outcomes: posted, replayed, key_conflict, no_conversation, no_session.
--
-- What is hidden from the receiver changes nothing of theirs: no event, no last message, no count. Their read position stays
-- below it, for nothing that they see can move it there.
CREATE OR REPLACE FUNCTION post_message(
    _session bigint, _sender bigint, _conversation bigint, _content text, _key text, _request_id text, _traceparent text
) RETURNS TABLE (
    outcome text, message_id bigint, created_at timestamptz,
    receiver bigint, epoch bigint, seq bigint, kind text, payload text, event_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    _other bigint;
    _hidden_from bigint;
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
        --
        -- Whether the sender is blocked is read here, after the wait for the lock: a block that was answered before this
        -- is seen.
        INSERT INTO messages AS m (conversation_id, sender_id, content, idempotency_key, hidden_from)
        VALUES (_conversation, _sender, _content, _key,
                (SELECT b.blocker_id FROM blocks AS b WHERE b.blocker_id = _other AND b.blocked_id = _sender))
        ON CONFLICT (sender_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
        RETURNING m.id, m.created_at, m.hidden_from INTO message_id, created_at, _hidden_from;
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
    WHERE p.conversation_id = _conversation AND p.user_id IS DISTINCT FROM _hidden_from;

    outcome := 'posted';
    FOR receiver IN SELECT u FROM unnest(ARRAY[_sender, _other]) AS u WHERE u IS DISTINCT FROM _hidden_from ORDER BY u LOOP
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
--
-- Who has blocked the starter is told nothing, and has no last message, so the conversation is in no list of theirs.
CREATE OR REPLACE FUNCTION start_conversation(
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
    FOR receiver IN
        SELECT u FROM unnest(ARRAY[_user, _other]) AS u
        WHERE NOT EXISTS (SELECT FROM blocks AS b WHERE b.blocker_id = u AND b.blocked_id = _user)
        ORDER BY u
    LOOP
        payload := conversation_json(conversation_id, receiver);
        SELECT f.epoch, f.seq, f.at INTO epoch, seq, event_at
        FROM append_to_feed(receiver, kind, NULL, payload, _request_id, _traceparent) AS f;
        RETURN NEXT;
    END LOOP;
END
$$;

-- Moves the reader's position to `_to`, or to the last message that they see when that is null; never back, never beyond
-- that one. Outcomes: moved, unmoved, no_conversation, no_session.
CREATE OR REPLACE FUNCTION mark_read(
    _session bigint, _reader bigint, _conversation bigint, _to bigint, _request_id text, _traceparent text
) RETURNS TABLE (
    outcome text,
    receiver bigint, epoch bigint, seq bigint, kind text, payload text, event_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    _mine participants;
    _position bigint;
    _unread bigint;
    _others_last bigint;
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

    -- Counted anew rather than subtracted: it ends right even if a count ever was wrong. Own messages are never unread, nor
    -- are those that the reader does not see.
    SELECT count(*) INTO _unread
    FROM messages AS m
    WHERE m.conversation_id = _conversation AND m.id > _position AND m.sender_id <> _reader
      AND m.hidden_from IS DISTINCT FROM _reader;

    UPDATE participants AS p SET last_read_message_id = _position, unread_count = _unread
    WHERE p.conversation_id = _conversation AND p.user_id = _reader;

    -- The other one is told of what they see, and not when of that no more was read.
    SELECT p.last_message_id INTO _others_last
    FROM participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _mine.other_user_id;

    outcome := 'moved';
    FOR receiver IN
        SELECT u FROM unnest(ARRAY[_reader, _mine.other_user_id]) AS u
        WHERE u = _reader
           OR read_of_seen(_position, _others_last) > coalesce(read_of_seen(_mine.last_read_message_id, _others_last), 0)
        ORDER BY u
    LOOP
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
                       read_of_seen(_position, _others_last)::text AS "lastReadMessageId"
            ) AS e;
        END IF;
        SELECT f.epoch, f.seq, f.at INTO epoch, seq, event_at
        FROM append_to_feed(receiver, kind, NULL, payload, _request_id, _traceparent) AS f;
        RETURN NEXT;
    END LOOP;
END
$$;
