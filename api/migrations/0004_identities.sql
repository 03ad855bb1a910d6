-- Who a user is elsewhere, and how a login there becomes one here.

-- One account at an issuer (GitHub's base URL, an OpenID Connect issuer, an issuer of tokens) is one user. A user may have
-- several. The name at the issuer is no part of it: names change hands, subjects do not.
CREATE TABLE identities (
    issuer     text        NOT NULL CHECK (issuer <> ''),
    subject    text        NOT NULL CHECK (subject <> ''),
    -- Checked at the commit, because `provision_user` claims the identity first and makes its user then.
    user_id    bigint      NOT NULL REFERENCES users ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (issuer, subject)
);

-- The cascade from users.
CREATE INDEX identities_by_user ON identities (user_id);

-- The user of an identity, made if it has none. The name is only for a new user: it is theirs from then on, whatever they are
-- called elsewhere later. The avatar follows, also when there is none any more.
--
-- Of two first logins at once one claims the identity; the other waits at the primary key for that commit, and then finds a
-- user. Nobody waits in a circle: identity first, then one name, and who has both waits for nothing more.
CREATE FUNCTION provision_user(
    _issuer text, _subject text, _username text, _avatar_url text
) RETURNS TABLE (user_id bigint, created boolean) LANGUAGE plpgsql AS $$
DECLARE
    _name text := _username;
    _suffix integer := 1;
BEGIN
    -- Again, when somebody else was quicker, or when the user was deleted between two statements.
    FOR _attempt IN 1..5 LOOP
        SELECT i.user_id INTO provision_user.user_id
        FROM identities AS i WHERE i.issuer = _issuer AND i.subject = _subject;
        IF FOUND THEN
            UPDATE users AS u SET avatar_url = _avatar_url
            WHERE u.id = provision_user.user_id AND u.avatar_url IS DISTINCT FROM _avatar_url;
            -- Nearly always nothing has changed, and then nothing is written or locked.
            IF FOUND OR EXISTS (SELECT FROM users AS u WHERE u.id = provision_user.user_id) THEN
                created := false;
                RETURN NEXT;
                RETURN;
            END IF;
            CONTINUE;
        END IF;

        user_id := nextval(pg_get_serial_sequence('users', 'id'));
        INSERT INTO identities AS i (issuer, subject, user_id) VALUES (_issuer, _subject, provision_user.user_id)
        ON CONFLICT DO NOTHING;
        CONTINUE WHEN NOT FOUND;

        -- name, name-2, …, name-20, and then names that nobody has.
        LOOP
            INSERT INTO users AS u (id, username, avatar_url) OVERRIDING SYSTEM VALUE
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

-- A login that is over at the provider, and waits for its page to fetch the token: a minute, once. The code travels in a URL, so
-- it is worth nothing without the cookie that the same answer set in the same browser. Only hashes of both are kept: who reads
-- this table cannot log in by it.
CREATE TABLE login_codes (
    code_hash    bytea       PRIMARY KEY CHECK (length(code_hash) = 32),
    binding_hash bytea       NOT NULL CHECK (length(binding_hash) = 32),
    user_id      bigint      NOT NULL REFERENCES users ON DELETE CASCADE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL
);

-- The cascade from users, and the deletion of what nobody fetched.
CREATE INDEX login_codes_by_user ON login_codes (user_id);
CREATE INDEX login_codes_by_end ON login_codes (expires_at);
