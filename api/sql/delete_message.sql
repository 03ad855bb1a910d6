-- Deletes a message: its own, or as an owner of the group. The row stays, with its number and without its text. Outcomes: deleted,
-- unchanged (it is deleted already), not_yours, no_message, no_conversation, no_session.
--
-- One event, `message.deleted`, to everybody who could see the message, with their count as it is now: the message counted for those who
-- had not read it. Locks are taken in the order of `post_message`.
CREATE OR REPLACE FUNCTION messenger.delete_message(
    _session bigint, _user bigint, _conversation bigint, _message bigint, _request_id text, _traceparent text,
    OUT outcome text, OUT deleted_at timestamptz, OUT unread_counts bigint[],
    OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _locked record;
    _mine messenger.participants;
    _old messenger.messages;
    _event bigint;
    _unread bigint[];
BEGIN
    SELECT * INTO _locked FROM messenger.lock_message(_session, _user, _conversation, _message);
    _mine := _locked.mine;
    _old := _locked.message;
    outcome := CASE
        WHEN _locked.refusal IS NOT NULL THEN _locked.refusal
        WHEN _old.sender_id <> _user AND NOT _mine.is_owner THEN 'not_yours'
        WHEN _old.deleted_at IS NOT NULL THEN 'unchanged'
        ELSE 'deleted'
    END;
    IF outcome <> 'deleted' THEN
        RETURN;
    END IF;

    deleted_at := clock_timestamp();
    UPDATE messenger.messages AS m
    SET content = '', deleted_at = delete_message.deleted_at, text_hidden_from = NULL
    WHERE m.id = _message;
    -- It counted for those who saw it and had not read it.
    UPDATE messenger.participants AS p SET unread_count = p.unread_count - 1
    WHERE p.conversation_id = _conversation AND p.user_id <> _old.sender_id
      AND p.joined_number < _old.number AND p.last_read_number < _old.number AND p.user_id IS DISTINCT FROM _old.hidden_from;
    SELECT array_agg(p.user_id ORDER BY p.user_id), array_agg(p.unread_count ORDER BY p.user_id),
           array_agg(CASE WHEN p.user_id <> _old.sender_id AND p.last_read_number < _old.number THEN -1 ELSE 0 END ORDER BY p.user_id)
    INTO receivers, unread_counts, _unread
    FROM messenger.participants AS p
    WHERE p.conversation_id = _conversation AND p.joined_number < _old.number AND p.user_id IS DISTINCT FROM _old.hidden_from;
    INSERT INTO messenger.events AS e (kind, conversation_id, message_id, request_id, traceparent, created_at)
    VALUES ('message.deleted', _conversation, _message, _request_id, _traceparent, delete_message.deleted_at)
    RETURNING -e.id INTO _event;
    SELECT f.epochs, f.seqs INTO epochs, seqs
    FROM messenger.append_to_feeds(receivers, array_fill(_event, ARRAY[cardinality(receivers)]), _unread) AS f;
END
$$;
