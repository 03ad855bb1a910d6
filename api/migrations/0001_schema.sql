-- Everything lives in the schema `messenger`, beside whatever else the database holds. Names are qualified wherever they are used,
-- so nothing depends on `search_path`, which a pooler in transaction mode does not keep. `migrate` creates the schema itself.
--
-- Here are the tables, and the functions that tables are made of. All other functions are in `api/sql`.
--
-- Ids are 64-bit identities: small, ordered, never reused. Clients see them as strings and must not interpret them.

CREATE TABLE messenger.users (
    id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- As the user wrote it, in Unicode's normal form C (RFC 8265).
    username   text        NOT NULL UNIQUE CHECK (username <> ''),
    avatar_url text,
    -- Whether partners may know when they are online.
    shares_presence boolean NOT NULL DEFAULT true,
    -- Who may add them to a group.
    addable_by text        NOT NULL DEFAULT 'everybody' CHECK (addable_by IN ('everybody', 'partners', 'nobody')),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- ANALYZE copies samples of a column into `pg_statistic`, where the name of an erased user, like a deleted text, would stay. No plan needs
-- those: names and subjects are looked up in unique indexes.
ALTER TABLE messenger.users ALTER COLUMN username SET STATISTICS 0;
ALTER TABLE messenger.users ALTER COLUMN avatar_url SET STATISTICS 0;

-- One account at an issuer (GitHub's base URL, an OpenID Connect issuer, an issuer of tokens) is one user; a user may have several.
-- The name at the issuer is not part of the key: names change hands, subjects do not.
CREATE TABLE messenger.identities (
    issuer     text        NOT NULL CHECK (issuer <> ''),
    subject    text        NOT NULL CHECK (subject <> ''),
    -- Checked at commit, because `provision_user` claims the identity first and then creates its user.
    user_id    bigint      NOT NULL REFERENCES messenger.users ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (issuer, subject)
);

ALTER TABLE messenger.identities ALTER COLUMN subject SET STATISTICS 0;

-- For the cascade from users.
CREATE INDEX identities_by_user ON messenger.identities (user_id);

-- A login that a provider has confirmed and whose page has not fetched the token yet: valid for a minute, once. The code travels in a
-- URL, so it is worthless without the cookie that the same response set in the same browser. Only hashes of both are stored.
CREATE TABLE messenger.login_codes (
    code_hash    bytea       PRIMARY KEY CHECK (length(code_hash) = 32),
    binding_hash bytea       NOT NULL CHECK (length(binding_hash) = 32),
    user_id      bigint      NOT NULL REFERENCES messenger.users ON DELETE CASCADE,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL
);

-- For the cascade from users, and for deleting expired codes.
CREATE INDEX login_codes_by_user ON messenger.login_codes (user_id);
CREATE INDEX login_codes_by_expiry ON messenger.login_codes (expires_at);

-- One login of one user: the `sid` of a token. A token is valid only while its session is live, so a logout updates one row and no
-- token is remembered.
CREATE TABLE messenger.sessions (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id      bigint      NOT NULL REFERENCES messenger.users ON DELETE CASCADE,
    -- What the user recognises the session by: "Firefox on Linux", from the User-Agent of the login.
    device       text        NOT NULL DEFAULT '' CHECK (length(device) <= 64),
    created_at   timestamptz NOT NULL DEFAULT now(),
    -- Coarse: a write per request would cost more than it tells.
    last_used_at timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,
    revoked_at   timestamptz
);

-- For the list of a user's sessions, and the cascade from users.
CREATE INDEX sessions_by_user ON messenger.sessions (user_id);

-- Other back ends. A token is 32 random bytes, so its hash need not be slow; it is deleted when it is revoked.
CREATE TABLE messenger.service_tokens (
    id           bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name         text        NOT NULL CONSTRAINT service_tokens_name UNIQUE CHECK (name <> ''),
    token_hash   bytea       NOT NULL UNIQUE CHECK (length(token_hash) = 32),
    scopes       text[]      NOT NULL CHECK (scopes <@ ARRAY['publish', 'users', 'admin'] AND cardinality(scopes) > 0),
    created_at   timestamptz NOT NULL DEFAULT now(),
    -- Within a minute.
    last_used_at timestamptz
);

-- When a user was last online: written when their last stream has ended, so once for each time they are online, and not at all while they do
-- not share it. Here and not in Redis, because it stays of interest when Redis was wiped; apart from `users`, whose rows are read everywhere.
CREATE TABLE messenger.last_seen (
    user_id bigint      PRIMARY KEY REFERENCES messenger.users ON DELETE CASCADE,
    at      timestamptz NOT NULL
) WITH (fillfactor = 80);

-- A user who blocks another one receives nothing from them. The blocked user is not told.
CREATE TABLE messenger.blocks (
    blocker_id bigint      NOT NULL REFERENCES messenger.users ON DELETE CASCADE,
    blocked_id bigint      NOT NULL REFERENCES messenger.users ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (blocker_id, blocked_id),
    CONSTRAINT blocks_another_user CHECK (blocker_id <> blocked_id)
);

-- For the cascade from the blocked user; the primary key serves the other one.
CREATE INDEX blocks_by_blocked ON messenger.blocks (blocked_id);

-- A direct conversation has two users for good: the pair is stored in one order and is unique, so two who start it at the same time meet
-- at the constraint. A group has a title and members who come and go.
--
-- No foreign keys to the two: when one of them is erased, the conversation stays for the other.
--
-- Every message updates the row, so it has free space in its page (HOT) and no index on what changes.
CREATE TABLE messenger.conversations (
    id                bigint      GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    -- Both NULL in a group.
    user_a            bigint,
    user_b            bigint,
    -- The one of the two who was erased: nothing is theirs to receive or to write here any more.
    erased_user       bigint,
    -- Of a group.
    title             text,
    participant_count bigint      NOT NULL DEFAULT 2,
    -- The number of the newest message. The function that numbers a message holds the row's lock until the commit, so within a
    -- conversation numbers follow commits.
    last_number       bigint      NOT NULL DEFAULT 0,
    -- Two users who have both written to each other are partners.
    user_a_has_written boolean    NOT NULL DEFAULT false,
    user_b_has_written boolean    NOT NULL DEFAULT false,
    -- The texts of messages up to this number are removed, because they are too old or no member is left.
    emptied_number    bigint      NOT NULL DEFAULT 0,
    -- When the last text of a group without members was removed.
    emptied_at        timestamptz,
    created_at        timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT conversations_one_per_pair UNIQUE (user_a, user_b)
) WITH (fillfactor = 80);

-- For finding the conversations of the second of the pair; the unique index serves the first.
CREATE INDEX conversations_by_user_b ON messenger.conversations (user_b);

-- Groups without members: those whose texts are to be removed, and those whose rows are to be deleted. No other row is in these indexes,
-- and no message changes them.
CREATE INDEX conversations_to_empty ON messenger.conversations (id) WHERE participant_count = 0 AND emptied_at IS NULL;
CREATE INDEX conversations_to_delete ON messenger.conversations (emptied_at) WHERE emptied_at IS NOT NULL;

-- As of names.
ALTER TABLE messenger.conversations ALTER COLUMN title SET STATISTICS 0;

-- A conversation as one of its users sees it. It repeats what could be computed (the last message, the unread count) because the list
-- of conversations is the most read page of all and must cost one index scan. It changes only under the lock of the conversation's row.
--
-- Every message updates these rows and all their indexes, so there are no more indexes than are read. No foreign key to the user: the
-- functions that insert it have read the user's row.
CREATE TABLE messenger.participants (
    conversation_id      bigint      NOT NULL REFERENCES messenger.conversations ON DELETE CASCADE,
    user_id              bigint      NOT NULL,
    -- NULL in a group.
    other_user_id        bigint,
    is_owner             boolean     NOT NULL DEFAULT false,
    joined_at            timestamptz NOT NULL DEFAULT now(),
    -- Messages up to this number are not theirs to see: those from before they joined.
    joined_number        bigint      NOT NULL DEFAULT 0,
    -- The newest message that they see, and the newest one that they have read. No foreign keys: only functions write them.
    last_message_id      bigint,
    last_number          bigint,
    last_read_message_id bigint,
    last_read_number     bigint      NOT NULL DEFAULT 0,
    unread_count         bigint      NOT NULL DEFAULT 0,
    -- Where the conversation stands in their list: the seq, in their own feed, of the event about its last message (in a group without
    -- one, about their joining). NULL: not listed.
    list_seq             bigint,
    PRIMARY KEY (conversation_id, user_id)
);

-- The list of conversations in its order. One event is about one conversation, so it is unique, which makes paging by it exact. Every
-- entry begins with the user, so no page of the index is shared by the users of a conversation.
CREATE UNIQUE INDEX participants_by_list ON messenger.participants (user_id, list_seq DESC) WHERE list_seq IS NOT NULL;

-- When former participants had joined, so that a page of members can start after one who has left.
CREATE TABLE messenger.former_participants (
    conversation_id bigint      NOT NULL REFERENCES messenger.conversations ON DELETE CASCADE,
    user_id         bigint      NOT NULL,
    joined_at       timestamptz NOT NULL,
    PRIMARY KEY (conversation_id, user_id)
);

-- For exporting and erasing a user: they may have written in groups that they have left.
CREATE INDEX former_participants_by_user ON messenger.former_participants (user_id, conversation_id);

CREATE TABLE messenger.messages (
    id              bigint      GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    conversation_id bigint      NOT NULL,
    -- By the conversation's row: order, paging and read positions use it, never a clock and never an id.
    number          bigint      NOT NULL,
    sender_id       bigint      NOT NULL,
    content         text        NOT NULL,
    -- The receiver, if they had blocked the sender when it was sent: they never see it, also after an unblock. It was never delivered, and
    -- a message that appears in the past would be in no order. Every reader of messages compares this with the requester.
    hidden_from     bigint,
    -- The receiver, if they blocked the sender when it was last edited: the new text is not theirs to see, and the one that they saw is
    -- gone. They see it as deleted.
    text_hidden_from bigint,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    edited_at       timestamptz,
    -- The text is removed, the row keeps its number.
    deleted_at      timestamptz,
    request_id      text,
    traceparent     text
);
-- No foreign keys: only `post_message` inserts, under the lock of the conversation's row and after it has found the sender in it.

-- For paging, and for counting unread messages.
CREATE UNIQUE INDEX messages_by_number ON messenger.messages (conversation_id, number);

ALTER TABLE messenger.messages ALTER COLUMN content SET STATISTICS 0;

-- What a client named its sends and its new groups, so that a repeat is recognised on every replica. No key and no text is stored:
-- `key_hash` recognises the key, and `content_hash`, which is keyed by the key itself, tells whether the request is the same.
CREATE TABLE messenger.idempotency_keys (
    sender_id    bigint      NOT NULL,
    key_hash     bytea       NOT NULL,
    content_hash bytea       NOT NULL,
    -- The message, or the group: their keys differ.
    made_id      bigint      NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (sender_id, key_hash)
);

-- For deleting old keys.
CREATE INDEX idempotency_keys_by_age ON messenger.idempotency_keys (created_at);

-- The feed: a user's events, numbered 1, 2, 3, … without gaps.
--
-- A Postgres sequence leaves a gap at every rollback and numbers by call, not by commit, so a reader could pass a number that is not
-- there yet. The number is a column instead. A writer holds the row's lock until it commits: numbers follow commits, and a rollback
-- gives its number back.

-- 60 random bits: the first half of a random UUID, of which four bits are fixed.
CREATE FUNCTION messenger.random_epoch() RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT ('x' || left(replace(gen_random_uuid()::text, '-', ''), 16))::bit(64)::bigint
$$;

-- Small rows, updated with every event: the free space keeps updates in their page (HOT), away from the index.
CREATE TABLE messenger.feed_heads (
    user_id      bigint PRIMARY KEY,
    -- Names one history of the feed. Random, so that a cursor from another history (a restored backup, whose epochs are drawn again) is
    -- recognised.
    epoch        bigint NOT NULL DEFAULT messenger.random_epoch(),
    head_seq     bigint NOT NULL DEFAULT 0,
    -- Unread messages in all conversations, as of the head: it changes together with it.
    unread_total bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);

-- A trigger, so that users made by plain SQL (a seed, an import) have a feed too.
CREATE FUNCTION messenger.create_feed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO messenger.feed_heads (user_id) VALUES (NEW.id);
    RETURN NULL;
END
$$;

CREATE TRIGGER users_have_a_feed AFTER INSERT ON messenger.users
    FOR EACH ROW EXECUTE FUNCTION messenger.create_feed();

-- Users who were or are being erased, by their ids alone: to know them again, and to finish what was begun.
CREATE TABLE messenger.erasures (
    user_id     bigint      PRIMARY KEY,
    begun_at    timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz
);

CREATE INDEX erasures_to_finish ON messenger.erasures (begun_at) WHERE finished_at IS NULL;

-- The conversations in which the messages of an erased user are still to be deleted.
CREATE TABLE messenger.erasure_steps (
    user_id         bigint NOT NULL,
    conversation_id bigint NOT NULL,
    -- Messages up to this number are done.
    done_number     bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (user_id, conversation_id)
);

-- The head goes with its user; not before the end of erasing, because members of groups are told of events until they have left them.
CREATE FUNCTION messenger.delete_feed_head() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM messenger.feed_heads AS h
    WHERE h.user_id = OLD.id
      AND NOT EXISTS (SELECT FROM messenger.erasures AS e WHERE e.user_id = OLD.id AND e.finished_at IS NULL);
    RETURN NULL;
END
$$;

CREATE TRIGGER users_leave_no_head AFTER DELETE ON messenger.users
    FOR EACH ROW EXECUTE FUNCTION messenger.delete_feed_head();

-- The body of an event that is not a message, stored once however many receive it. It says what the event is about; the JSON that
-- clients see is made from it and from the rows that it names, at publishing and at replay alike (`api/src/domain/event.rs`).
CREATE TABLE messenger.events (
    id              bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind            text        NOT NULL,
    conversation_id bigint,
    message_id      bigint,
    -- The user whom it is about.
    user_id         bigint,
    -- As it was then: of `conversation.read` the unread messages that were left, of `conversation.created` and `conversation.updated` the
    -- participants; of one that another back end has published, the feeds that have it, without those of erased users.
    count           bigint,
    -- The number of the conversation's last message then: a conversation is shown as of its event.
    number          bigint,
    -- The role that `participant.joined` and `participant.updated` tell.
    is_owner        boolean,
    -- Of an event that another back end has published: its JSON, as clients get it. `kind` is its name.
    data            text,
    request_id      text,
    traceparent     text,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp()
);

ALTER TABLE messenger.events ALTER COLUMN data SET STATISTICS 0;

-- One row per event and receiver: nothing but numbers, none NULL, since every message writes as many of these as it has readers. `event_id`
-- is the id of a message, which is the body of its own event (`message.sent` for its sender, `message` for others), or, negated, the id
-- of a row of `events`. No foreign keys: the head row, updated
-- by the same function, proves the user, and the largest table of all is only appended to and pruned at its old end.
CREATE TABLE messenger.feed (
    user_id  bigint NOT NULL,
    seq      bigint NOT NULL,
    event_id bigint NOT NULL,
    PRIMARY KEY (user_id, seq)
);

-- What other back ends publish waits here until the relay of one `api` replica has appended it to the feeds
-- (docs/decisions/0035-published-events-are-staged.md). A host's transaction only inserts: nothing here makes two of them wait for each
-- other, and nothing is updated.
CREATE TABLE messenger.staged_events (
    -- The transaction that stages it, not the subtransaction. With `id` it is the order: a transaction that began after the commit of
    -- another one has the larger number.
    xid         xid8     NOT NULL DEFAULT pg_current_xact_id(),
    -- Becomes the id of its row in `events`.
    id          bigint   NOT NULL DEFAULT nextval('messenger.events_id_seq'),
    -- Users, each once.
    receivers   bigint[] NOT NULL CHECK (cardinality(receivers) BETWEEN 1 AND 1000),
    name        text     NOT NULL CHECK (octet_length(name) BETWEEN 1 AND 128),
    data        text     NOT NULL CHECK (octet_length(data) BETWEEN 1 AND 49152),
    key_hash    bytea    CHECK (length(key_hash) = 16),
    request_id  text,
    traceparent text
-- Giving back the pages at the end would lock out hosts for moments. Every row soon is a dead one.
) WITH (vacuum_truncate = off, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, toast.vacuum_truncate = off,
        toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 5000);

-- For the relay. Not unique: that would be checked.
CREATE INDEX staged_events_by_transaction ON messenger.staged_events (xid, id);

ALTER TABLE messenger.staged_events ALTER COLUMN receivers SET STATISTICS 0;
ALTER TABLE messenger.staged_events ALTER COLUMN data SET STATISTICS 0;

-- The keys of published events, per receiver and hashed, for as long as the event is in the feed.
CREATE TABLE messenger.event_keys (
    user_id  bigint NOT NULL,
    key_hash bytea  NOT NULL,
    seq      bigint NOT NULL,
    PRIMARY KEY (user_id, key_hash)
);

-- Which replica relays. Its row lock excludes others from a turn, and belongs to a transaction, so it works through poolers; the time
-- is a lease, and keeps the others from looking as often.
CREATE TABLE messenger.relay (
    only_row   boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    holder     bigint,
    renewed_at timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO messenger.relay DEFAULT VALUES;

-- EXTERNAL_ISSUER of the replica that relays: whose subjects `publish` knows.
CREATE TABLE messenger.external_issuer (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    issuer   text
);
INSERT INTO messenger.external_issuer DEFAULT VALUES;

-- The sets of functions (`api/sql`) that were applied, by checksum. The newest one is in place.
CREATE TABLE messenger.function_sets (
    checksum   bytea       PRIMARY KEY,
    applied_at timestamptz NOT NULL
);

-- Names are found in either case and either normal form, whatever the database's locale: `lower()` follows LC_CTYPE, and in "C" it
-- knows only A to Z.
--
-- Simple case folding by a table inside the function. An index is built on it, so it is never replaced: a newer Unicode table is
-- another function with another index.
DO $do$
DECLARE
    _from text;
    _to text;
BEGIN
    -- Unicode 16, CaseFolding.txt, statuses C and S, as runs of letters: first, last, step, and the distance to the folded letter.
    SELECT string_agg(chr(letter), '' ORDER BY letter), string_agg(chr(letter + offs), '' ORDER BY letter)
    INTO STRICT _from, _to
    FROM (VALUES
        (65, 90, 1, 32), (181, 181, 1, 775), (192, 214, 1, 32), (216, 222, 1, 32), (256, 302, 2, 1), (306, 310, 2, 1),
        (313, 327, 2, 1), (330, 374, 2, 1), (376, 376, 1, -121), (377, 381, 2, 1), (383, 383, 1, -268), (385, 385, 1, 210),
        (386, 388, 2, 1), (390, 390, 1, 206), (391, 391, 1, 1), (393, 394, 1, 205), (395, 395, 1, 1), (398, 398, 1, 79),
        (399, 399, 1, 202), (400, 400, 1, 203), (401, 401, 1, 1), (403, 403, 1, 205), (404, 404, 1, 207),
        (406, 406, 1, 211), (407, 407, 1, 209), (408, 408, 1, 1), (412, 412, 1, 211), (413, 413, 1, 213),
        (415, 415, 1, 214), (416, 420, 2, 1), (422, 422, 1, 218), (423, 423, 1, 1), (425, 425, 1, 218), (428, 428, 1, 1),
        (430, 430, 1, 218), (431, 431, 1, 1), (433, 434, 1, 217), (435, 437, 2, 1), (439, 439, 1, 219), (440, 440, 1, 1),
        (444, 444, 1, 1), (452, 452, 1, 2), (453, 453, 1, 1), (455, 455, 1, 2), (456, 456, 1, 1), (458, 458, 1, 2),
        (459, 475, 2, 1), (478, 494, 2, 1), (497, 497, 1, 2), (498, 500, 2, 1), (502, 502, 1, -97), (503, 503, 1, -56),
        (504, 542, 2, 1), (544, 544, 1, -130), (546, 562, 2, 1), (570, 570, 1, 10795), (571, 571, 1, 1),
        (573, 573, 1, -163), (574, 574, 1, 10792), (577, 577, 1, 1), (579, 579, 1, -195), (580, 580, 1, 69),
        (581, 581, 1, 71), (582, 590, 2, 1), (837, 837, 1, 116), (880, 882, 2, 1), (886, 886, 1, 1), (895, 895, 1, 116),
        (902, 902, 1, 38), (904, 906, 1, 37), (908, 908, 1, 64), (910, 911, 1, 63), (913, 929, 1, 32), (931, 939, 1, 32),
        (962, 962, 1, 1), (975, 975, 1, 8), (976, 976, 1, -30), (977, 977, 1, -25), (981, 981, 1, -15), (982, 982, 1, -22),
        (984, 1006, 2, 1), (1008, 1008, 1, -54), (1009, 1009, 1, -48), (1012, 1012, 1, -60), (1013, 1013, 1, -64),
        (1015, 1015, 1, 1), (1017, 1017, 1, -7), (1018, 1018, 1, 1), (1021, 1023, 1, -130), (1024, 1039, 1, 80),
        (1040, 1071, 1, 32), (1120, 1152, 2, 1), (1162, 1214, 2, 1), (1216, 1216, 1, 15), (1217, 1229, 2, 1),
        (1232, 1326, 2, 1), (1329, 1366, 1, 48), (4256, 4293, 1, 7264), (4295, 4295, 1, 7264), (4301, 4301, 1, 7264),
        (5112, 5117, 1, -8), (7296, 7296, 1, -6222), (7297, 7297, 1, -6221), (7298, 7298, 1, -6212), (7299, 7300, 1, -6210),
        (7301, 7301, 1, -6211), (7302, 7302, 1, -6204), (7303, 7303, 1, -6180), (7304, 7304, 1, 35267), (7305, 7305, 1, 1),
        (7312, 7354, 1, -3008), (7357, 7359, 1, -3008), (7680, 7828, 2, 1), (7835, 7835, 1, -58), (7838, 7838, 1, -7615),
        (7840, 7934, 2, 1), (7944, 7951, 1, -8), (7960, 7965, 1, -8), (7976, 7983, 1, -8), (7992, 7999, 1, -8),
        (8008, 8013, 1, -8), (8025, 8031, 2, -8), (8040, 8047, 1, -8), (8072, 8079, 1, -8), (8088, 8095, 1, -8),
        (8104, 8111, 1, -8), (8120, 8121, 1, -8), (8122, 8123, 1, -74), (8124, 8124, 1, -9), (8126, 8126, 1, -7173),
        (8136, 8139, 1, -86), (8140, 8140, 1, -9), (8147, 8147, 1, -7235), (8152, 8153, 1, -8), (8154, 8155, 1, -100),
        (8163, 8163, 1, -7219), (8168, 8169, 1, -8), (8170, 8171, 1, -112), (8172, 8172, 1, -7), (8184, 8185, 1, -128),
        (8186, 8187, 1, -126), (8188, 8188, 1, -9), (8486, 8486, 1, -7517), (8490, 8490, 1, -8383), (8491, 8491, 1, -8262),
        (8498, 8498, 1, 28), (8544, 8559, 1, 16), (8579, 8579, 1, 1), (9398, 9423, 1, 26), (11264, 11311, 1, 48),
        (11360, 11360, 1, 1), (11362, 11362, 1, -10743), (11363, 11363, 1, -3814), (11364, 11364, 1, -10727),
        (11367, 11371, 2, 1), (11373, 11373, 1, -10780), (11374, 11374, 1, -10749), (11375, 11375, 1, -10783),
        (11376, 11376, 1, -10782), (11378, 11378, 1, 1), (11381, 11381, 1, 1), (11390, 11391, 1, -10815),
        (11392, 11490, 2, 1), (11499, 11501, 2, 1), (11506, 11506, 1, 1), (42560, 42604, 2, 1), (42624, 42650, 2, 1),
        (42786, 42798, 2, 1), (42802, 42862, 2, 1), (42873, 42875, 2, 1), (42877, 42877, 1, -35332), (42878, 42886, 2, 1),
        (42891, 42891, 1, 1), (42893, 42893, 1, -42280), (42896, 42898, 2, 1), (42902, 42920, 2, 1),
        (42922, 42922, 1, -42308), (42923, 42923, 1, -42319), (42924, 42924, 1, -42315), (42925, 42925, 1, -42305),
        (42926, 42926, 1, -42308), (42928, 42928, 1, -42258), (42929, 42929, 1, -42282), (42930, 42930, 1, -42261),
        (42931, 42931, 1, 928), (42932, 42946, 2, 1), (42948, 42948, 1, -48), (42949, 42949, 1, -42307),
        (42950, 42950, 1, -35384), (42951, 42953, 2, 1), (42955, 42955, 1, -42343), (42956, 42956, 1, 1),
        (42960, 42960, 1, 1), (42966, 42970, 2, 1), (42972, 42972, 1, -42561), (42997, 42997, 1, 1),
        (43888, 43967, 1, -38864), (64262, 64262, 1, -1), (65313, 65338, 1, 32), (66560, 66599, 1, 40),
        (66736, 66771, 1, 40), (66928, 66938, 1, 39), (66940, 66954, 1, 39), (66956, 66962, 1, 39), (66964, 66965, 1, 39),
        (68736, 68786, 1, 64), (68944, 68965, 1, 32), (71840, 71871, 1, 32), (93760, 93791, 1, 32), (125184, 125217, 1, 34)
    ) AS run (first, last, step, offs), generate_series(first, last, step) AS letter;
    -- Most names are ASCII and skip the table. Folding can break the normal form, so the result is normalised again.
    EXECUTE format($format$
        CREATE FUNCTION messenger.fold_name(_name text) RETURNS text LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
        BEGIN
            IF octet_length(_name) = length(_name) THEN
                RETURN lower(_name COLLATE "C");
            END IF;
            RETURN normalize(translate(normalize(_name), %L, %L));
        END
        $$
    $format$, _from, _to);
END
$do$;

-- Search by prefix. With the collation "C" a prefix is a range, and the second column orders the result, so that a search reads its five
-- rows and sorts nothing.
CREATE INDEX users_by_name ON messenger.users ((messenger.fold_name(username) COLLATE "C"), username COLLATE "C");

-- The statistics of an expression are those of its index.
ALTER INDEX messenger.users_by_name ALTER COLUMN 1 SET STATISTICS 0;
