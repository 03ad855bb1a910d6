-- Whether a token of this session and user is still valid. A token of an external issuer has no session: it is valid until it expires, as
-- long as its user exists.
--
-- PL/pgSQL keeps its plan; plain SQL would be planned again at every call from another function.
CREATE OR REPLACE FUNCTION messenger.session_is_live(_session bigint, _user bigint) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF _session IS NULL THEN
        RETURN EXISTS (SELECT FROM messenger.users AS u WHERE u.id = _user);
    END IF;
    RETURN EXISTS (SELECT FROM messenger.sessions AS s
                   WHERE s.id = _session AND s.user_id = _user AND s.revoked_at IS NULL AND s.expires_at > now());
END
$$;
