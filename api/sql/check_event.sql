-- Rejects what no event can be (22023). The same rules as in `api/src/domain/published.rs`.
CREATE OR REPLACE FUNCTION messenger.check_event(_event text, _data text, _key text) RETURNS void LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    -- Three characters that some readers take for line ends are written as escapes of six bytes.
    _bytes CONSTANT bigint := octet_length(_data)
        + 4 * (length(_data) - length(replace(_data, chr(133), '')))
        + 3 * (length(_data) - length(translate(_data, chr(8232) || chr(8233), '')));
BEGIN
    IF _event IS NULL OR octet_length(_event) > 128
        OR _event COLLATE "C" !~ '^[A-Za-z][A-Za-z0-9]*([._:-][A-Za-z0-9]+)*$' THEN
        RAISE EXCEPTION 'messenger.publish: the event needs a name of letters and digits, in segments divided by one of . _ : -, '
            'of at most 128 bytes, not %', quote_nullable(left(_event, 200)) USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF lower(split_part(translate(_event, '_:-', '...'), '.', 1)) IN ('message', 'conversation', 'participant', 'receipt', 'user', 'typing',
        'presence', 'ready', 'resync', 'goodbye', 'error', 'open') THEN
        RAISE EXCEPTION 'messenger.publish: the first segment of % is reserved for our own events', _event
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF _bytes > 49152 THEN
        RAISE EXCEPTION 'messenger.publish: the data has % bytes, and 49152 is the most', _bytes
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF _key COLLATE "C" !~ '^[!-~]{1,128}$' THEN
        RAISE EXCEPTION 'messenger.publish: a key is 1 to 128 visible ASCII characters' USING ERRCODE = 'invalid_parameter_value';
    END IF;
END
$$;
REVOKE ALL ON FUNCTION messenger.check_event(text, text, text) FROM PUBLIC;
