-- Starts a conversation with the user of exactly this name. Outcomes: created, exists, no_user, self, no_session.
--
-- A user who blocks the starter receives no event, and sees no conversation before its first message.
CREATE OR REPLACE FUNCTION messenger.start_conversation(
    _session bigint, _user bigint, _username text, _request_id text, _traceparent text
) RETURNS TABLE (
    outcome text, conversation_id bigint,
    receiver bigint, epoch bigint, seq bigint, kind text, payload text, event_at timestamptz
) LANGUAGE plpgsql AS $$
DECLARE
    _other bigint;
BEGIN
    IF NOT messenger.session_is_live(_session, _user) THEN
        outcome := 'no_session';
        RETURN NEXT;
        RETURN;
    END IF;

    SELECT u.id INTO _other FROM messenger.users AS u WHERE u.username = _username;
    IF NOT FOUND THEN
        outcome := 'no_user';
    ELSIF _other = _user THEN
        outcome := 'self';
    ELSE
        SELECT c.id INTO conversation_id
        FROM messenger.conversations AS c WHERE c.user_a = least(_user, _other) AND c.user_b = greatest(_user, _other);
        IF NOT FOUND THEN
            -- If both start it at the same time, one waits here for the other's commit and then reads its row.
            INSERT INTO messenger.conversations AS c (user_a, user_b) VALUES (least(_user, _other), greatest(_user, _other))
            ON CONFLICT ON CONSTRAINT conversations_one_per_pair DO NOTHING
            RETURNING c.id INTO conversation_id;
            IF FOUND THEN
                outcome := 'created';
            ELSE
                SELECT c.id INTO STRICT conversation_id
                FROM messenger.conversations AS c WHERE c.user_a = least(_user, _other) AND c.user_b = greatest(_user, _other);
            END IF;
        END IF;
        outcome := coalesce(outcome, 'exists');
    END IF;

    IF outcome <> 'created' THEN
        RETURN NEXT;
        RETURN;
    END IF;

    INSERT INTO messenger.participants (conversation_id, user_id, other_user_id)
    VALUES (start_conversation.conversation_id, _user, _other), (start_conversation.conversation_id, _other, _user);

    kind := 'conversation.created';
    FOR receiver IN
        SELECT u FROM unnest(ARRAY[_user, _other]) AS u
        WHERE NOT EXISTS (SELECT FROM messenger.blocks AS b WHERE b.blocker_id = u AND b.blocked_id = _user)
        ORDER BY u
    LOOP
        payload := messenger.conversation_json(conversation_id, receiver);
        SELECT f.epoch, f.seq, f.at INTO epoch, seq, event_at
        FROM messenger.append_to_feed(receiver, kind, NULL, payload, _request_id, _traceparent) AS f;
        RETURN NEXT;
    END LOOP;
END
$$;
