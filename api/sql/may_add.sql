-- Whether a user may add another one to a group: neither has blocked the other, and the other one lets everybody do it, or partners (a
-- direct conversation in which both have written).
CREATE OR REPLACE FUNCTION messenger.may_add(_user bigint, _other bigint) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT NOT EXISTS (
               SELECT FROM messenger.blocks AS b
               WHERE (b.blocker_id, b.blocked_id) IN ((_user, _other), (_other, _user))
           ) AND CASE u.addable_by
               WHEN 'everybody' THEN true
               WHEN 'partners' THEN EXISTS (
                   SELECT FROM messenger.conversations AS c
                   WHERE c.user_a = least(_user, _other) AND c.user_b = greatest(_user, _other)
                     AND c.user_a_has_written AND c.user_b_has_written
               )
               ELSE false
           END
    FROM messenger.users AS u WHERE u.id = _other
$$;
