-- Conversations as each of their users (`reader`) sees them, for lists, answers and events alike. A message whose text is hidden from the
-- reader is shown as deleted, here and wherever messages are read.
CREATE OR REPLACE VIEW messenger.seen_conversations AS
SELECT p.conversation_id AS id, p.user_id AS reader, p.list_seq, c.user_a IS NULL AS is_group, c.title, c.participant_count, p.is_owner,
       p.joined_number, p.unread_count, p.last_read_message_id, p.last_read_number,
       messenger.visible_last_read(o.last_read_message_id, o.last_read_number, p.last_message_id, p.last_number)
           AS other_last_read_message_id,
       o.last_read_number AS other_last_read_number,
       p.other_user_id AS other_id, u.username AS other_username, u.avatar_url AS other_avatar_url,
       m.id AS message_id, m.created_at AS message_created_at,
       CASE WHEN m.text_hidden_from = p.user_id THEN '' ELSE m.content END AS message_content,
       CASE WHEN m.text_hidden_from = p.user_id THEN NULL ELSE m.edited_at END AS message_edited_at,
       CASE WHEN m.text_hidden_from = p.user_id THEN m.edited_at ELSE m.deleted_at END AS message_deleted_at,
       m.sender_id, s.username AS sender_username, s.avatar_url AS sender_avatar_url
FROM messenger.participants AS p
JOIN messenger.conversations AS c ON c.id = p.conversation_id
LEFT JOIN messenger.participants AS o ON o.conversation_id = p.conversation_id AND o.user_id = p.other_user_id
LEFT JOIN messenger.users AS u ON u.id = p.other_user_id
LEFT JOIN messenger.messages AS m ON m.id = p.last_message_id
LEFT JOIN messenger.users AS s ON s.id = m.sender_id;
