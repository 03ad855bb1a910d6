-- A token of a foreign issuer has no session here: it is good until it expires, as long as its user exists.
CREATE OR REPLACE FUNCTION session_is_live(_session bigint, _user bigint) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF _session IS NULL THEN
        RETURN EXISTS (SELECT FROM users AS u WHERE u.id = _user);
    END IF;
    RETURN EXISTS (SELECT FROM sessions AS s
                   WHERE s.id = _session AND s.user_id = _user AND s.revoked_at IS NULL AND s.expires_at > now());
END
$$;
