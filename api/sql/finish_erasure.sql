-- The end of erasing one user, who has left all conversations: their keys and their feed go, at most `_most` rows in one call. NULL: nobody is
-- to be finished, or another replica does so. `finished`: nothing of them is left.
CREATE OR REPLACE FUNCTION messenger.finish_erasure(_most bigint, OUT erased_user bigint, OUT finished boolean) LANGUAGE plpgsql AS $$
DECLARE
    _deleted bigint;
BEGIN
    SELECT e.user_id INTO erased_user
    FROM messenger.erasures AS e
    WHERE e.finished_at IS NULL AND NOT EXISTS (SELECT FROM messenger.erasure_steps AS w WHERE w.user_id = e.user_id)
    ORDER BY e.begun_at LIMIT 1
    FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    finished := false;
    -- Commands that were under way when it began have this lock until they commit, if they made a conversation with the user. Any later one
    -- finds no head, and is repeated.
    PERFORM FROM messenger.feed_heads AS h WHERE h.user_id = erased_user FOR UPDATE;
    IF messenger.note_erasures(erased_user, false) > 0 THEN
        RETURN;
    END IF;
    DELETE FROM messenger.idempotency_keys AS k
    WHERE k.sender_id = erased_user AND k.key_hash IN (
        SELECT o.key_hash FROM messenger.idempotency_keys AS o WHERE o.sender_id = erased_user LIMIT _most
    );
    GET DIAGNOSTICS _deleted = ROW_COUNT;
    IF _deleted = _most THEN
        RETURN;
    END IF;
    DELETE FROM messenger.event_keys AS k
    WHERE k.user_id = erased_user AND k.key_hash IN (
        SELECT o.key_hash FROM messenger.event_keys AS o WHERE o.user_id = erased_user LIMIT _most
    );
    GET DIAGNOSTICS _deleted = ROW_COUNT;
    IF _deleted = _most THEN
        RETURN;
    END IF;
    -- What other back ends published to the user alone goes with its row in the feed. `count` says in how many feeds it is.
    WITH gone AS (
        DELETE FROM messenger.feed AS f
        WHERE f.user_id = erased_user AND f.seq IN (
            SELECT o.seq FROM messenger.feed AS o WHERE o.user_id = erased_user ORDER BY o.seq LIMIT _most
        )
        RETURNING -f.event_id AS event_id
    ), last AS (
        DELETE FROM messenger.events AS e USING gone WHERE e.id = gone.event_id AND e.data IS NOT NULL AND e.count = 1
    ), fewer AS (
        UPDATE messenger.events AS e SET count = e.count - 1 FROM gone
        WHERE e.id = gone.event_id AND e.data IS NOT NULL AND e.count > 1
    )
    SELECT count(*) INTO _deleted FROM gone;
    IF _deleted = _most THEN
        RETURN;
    END IF;
    DELETE FROM messenger.feed_heads AS h WHERE h.user_id = erased_user;
    UPDATE messenger.erasures AS e SET finished_at = clock_timestamp() WHERE e.user_id = erased_user;
    finished := true;
END
$$;
