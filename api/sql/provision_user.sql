-- The user of an identity; creates them at the first login. The name is used only then; later changes at the issuer do not
-- change it. The avatar follows, also when it is removed.
--
-- Of two first logins at the same time one claims the identity; the other waits at the primary key for that commit and then finds the
-- user. The order avoids deadlocks: the identity first, then one name, and nothing after both.
CREATE OR REPLACE FUNCTION messenger.provision_user(
    _issuer text, _subject text, _username text, _avatar_url text
) RETURNS TABLE (user_id bigint, created boolean) LANGUAGE plpgsql AS $$
DECLARE
    _name text := _username;
    _suffix integer := 1;
BEGIN
    -- Repeated if another login was quicker, or the user was deleted between two statements.
    FOR _attempt IN 1..5 LOOP
        SELECT i.user_id INTO provision_user.user_id
        FROM messenger.identities AS i WHERE i.issuer = _issuer AND i.subject = _subject;
        IF FOUND THEN
            UPDATE messenger.users AS u SET avatar_url = _avatar_url
            WHERE u.id = provision_user.user_id AND u.avatar_url IS DISTINCT FROM _avatar_url;
            -- Mostly nothing has changed, and then nothing is written or locked.
            IF FOUND OR EXISTS (SELECT FROM messenger.users AS u WHERE u.id = provision_user.user_id) THEN
                created := false;
                RETURN NEXT;
                RETURN;
            END IF;
            CONTINUE;
        END IF;

        user_id := nextval(pg_get_serial_sequence('messenger.users', 'id'));
        INSERT INTO messenger.identities AS i (issuer, subject, user_id) VALUES (_issuer, _subject, provision_user.user_id)
        ON CONFLICT DO NOTHING;
        CONTINUE WHEN NOT FOUND;

        -- name, name-2, …, name-20, and then random suffixes.
        LOOP
            INSERT INTO messenger.users AS u (id, username, avatar_url) OVERRIDING SYSTEM VALUE
            VALUES (provision_user.user_id, _name, _avatar_url)
            ON CONFLICT (username) DO NOTHING;
            EXIT WHEN FOUND;
            _suffix := _suffix + 1;
            IF _suffix > 30 THEN
                RAISE EXCEPTION 'no free name was found';
            END IF;
            _name := _username || '-' || CASE WHEN _suffix <= 20 THEN _suffix::text ELSE left(gen_random_uuid()::text, 8) END;
        END LOOP;
        created := true;
        RETURN NEXT;
        RETURN;
    END LOOP;
    RAISE EXCEPTION 'the identity keeps changing' USING ERRCODE = 'serialization_failure';
END
$$;
