-- Makes a group of the user, its owner, and of the users of these names. Outcomes: created, replayed, key_conflict, unknown_users,
-- cannot_be_added, too_many, no_session.
--
-- `names`: with unknown_users and cannot_be_added, those names. `content_hash` is of title and names.
CREATE OR REPLACE FUNCTION messenger.create_group(
    _session bigint, _user bigint, _title text, _usernames text[], _largest bigint, _key_hash bytea, _content_hash bytea,
    _request_id text, _traceparent text,
    OUT outcome text, OUT conversation_id bigint, OUT names text[], OUT event_at timestamptz,
    OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _used messenger.idempotency_keys;
    _event bigint;
BEGIN
    IF NOT messenger.session_is_live(_session, _user) THEN
        outcome := 'no_session';
        RETURN;
    END IF;
    conversation_id := nextval('messenger.conversations_id_seq');

    -- If a copy of this request is under way, the index makes us wait for its end.
    IF _key_hash IS NOT NULL THEN
        INSERT INTO messenger.idempotency_keys (sender_id, key_hash, content_hash, made_id)
        VALUES (_user, _key_hash, _content_hash, create_group.conversation_id)
        ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            SELECT k.* INTO STRICT _used FROM messenger.idempotency_keys AS k WHERE k.sender_id = _user AND k.key_hash = _key_hash;
            conversation_id := _used.made_id;
            outcome := CASE WHEN _used.content_hash = _content_hash THEN 'replayed' ELSE 'key_conflict' END;
            RETURN;
        END IF;
    END IF;

    WITH named AS MATERIALIZED (
        SELECT n.name, messenger.find_user(n.name) AS id FROM unnest(_usernames) AS n (name)
    )
    SELECT array_agg(DISTINCT named.id ORDER BY named.id), array_agg(named.name) FILTER (WHERE named.id IS NULL)
    INTO receivers, names
    FROM (SELECT * FROM named UNION ALL SELECT NULL, _user) AS named
    WHERE named.id IS NOT NULL OR named.name IS NOT NULL;
    receivers := array_remove(receivers, NULL);
    IF names IS NOT NULL THEN
        outcome := 'unknown_users';
    ELSIF cardinality(receivers) > _largest THEN
        outcome := 'too_many';
    ELSE
        SELECT array_agg(u.username) INTO names
        FROM messenger.users AS u
        WHERE u.id = ANY (receivers) AND u.id <> _user AND NOT messenger.may_add(_user, u.id);
        IF names IS NOT NULL THEN
            outcome := 'cannot_be_added';
        END IF;
    END IF;
    IF outcome IS NOT NULL THEN
        receivers := NULL;
        -- The key stays free for a request that succeeds.
        DELETE FROM messenger.idempotency_keys AS k WHERE k.sender_id = _user AND k.key_hash = _key_hash;
        RETURN;
    END IF;

    event_at := clock_timestamp();
    INSERT INTO messenger.conversations (id, title, participant_count)
    VALUES (create_group.conversation_id, _title, cardinality(receivers));
    INSERT INTO messenger.events AS e (kind, conversation_id, count, number, request_id, traceparent, created_at)
    VALUES ('conversation.created', create_group.conversation_id, cardinality(receivers), 0, _request_id, _traceparent, event_at)
    RETURNING -e.id INTO _event;
    SELECT f.epochs, f.seqs INTO epochs, seqs
    FROM messenger.append_to_feeds(
        receivers, array_fill(_event, ARRAY[cardinality(receivers)]), array_fill(0::bigint, ARRAY[cardinality(receivers)])
    ) AS f;
    INSERT INTO messenger.participants (conversation_id, user_id, is_owner, joined_at, list_seq)
    SELECT create_group.conversation_id, r.user_id, r.user_id = _user, event_at, r.seq
    FROM unnest(receivers, seqs) AS r (user_id, seq);
    outcome := 'created';
END
$$;
