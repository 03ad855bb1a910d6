-- Creates the user of a subject of the external issuer, or changes them: for the back end that has their account. NULL leaves a value as
-- it is; a new user without a name gets one that is made up. Outcomes: created, updated, unchanged, taken.
--
-- The order of locks is that of `provision_user`: the identity first, then one name, and nothing after both.
CREATE OR REPLACE FUNCTION messenger.put_user(
    _issuer text, _subject text, _username text, _sets_avatar boolean, _avatar_url text,
    _small_group bigint, _most bigint, _request_id text, _traceparent text,
    OUT outcome text, OUT user_id bigint, OUT username text, OUT avatar_url text, OUT event_at timestamptz,
    OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
BEGIN
    -- Repeated if another request was quicker, or the user was deleted between two statements.
    FOR _attempt IN 1..5 LOOP
        SELECT i.user_id INTO put_user.user_id
        FROM messenger.identities AS i WHERE i.issuer = _issuer AND i.subject = _subject;
        IF FOUND THEN
            SELECT u.outcome, u.username, u.avatar_url, u.event_at, u.receivers, u.epochs, u.seqs
            INTO outcome, username, avatar_url, event_at, receivers, epochs, seqs
            FROM messenger.update_user(
                NULL, put_user.user_id, _username, _sets_avatar, _avatar_url, NULL, NULL, _small_group, _most, _request_id, _traceparent
            ) AS u;
            CONTINUE WHEN outcome = 'no_session';
            RETURN;
        END IF;

        user_id := nextval(pg_get_serial_sequence('messenger.users', 'id'));
        INSERT INTO messenger.identities AS i (issuer, subject, user_id) VALUES (_issuer, _subject, put_user.user_id)
        ON CONFLICT DO NOTHING;
        CONTINUE WHEN NOT FOUND;

        avatar_url := _avatar_url;
        LOOP
            username := coalesce(_username, 'user-' || left(replace(gen_random_uuid()::text, '-', ''), 10));
            INSERT INTO messenger.users AS u (id, username, avatar_url) OVERRIDING SYSTEM VALUE
            VALUES (put_user.user_id, put_user.username, put_user.avatar_url)
            ON CONFLICT ON CONSTRAINT users_username_key DO NOTHING;
            IF FOUND THEN
                outcome := 'created';
                RETURN;
            ELSIF _username IS NOT NULL THEN
                DELETE FROM messenger.identities AS i WHERE i.issuer = _issuer AND i.subject = _subject;
                outcome := 'taken';
                RETURN;
            END IF;
        END LOOP;
    END LOOP;
    RAISE EXCEPTION 'the identity keeps changing' USING ERRCODE = 'serialization_failure';
END
$$;
