-- The participants of a conversation as each of them (`reader`) sees the others. What another one has read is shown only within what
-- the reader sees.
CREATE OR REPLACE VIEW messenger.seen_participants AS
SELECT p.conversation_id, me.user_id AS reader, p.user_id, u.username, u.avatar_url, p.is_owner, p.joined_at,
       CASE WHEN p.user_id = me.user_id THEN p.last_read_message_id
            WHEN p.last_read_number > me.joined_number THEN
                messenger.visible_last_read(p.last_read_message_id, p.last_read_number, me.last_message_id, me.last_number)
       END AS last_read_message_id
FROM messenger.participants AS me
JOIN messenger.participants AS p ON p.conversation_id = me.conversation_id
LEFT JOIN messenger.users AS u ON u.id = p.user_id;
