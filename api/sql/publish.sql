-- For host applications in the same database: publishes an event to one user when, and only if, the caller's transaction commits. The
-- receiver is a user's id, or a subject of the external issuer. One insert, and no lock that anybody waits for. Docs: docs/publish.md.
CREATE OR REPLACE FUNCTION messenger.publish(receiver bigint, event text, data jsonb, key text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    _data CONSTANT text := coalesce(data::text, 'null');
BEGIN
    PERFORM messenger.check_event(event, _data, key);
    IF receiver IS NULL THEN
        RAISE EXCEPTION 'messenger.publish: the receiver is NULL' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF EXISTS (SELECT FROM messenger.users AS u WHERE u.id = receiver) THEN
        PERFORM messenger.stage_event(receiver, event, _data, key);
    ELSE
        RAISE NOTICE 'messenger.publish: there is no user %; nothing is published', receiver;
    END IF;
END
$$;
REVOKE ALL ON FUNCTION messenger.publish(bigint, text, jsonb, text) FROM PUBLIC;

CREATE OR REPLACE FUNCTION messenger.publish(receiver text, event text, data jsonb, key text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    _data CONSTANT text := coalesce(data::text, 'null');
    _user bigint;
BEGIN
    PERFORM messenger.check_event(event, _data, key);
    IF receiver IS NULL OR octet_length(receiver) > 255 THEN
        RAISE EXCEPTION 'messenger.publish: a subject is not NULL and has at most 255 bytes' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    SELECT i.user_id INTO _user
    FROM messenger.identities AS i
    WHERE i.issuer = (SELECT e.issuer FROM messenger.external_issuer AS e) AND i.subject = receiver;
    IF FOUND THEN
        PERFORM messenger.stage_event(_user, event, _data, key);
    ELSE
        RAISE NOTICE 'messenger.publish: no user has the subject %; nothing is published', receiver;
    END IF;
END
$$;
REVOKE ALL ON FUNCTION messenger.publish(text, text, jsonb, text) FROM PUBLIC;
