-- The user of a typed name: the one with exactly this name, or with the same text in another normal form; otherwise the only one
-- whose name is equal when folded.
CREATE OR REPLACE FUNCTION messenger.find_user(_name text) RETURNS bigint LANGUAGE plpgsql STABLE STRICT AS $$
DECLARE
    _user bigint;
BEGIN
    SELECT u.id INTO _user
    FROM messenger.users AS u WHERE u.username IN (_name, normalize(_name), normalize(_name, NFD))
    ORDER BY u.username = _name DESC, u.username = normalize(_name) DESC
    LIMIT 1;
    IF FOUND THEN
        RETURN _user;
    END IF;
    SELECT CASE WHEN count(*) = 1 THEN min(alike.id) END INTO _user
    FROM (
        SELECT u.id FROM messenger.users AS u
        WHERE messenger.fold_name(u.username) COLLATE "C" = messenger.fold_name(_name) LIMIT 2
    ) AS alike;
    RETURN _user;
END
$$;
