//! Groups: who may do what, what each member sees and is told, and what a member who came later or has left does not see.

use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::{
    ApiUser, App, add_users, assert_not_now, assert_problem, assert_unacceptable, execute, number, text,
};

const UNKNOWN: &str = "Conversation not found";
const OWNERS_ONLY: &str = "Only an owner of the group can do this";

/// Logged in, each with a new name.
async fn users<const N: usize>(app: &App, pool: &PgPool, names: [&str; N]) -> [ApiUser; N] {
    let mut users = Vec::new();
    for name in names {
        users.push(app.user(pool, name).await);
    }
    users.try_into().unwrap_or_else(|_| unreachable!("one for each name"))
}

async fn see(user: &ApiUser, conversation: &str) -> Value {
    user.conversation(conversation).expect(200).await.json()
}

fn shown(user: &ApiUser) -> Value {
    json!({ "id": user.id, "username": user.name, "avatarURL": null })
}

/// The events after the first `seen`.
async fn news(app: &App, user: &ApiUser, seen: usize) -> Vec<(String, Value)> {
    app.feed(user.id).await.split_off(seen)
}

async fn count(app: &App, user: &ApiUser) -> usize {
    app.feed(user.id).await.len()
}

/// The contents of a page, marking nothing.
async fn page(user: &ApiUser, conversation: &str) -> Vec<String> {
    let page = user.messages(conversation, "?markRead=false").expect(200).await.json();
    page.as_array().unwrap().iter().map(|message| text(&message["content"])).collect()
}

