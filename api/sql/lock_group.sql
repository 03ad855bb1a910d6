-- Locks a group's row, so that its members, their roles and its title change only in this transaction, for a change by the member
-- `_user`. `refusal`: no_session, no_conversation, not_a_group; NULL if it is locked.
CREATE OR REPLACE FUNCTION messenger.lock_group(
    _session bigint, _user bigint, _conversation bigint,
    OUT refusal text, OUT is_owner boolean, OUT title text, OUT participant_count bigint, OUT last_number bigint
) LANGUAGE plpgsql AS $$
DECLARE
    _is_group boolean;
BEGIN
    IF NOT messenger.session_is_live(_session, _user) THEN
        refusal := 'no_session';
        RETURN;
    END IF;
    -- Only a member may wait for the lock, and may have left before it is ours.
    FOR _attempt IN 1..2 LOOP
        SELECT p.is_owner INTO is_owner
        FROM messenger.participants AS p WHERE p.conversation_id = _conversation AND p.user_id = _user;
        IF NOT FOUND THEN
            refusal := 'no_conversation';
            RETURN;
        END IF;
        IF _attempt = 1 THEN
            SELECT c.user_a IS NULL, c.title, c.participant_count, c.last_number
            INTO _is_group, title, participant_count, last_number
            FROM messenger.conversations AS c WHERE c.id = _conversation FOR NO KEY UPDATE;
            IF _is_group IS NOT TRUE THEN
                refusal := 'not_a_group';
                RETURN;
            END IF;
        END IF;
    END LOOP;
END
$$;
