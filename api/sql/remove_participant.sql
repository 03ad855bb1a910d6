-- Takes a member out of a group: an owner anybody, and everybody themselves. Outcomes: removed, not_in, not_owner, and the refusals of
-- `lock_group`. The rest is as `leave_group` has it.
CREATE OR REPLACE FUNCTION messenger.remove_participant(
    _session bigint, _user bigint, _conversation bigint, _who bigint, _request_id text, _traceparent text,
    OUT outcome text, OUT successor bigint, OUT event_at timestamptz,
    OUT receivers bigint[], OUT kinds text[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _group record;
BEGIN
    SELECT * INTO _group FROM messenger.lock_group(_session, _user, _conversation);
    IF _group.refusal IS NOT NULL THEN
        outcome := _group.refusal;
        RETURN;
    END IF;
    PERFORM FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _who;
    outcome := CASE WHEN NOT FOUND THEN 'not_in' WHEN _who <> _user AND NOT _group.is_owner THEN 'not_owner' ELSE 'removed' END;
    IF outcome <> 'removed' THEN
        RETURN;
    END IF;
    SELECT l.successor, l.event_at, l.receivers, l.kinds, l.epochs, l.seqs INTO successor, event_at, receivers, kinds, epochs, seqs
    FROM messenger.leave_group(_conversation, _who, _request_id, _traceparent) AS l;
END
$$;
