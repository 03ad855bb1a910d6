-- Appends an event to the feeds of all participants of a conversation whose row is locked.
CREATE OR REPLACE FUNCTION messenger.append_for_members(
    _conversation bigint, _event bigint, OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE sql AS $$
    SELECT a.receivers, f.epochs, f.seqs
    FROM (
        SELECT array_agg(p.user_id ORDER BY p.user_id) AS receivers, array_agg(_event) AS events, array_agg(0::bigint) AS unread
        FROM messenger.participants AS p WHERE p.conversation_id = _conversation
    ) AS a CROSS JOIN LATERAL messenger.append_to_feeds(a.receivers, a.events, a.unread) AS f
$$;