async fn unread_total(user: &ApiUser) -> Value {
    user.auth_user().expect(200).await.json()["unreadTotal"].clone()
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn group_is_made_once_and_each_member_is_told(pool: PgPool) {
    let app = App::start(&pool).await;
    let [ann, bob, cid] = users(&app, &pool, ["ann", "bob", "cid"]).await;
    let answer = ann.create_group(" The\r\nTeam\t1 ", &[" bob ", "CID", "bob", "ann"]).expect(201).await;
    let group = answer.json();
    let id = text(&group["id"]);
    assert_eq!(answer.header("location"), Some(format!("/api/conversations/{id}").as_str()));
    let expected = |role: &str| {
        json!({
            "id": id, "kind": "group", "title": "The Team 1", "participantCount": 3, "role": role, "otherParticipant": null,
            "lastMessage": null, "hasUnreadMessages": false, "unreadCount": 0, "lastReadMessageId": null,
            "otherLastReadMessageId": null,
        })
    };
    assert_eq!(group, expected("owner"));
    for (user, role) in [(&ann, "owner"), (&bob, "member"), (&cid, "member")] {
        assert_eq!(see(user, &id).await, expected(role));
        assert_eq!(
            user.conversations("").expect(200).await.json(),
            json!([expected(role)]),
            "also without a message"
        );
        assert_eq!(app.feed(user.id).await, [("conversation.created".to_owned(), expected(role))]);
    }
    ann.other_participant(&id).expect(404).await;
    // Two groups may have the same title and members, and a group may have one member.
    let again = ann.group("The Team 1", &["bob", "cid"]).await;
    assert_ne!(again, id);
    let alone = ann.create_group("Notes", &[]).expect(201).await.json();
    assert_eq!((&alone["participantCount"], &alone["role"]), (&json!(1), &json!("owner")));
    // A group without a message stands where its member joined.
    let titles = async |user: &ApiUser| {
        let list = user.conversations("").expect(200).await.json();
        list.as_array().unwrap().iter().map(|group| text(&group["title"])).collect::<Vec<_>>()
    };
    assert_eq!(titles(&ann).await, ["Notes", "The Team 1", "The Team 1"]);
    bob.say(&id, "hi").await;
    let list = ann.conversations("").expect(200).await.json();
    assert_eq!(list[0]["id"], json!(id));
    assert_eq!(list[0]["lastMessage"]["content"], "hi");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn title_and_names_of_a_new_group_are_checked(pool: PgPool) {
    let app = App::with(&pool, |config| config.largest_group = 3).await;
    let [ann, bob] = users(&app, &pool, ["ann", "bob"]).await;
    add_users(&pool, ["cid", "dan"]).await;
    let post = async |body: Value| ann.call("POST", "/api/conversations").json(&body).send().await.unwrap();
    for title in [json!(null), json!(""), json!(" \t\n"), json!("\u{200b}\u{2800}")] {
        let answer = post(json!({ "usernames": [], "title": title })).await;
        assert_unacceptable(&answer, "title", "Title required");
    }
    assert_unacceptable(&post(json!({ "usernames": ["bob"] })).await, "title", "Title required");
    let long = post(json!({ "usernames": [], "title": "é".repeat(81) })).await;
    assert_unacceptable(&long, "title", "Title too long. 80 max");
    let nul = post(json!({ "usernames": [], "title": "a\0b" })).await;
    assert_unacceptable(&nul, "title", "Title must not contain the character U+0000");
    assert_eq!(post(json!({ "usernames": [], "title": "é".repeat(80) })).await.status, 201);
    for (names, sentence) in [
        (json!(["bob", "nobody", "none"]), "No such user: nobody, none"),
        (json!(["bob", null]), "No such user: "),
        (json!(["a\0b"]), "No such user: a\0b"),
        (json!(["bob", "cid", "dan"]), "A group has at most 3 members"),
        (json!(["1", "2", "3", "4", "5", "6", "7"]), "A group has at most 3 members"),
    ] {
        let answer = post(json!({ "usernames": names, "title": "Team" })).await;
        assert_unacceptable(&answer, "usernames", sentence);
    }
    for wrong in [json!(null), json!("bob"), json!([1]), json!({ "0": "bob" })] {
        assert_eq!(post(json!({ "usernames": wrong, "title": "Team" })).await.status, 400, "{wrong}");
    }
    // A title alone makes no group.
    assert_unacceptable(&post(json!({ "title": "Team" })).await, "username", "Username required");
    let full = post(json!({ "usernames": ["bob", "cid", "BOB", "ann"], "title": "Team" })).await;
    assert_eq!(full.json()["participantCount"], 3, "doubles count once");
    let limits = app.get("/api/limits").expect(200).await.json();
    assert_eq!(limits["maxGroupSize"], 3);
    assert_eq!(count(&app, &bob).await, 1, "of all these, one group was made with him");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn repeated_key_makes_one_group(pool: PgPool) {
    let app = App::start(&pool).await;
    let [ann, bob] = users(&app, &pool, ["ann", "bob"]).await;
    let create = |title: &str, names: &[&str]| ann.create_group(title, names).header("idempotency-key", "k");
    // A request that fails leaves the key free.
    create("Team", &["nobody"]).expect(422).await;
    let first = create("Team", &["bob", "ann"]).expect(201).await;
    assert_eq!(first.header("idempotent-replayed"), None);
    let again = create("Team", &["ann", " bob"]).expect(201).await;
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    assert_eq!(again.json(), first.json());
    assert_eq!(again.header("location"), first.header("location"));
    let id = text(&first.json()["id"]);
    ann.rename(&id, "Renamed").expect(200).await;
    assert_eq!(
        create("Team", &["bob", "ann"]).expect(201).await.json()["title"],
        "Renamed",
        "as it is today"
    );
    for (title, names) in [("Other", &["bob"][..]), ("Team", &["ann"])] {
        let answer = create(title, names).send().await.unwrap();
        assert_unacceptable(&answer, "idempotencyKey", "Idempotency-Key was already used for another group");
    }
    let malformed = ann.create_group("Team", &[]).header("idempotency-key", "a b").send().await.unwrap();
    assert_eq!(malformed.status, 422);
    // Keys of messages are a space of their own, and each user's.
    ann.post_message(&id, "hi").header("idempotency-key", "k").expect(201).await;
    bob.create_group("Team", &["bob", "ann"]).header("idempotency-key", "k").expect(201).await;
    ann.remove(&id, &ann).expect(204).await;
    let gone = create("Team", &["bob", "ann"]).send().await.unwrap();
    assert_problem(&gone, 404, UNKNOWN);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn who_cannot_be_added_is_told_by_one_sentence(pool: PgPool) {
    let app = App::start(&pool).await;
    let [ann, blocks, blocked, strict, choosy, partner] =
        users(&app, &pool, ["ann", "blocks", "blocked", "strict", "choosy", "partner"]).await;
    blocks.call("PUT", &format!("/api/blocks/{}", ann.id)).expect(204).await;
    ann.call("PUT", &format!("/api/blocks/{}", blocked.id)).expect(204).await;
    execute(&pool, "UPDATE messenger.users SET addable_by = 'nobody' WHERE username = 'strict'").await;
    execute(
        &pool,
        "UPDATE messenger.users SET addable_by = 'partners' WHERE username IN ('choosy', 'partner')",
    )
    .await;
    // Both must have written to be partners.
    let (written, both) = (ann.start("choosy").await, ann.start("partner").await);
    ann.say(&written, "hi").await;
    ann.say(&both, "hi").await;
    partner.say(&both, "hi").await;

    let group = ann.group("Team", &[]).await;
    for name in ["blocks", "blocked", "strict", "choosy"] {
        let answer = ann.create_group("Team", &[name, "partner"]).send().await.unwrap();
        assert_unacceptable(&answer, "usernames", &format!("You cannot add {name}"));
        let answer = ann.add(&group, name).send().await.unwrap();
        assert_not_now(&answer, "cannot_be_added");
        assert_eq!(answer.json()["message"], "You cannot add this user");
    }
    ann.add(&group, "partner").expect(201).await;
    choosy.say(&written, "hi").await;
    ann.add(&group, "choosy").expect(201).await;
    for user in [&blocks, &blocked, &strict] {
        assert_eq!(count(&app, user).await, 0, "{} hears of no group", user.name);
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn owners_rename_a_group_and_each_member_sees_it_in_their_own_way(pool: PgPool) {
    let app = App::start(&pool).await;
    let [ann, bob, cid, eve] = users(&app, &pool, ["ann", "bob", "cid", "eve"]).await;
    let group = ann.group("Team", &["bob"]).await;
    ann.say(&group, "one").await;
    bob.messages(&group, "").expect(200).await;
    ann.say(&group, "two").await;
    ann.add(&group, "cid").expect(201).await;
    let seen = [count(&app, &ann).await, count(&app, &bob).await, count(&app, &cid).await];

    let answer = ann.rename(&group, " Crew ").expect(200).await.json();
    assert_eq!((&answer["title"], &answer["role"]), (&json!("Crew"), &json!("owner")));
    for (user, seen) in [(&ann, seen[0]), (&bob, seen[1]), (&cid, seen[2])] {
        let events = news(&app, user, seen).await;
        assert_eq!(events, [("conversation.updated".to_owned(), see(user, &group).await)], "{}", user.name);
    }
    let (bobs, cids) = (see(&bob, &group).await, see(&cid, &group).await);
    assert_eq!((&bobs["unreadCount"], &bobs["lastMessage"]["content"]), (&json!(1), &json!("two")));
    assert_eq!((&cids["unreadCount"], &cids["lastMessage"]), (&json!(0), &json!(null)));

    ann.rename(&group, "Crew").expect(200).await;
    assert_eq!(news(&app, &bob, seen[1]).await.len(), 1, "the same title tells nobody");
    let direct = ann.start("eve").await;
    assert_problem(&bob.rename(&group, "Mine").send().await.unwrap(), 403, OWNERS_ONLY);
    assert_problem(&eve.rename(&group, "Mine").send().await.unwrap(), 404, UNKNOWN);
    assert_problem(&ann.rename("no-id", "Mine").send().await.unwrap(), 404, UNKNOWN);
    assert_not_now(&ann.rename(&direct, "Mine").send().await.unwrap(), "not_a_group");
    for id in [&*group, "999", "no-id", &direct] {
        assert_unacceptable(&ann.rename(id, " ").send().await.unwrap(), "title", "Title required");
    }
    // What is replayed is what was seen then, with the title of today.
    ann.say(&group, "three").await;
    ann.rename(&group, "Band").expect(200).await;
    let (_, first) = news(&app, &bob, seen[1]).await.remove(0);
    assert_eq!((&first["title"], &first["unreadCount"]), (&json!("Band"), &json!(1)));
    assert_eq!(first["lastMessage"]["content"], "two");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn owners_add_members_and_all_are_told(pool: PgPool) {
    let app = App::with(&pool, |config| config.largest_group = 3).await;
    let [ann, bob, cid] = users(&app, &pool, ["ann", "bob", "cid"]).await;
    add_users(&pool, ["dan"]).await;
    let group = ann.group("Team", &["bob"]).await;
    let direct = ann.start("bob").await;
    ann.say(&group, "before").await;
    let seen = [count(&app, &ann).await, count(&app, &bob).await];

    let added = ann.add(&group, " CID ").expect(201).await.json();
    assert_eq!((&added["user"], &added["role"]), (&shown(&cid), &json!("member")));
    assert_eq!(added["lastReadMessageId"], json!(null));
    let joined = json!({ "conversationId": group, "user": shown(&cid), "role": "member" });
    for (user, seen) in [(&ann, seen[0]), (&bob, seen[1])] {
        assert_eq!(news(&app, user, seen).await, [("participant.joined".to_owned(), joined.clone())]);
    }
    let cids = app.feed(cid.id).await;
    assert_eq!(cids[0], ("conversation.created".to_owned(), see(&cid, &group).await), "it comes first");
    assert_eq!(cids[1..], [("participant.joined".to_owned(), joined)]);
    assert_eq!(cids[0].1["participantCount"], 3);

    // Once more: nobody is told, and the group being full is no matter.
    assert_eq!(ann.add(&group, "cid").expect(200).await.json(), added);
    assert_eq!((count(&app, &bob).await, count(&app, &cid).await), (seen[1] + 1, 2));
    assert_not_now(&ann.add(&group, "dan").send().await.unwrap(), "group_full");
    assert_problem(&bob.add(&group, "dan").send().await.unwrap(), 403, OWNERS_ONLY);
    assert_problem(&bob.add(&group, "nobody").send().await.unwrap(), 404, "User not found");
    assert_problem(&ann.add(&group, "a\0b").send().await.unwrap(), 404, "User not found");
    assert_problem(&cid.add(&direct, "dan").send().await.unwrap(), 404, UNKNOWN);
    assert_problem(&ann.add("no-id", "dan").send().await.unwrap(), 404, UNKNOWN);
    // What it is comes before who it is about.
    assert_not_now(&ann.add(&direct, "nobody").send().await.unwrap(), "not_a_group");
    for id in [&*group, "999", "no-id"] {
        assert_unacceptable(&ann.add(id, " ").send().await.unwrap(), "username", "Username required");
    }
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn a_group_keeps_an_owner(pool: PgPool) {
    let app = App::start(&pool).await;
    let [ann, bob, cid, eve] = users(&app, &pool, ["ann", "bob", "cid", "eve"]).await;
    let group = ann.group("Team", &[]).await;
    ann.add(&group, "bob").expect(201).await;
    ann.add(&group, "cid").expect(201).await;
    let direct = ann.start("bob").await;
    let seen = count(&app, &cid).await;

    assert_not_now(&ann.set_role(&group, &ann, "member").send().await.unwrap(), "last_owner");
    assert_problem(&bob.set_role(&group, &bob, "owner").send().await.unwrap(), 403, OWNERS_ONLY);
    assert_problem(&ann.set_role(&group, &eve, "owner").send().await.unwrap(), 404, "User not found");
    assert_problem(&eve.set_role(&group, &ann, "owner").send().await.unwrap(), 404, UNKNOWN);
    assert_not_now(&ann.set_role(&direct, &eve, "owner").send().await.unwrap(), "not_a_group");
    let path = format!("/api/conversations/{group}/participants/no-id");
    for body in [json!({ "role": "admin" }), json!({ "role": null }), json!({})] {
        let answer = ann.call("PATCH", &path).json(&body).send().await.unwrap();
        assert_unacceptable(&answer, "role", "Role must be owner or member");
    }
    let nobody = ann.call("PATCH", &path).json(&json!({ "role": "owner" })).send().await.unwrap();
    assert_problem(&nobody, 404, "User not found");

    let owner = ann.set_role(&group, &bob, "owner").expect(200).await.json();
    assert_eq!((&owner["user"], &owner["role"]), (&shown(&bob), &json!("owner")));
    ann.set_role(&group, &bob, "owner").expect(200).await;
    // Owners change owners.
    bob.set_role(&group, &ann, "member").expect(200).await;
    assert_eq!(
        (&see(&ann, &group).await["role"], &see(&bob, &group).await["role"]),
        (&json!("member"), &json!("owner"))
    );
    let updated = |user: &ApiUser, role: &str| {
        (
            "participant.updated".to_owned(),
            json!({ "conversationId": group, "userId": user.id, "role": role }),
        )
    };
    assert_eq!(news(&app, &cid, seen).await, [updated(&bob, "owner"), updated(&ann, "member")]);

    // The last owner leaves: the member who joined first becomes one.
    let seen = [count(&app, &cid).await, count(&app, &bob).await];
    bob.remove(&group, &bob).expect(204).await;
    let left = |user: &ApiUser| {
        ("participant.left".to_owned(), json!({ "conversationId": group, "userId": user.id }))
    };
    assert_eq!(news(&app, &cid, seen[0]).await, [left(&bob), updated(&ann, "owner")]);
    assert_eq!(news(&app, &bob, seen[1]).await, [left(&bob)], "who left learns no more");
    assert_eq!(see(&ann, &group).await["role"], "owner");
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn owners_take_members_out_and_members_leave(pool: PgPool) {
    let app = App::start(&pool).await;
    let [ann, bob, cid, eve] = users(&app, &pool, ["ann", "bob", "cid", "eve"]).await;
    let group = ann.group("Team", &["bob", "cid"]).await;
    let direct = ann.start("bob").await;
    ann.say(&group, "one").await;
    ann.say(&group, "two").await;
    assert_eq!(unread_total(&bob).await, 2);
    assert_problem(&bob.remove(&group, &cid).send().await.unwrap(), 403, OWNERS_ONLY);
    assert_problem(&bob.remove(&group, &eve).send().await.unwrap(), 404, "User not found");
    assert_problem(&eve.remove(&group, &eve).send().await.unwrap(), 404, UNKNOWN);
    assert_not_now(&ann.remove(&direct, &ann).send().await.unwrap(), "not_a_group");

    ann.remove(&group, &bob).expect(204).await;
    assert_eq!(unread_total(&bob).await, 0, "what he had unread there is not his to read");
    for answer in [
        bob.conversation(&group).send().await.unwrap(),
        bob.messages(&group, "").send().await.unwrap(),
        bob.post_message(&group, "hi").send().await.unwrap(),
        bob.read_messages(&group).send().await.unwrap(),
        bob.participants(&group, "").send().await.unwrap(),
        bob.remove(&group, &bob).send().await.unwrap(),
    ] {
        assert_problem(&answer, 404, UNKNOWN);
    }
    let list = bob.conversations("").expect(200).await.json();
    assert_eq!(list, json!([]));
    assert_problem(&ann.remove(&group, &bob).send().await.unwrap(), 404, "User not found");
    assert_eq!(see(&ann, &group).await["participantCount"], 2);
    let seen = count(&app, &bob).await;
    ann.say(&group, "three").await;
    ann.rename(&group, "Crew").expect(200).await;
    assert_eq!(count(&app, &bob).await, seen, "nothing after leaving");
    // What he has is replayed without text and title.
    for (name, data) in app.feed(bob.id).await {
        match name.as_str() {
            "message" => assert_eq!(data["content"], ""),
            "conversation.created" if data["kind"] == "group" => assert_eq!(data["title"], json!(null)),
            _ => {}
        }
    }

    cid.remove(&group, &cid).expect(204).await;
    ann.remove(&group, &ann).expect(204).await;
    assert_problem(&ann.conversation(&group).send().await.unwrap(), 404, UNKNOWN);
    let members = format!("SELECT count(*) FROM messenger.participants WHERE conversation_id = {group}");
    let counted = format!("SELECT participant_count FROM messenger.conversations WHERE id = {group}");
    assert_eq!((number(&pool, members).await, number(&pool, counted).await), (0, 0));
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn member_sees_messages_from_joining_to_leaving(pool: PgPool) {
    let app = App::start(&pool).await;
    let [ann, bob] = users(&app, &pool, ["ann", "bob"]).await;
    let group = ann.group("Team", &[]).await;
    let before = ann.say(&group, "before").await;
    ann.add(&group, "bob").expect(201).await;
    let joined = see(&bob, &group).await;
    assert_eq!((&joined["lastMessage"], &joined["unreadCount"]), (&json!(null), &json!(0)));
    assert_eq!(page(&bob, &group).await, Vec::<String>::new());
    for query in [format!("?before={before}"), format!("?after={before}")] {
        bob.messages(&group, &query).expect(422).await;
    }
    bob.read_messages(&group).expect(204).await;
    assert_eq!(see(&ann, &group).await["otherLastReadMessageId"], json!(null));
    let first = ann.say(&group, "first stay").await;
    bob.say(&group, "mine").await;
    assert_eq!(page(&bob, &group).await, ["mine", "first stay"]);
    bob.messages(&group, &format!("?before={first}")).expect(200).await;
    bob.read_messages(&group).expect(204).await;
    ann.remove(&group, &bob).expect(204).await;
    ann.say(&group, "between").await;

    // A user who returns starts again.
    ann.add(&group, "bob").expect(201).await;
    let back = see(&bob, &group).await;
    for member in ["lastMessage", "lastReadMessageId"] {
        assert_eq!(back[member], json!(null), "{member}");
    }
    assert_eq!(page(&bob, &group).await, Vec::<String>::new());
    ann.say(&group, "second stay").await;
    let back = see(&bob, &group).await;
    assert_eq!((&back["unreadCount"], &back["lastMessage"]["content"]), (&json!(1), &json!("second stay")));
    assert_eq!(
        (unread_total(&bob).await, page(&bob, &group).await),
        (json!(1), vec!["second stay".to_owned()])
    );
    assert_eq!(page(&ann, &group).await, ["second stay", "between", "mine", "first stay", "before"]);
    // Events of the first stay are replayed without text, those of the second one with it.
    let texts: Vec<(String, Value)> = app.feed(bob.id).await;
    let texts = texts.iter().filter(|(name, _)| name.starts_with("message"));
    assert_eq!(texts.map(|(_, data)| data["content"].clone()).collect::<Vec<_>>(), ["", "", "second stay"]);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn participants_are_listed_in_the_order_of_joining(pool: PgPool) {
    let app = App::start(&pool).await;
    let [ann, bob, _, dan, eve] = users(&app, &pool, ["ann", "bob", "cid", "dan", "eve"]).await;
    let group = ann.group("Team", &[]).await;
    let early = ann.say(&group, "early").await;
    for name in ["dan", "cid", "bob"] {
        ann.add(&group, name).expect(201).await;
    }
    let names = async |reader: &ApiUser, query: &str| {
        let list = reader.participants(&group, query).expect(200).await;
        assert!(list.header("feed-cursor").is_some());
        let list = list.json();
        list.as_array().unwrap().iter().map(|member| text(&member["user"]["username"])).collect::<Vec<_>>()
    };
    assert_eq!(names(&bob, "").await, ["ann", "dan", "cid", "bob"]);
    assert_eq!(names(&bob, &format!("?limit=2&after={}", ann.id)).await, ["dan", "cid"]);
    // The place stays valid when that user leaves.
    dan.remove(&group, &dan).expect(204).await;
    assert_eq!(names(&bob, &format!("?after={}", dan.id)).await, ["cid", "bob"]);
    ann.add(&group, "dan").expect(201).await;
    assert_eq!(names(&bob, "").await, ["ann", "cid", "bob", "dan"]);
    for bad in ["no-id", "999", &eve.id.to_string()] {
        let answer = bob.participants(&group, &format!("?after={bad}")).send().await.unwrap();
        assert_unacceptable(&answer, "after", "No such participant");
    }
    for bad in ["0", "101", "x"] {
        let answer = bob.participants(&group, &format!("?limit={bad}")).send().await.unwrap();
        assert_unacceptable(&answer, "limit", "Limit must be from 1 to 100");
    }
    assert_problem(&eve.participants(&group, "").send().await.unwrap(), 404, UNKNOWN);
    assert_problem(&eve.participants("no-id", "").send().await.unwrap(), 404, UNKNOWN);

    // What others have read, within what the reader sees.
    let read = async |reader: &ApiUser, who: &ApiUser| {
        let list = reader.participants(&group, "").expect(200).await.json();
        let member = list.as_array().unwrap().iter().find(|member| member["user"]["id"] == json!(who.id));
        member.unwrap()["lastReadMessageId"].clone()
    };
    ann.read_messages(&group).expect(204).await;
    assert_eq!((read(&ann, &ann).await, read(&bob, &ann).await), (json!(early), json!(null)));
    let late = ann.say(&group, "late").await;
    ann.read_messages(&group).expect(204).await;
    assert_eq!(read(&bob, &ann).await, json!(late));

    let direct = ann.start("eve").await;
    let pair = eve.participants(&direct, "").expect(200).await.json();
    let pair: Vec<_> = pair.as_array().unwrap().iter().map(|one| (&one["user"], &one["role"])).collect();
    assert_eq!(pair, [(&shown(&ann), &json!("member")), (&shown(&eve), &json!("member"))]);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn messages_and_marks_work_in_groups_as_in_conversations_of_two(pool: PgPool) {
    let app = App::start(&pool).await;
    let [ann, bob, cid] = users(&app, &pool, ["ann", "bob", "cid"]).await;
    let group = ann.group("Team", &["bob", "cid"]).await;
    // In a group, blocks hide nothing.
    cid.call("PUT", &format!("/api/blocks/{}", ann.id)).expect(204).await;
    let send = || ann.post_message(&group, "hi").header("idempotency-key", "k");
    let sent = send().expect(201).await.json();
    assert_eq!(send().expect(201).await.json(), sent);
    let id = text(&sent["id"]);
    for user in [&bob, &cid] {
        let events = app.feed(user.id).await;
        let (name, data) = events.last().unwrap();
        assert_eq!((name.as_str(), &data["id"], &data["mine"]), ("message", &json!(id), &json!(false)));
        assert_eq!(data["sender"], shown(&ann));
        assert_eq!(
            (see(user, &group).await["unreadCount"].clone(), unread_total(user).await),
            (json!(1), json!(1))
        );
    }
    let seen = [count(&app, &ann).await, count(&app, &bob).await, count(&app, &cid).await];
    bob.read_messages(&group).expect(204).await;
    let receipt = (
        "receipt.read".to_owned(),
        json!({ "conversationId": group, "userId": bob.id, "lastReadMessageId": id }),
    );
    assert_eq!(news(&app, &ann, seen[0]).await, std::slice::from_ref(&receipt));
    assert_eq!(news(&app, &cid, seen[2]).await, [receipt]);
    let read = json!({ "conversationId": group, "lastReadMessageId": id, "unreadCount": 0 });
    assert_eq!(news(&app, &bob, seen[1]).await, [("conversation.read".to_owned(), read)]);
    app.stop().await;
}

#[sqlx::test(migrator = "api::store::schema::MIGRATIONS")]
async fn receipts_go_to_groups_of_up_to_32(pool: PgPool) {
    let app = App::start(&pool).await;
    let ann = app.user(&pool, "ann").await;
    let names: Vec<String> = (1..=32).map(|n| format!("user{n}")).collect();
    for name in &names {
        add_users(&pool, [name.as_str()]).await;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let (small, large) = (ann.group("32", &names[1..]).await, ann.group("33", &names).await);
    let reader = app.login("user2").await;
    for group in [&small, &large] {
        ann.say(group, "hi").await;
        let before = count(&app, &ann).await;
        reader.read_messages(group).expect(204).await;
        assert_eq!(count(&app, &ann).await - before, usize::from(*group == small));
        assert_eq!(see(&reader, group).await["unreadCount"], 0);
    }
    app.stop().await;
}
