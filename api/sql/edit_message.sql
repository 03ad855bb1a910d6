-- Changes the text of the editor's own message, which is not older than `_window` seconds. Outcomes: edited, unchanged (it is the same
-- text), window_over, not_yours, no_message, no_conversation, no_session.
--
-- One event, `message.updated`, to everybody who can see the message, its sender included. It refers to the message, so that no copy of a
-- text is anywhere else. Locks are taken in the order of `post_message`.
--
-- A receiver of a direct conversation who blocks the editor receives nothing, and does not see the new text: what a blocked user writes is
-- hidden from them, in an edit as in a message.
CREATE OR REPLACE FUNCTION messenger.edit_message(
    _session bigint, _editor bigint, _conversation bigint, _message bigint, _content text, _window double precision,
    _request_id text, _traceparent text,
    OUT outcome text, OUT content text, OUT created_at timestamptz, OUT edited_at timestamptz,
    OUT sender_username text, OUT sender_avatar_url text, OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _locked record;
    _mine messenger.participants;
    _old messenger.messages;
    _blocker bigint;
    _event bigint;
BEGIN
    SELECT * INTO _locked FROM messenger.lock_message(_session, _editor, _conversation, _message);
    _mine := _locked.mine;
    _old := _locked.message;
    outcome := CASE
        WHEN _locked.refusal IS NOT NULL THEN _locked.refusal
        WHEN _old.deleted_at IS NOT NULL THEN 'no_message'
        WHEN _old.sender_id <> _editor THEN 'not_yours'
        WHEN _old.created_at + make_interval(secs => _window) <= clock_timestamp() THEN 'window_over'
        WHEN _old.content = _content THEN 'unchanged'
        ELSE 'edited'
    END;
    IF outcome NOT IN ('unchanged', 'edited') THEN
        RETURN;
    END IF;

    content := _content;
    created_at := _old.created_at;
    edited_at := _old.edited_at;
    SELECT u.username, u.avatar_url INTO sender_username, sender_avatar_url FROM messenger.users AS u WHERE u.id = _editor;
    IF outcome = 'unchanged' THEN
        RETURN;
    END IF;

    -- Read after the wait for the lock, so a block that was confirmed before this edit is seen. In a group they hide nothing.
    SELECT b.blocker_id INTO _blocker
    FROM messenger.blocks AS b WHERE b.blocker_id = _mine.other_user_id AND b.blocked_id = _editor;
    edited_at := clock_timestamp();
    UPDATE messenger.messages AS m
    SET content = _content, edited_at = edit_message.edited_at, text_hidden_from = _blocker
    WHERE m.id = _message;
    INSERT INTO messenger.events AS e (kind, conversation_id, message_id, request_id, traceparent, created_at)
    VALUES ('message.updated', _conversation, _message, _request_id, _traceparent, edit_message.edited_at)
    RETURNING -e.id INTO _event;
    SELECT array_agg(p.user_id ORDER BY p.user_id) INTO receivers
    FROM messenger.participants AS p
    WHERE p.conversation_id = _conversation AND p.joined_number < _old.number
      AND p.user_id IS DISTINCT FROM _old.hidden_from AND p.user_id IS DISTINCT FROM _blocker;
    SELECT f.epochs, f.seqs INTO epochs, seqs
    FROM messenger.append_to_feeds(receivers, array_fill(_event, ARRAY[cardinality(receivers)]), array_fill(0::bigint, ARRAY[cardinality(receivers)])) AS f;
END
$$;
