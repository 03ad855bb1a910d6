-- no-transaction
-- By itself, so that new users do not wait for it. If it is interrupted, it leaves an index that is not valid, and the next try says
-- that there is one: `DROP INDEX users_by_name`, and run it again.
--
-- Replaces `users_by_folded_name`, which the version before this one still uses; a later migration drops that one.
CREATE INDEX CONCURRENTLY users_by_name ON users ((fold_name(username) COLLATE "C"), username COLLATE "C");
