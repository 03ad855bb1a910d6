-- The last message that a user has read, as the other one may see it: not beyond the last message that the other one sees.
CREATE OR REPLACE FUNCTION messenger.visible_last_read(
    _read_id bigint, _read_number bigint, _visible_id bigint, _visible_number bigint
) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN _read_number <= _visible_number THEN _read_id WHEN _read_number > _visible_number THEN _visible_id END
$$;
