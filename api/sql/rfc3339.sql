-- The one form of a time in JSON: RFC 3339, UTC, microseconds.
CREATE OR REPLACE FUNCTION messenger.rfc3339(_at timestamptz) RETURNS text LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT to_char(_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
$$;
