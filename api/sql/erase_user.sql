-- Begins to erase a user: from its commit on there is no such user, no session and no name. Their messages are deleted in steps
-- (`erase_messages`, `finish_erasure`), by any replica. Outcomes: begun, erased (earlier), no_user.
--
-- `sessions`: those that ended. `user.updated` tells those to whom the user matters.
CREATE OR REPLACE FUNCTION messenger.erase_user(
    _user bigint, _small_group bigint, _most bigint, _request_id text, _traceparent text,
    OUT outcome text, OUT sessions bigint[], OUT event_at timestamptz, OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
BEGIN
    -- As in `update_user`: the row first, then feed heads by user id.
    PERFORM FROM messenger.users AS u WHERE u.id = _user FOR UPDATE;
    IF NOT FOUND THEN
        outcome := CASE WHEN EXISTS (SELECT FROM messenger.erasures AS e WHERE e.user_id = _user) THEN 'erased' ELSE 'no_user' END;
        RETURN;
    END IF;
    outcome := 'begun';
    INSERT INTO messenger.erasures (user_id) VALUES (_user);
    PERFORM messenger.note_erasures(_user, true);
    -- In the order of ids, as ending sessions locks them.
    SELECT array_agg(s.id) INTO sessions
    FROM (SELECT s.id FROM messenger.sessions AS s WHERE s.user_id = _user ORDER BY s.id FOR UPDATE) AS s;
    SELECT t.event_at, t.receivers, t.epochs, t.seqs INTO event_at, receivers, epochs, seqs
    FROM messenger.tell_of_user(_user, _small_group, _most, _request_id, _traceparent) AS t;
    -- With it go identities, sessions, login codes, blocks of both sides and `last_seen`.
    DELETE FROM messenger.users AS u WHERE u.id = _user;
END
$$;
