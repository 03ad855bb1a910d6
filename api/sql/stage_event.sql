-- Stages an event for one user, in the transaction of a host. Callers of `publish` run this with the rights of its owner.
CREATE OR REPLACE FUNCTION messenger.stage_event(_receiver bigint, _event text, _data text, _key text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO messenger.staged_events (receivers, name, data, key_hash)
    VALUES (ARRAY[_receiver], _event, _data, substr(sha256(convert_to(_key, 'UTF8')), 1, 16));
END
$$;
REVOKE ALL ON FUNCTION messenger.stage_event(bigint, text, text, text) FROM PUBLIC;
