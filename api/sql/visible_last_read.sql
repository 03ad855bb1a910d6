-- How far a user has read, as the other one may see it: not beyond the last message that the other one sees.
CREATE OR REPLACE FUNCTION messenger.visible_last_read(_last_read bigint, _last_visible bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN _last_read IS NULL OR _last_visible IS NULL THEN NULL ELSE least(_last_read, _last_visible) END
$$;
