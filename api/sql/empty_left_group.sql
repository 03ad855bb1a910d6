-- Removes the next texts, at most `_most`, of one group that its last member has left, and at the end its title. `conversation`: which;
-- null if there is none. Another replica may empty another group meanwhile.
CREATE OR REPLACE FUNCTION messenger.empty_left_group(_most integer, OUT conversation bigint, OUT emptied bigint) LANGUAGE plpgsql AS $$
DECLARE
    _emptied bigint;
    _to bigint;
BEGIN
    SELECT c.id, c.emptied_number INTO conversation, _emptied
    FROM messenger.conversations AS c
    WHERE c.participant_count = 0 AND c.emptied_at IS NULL
    ORDER BY c.id LIMIT 1
    FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT max(o.number), count(*) INTO _to, emptied
    FROM (
        SELECT m.number FROM messenger.messages AS m
        WHERE m.conversation_id = conversation AND m.number > _emptied
        ORDER BY m.number LIMIT _most
    ) AS o;
    UPDATE messenger.messages AS m
    SET content = '', deleted_at = coalesce(m.deleted_at, clock_timestamp()), text_hidden_from = NULL
    WHERE m.conversation_id = conversation AND m.number > _emptied AND m.number <= _to;
    UPDATE messenger.conversations AS c
    SET emptied_number = coalesce(_to, c.emptied_number),
        emptied_at = CASE WHEN emptied < _most THEN clock_timestamp() END,
        title = CASE WHEN emptied < _most THEN NULL ELSE c.title END
    WHERE c.id = conversation;
END
$$;
