-- Changes a user's profile; NULL leaves a value as it is. Outcomes: updated, unchanged, taken, no_session.
--
-- `tell_of_user` says who receives `user.updated`.
CREATE OR REPLACE FUNCTION messenger.update_user(
    _session bigint, _user bigint, _username text, _sets_avatar boolean, _avatar_url text, _shares_presence boolean, _addable_by text,
    _small_group bigint, _most bigint, _request_id text, _traceparent text,
    OUT outcome text, OUT username text, OUT avatar_url text, OUT shares_presence boolean, OUT addable_by text, OUT event_at timestamptz,
    OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _before messenger.users;
BEGIN
    IF NOT messenger.session_is_live(_session, _user) THEN
        outcome := 'no_session';
        RETURN;
    END IF;
    -- The row first, then feed heads by user id.
    SELECT u.* INTO _before FROM messenger.users AS u WHERE u.id = _user FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        outcome := 'no_session';
        RETURN;
    END IF;
    username := coalesce(_username, _before.username);
    avatar_url := CASE WHEN _sets_avatar THEN _avatar_url ELSE _before.avatar_url END;
    shares_presence := coalesce(_shares_presence, _before.shares_presence);
    addable_by := coalesce(_addable_by, _before.addable_by);
    outcome := 'unchanged';
    IF (username, avatar_url, shares_presence, addable_by)
        IS NOT DISTINCT FROM (_before.username, _before.avatar_url, _before.shares_presence, _before.addable_by) THEN
        RETURN;
    END IF;
    BEGIN
        UPDATE messenger.users AS u
        SET username = update_user.username, avatar_url = update_user.avatar_url,
            shares_presence = update_user.shares_presence, addable_by = update_user.addable_by
        WHERE u.id = _user;
    EXCEPTION WHEN unique_violation THEN
        outcome := 'taken';
        RETURN;
    END;
    outcome := 'updated';
    -- Others see no more of a user than this.
    IF (username, avatar_url) IS NOT DISTINCT FROM (_before.username, _before.avatar_url) THEN
        RETURN;
    END IF;
    SELECT t.event_at, t.receivers, t.epochs, t.seqs INTO event_at, receivers, epochs, seqs
    FROM messenger.tell_of_user(_user, _small_group, _most, _request_id, _traceparent) AS t;
END
$$;
