-- One turn of the relay: appends what other back ends have staged and committed to the feeds, in its order, within the three bounds.
--
-- The first row says how it went: `passive` (another replica relays), `idle` (nothing was there), `relayed`, with the number of staged
-- events taken and whether there may be more; and what to pass to the next turn. After `relayed` follows a row for each event that has
-- receivers.
--
-- Nothing scans what earlier turns have taken: while any transaction is open, Postgres keeps those dead rows. Of the rows that are
-- visible and not taken, each is beyond (`_from_xid`, `_from_id`), or of a transaction that `_looked`, the snapshot of the look before, saw
-- in progress and that has ended since. A look that takes all it sees continues from its snapshot's end; one that is cut, from the last row
-- it took. `_looked` NULL: looks at everything.
CREATE OR REPLACE FUNCTION messenger.relay_events(
    _me bigint, _renew boolean, _issuer text, _looked pg_snapshot, _from_xid xid8, _from_id bigint,
    _most_events bigint, _most_receivers bigint, _most_bytes bigint
) RETURNS TABLE (
    outcome text, looked text, from_xid text, from_id bigint, taken bigint, more boolean,
    name text, data text, request_id text, traceparent text, created_at timestamptz, receivers bigint[], epochs bigint[], seqs bigint[]
)
-- The planner knows neither how many rows a turn has nor how many are dead.
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_nestloop = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
    _rows tid[];
    _users bigint[];
    _seen bigint;
    _now timestamptz;
