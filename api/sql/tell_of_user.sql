-- Tells of a user's new name or avatar, by `user.updated`: the user and those to whom they matter, partners (a direct conversation in which
-- both have written) and members of groups of up to `_small_group`, but nobody who blocks the user. At most `_most` of them, by the newest
-- conversations: the head of each is locked until the commit, and all others see the change when they read next.
CREATE OR REPLACE FUNCTION messenger.tell_of_user(
    _user bigint, _small_group bigint, _most bigint, _request_id text, _traceparent text,
    OUT event_at timestamptz, OUT receivers bigint[], OUT epochs bigint[], OUT seqs bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    _event bigint;
BEGIN
    event_at := clock_timestamp();
    INSERT INTO messenger.events AS e (kind, user_id, request_id, traceparent, created_at)
    VALUES ('user.updated', _user, _request_id, _traceparent, event_at)
    RETURNING -e.id INTO _event;
    SELECT a.receivers, f.epochs, f.seqs INTO receivers, epochs, seqs
    FROM (
        SELECT array_agg(told.id ORDER BY told.id) AS receivers, array_agg(_event) AS events, array_agg(0::bigint) AS unread
        FROM (
            SELECT _user AS id
            UNION ALL
            SELECT newest.id
            FROM (
                SELECT o.user_id AS id, max(recent.list_seq) AS list_seq
                FROM (
                    SELECT p.conversation_id, p.list_seq FROM messenger.participants AS p
                    WHERE p.user_id = _user AND p.list_seq IS NOT NULL ORDER BY p.list_seq DESC LIMIT _most
                ) AS recent
                JOIN messenger.conversations AS c ON c.id = recent.conversation_id
                JOIN messenger.participants AS o ON o.conversation_id = c.id AND o.user_id <> _user
                WHERE CASE WHEN c.user_a IS NULL THEN c.participant_count <= _small_group
                           ELSE c.user_a_has_written AND c.user_b_has_written AND c.erased_user IS NULL END
                  AND NOT EXISTS (SELECT FROM messenger.blocks AS b WHERE b.blocker_id = o.user_id AND b.blocked_id = _user)
                GROUP BY o.user_id
                ORDER BY max(recent.list_seq) DESC, o.user_id
                LIMIT _most
            ) AS newest
        ) AS told
    ) AS a CROSS JOIN LATERAL messenger.append_to_feeds(a.receivers, a.events, a.unread) AS f;
END
$$;
