-- Adds the user of this name to a group. Outcomes: added, is_in, no_user, not_owner, cannot_be_added, full, and the refusals of
-- `lock_group`.
--
-- Two events: `conversation.created` for who joins, then `participant.joined` for all; `kinds` tells which one went to the nth receiver.
-- A new member, also one who returns, sees no earlier messages: read marks and counts start at zero.
CREATE OR REPLACE FUNCTION messenger.add_participant(
    _session bigint, _user bigint, _conversation bigint, _username text, _largest bigint, _request_id text, _traceparent text,
    OUT outcome text, OUT user_id bigint, OUT participant_count bigint, OUT last_number bigint, OUT event_at timestamptz,
    OUT receivers bigint[], OUT kinds text[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _group record;
    _created bigint;
    _joined bigint;
BEGIN
    SELECT * INTO _group FROM messenger.lock_group(_session, _user, _conversation);
    IF _group.refusal IS NOT NULL THEN
        outcome := _group.refusal;
        RETURN;
    END IF;
    user_id := messenger.find_user(_username);
    IF user_id IS NULL THEN
        outcome := 'no_user';
    ELSIF NOT _group.is_owner THEN
        outcome := 'not_owner';
    ELSIF EXISTS (
        SELECT FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND p.user_id = add_participant.user_id
    ) THEN
        outcome := 'is_in';
    ELSIF NOT messenger.may_add(_user, user_id) THEN
        outcome := 'cannot_be_added';
    ELSIF _group.participant_count >= _largest THEN
        outcome := 'full';
    ELSE
        outcome := 'added';
    END IF;
    IF outcome <> 'added' THEN
        RETURN;
    END IF;

    last_number := _group.last_number;
    event_at := clock_timestamp();
    UPDATE messenger.conversations AS c SET participant_count = c.participant_count + 1
    WHERE c.id = _conversation RETURNING c.participant_count INTO add_participant.participant_count;
    INSERT INTO messenger.participants (conversation_id, user_id, joined_at, joined_number)
    VALUES (_conversation, add_participant.user_id, event_at, add_participant.last_number);
    INSERT INTO messenger.events AS e (kind, conversation_id, count, number, request_id, traceparent, created_at)
    VALUES ('conversation.created', _conversation, add_participant.participant_count, add_participant.last_number, _request_id, _traceparent, event_at)
    RETURNING -e.id INTO _created;
    INSERT INTO messenger.events AS e (kind, conversation_id, user_id, is_owner, request_id, traceparent, created_at)
    VALUES ('participant.joined', _conversation, add_participant.user_id, false, _request_id, _traceparent, event_at)
    RETURNING -e.id INTO _joined;
    SELECT a.receivers, a.kinds, f.epochs, f.seqs INTO receivers, kinds, epochs, seqs
    FROM (
        SELECT array_agg(t.receiver ORDER BY t.receiver, t.nth) AS receivers, array_agg(t.kind ORDER BY t.receiver, t.nth) AS kinds,
               array_agg(t.event ORDER BY t.receiver, t.nth) AS events, array_agg(0::bigint) AS unread
        FROM (
            SELECT add_participant.user_id, 1, 'conversation.created', _created
            UNION ALL
            SELECT p.user_id, 2, 'participant.joined', _joined FROM messenger.participants AS p WHERE p.conversation_id = _conversation
        ) AS t (receiver, nth, kind, event)
    ) AS a CROSS JOIN LATERAL messenger.append_to_feeds(a.receivers, a.events, a.unread) AS f;
    UPDATE messenger.participants AS p SET list_seq = seqs[array_position(receivers, add_participant.user_id)]
    WHERE p.conversation_id = _conversation AND p.user_id = add_participant.user_id;
END
$$;
