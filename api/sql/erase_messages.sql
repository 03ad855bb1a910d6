-- One step of erasing, in one conversation of an erased user: they leave it, and of the next `_scan` messages theirs are deleted, as many as
-- make about `_most_events` events. No row: no conversation is left, or other replicas work on those that are.
--
-- Rows are events, as `kind` says, each for one receiver. The last one has no `kind` and says where, and how many messages were `deleted`.
--
-- They leave first, under the lock of the conversation, so no message of theirs can follow those that are deleted. In a direct conversation
-- their row stays, so that the other one still sees a pair, and `erased_user` and `joined_number` keep everything from them.
CREATE OR REPLACE FUNCTION messenger.erase_messages(_scan bigint, _most_events bigint)
RETURNS TABLE (
    erased_user bigint, conversation_id bigint, deleted bigint,
    kind text, message_id bigint, about bigint, event_at timestamptz, receiver bigint, unread_count bigint, epoch bigint, seq bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    _step messenger.erasure_steps;
    _conversation messenger.conversations;
    _at timestamptz := clock_timestamp();
    _deleted bigint := 0;
    _most bigint;
    _to bigint;
    _scanned bigint;
    _left record;
    _ids bigint[];
    _events bigint[];
    _receivers bigint[];
    _messages bigint[];
    _told bigint[];
    _unread bigint[];
BEGIN
    SELECT w.* INTO _step FROM messenger.erasure_steps AS w ORDER BY w.user_id, w.conversation_id LIMIT 1 FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT c.* INTO _conversation FROM messenger.conversations AS c WHERE c.id = _step.conversation_id FOR NO KEY UPDATE;
    IF _conversation.user_a IS NULL THEN
        IF EXISTS (
            SELECT FROM messenger.participants AS p WHERE p.conversation_id = _step.conversation_id AND p.user_id = _step.user_id
        ) THEN
            SELECT * INTO _left FROM messenger.leave_group(_step.conversation_id, _step.user_id, NULL, NULL);
            _conversation.participant_count := _conversation.participant_count - 1;
            RETURN QUERY
            SELECT _step.user_id, _step.conversation_id, 0::bigint, l.kind, NULL::bigint,
                   CASE l.kind WHEN 'participant.left' THEN _step.user_id ELSE _left.successor END,
                   _left.event_at, l.receiver, NULL::bigint, l.epoch, l.seq
            FROM unnest(_left.receivers, _left.kinds, _left.epochs, _left.seqs) AS l (receiver, kind, epoch, seq);
        END IF;
    ELSIF _conversation.erased_user IS NULL THEN
        UPDATE messenger.conversations AS c SET erased_user = _step.user_id WHERE c.id = _step.conversation_id;
        UPDATE messenger.participants AS p
        SET joined_number = 9223372036854775807, last_message_id = NULL, last_number = NULL, list_seq = NULL, unread_count = 0
        WHERE p.conversation_id = _step.conversation_id AND p.user_id = _step.user_id;
    ELSIF _conversation.erased_user <> _step.user_id THEN
        -- Nobody is left: it goes as a group goes that its last member has left.
        DELETE FROM messenger.participants AS p WHERE p.conversation_id = _step.conversation_id;
        UPDATE messenger.conversations AS c SET participant_count = 0 WHERE c.id = _step.conversation_id;
        _conversation.participant_count := 0;
    END IF;

    SELECT max(o.number), count(*) INTO _to, _scanned
    FROM (
        SELECT m.number FROM messenger.messages AS m
        WHERE m.conversation_id = _step.conversation_id AND m.number > _step.done_number AND _conversation.participant_count > 0
        ORDER BY m.number LIMIT _scan
    ) AS o;
    _most := greatest(_most_events / greatest(_conversation.participant_count, 1), 1);
    SELECT array_agg(o.id ORDER BY o.number), CASE WHEN count(*) = _most THEN max(o.number) ELSE _to END INTO _ids, _to
    FROM (
        SELECT m.id, m.number FROM messenger.messages AS m
        WHERE m.conversation_id = _step.conversation_id AND m.number > _step.done_number AND m.number <= _to
          AND m.sender_id = _step.user_id AND m.deleted_at IS NULL
        ORDER BY m.number LIMIT _most
    ) AS o;
    IF _ids IS NOT NULL THEN
        _deleted := cardinality(_ids);
        UPDATE messenger.messages AS m SET content = '', deleted_at = _at, text_hidden_from = NULL WHERE m.id = ANY (_ids);
        WITH made AS (
            INSERT INTO messenger.events AS e (kind, conversation_id, message_id, created_at)
            SELECT 'message.deleted', _step.conversation_id, i.id, _at FROM unnest(_ids) AS i (id)
            RETURNING -e.id AS id, e.message_id
        )
        SELECT array_agg(made.message_id), array_agg(made.id) INTO _messages, _events FROM made;
        -- As in `delete_message`: to everybody who could see it, and it counted for those who had not read it.
        SELECT array_agg(p.user_id ORDER BY p.user_id, m.number), array_agg(m.id ORDER BY p.user_id, m.number),
               array_agg(e.id ORDER BY p.user_id, m.number),
               array_agg(CASE WHEN p.last_read_number < m.number THEN -1 ELSE 0 END ORDER BY p.user_id, m.number)
        INTO _receivers, _messages, _told, _unread
        FROM messenger.participants AS p
        CROSS JOIN unnest(_messages, _events) AS e (message_id, id)
        JOIN messenger.messages AS m
            ON m.id = e.message_id AND m.number > p.joined_number AND m.hidden_from IS DISTINCT FROM p.user_id
        WHERE p.conversation_id = _step.conversation_id;
        UPDATE messenger.participants AS p SET unread_count = p.unread_count + n.unread
        FROM (SELECT r.user_id, sum(r.unread) AS unread FROM unnest(_receivers, _unread) AS r (user_id, unread) GROUP BY r.user_id) AS n
        WHERE p.conversation_id = _step.conversation_id AND p.user_id = n.user_id AND n.unread <> 0;
        RETURN QUERY
        SELECT _step.user_id, _step.conversation_id, 0::bigint, 'message.deleted', a.message_id, NULL::bigint, _at, a.receiver,
               p.unread_count, a.epoch, a.seq
        FROM messenger.append_to_feeds(_receivers, _told, _unread) AS f
        CROSS JOIN LATERAL unnest(_receivers, _messages, f.epochs, f.seqs) AS a (receiver, message_id, epoch, seq)
        JOIN messenger.participants AS p ON p.conversation_id = _step.conversation_id AND p.user_id = a.receiver
        WHERE _receivers IS NOT NULL;
    END IF;
    IF _scanned < _scan AND _deleted < _most THEN
        DELETE FROM messenger.erasure_steps AS w WHERE w.user_id = _step.user_id AND w.conversation_id = _step.conversation_id;
    ELSE
        UPDATE messenger.erasure_steps AS w SET done_number = _to
        WHERE w.user_id = _step.user_id AND w.conversation_id = _step.conversation_id;
    END IF;
    RETURN QUERY
    SELECT _step.user_id, _step.conversation_id, _deleted,
           NULL, NULL::bigint, NULL::bigint, NULL::timestamptz, NULL::bigint, NULL::bigint, NULL::bigint, NULL::bigint;
END
$$;