BEGIN
    IF _renew THEN
        PERFORM FROM messenger.relay AS r
        WHERE r.holder = _me OR r.renewed_at < clock_timestamp() - interval '1.2 seconds' FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            outcome := 'passive';
            RETURN NEXT;
            RETURN;
        END IF;
        UPDATE messenger.relay AS r SET holder = _me, renewed_at = clock_timestamp();
        UPDATE messenger.external_issuer AS e SET issuer = _issuer WHERE e.issuer IS DISTINCT FROM _issuer;
    END IF;

    SELECT pg_current_snapshot()::text, count(*), array_agg(s.place) FILTER (WHERE s.fits),
           coalesce((array_agg(s.xid ORDER BY s.xid DESC, s.id DESC) FILTER (WHERE s.fits))[1]::text, _from_xid::text),
           coalesce((array_agg(s.id ORDER BY s.xid DESC, s.id DESC) FILTER (WHERE s.fits))[1], _from_id)
    INTO looked, _seen, _rows, from_xid, from_id
    FROM (
        SELECT c.place, c.xid, c.id,
               row_number() OVER so_far = 1
                   OR sum(c.receivers) OVER so_far <= _most_receivers AND sum(c.receivers * c.bytes) OVER so_far <= _most_bytes AS fits
        FROM (
            (
                SELECT e.ctid AS place, e.xid, e.id, cardinality(e.receivers) AS receivers, octet_length(e.data) AS bytes
                FROM messenger.staged_events AS e
                WHERE (e.xid, e.id) > (_from_xid, _from_id)
                ORDER BY e.xid, e.id LIMIT _most_events
            ) UNION ALL (
                SELECT e.place, e.xid, e.id, e.receivers, e.bytes
                FROM (
                    SELECT x.xid FROM pg_snapshot_xip(_looked) AS x (xid) WHERE pg_visible_in_snapshot(x.xid, pg_current_snapshot())
                ) AS ended
                CROSS JOIN LATERAL (
                    SELECT e.ctid AS place, e.xid, e.id, cardinality(e.receivers) AS receivers, octet_length(e.data) AS bytes
                    FROM messenger.staged_events AS e
                    WHERE e.xid = ended.xid AND (e.xid, e.id) <= (_from_xid, _from_id)
                    ORDER BY e.xid, e.id LIMIT _most_events
                ) AS e
            )
            ORDER BY 2, 3 LIMIT _most_events
        ) AS c
        WINDOW so_far AS (ORDER BY c.xid, c.id)
    ) AS s;
    taken := coalesce(cardinality(_rows), 0);
    more := taken < _seen OR _seen = _most_events;
    IF NOT more THEN
        from_xid := pg_snapshot_xmax(looked::pg_snapshot)::text;
        from_id := 0;
    END IF;
    IF taken = 0 THEN
        outcome := 'idle';
        RETURN NEXT;
        RETURN;
    END IF;

    PERFORM FROM messenger.relay AS r WHERE r.holder = _me FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        outcome := 'passive';
        RETURN NEXT;
        RETURN;
    END IF;
    outcome := 'relayed';
    RETURN NEXT;

    -- Users who were deleted meanwhile are skipped: they have no head any more. The others' heads are locked in the order of their ids.
    SELECT array_agg(DISTINCT r.user_id) INTO _users
    FROM messenger.staged_events AS e CROSS JOIN LATERAL unnest(e.receivers) AS r (user_id)
    WHERE e.ctid = ANY (_rows);
    SELECT coalesce(array_agg(l.user_id), '{}') INTO _users
    FROM (
        SELECT h.user_id FROM messenger.feed_heads AS h WHERE h.user_id = ANY (_users) ORDER BY h.user_id FOR NO KEY UPDATE
    ) AS l;
    _now := clock_timestamp();

    RETURN QUERY
    WITH staged AS MATERIALIZED (
        DELETE FROM messenger.staged_events AS e WHERE e.ctid = ANY (_rows) RETURNING e.*
    ), pair AS MATERIALIZED (
        SELECT e.xid, e.id, r.user_id, e.key_hash,
               row_number() OVER (PARTITION BY r.user_id, e.key_hash ORDER BY e.xid, e.id) = 1 AS is_first
        FROM staged AS e
        CROSS JOIN LATERAL unnest(e.receivers) AS r (user_id)
        JOIN unnest(_users) AS known (user_id) ON known.user_id = r.user_id
    ), kept AS MATERIALIZED (
        SELECT p.id, p.user_id, p.key_hash, row_number() OVER (PARTITION BY p.user_id ORDER BY p.xid, p.id) AS nth
        FROM pair AS p
        LEFT JOIN LATERAL (
            SELECT true AS is_used FROM messenger.event_keys AS k
            WHERE p.key_hash IS NOT NULL AND k.user_id = p.user_id AND k.key_hash = p.key_hash LIMIT 1
        ) AS k ON true
        WHERE p.key_hash IS NULL OR p.is_first AND k.is_used IS NULL
    ), moved AS (
        UPDATE messenger.feed_heads AS h SET head_seq = h.head_seq + n.events
        FROM (SELECT k.user_id, count(*) AS events FROM kept AS k GROUP BY k.user_id) AS n
        WHERE h.user_id = n.user_id AND h.user_id = ANY (_users)
        RETURNING h.user_id, h.epoch, h.head_seq - n.events AS before
    ), numbered AS MATERIALIZED (
        SELECT k.id, k.user_id, k.key_hash, m.epoch, m.before + k.nth AS seq FROM kept AS k JOIN moved AS m ON m.user_id = k.user_id
    ), appended AS (
        INSERT INTO messenger.feed (user_id, seq, event_id) SELECT p.user_id, p.seq, -p.id FROM numbered AS p
    ), remembered AS (
        INSERT INTO messenger.event_keys (user_id, key_hash, seq)
        SELECT p.user_id, p.key_hash, p.seq FROM numbered AS p WHERE p.key_hash IS NOT NULL
    ), received AS MATERIALIZED (
        SELECT e.xid, e.id, e.name, e.data, e.request_id, e.traceparent, g.receivers, g.epochs, g.seqs
        FROM (
            SELECT p.id, array_agg(p.user_id) AS receivers, array_agg(p.epoch) AS epochs, array_agg(p.seq) AS seqs
            FROM numbered AS p GROUP BY p.id
        ) AS g
        JOIN staged AS e ON e.id = g.id
    ), stored AS (
        INSERT INTO messenger.events (id, kind, data, count, request_id, traceparent, created_at) OVERRIDING SYSTEM VALUE
        SELECT r.id, r.name, r.data, cardinality(r.receivers), r.request_id, r.traceparent, _now FROM received AS r
    )
    SELECT 'event', NULL, NULL, NULL::bigint, NULL::bigint, NULL::boolean,
           r.name, r.data, r.request_id, r.traceparent, _now, r.receivers, r.epochs, r.seqs
    FROM received AS r ORDER BY r.xid, r.id;
END
$$;
