-- A conversation as `_reader` sees it, with its last message: the same JSON as the REST response.
CREATE OR REPLACE FUNCTION messenger.conversation_json(_conversation bigint, _reader bigint) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT row_to_json(c)::text
    FROM (
        SELECT p.conversation_id::text AS id,
               (SELECT row_to_json(o) FROM (
                   SELECT u.id::text AS id, u.username, u.avatar_url AS "avatarURL"
                   FROM messenger.users AS u WHERE u.id = p.other_user_id
               ) AS o) AS "otherParticipant",
               (SELECT row_to_json(l) FROM (
                   SELECT m.id::text AS id, m.content, messenger.rfc3339(m.created_at) AS "createdAt",
                          m.sender_id = _reader AS mine
                   FROM messenger.messages AS m WHERE m.id = p.last_message_id
               ) AS l) AS "lastMessage",
               p.unread_count > 0 AS "hasUnreadMessages",
               p.unread_count AS "unreadCount",
               p.last_read_message_id::text AS "lastReadMessageId",
               messenger.visible_last_read(other.last_read_message_id, p.last_message_id)::text AS "otherLastReadMessageId"
        FROM messenger.participants AS p
        JOIN messenger.participants AS other
            ON other.conversation_id = p.conversation_id AND other.user_id = p.other_user_id
        WHERE p.conversation_id = _conversation AND p.user_id = _reader
    ) AS c
$$;
