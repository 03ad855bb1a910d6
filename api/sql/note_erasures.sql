-- Notes the conversations in which an erased user has yet to leave or, at the first time, `_formerly`, may have messages. Returns how many
-- are new.
CREATE OR REPLACE FUNCTION messenger.note_erasures(_user bigint, _formerly boolean) RETURNS bigint LANGUAGE sql AS $$
    WITH noted AS (
        INSERT INTO messenger.erasure_steps (user_id, conversation_id)
        SELECT _user, c.id FROM messenger.conversations AS c
        WHERE (c.user_a = _user OR c.user_b = _user) AND c.erased_user IS DISTINCT FROM _user AND c.participant_count > 0
        UNION
        SELECT _user, p.conversation_id
        FROM messenger.participants AS p JOIN messenger.conversations AS c ON c.id = p.conversation_id
        WHERE p.user_id = _user AND p.list_seq IS NOT NULL AND c.user_a IS NULL
        UNION
        SELECT _user, f.conversation_id FROM messenger.former_participants AS f WHERE _formerly AND f.user_id = _user
        ON CONFLICT DO NOTHING
        RETURNING 1
    )
    SELECT count(*) FROM noted
$$;
