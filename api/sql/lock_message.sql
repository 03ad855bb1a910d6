-- Locks a message's conversation for a change by its participant `_user`, who may still see the message: from then on this is the only
-- writer of the conversation. `refusal`: no_session, no_conversation, no_message; NULL if it is locked.
CREATE OR REPLACE FUNCTION messenger.lock_message(
    _session bigint, _user bigint, _conversation bigint, _message bigint,
    OUT refusal text, OUT mine messenger.participants, OUT message messenger.messages
) LANGUAGE plpgsql AS $$
BEGIN
    IF NOT messenger.session_is_live(_session, _user) THEN
        refusal := 'no_session';
        RETURN;
    END IF;
    -- Only a participant may wait for the lock, and may have left before it is ours.
    PERFORM FROM messenger.conversations AS c
    WHERE c.id = _conversation
      AND EXISTS (SELECT FROM messenger.participants AS p WHERE p.conversation_id = c.id AND p.user_id = _user)
    FOR NO KEY UPDATE;
    SELECT p.* INTO mine FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _user;
    IF NOT FOUND THEN
        refusal := 'no_conversation';
        RETURN;
    END IF;
    SELECT m.* INTO message
    FROM messenger.messages AS m
    WHERE m.id = _message AND m.conversation_id = _conversation AND m.number > mine.joined_number
      AND m.hidden_from IS DISTINCT FROM _user;
    IF NOT FOUND THEN
        refusal := 'no_message';
    END IF;
END
$$;
