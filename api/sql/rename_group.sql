-- Gives a group another title. Outcomes: renamed, same, not_owner, and the refusals of `lock_group`.
CREATE OR REPLACE FUNCTION messenger.rename_group(
    _session bigint, _user bigint, _conversation bigint, _title text, _request_id text, _traceparent text,
    OUT outcome text, OUT participant_count bigint, OUT last_number bigint, OUT event_at timestamptz,
    OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _group record;
    _event bigint;
BEGIN
    SELECT * INTO _group FROM messenger.lock_group(_session, _user, _conversation);
    outcome := CASE WHEN _group.refusal IS NOT NULL THEN _group.refusal
                    WHEN NOT _group.is_owner THEN 'not_owner'
                    WHEN _group.title = _title THEN 'same'
                    ELSE 'renamed' END;
    IF outcome <> 'renamed' THEN
        RETURN;
    END IF;
    participant_count := _group.participant_count;
    last_number := _group.last_number;
    event_at := clock_timestamp();
    UPDATE messenger.conversations AS c SET title = _title WHERE c.id = _conversation;
    INSERT INTO messenger.events AS e (kind, conversation_id, count, number, request_id, traceparent, created_at)
    VALUES ('conversation.updated', _conversation, participant_count, last_number, _request_id, _traceparent, event_at)
    RETURNING -e.id INTO _event;
    SELECT a.receivers, a.epochs, a.seqs INTO receivers, epochs, seqs
    FROM messenger.append_for_members(_conversation, _event) AS a;
END
$$;
