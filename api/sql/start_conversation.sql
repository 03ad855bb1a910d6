-- Starts a direct conversation with the user of exactly this name. Outcomes: created, exists, no_user, self, no_session.
--
-- `user_ids`, `usernames` and `avatar_urls` are of the two, when it is created.
--
-- A user who blocks the starter receives no event, and sees no conversation before its first message.
CREATE OR REPLACE FUNCTION messenger.start_conversation(
    _session bigint, _user bigint, _username text, _request_id text, _traceparent text,
    OUT outcome text, OUT conversation_id bigint, OUT event_at timestamptz,
    OUT user_ids bigint[], OUT usernames text[], OUT avatar_urls text[],
    OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _other bigint;
    _receiver bigint;
    _event bigint;
BEGIN
    IF NOT messenger.session_is_live(_session, _user) THEN
        outcome := 'no_session';
        RETURN;
    END IF;

    SELECT u.id INTO _other FROM messenger.users AS u WHERE u.username = _username;
    IF NOT FOUND THEN
        outcome := 'no_user';
        RETURN;
    ELSIF _other = _user THEN
        outcome := 'self';
        RETURN;
    END IF;

    outcome := 'exists';
    SELECT c.id INTO conversation_id
    FROM messenger.conversations AS c WHERE c.user_a = least(_user, _other) AND c.user_b = greatest(_user, _other);
    IF FOUND THEN
        RETURN;
    END IF;
    -- If both start it at the same time, one waits here for the other's commit and then reads its row.
    INSERT INTO messenger.conversations AS c (user_a, user_b) VALUES (least(_user, _other), greatest(_user, _other))
    ON CONFLICT ON CONSTRAINT conversations_one_per_pair DO NOTHING
    RETURNING c.id INTO conversation_id;
    IF NOT FOUND THEN
        SELECT c.id INTO STRICT conversation_id
        FROM messenger.conversations AS c WHERE c.user_a = least(_user, _other) AND c.user_b = greatest(_user, _other);
        RETURN;
    END IF;
    outcome := 'created';
    INSERT INTO messenger.participants (conversation_id, user_id, other_user_id)
    VALUES (start_conversation.conversation_id, _user, _other), (start_conversation.conversation_id, _other, _user);

    SELECT array_agg(u.id), array_agg(u.username), array_agg(u.avatar_url) INTO user_ids, usernames, avatar_urls
    FROM messenger.users AS u WHERE u.id IN (_user, _other);

    INSERT INTO messenger.events AS e (kind, conversation_id, count, request_id, traceparent)
    VALUES ('conversation.created', start_conversation.conversation_id, 2, _request_id, _traceparent)
    RETURNING -e.id, e.created_at INTO _event, event_at;
    FOR _receiver IN
        SELECT u FROM unnest(ARRAY[_user, _other]) AS u
        WHERE NOT EXISTS (SELECT FROM messenger.blocks AS b WHERE b.blocker_id = u AND b.blocked_id = _user)
        ORDER BY u
    LOOP
        SELECT receivers || _receiver, epochs || f.epoch, seqs || f.seq INTO receivers, epochs, seqs
        FROM messenger.append_to_feed(_receiver, _event, 0) AS f;
    END LOOP;
END
$$;
