-- Who there is, who is logged in, and what they wrote to each other.
--
-- Ids are 64-bit identities: small, ordered, never reused. Clients see them as strings and must not read anything into them.

CREATE TABLE users (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- Exactly as the person wrote it. Login and "start a conversation" compare it exactly.
    username   text        NOT NULL UNIQUE CHECK (username <> ''),
    avatar_url text,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Search by prefix, whatever the case. By the "C" collation a prefix is a range, and the second column gives the answer its
-- order, so that the first five are read and nothing is sorted, however many people share a prefix.
CREATE INDEX users_by_folded_name ON users ((lower(username) COLLATE "C"), username COLLATE "C");

-- One login of one user: the `sid` of a token. A token is good only while its session is, so logging out is a matter of
-- one row, and no token needs to be remembered. `last_used_at` moves when the token is refreshed, not at each request: a
-- write per read would cost more than it tells.
CREATE TABLE sessions (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id      bigint      NOT NULL REFERENCES users ON DELETE CASCADE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    revoked_at   timestamptz
);

-- "My sessions", and the cascade from users.
CREATE INDEX sessions_by_user ON sessions (user_id);

-- Two people have one conversation, and the table says so: the pair is kept in one order, and is unique. Two who start it
-- at the same moment meet at the constraint.
CREATE TABLE conversations (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_a     bigint      NOT NULL REFERENCES users ON DELETE CASCADE,
    user_b     bigint      NOT NULL REFERENCES users ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT conversations_pair_in_order CHECK (user_a < user_b),
    CONSTRAINT conversations_one_per_pair UNIQUE (user_a, user_b)
);

-- The cascade from the second of the pair; the first is served by the unique index.
CREATE INDEX conversations_by_user_b ON conversations (user_b);

-- A conversation as one of its two people sees it. It repeats what could be computed (the other one, the last message, the
-- count of unread ones) because the list of conversations is the most read page of all, and must cost one index scan.
-- All of it changes only under the lock of the conversation's row.
--
-- Every message updates two of these rows and all their indexes, so there are no more of these than are read. The people
-- are named by the conversation, whose foreign keys hold for both; here they need none of their own.
CREATE TABLE participants (
    conversation_id      bigint NOT NULL REFERENCES conversations ON DELETE CASCADE,
    user_id              bigint NOT NULL,
    other_user_id        bigint NOT NULL,
    -- Both are ids of messages of this conversation, without foreign keys: only the functions of a later migration write
    -- them, from a message they have just made or read, and messages are not deleted one by one.
    last_message_id      bigint,
    last_read_message_id bigint,
    unread_count         bigint NOT NULL DEFAULT 0 CHECK (unread_count >= 0),
    PRIMARY KEY (conversation_id, user_id)
);

-- The list of conversations in its order. Those without a message are not in the list, so not in the index. It is unique,
-- which is what makes paging by it exact: a message is the last one of one conversation only.
CREATE UNIQUE INDEX participants_by_last_message ON participants (user_id, last_message_id DESC)
    WHERE last_message_id IS NOT NULL;

-- Ids are drawn under the lock of the conversation's row, so within a conversation they grow in the order of commits:
-- order, paging and read positions use the id, never a clock.
CREATE TABLE messages (
    id              bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    conversation_id bigint      NOT NULL,
    sender_id       bigint      NOT NULL,
    content         text        NOT NULL CHECK (content <> ''),
    -- What the sender's client calls this send, so that a repeat is recognised, whichever replica it reaches.
    idempotency_key text,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- One key that says two things: the conversation exists, and the sender takes part in it.
    FOREIGN KEY (conversation_id, sender_id) REFERENCES participants (conversation_id, user_id) ON DELETE CASCADE
);

-- Paging, and counting what is unread.
CREATE INDEX messages_by_conversation ON messages (conversation_id, id);

-- Most messages come with a key, but those without need no place here.
CREATE UNIQUE INDEX messages_by_idempotency_key ON messages (sender_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
