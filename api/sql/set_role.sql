-- Makes a member of a group its owner, or an owner a member. Outcomes: changed, same, not_in, not_owner, last_owner, and the refusals
-- of `lock_group`.
CREATE OR REPLACE FUNCTION messenger.set_role(
    _session bigint, _user bigint, _conversation bigint, _of bigint, _is_owner boolean, _request_id text, _traceparent text,
    OUT outcome text, OUT event_at timestamptz, OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _group record;
    _was_owner boolean;
    _event bigint;
BEGIN
    SELECT * INTO _group FROM messenger.lock_group(_session, _user, _conversation);
    IF _group.refusal IS NOT NULL THEN
        outcome := _group.refusal;
        RETURN;
    END IF;
    SELECT p.is_owner INTO _was_owner FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _of;
    outcome := CASE WHEN NOT FOUND THEN 'not_in'
                    WHEN NOT _group.is_owner THEN 'not_owner'
                    WHEN _was_owner = _is_owner THEN 'same'
                    WHEN _was_owner AND NOT EXISTS (
                        SELECT FROM messenger.participants AS p
                        WHERE p.conversation_id = _conversation AND p.is_owner AND p.user_id <> _of
                    ) THEN 'last_owner'
                    ELSE 'changed' END;
    IF outcome <> 'changed' THEN
        RETURN;
    END IF;
    event_at := clock_timestamp();
    UPDATE messenger.participants AS p SET is_owner = _is_owner WHERE p.conversation_id = _conversation AND p.user_id = _of;
    INSERT INTO messenger.events AS e (kind, conversation_id, user_id, is_owner, request_id, traceparent, created_at)
    VALUES ('participant.updated', _conversation, _of, _is_owner, _request_id, _traceparent, event_at)
    RETURNING -e.id INTO _event;
    SELECT a.receivers, a.epochs, a.seqs INTO receivers, epochs, seqs
    FROM messenger.append_for_members(_conversation, _event) AS a;
END
$$;
